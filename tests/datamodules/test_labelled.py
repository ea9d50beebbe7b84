import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from dtpvit.datamodules.labelled import labelled_loader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform

WNIDS = ImageNetInfo().label_names()


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """An image that is told from others by its colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def colours(batch: dict) -> list[int]:
    """The values that ``png`` was given, read back from a batch."""
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in batch["image"]]


def make_folders(root: Path, names: list[str], images: int = 1) -> Path:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(images):
            (root / name / f"{j}.png").write_bytes(png(i * images + j))
    return root


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_shards(root: Path, labels: list[int], per_shard: int = 3) -> Path:
    for shard, start in enumerate(range(0, len(labels), per_shard)):
        members = {}
        for i, label in enumerate(labels[start : start + per_shard], start=start):
            members |= {f"s{i:07d}.png": png(i), f"s{i:07d}.cls": str(label).encode()}
        make_tar(root / f"{shard}.tar", members)
    return root


def load(data: Path | str, **settings) -> tuple[list[int], list[int]]:
    """Colours and labels of all batches."""
    batches = list(labelled_loader(str(data), **{"image_size": (4, 4), "batch_size": 4, "num_workers": 0} | settings))
    return [c for b in batches for c in colours(b)], [int(x) for b in batches for x in b["label"]]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    # Made in an order that is not the labels'.
    return make_folders(tmp_path_factory.mktemp("imagenet"), WNIDS[::-1])


def test_imagenet_labels_are_the_rank_of_the_wnid(imagenet):
    index = index_labelled(str(imagenet))
    assert [(Path(sample.path).parent.name, sample.label) for sample in index.samples] == [
        (wnid, label) for label, wnid in enumerate(WNIDS)
    ]
    assert index.samples[0].path.endswith("n01440764/0.png")
    assert (index.num_classes, index.classnames, index.class_indices) == (1000, None, None)
    assert index_labelled(str(imagenet), labels="sketch") == index


def test_a_missing_or_unknown_imagenet_folder_is_refused(imagenet, tmp_path):
    for folder in imagenet.iterdir():
        if folder.name != WNIDS[3]:
            (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(UserError, match=rf"999 of the 1000 class folders of labels=imagenet, without {WNIDS[3]}"):
        index_labelled(str(tmp_path))
    make_folders(tmp_path, ["n99999999"])
    with pytest.raises(UserError, match="1 that are not among them, such as n99999999"):
        index_labelled(str(tmp_path))
    numbered = index_labelled(str(tmp_path), labels="folders")
    assert numbered.num_classes == 1000
    assert numbered.classnames[:4] == ["tench", "goldfish", "great white shark", "hammerhead shark"]


@pytest.mark.parametrize(("kind", "first"), [("a", ("n01498041", 6)), ("r", ("n01443537", 1))])
def test_the_200_classes_of_a_and_r_keep_their_imagenet_labels(tmp_path, kind, first):
    import timm.data

    file = Path(timm.data.__file__).parent / "_info" / f"imagenet_{kind}_synsets.txt"
    root = make_folders(tmp_path, file.read_text().split())
    (root / "README.txt").write_text("not a class")
    index = index_labelled(str(root))
    assert (Path(index.samples[0].path).parent.name, index.samples[0].label) == first
    assert index.class_indices == sorted(sample.label for sample in index.samples)
    assert len(set(index.class_indices)) == 200
    assert index.num_classes == 1000
    assert index_labelled(str(root), labels=kind) == index
    other = "r" if kind == "a" else "a"
    with pytest.raises(UserError, match=f"of the 200 class folders of labels={other}"):
        index_labelled(str(root), labels=other)


def test_imagenet_v2_folders_are_numbers_not_words(tmp_path):
    root = make_folders(tmp_path, [str(i) for i in range(1000)])
    found, labels = load(root, batch_size=256)
    assert labels == found
    assert sorted(labels) == list(range(1000))
    (root / "999").rename(tmp_path / "1000")
    with pytest.raises(UserError, match=r"999 of the 1000 .* without 999, and 1 .* such as 1000"):
        index_labelled(str(root))


def test_numbered_folders_of_another_data_set_need_names(tmp_path):
    root = make_folders(tmp_path, [str(i) for i in range(12)])
    with pytest.raises(UserError, match="12 numbered folders"):
        index_labelled(str(root))
    names = [f"digit {i}" for i in range(12)]
    for settings in ({"classnames": names}, {"labels": "folders"}):
        found, labels = load(root, **settings)
        assert labels == found
        assert sorted(labels) == list(range(12))


def test_class_names_give_the_labels_whatever_the_spelling(tmp_path):
    root = make_folders(tmp_path, ["Great_Dane", "pug", "toy-poodle"])
    index = index_labelled(str(root), classnames=["pug", "toy poodle", "great dane"])
    assert [sample.label for sample in index.samples] == [2, 0, 1]
    assert index.classnames == ["pug", "toy poodle", "great dane"]
    alone = index_labelled(str(root))
    assert [sample.label for sample in alone.samples] == [0, 1, 2]
    assert alone.classnames == ["Great Dane", "pug", "toy-poodle"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["pug"], "no class name for the folder 'newt'"),
        (["pug", "newt", "owl"], "no folder for 'owl'"),
        (["pug", "ant"], "no folder for 'ant', with no class name for the folder 'newt'"),
        (["pug", "newt", "Pug"], "'pug' occurs twice"),
    ],
)
def test_folders_that_do_not_fit_the_names_are_refused(tmp_path, names, found):
    with pytest.raises(UserError, match=found):
        index_labelled(str(make_folders(tmp_path, ["pug", "newt"])), classnames=names)


@pytest.mark.parametrize("name", ["{}.JPEG", "{}_10042.JPEG", "ILSVRC2012_val_00000293_{}.JPEG"])
def test_a_flat_folder_is_labelled_by_the_wnid_in_its_names(tmp_path, name):
    for label in (5, 0, 999):
        (tmp_path / name.format(WNIDS[label])).write_bytes(png(label))
    (tmp_path / "labels.tsv").write_text("not an image")
    found, labels = load(tmp_path)
    assert found == labels == [0, 5, 999]


def test_flat_images_without_a_label_are_refused(tmp_path):
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(png(0))
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000001\.JPEG gives no label"):
        index_labelled(str(tmp_path))


def test_shards_with_names_beside_them_as_clip_benchmark_stores_them(tmp_path):
    want = [4, 0, 2, 2, 1, 3, 0, 4]
    make_shards(tmp_path / "test", want)
    (tmp_path / "test" / "nshards.txt").write_text("3\n")
    (tmp_path / "classnames.txt").write_text("a\nb\nc\nd\ne\n")
    for data in (tmp_path, tmp_path / "test", f"{tmp_path}/test/{{0..2}}.tar", f"{tmp_path}/test/*.tar"):
        assert load(data) == (list(range(8)), want)
        assert index_labelled(str(data)).classnames == ["a", "b", "c", "d", "e"]
    (tmp_path / "test" / "nshards.txt").write_text("4")
    with pytest.raises(UserError, match=r"3 shards where its nshards\.txt says 4"):
        index_labelled(str(tmp_path))


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    want = [i % 2 for i in range(33)]
    root = make_shards(tmp_path, want, per_shard=3)  # 0.tar to 10.tar
    assert load(root, classnames=["even", "odd"]) == (list(range(33)), want)


def test_labels_of_shards_must_have_classes(tmp_path):
    root = make_shards(tmp_path, [0, 1, 7])
    with pytest.raises(UserError, match=r"3 labels from 0 to 7 and no classnames\.txt"):
        index_labelled(str(root))
    with pytest.raises(UserError, match="the label 7, which is none of its 5 classes"):
        index_labelled(str(root), classnames=list("abcde"))
    assert index_labelled(str(root), labels="imagenet").num_classes == 1000
    with pytest.raises(UserError, match="the label 0, which is none of its 200 classes"):
        index_labelled(str(root), labels="a")


def test_incomplete_samples_of_a_shard_are_counted_once(tmp_path):
    members = {
        "a.png": png(0),
        "a.cls": b"0",
        "b.png": png(1),
        "c.cls": b"1",
        "d.PNG": png(3),
        "d.cls": b" 1\n",
    }
    make_tar(tmp_path / "0.tar", members)
    settings = {"image_size": (4, 4), "batch_size": 4, "num_workers": 0, "classnames": ["x", "y"]}
    loaders = [labelled_loader(str(tmp_path), **settings, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[colours(batch) for batch in loader] for loader in loaders] == [[[0]], [[3]]]
    assert [loader.skipped for loader in loaders] == [2, 0]


def test_foreign_and_damaged_tars_are_refused(tmp_path):
    folders = make_tar(tmp_path / "folders.tar", {f"train/cat/{i}.png": png(i) for i in range(3)})
    with pytest.raises(UserError, match=r"no sample with both .* among 3"):
        index_labelled(str(folders))
    words = make_tar(tmp_path / "words.tar", {"a.png": png(0), "a.cls": b"cat"})
    with pytest.raises(UserError, match="whole numbers as labels"):
        index_labelled(str(words))
    whole = make_tar(tmp_path / "whole.tar", {"a.cls": b"0", "a.png": png(0) + bytes(5000)})
    (tmp_path / "half.tar").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"half\.tar is no sound"):
        index_labelled(str(tmp_path / "half.tar"), classnames=["x"])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("absent", "absent is no folder on this machine"),
        ("empty", "holds no class folders"),
        ("nested", r"holds the split val where class folders were expected: give one split, such as \S+/val\.$"),
        ("empty/{0..3}.tar", "4 of the 4 shards"),
        ("https://host/x/{0..3}.tar", r"is not a \.tar file on this machine"),
    ],
)
def test_a_place_without_labelled_images_is_refused(tmp_path, monkeypatch, data, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_folders(tmp_path / "nested" / "val", ["cat", "dog"])
    with pytest.raises(UserError, match=found):
        index_labelled(data)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"labels": "v3"}, "choose one of"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, settings, found):
    with pytest.raises(UserError, match=found):
        load(make_folders(tmp_path, ["cat"]), **settings)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_images_without_repeats(tmp_path, world_size):
    root = make_shards(tmp_path, [i % 3 for i in range(7)])
    parts = [load(root, classnames=list("abc"), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(pair for part in parts for pair in zip(*part, strict=True)) == [(i, i % 3) for i in range(7)]


def test_workers_change_nothing(tmp_path):
    root = make_folders(tmp_path, ["a", "b", "c"], images=5)
    assert load(root, num_workers=2) == load(root, num_workers=0) == (list(range(15)), [0] * 5 + [1] * 5 + [2] * 5)


def test_a_limit_keeps_the_share_of_each_class(tmp_path):
    root = make_folders(tmp_path, ["a", "b", "c"], images=10)
    assert load(root, limit=6) == ([0, 5, 10, 15, 20, 25], [0, 0, 1, 1, 2, 2])
    assert len(load(root, limit=7)[0]) == 7
    assert len(load(root, limit=31)[0]) == 30


def test_broken_images_are_left_out_and_counted(tmp_path):
    root = make_folders(tmp_path, ["a", "b"], images=4)
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(stream, "JPEG")
    (root / "a" / "1.jpg").write_bytes(stream.getvalue()[:900])  # a download that stopped
    (root / "a" / "2.png").write_bytes(b"<html>404</html>")
    (root / "b" / "0.png").write_bytes(b"")
    loader = labelled_loader(str(root), image_size=(4, 4), batch_size=3, num_workers=0)
    for _ in range(2):  # the count starts anew
        batches = list(loader)
        assert [colours(batch) for batch in batches] == [[0, 1], [3], [5, 6, 7]]
        assert [batch["label"].tolist() for batch in batches] == [[0, 0], [0], [1, 1, 1]]
        assert loader.skipped == 3
        assert [Path(path).name for path in loader.broken] == ["1.jpg", "2.png", "0.png"]


def test_a_batch_of_broken_images_only_does_not_come_out(tmp_path):
    root = make_folders(tmp_path, ["a", "b"], images=2)
    for i in range(2):
        (root / "a" / f"{i}.png").write_bytes(b"broken")
    loader = labelled_loader(str(root), image_size=(4, 4), batch_size=2, num_workers=2)
    assert [batch["label"].tolist() for batch in loader] == [[1, 1]]
    assert loader.skipped == 2


def test_batches_are_what_the_interface_promises(tmp_path):
    root = make_folders(tmp_path, ["a", "b"], images=3)
    loader = labelled_loader(str(root), image_size=(6, 8), batch_size=4, num_workers=0)
    assert len(loader) == 2
    first, last = loader
    assert first.keys() == {"image", "label"}
    assert (first["image"].shape, last["image"].shape) == ((4, 3, 6, 8), (2, 3, 6, 8))
    assert (first["image"].dtype, first["label"].dtype) == (torch.uint8, torch.int64)


def test_real_imagenet_images_get_the_labels_of_their_list(shared_data):
    root = shared_data / "imagenet_sample"
    rows = [line.split("\t") for line in (root / "labels.tsv").read_text().splitlines()[1:]]
    index = index_labelled(str(root))
    assert {Path(s.path).stem: s.label for s in index.samples} == {row[1]: int(row[0]) for row in rows}
    loader = labelled_loader(str(root), image_size=(64, 64), batch_size=8, num_workers=0, limit=8)
    (batch,) = loader
    sample = loader.index.samples[3]
    with Image.open(sample.path) as image:
        assert torch.equal(batch["image"][3], eval_transform((64, 64))(image))
    assert batch["label"][3] == sample.label


def test_real_class_folders_follow_the_given_names(shared_data):
    root = shared_data / "classify" / "flowers224" / "test"
    index = index_labelled(str(root), classnames=["Tulips", "sunflowers", "roses", "dandelion", "daisy"])
    assert len(index.samples) == 375
    for sample in index.samples:
        assert Path(sample.path).parent.name == ["tulips", "sunflowers", "roses", "dandelion", "daisy"][sample.label]
