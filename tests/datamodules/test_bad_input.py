"""What the Web holds beside whole photographs, through the training loaders: used where it can be, else counted."""

import io
import json
import random
import string
import tarfile
from collections import Counter

import pytest
import torch
from bad_images import BAD, BLUE, ODD, RED, TINY, picture, turned
from conversation_files import llava
from shard_files import jpeg, pair, write_tar

from dtpvit.datamodules.image_text import ImageTextShards
from dtpvit.datamodules.instruction import InstructionData
from dtpvit.datamodules.labelled_images import LabelledImages
from dtpvit.datamodules.tars import index_members
from dtpvit.errors import UserError
from dtpvit.interop.chat import Chat
from dtpvit.interop.loading import Tokenize
from dtpvit.interop.preprocessing import eval_transform
from dtpvit.interop.tiny_language_model import make_tiny_language_model

transformers = pytest.importorskip("transformers", reason="needs the extra dtpvit[instruct]")
TOKENIZE = Tokenize(8)
SIZE = 32
pytestmark = [
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),  # as in a run
    pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning"),
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = make_tiny_language_model(["what is 0 1 2?"], tmp_path_factory.mktemp("lm"), dim=16, depth=1, num_heads=2)
    return Chat(transformers.AutoTokenizer.from_pretrained(folder))


class Epoch:
    """One training epoch over files: pixels by the place of the file among them, and what was skipped."""

    def __init__(self, kind, folder, files, chat, **options):
        data = {"pairs": pairs, "folders": folders, "labelled": labelled, "records": records}[kind](folder, files, chat)
        data.num_workers = options.pop("num_workers", 0)
        data.batch_size = options.pop("batch_size", 1)
        data.setup("fit")
        self.loader = data.train_dataloader()
        self.pixels, self.batches = {}, 0
        number_of = {tuple(TOKENIZE([str(number)])[0].tolist()): number for number in range(len(files))}
        for batch in self.loader:
            self.batches += 1
            if "text" in batch:
                numbers = [number_of[tuple(row)] for row in batch["text"].tolist()]
            else:
                numbers = batch["label" if "label" in batch else "record"].tolist()
            self.pixels |= dict(zip(numbers, batch["image"], strict=True))
        self.skipped = self.loader.skipped


def pairs(folder, files, chat):
    samples = {f"{number:03d}": {"jpg": file, "txt": str(number).encode()} for number, file in enumerate(files)}
    write_tar(folder / "00000.tar", samples)
    return ImageTextShards(
        train=str(folder), image_size=SIZE, tokenize=TOKENIZE, crop_scale=(1.0, 1.0), shuffle_buffer=0
    )


def folders(folder, files, chat):
    for number, file in enumerate(files):
        (folder / f"{number:03d}").mkdir(parents=True)
        (folder / f"{number:03d}" / "x.jpg").write_bytes(file)
    return LabelledImages(train=str(folder), image_size=SIZE, num_classes=len(files), labels="folders", augment=False)


def labelled(folder, files, chat):
    samples = {f"{number:03d}": {"jpg": file, "cls": str(number).encode()} for number, file in enumerate(files)}
    write_tar(folder / "00000.tar", samples)
    return LabelledImages(train=str(folder), image_size=SIZE, num_classes=len(files), augment=False, shuffle_buffer=0)


def records(folder, files, chat):
    (folder / "pictures").mkdir(parents=True)
    for number, file in enumerate(files):
        (folder / "pictures" / f"{number}.png").write_bytes(file)
    (folder / "train.json").write_text(json.dumps([llava(number) for number in range(len(files))]))
    return InstructionData(
        train=str(folder / "train.json"), chat=chat, image_size=SIZE, image_aspect="squash", image_fill=(0, 0, 0)
    )


def near(pixel, colour):
    return all(abs(int(value) - wanted) < 25 for value, wanted in zip(pixel, colour, strict=True))


KINDS = ["pairs", "folders", "labelled", "records"]


# ------------------------------------------------------------------ images


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_are_trained_on_as_they_look(tmp_path, chat, kind):
    epoch = Epoch(kind, tmp_path / "data", [file for file, _, _ in ODD.values()], chat)
    assert epoch.skipped == {} and len(epoch.pixels) == len(ODD)
    for (name, (_, left, right)), (_, pixels) in zip(ODD.items(), sorted(epoch.pixels.items()), strict=True):
        assert near(pixels[:, 16, 4], left) and near(pixels[:, 16, 27], right), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_left_out_and_counted(tmp_path, chat, kind, name):
    file, cause = BAD[name]
    epoch = Epoch(kind, tmp_path / "data", [jpeg(0), file, jpeg(1), jpeg(2)], chat)
    assert set(epoch.pixels) == {0, 2, 3} and epoch.batches == 4
    assert epoch.skipped == {cause: 1} and [found for found, _ in epoch.loader.examples] == [cause]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_no_image(tmp_path, chat, kind):
    epoch = Epoch(kind, tmp_path / "data", [jpeg(0), b"", jpeg(1)], chat)
    assert set(epoch.pixels) == {0, 2}
    assert set(epoch.skipped) == {"broken image" if kind in ("folders", "records") else "no image"}


@pytest.mark.parametrize("kind", ["pairs", "records"])
def test_all_eight_ways_of_holding_a_camera_are_upright(tmp_path, chat, kind):
    epoch = Epoch(kind, tmp_path / "data", [turned(orientation) for orientation in range(1, 9)], chat)
    assert len(epoch.pixels) == 8
    for orientation, pixels in epoch.pixels.items():
        assert near(pixels[:, 16, 4], RED) and near(pixels[:, 16, 27], BLUE), orientation + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_pixel_is_an_image(tmp_path, chat, kind):
    epoch = Epoch(kind, tmp_path / "data", [TINY, jpeg(0)], chat)
    assert near(epoch.pixels[0][:, 9, 9], RED) and epoch.skipped == {}


def test_a_pixel_that_cannot_be_cropped_at_random_is_replaced(tmp_path):
    data = folders(tmp_path / "data", [TINY, jpeg(0), jpeg(1)], None)
    data.augments, data.batch_size, data.num_workers = True, 3, 0
    data.setup("fit")
    loader = data.train_dataloader()
    (batch,) = loader
    assert 0 not in batch["label"].tolist() and loader.skipped == {"broken image": 1}


def test_the_middle_of_a_long_image_is_what_its_resize_gave():
    image = picture((64 * 3, 3))
    thin = eval_transform(32)(image.crop((64, 0, 128, 3)))
    assert torch.equal(eval_transform(32)(picture((192, 3))), eval_transform(32)(image))
    long = picture((3 * 64 * 10, 3))
    assert torch.equal(eval_transform(32)(long), thin), "the middle 64 shapes of it are all that counts"


# ------------------------------------------------------------------ captions


def captions(tmp_path, samples, **options):
    write_tar(tmp_path / "d" / "00000.tar", samples)
    data = ImageTextShards(
        train=str(tmp_path / "d"), image_size=8, tokenize=Tokenize(77), shuffle_buffer=0, batch_size=1, num_workers=0
    )
    data.setup("fit")
    loader = data.train_dataloader()
    return [batch["text"][0] for batch in loader], loader.skipped


def test_captions_of_every_kind_are_read(tmp_path):
    random_word = "".join(random.Random(0).choices(string.ascii_lowercase, k=100_000))
    texts = {
        "emoji": "a dog 🐕‍🦺 and its 👩‍👩‍👧‍👦".encode(),
        "right to left": "שלום עולם, مرحبا بالعالم \u202e evil".encode(),
        "100 KB": b"a long story " * 8000,
        "100 KB in one word": random_word.encode(),
        "Latin-1": "Übergröße für die Füße".encode("latin-1"),
        "UTF-16": "a cat".encode("utf-16"),
        "a null": b"a \0 cat",
    }
    jsons = {
        "half a surrogate pair": b'{"caption": "a cat \\ud83d"}',
        "half a pair in a list": b'{"captions": ["a cat \\udc00", 3, null, ""]}',
    }
    samples = {name: {"jpg": jpeg(0), "txt": text} for name, text in texts.items()}
    samples |= {name: {"jpg": jpeg(0), "json": text} for name, text in jsons.items()}
    found, skipped = captions(tmp_path, samples)
    assert skipped == {} and len(found) == len(samples)
    expected = Tokenize(77)
    rows = dict(zip(samples, found, strict=True))
    for name in ("emoji", "right to left", "100 KB"):
        assert torch.equal(rows[name], expected([texts[name].decode()])[0]), name
    assert torch.equal(rows["100 KB in one word"], expected([random_word[:1000]])[0])
    assert torch.equal(rows["half a surrogate pair"], expected(["a cat ?"])[0])
    assert torch.equal(rows["Latin-1"], expected([texts["Latin-1"].decode("utf-8", "replace")])[0])


def test_missing_captions_are_counted(tmp_path):
    nowhere = [{}, {"txt": b""}, {"txt": b" \n"}, {"json": b"{"}, {"json": b"[" * 100_000}, {"json": b'{"caption": 3}'}]
    nowhere += [{"json": b'{"captions": 9' + b"9" * 5000 + b"}"}, {"json": b"\xff\xfe"}]
    samples = {f"{number}": {"jpg": jpeg(0)} | parts for number, parts in enumerate(nowhere)} | {"good": pair(1)}
    samples |= {"also": pair(2)}
    found, skipped = captions(tmp_path, samples)
    assert len(found) == len(samples) and skipped["no caption"] % len(nowhere) == 0 and set(skipped) == {"no caption"}


# ------------------------------------------------------------------ shards


def cut(path, keep):
    with open(path, "r+b") as file:
        file.truncate(keep)


def bad_shards(folder, members):
    """Twelve samples in a good shard, six before the cut of one, two beside duplicates, and three shards of nothing."""
    write_tar(folder / "0.tar", {f"a{number}": members(number) for number in range(12)}, stats=False)
    whole = write_tar(folder / "1.tar", {f"b{number}": members(12 + number) for number in range(8)}, stats=False)
    cut(whole, list(index_members(whole))[12][1] + 5)
    (folder / "2.tar").write_bytes(b"")
    write_tar(folder / "3.tar", {}, stats=False)
    (folder / "4.tar").write_bytes(b"<!DOCTYPE html><html>" * 100)
    write_tar(folder / "5.tar", {"c": members(20)}, stats=False)
    with tarfile.open(folder / "5.tar", "a") as tar:
        for key in ("d", "c", "d"):
            for ending, content in members(21 if key == "d" else 20).items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return [*range(18), 20, 21]


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_bad_shards_cost_what_is_bad_in_them(tmp_path, kind, num_workers):
    options = {"image_size": 8, "batch_size": 5, "num_workers": num_workers, "num_samples": 20, "shuffle_buffer": 9}
    if kind == "pairs":
        good = bad_shards(tmp_path, lambda n: {"jpg": jpeg(n), "txt": str(n).encode()})
        data = ImageTextShards(train=str(tmp_path), tokenize=TOKENIZE, **options)
    else:
        good = bad_shards(tmp_path, lambda n: {"jpg": jpeg(n), "cls": str(n).encode()})
        data = LabelledImages(train=str(tmp_path), num_classes=22, augment=False, **options)
    data.setup("fit")
    loader = data.train_dataloader()
    row = {tuple(TOKENIZE([str(number)])[0].tolist()): number for number in range(22)}
    seen = Counter()
    for epoch in range(12):  # an epoch of 20 is not one pass where the workers' shares are unequal
        loader.set_epoch(epoch)
        for batch in loader:
            seen.update(
                batch["label"].tolist() if "label" in batch else [row[tuple(one)] for one in batch["text"].tolist()]
            )
        assert set(loader.skipped) <= {"unreadable shard", "duplicate key"} and loader.skipped
    assert set(seen) == set(good), "no good sample is lost, and no bad one used"


def test_fewer_shards_than_workers_and_ranks_lose_nothing(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{n}": {"jpg": jpeg(n), "txt": str(n).encode()} for n in range(30)})
    data = ImageTextShards(train=str(tmp_path), image_size=8, tokenize=TOKENIZE, batch_size=2, num_workers=5)
    data.setup("fit")
    rows = [tuple(row) for batch in data.train_dataloader() for row in batch["text"].tolist()]
    assert len(rows) == len(set(rows)) == 30


@pytest.mark.parametrize("make", [
    lambda spec: ImageTextShards(train=spec, image_size=8, tokenize=TOKENIZE),
    lambda spec: LabelledImages(train=spec, image_size=8, num_classes=2),
    lambda spec: InstructionData(train=spec, image_size=8),
])  # fmt: skip
def test_a_hole_in_a_list_of_shards_is_refused_before_any_work(tmp_path, make):
    for name in ("0", "2"):
        write_tar(tmp_path / f"{name}.tar", {name: pair(0)})
    with pytest.raises(UserError, match=r"1 of the 3 shards of .* do not exist, the first is .*1\.tar"):
        make(f"{tmp_path}/{{0..2}}.tar").setup("fit")


def test_records_in_bad_shards(tmp_path, chat, caplog):
    good = bad_shards(tmp_path, lambda n: {"json": json.dumps(llava(n)).encode(), "png": jpeg(n)})
    data = InstructionData(
        train=str(tmp_path), chat=chat, image_size=8, image_fill=(0, 0, 0), batch_size=20, num_workers=0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(set(batch["record"].tolist())) == len(good) == 20
    assert "3 records cannot be used (unreadable shard: 3)" in caplog.text


def test_records_nested_without_end_are_one_record_less(tmp_path, chat):
    lines = [json.dumps(llava(0, image=False)), "[" * 100_000, '{"image": ' + "[" * 900 + "]" * 900 + "}", "9" * 9000]
    lines += ['{"conversations": [{"from": ' + "[" * 900 + "]" * 900 + "}]}", json.dumps(llava(1, image=False))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = InstructionData(
        train=str(tmp_path / "train.jsonl"), chat=chat, image_size=8, image_fill=(0, 0, 0), batch_size=2, num_workers=0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["record"].tolist()) == [0, 5]
    (tmp_path / "whole.json").write_text("[" * 100_000)
    data.train = str(tmp_path / "whole.json")
    with pytest.raises(UserError, match=r"whole\.json is no JSON \(nested too deep"):
        data.setup("fit")
