"""Batches of conversations: contents, order, ranks, grouping, pieces, broken images, exact resume."""

import io
import itertools
import json
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conversation_files import images_of, llava, said, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_files import noisy_jpeg
from PIL import Image

from dtpvit.datamodules.conversation_loader import GroupedSchedule
from dtpvit.datamodules.instruction import InstructionData
from dtpvit.datamodules.samples import sample_seed
from dtpvit.errors import UserError
from dtpvit.interop.chat import IMAGE_ID, Chat, Turn
from dtpvit.interop.preprocessing import aspect_transform
from dtpvit.interop.tiny_language_model import make_tiny_language_model

transformers = pytest.importorskip("transformers", reason="needs the extra dtpvit[instruct]")
KEYS = {"image", "image_seed", "ids", "supervised", "length", "record"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = make_tiny_language_model(["what is 0 1 2?"], tmp_path_factory.mktemp("lm"), dim=16, depth=1, num_heads=2)
    return Chat(transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def made(chat):
    def make(train=None, val=None, stage="fit", **options):
        options = {"batch_size": 4, "num_workers": 0, "image_size": 8, "image_fill": (1, 2, 3)} | options
        data = InstructionData(train=train, val=val, chat=chat, **options)
        data.setup(stage)
        return data

    return make


def ranks(data, world_size, loader="train_dataloader"):
    found = []
    for rank in range(world_size):
        data._trainer = None
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=world_size, lightning_module=None, state=SimpleNamespace(fn="validate")
        )
        found.append(list(getattr(data, loader)()))
    return found


def records(batches):
    return [record for batch in batches for record in batch["record"].tolist()]


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return True


# ------------------------------------------------------------------ batches


def test_a_batch_has_every_rows_images_in_order_and_its_answers_supervised(tmp_path, chat, made):
    turns = llava(0)["conversations"] + [{"from": "human", "value": "and <image>?"}, {"from": "gpt", "value": "both"}]
    two = {"id": "two", "image": ["pictures/5.png", "pictures/3.png"], "conversations": turns}
    path = write_json(tmp_path, [llava(1, 2), llava(2, image=False), two, llava(4)])
    loader = made(path).train_dataloader()
    (batch,) = loader
    assert batch.keys() == KEYS and len(loader) == 1
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 8, 8)
    assert batch["supervised"].dtype == torch.bool
    assert all(batch[name].dtype == torch.int64 for name in KEYS - {"image", "supervised"})
    answers = {0: ["1 0", "1 1"], 1: ["2 0"], 2: ["0 0", "both"], 3: ["4 0"]}
    pictures = {0: [1], 1: [], 2: [5, 3], 3: [4]}
    rows = batch["record"].tolist()
    assert sorted(rows) == [0, 1, 2, 3] and rows != [0, 1, 2, 3]
    assert said(chat, batch) == [answers[row] for row in rows] and images_of(batch) == [pictures[row] for row in rows]
    place = rows.index(1)
    expected = chat.encode([Turn("user", ("what is 2.0?",)), Turn("assistant", ("2 0",))])
    assert batch["ids"][place, : batch["length"][place]].tolist() == expected.ids
    assert batch["supervised"][place, : batch["length"][place]].tolist() == expected.supervised
    assert len(set(batch["image_seed"].tolist())) == 4


def test_a_batch_of_text_alone_has_no_images(tmp_path, made):
    (batch,) = made(write_json(tmp_path, [llava(i, image=False) for i in range(4)])).train_dataloader()
    assert batch["image"].shape == (0, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["image_seed"].shape == (0,) and not (batch["ids"] == IMAGE_ID).any()


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
def test_images_get_their_shape_as_told(aspect):
    pixels = np.random.RandomState(0).randint(0, 256, (30, 60, 3)).astype(np.uint8)
    result = aspect_transform(20, aspect, (9, 8, 7))(Image.fromarray(pixels))
    assert result.shape == (3, 20, 20)
    if aspect == "pad":
        assert (result[:, :5] == torch.tensor([9, 8, 7])[:, None, None]).all() and torch.equal(
            result[:, :5], result[:, 15:]
        )
        square = np.empty((60, 60, 3), np.uint8)  # LLaVA's expand2square, which pads before the resize
        square[:] = (9, 8, 7)
        square[15:45] = pixels
        llavas = np.asarray(Image.fromarray(square).resize((20, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert (result.numpy()[:, 7:13] == llavas[:, 7:13]).all()
    else:
        box = (15, 0, 45, 30) if aspect == "crop" else None
        image = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC, box=box)
        assert np.abs(result.numpy().astype(int) - np.asarray(image).transpose(2, 0, 1)).mean() < 2


def test_the_model_is_asked_for_what_is_not_given(tmp_path, chat):
    path = write_json(tmp_path, [llava(i) for i in range(4)])
    data = InstructionData(train=path, batch_size=4, num_workers=0)
    with pytest.raises(UserError, match="no chat and no model to ask"):
        data.setup("fit")
    model = SimpleNamespace(chat=chat, image_size=(6, 10), image_fill=(9, 9, 9), image_aspect="pad")
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(
        lightning_module=model, global_rank=0, world_size=1, state=state, default_root_dir=tmp_path / "run"
    )
    data.trainer = trainer
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (4, 3, 6, 10) and (batch["image"][:, :, :, 0] == 9).all()
    other = InstructionData(train=path, image_aspect="crop")
    other.trainer = trainer
    with pytest.raises(UserError, match="image_aspect of the data is crop where the model's is pad"):
        other.setup("fit")


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, made):
    path = write_json(tmp_path, [llava(0), llava(1)])
    for options, sentence in [
        ({"max_turns": 0}, "max_turns is 0; give at least 1"),
        ({"limit_train": 0}, "limit_train is 0"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"image_aspect": "stretch"}, "image aspect is 'stretch'; choose one of pad, crop, squash"),
    ]:
        with pytest.raises(UserError, match=sentence):
            made(path, **options)
    with pytest.raises(UserError, match="There are no training records"):
        made(None)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        made(path, stage="validate")
    with pytest.raises(UserError, match=r"cannot be read .* \(see data/llava/README.md\)"):
        made(str(tmp_path / "gone.json"), get_data="see data/llava/README.md")
    with pytest.raises(UserError, match="2 training samples do not fill one batch of 4"):
        made(path).train_dataloader()


# ------------------------------------------------------------------ order


def test_an_epoch_gives_every_record_once_in_an_order_of_its_own(tmp_path, made):
    path = write_json(tmp_path, [llava(i) for i in range(18)])
    loader = made(path).train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        orders.append(records(batches))
        assert len(batches) == 4 and len(set(orders[-1])) == 16
        assert [n for batch in batches for row in images_of(batch) for n in row] == orders[-1]
    assert orders[0] == orders[2] != orders[1] and set(orders[0]) != set(orders[1])
    assert records(made(path, seed=1).train_dataloader()) != orders[0]


def test_seeds_of_images_are_a_function_of_record_epoch_and_seed(tmp_path, made):
    loader = made(write_json(tmp_path, [llava(i) for i in range(4)])).train_dataloader()
    found = []
    for epoch in (0, 0, 1):
        loader.set_epoch(epoch)
        (batch,) = loader
        found.append(dict(zip(batch["record"].tolist(), batch["image_seed"].tolist(), strict=True)))
    assert found[0] == found[1] and not set(found[0].values()) & set(found[2].values())
    assert found[0][2] == sample_seed("r2|2|2|0", 0, 0)


@pytest.mark.parametrize("group", [False, True])
def test_ranks_are_disjoint_equally_long_and_share_each_step(tmp_path, made, group):
    path = write_json(tmp_path, [llava(i, i % 3 + 1, image=i % 4 > 0) for i in range(38)])
    parts = ranks(made(path, batch_size=2, group_by_length=group), 2)
    whole = list(made(path, batch_size=4, group_by_length=group).train_dataloader())
    assert [len(part) for part in parts] == [9, 9] == [len(whole)] * 2
    for step, batch in enumerate(whole):
        shared = list(zip(*(part[step]["record"].tolist() for part in parts), strict=True))
        assert list(itertools.chain(*shared)) == batch["record"].tolist()


def test_grouped_batches_are_of_one_kind_and_like_length(tmp_path, chat, made):
    lengths = random.Random(0).choices(range(1, 12), k=120)
    path = write_json(tmp_path, [llava(i, lengths[i], image=i % 3 > 0) for i in range(120)])

    def waste(loader):
        batches = list(loader)
        assert len(set(records(batches))) == len(records(batches)) == 120
        kinds = [{record % 3 > 0 for record in batch["record"].tolist()} for batch in batches]
        return sum((batch["length"].max() - batch["length"]).sum().item() for batch in batches), kinds, batches

    plain, _, _ = waste(made(path).train_dataloader())
    loader = made(path, group_by_length=True).train_dataloader()
    grouped, kinds, batches = waste(loader)
    assert grouped < plain / 8 and all(len(kind) == 1 for kind in kinds)
    sizes = [batch["length"].max().item() for batch in batches]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)
    loader.set_epoch(1)
    again = records(loader)
    assert again != records(batches) and set(again) == set(records(batches))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=90), st.integers(1, 5))
def test_grouping_gives_every_batch_there_is_room_for(found, whole):
    lengths, kinds = (np.array(values) for values in zip(*found, strict=True))
    steps = len(found) // whole
    schedule = GroupedSchedule(len(found), steps, whole, lengths=lengths, has_image=kinds.astype(bool))
    if steps:
        drawn = [draws.records for draws in schedule]
        assert len(drawn) == steps and len(set(itertools.chain(*drawn))) == steps * whole
        assert sum(len(set(kinds[batch])) == 2 for batch in drawn) <= 1


# ------------------------------------------------------------------ pieces


def test_long_conversations_come_in_pieces_each_with_its_image(tmp_path, chat, made):
    path = write_json(tmp_path, [llava(0, 5), llava(1, 2), llava(2, 1, image=False)])
    (batch,) = made(path, max_turns=2, batch_size=5).train_dataloader()
    found = sorted(zip(batch["record"].tolist(), said(chat, batch), images_of(batch), strict=True))
    assert found == [
        *((0, ["0 0", "0 1"], [0]), (0, ["0 2", "0 3"], [0]), (0, ["0 4"], [0])),
        *((1, ["1 0", "1 1"], [1]), (2, ["2 0"], [])),
    ]
    assert len(set(batch["image_seed"].tolist())) == 4


def test_shuffled_questions_are_all_asked_in_another_order_each_epoch(tmp_path, chat, made):
    path = write_json(tmp_path, [llava(i, 6) for i in range(2)])
    loader = made(path, max_turns=2, shuffle_turns=True, batch_size=6).train_dataloader()
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        (batch,) = loader
        answers = said(chat, batch)
        assert sorted(itertools.chain(*answers)) == [f"{i} {q}" for i in range(2) for q in range(6)]
        assert images_of(batch) == [[record] for record in batch["record"].tolist()]
        orders.append(answers)
    assert len({str(order) for order in orders}) == 3
    assert any(row != sorted(row) for order in orders for row in order)


def test_independent_questions_are_read_as_if_asked_alone(tmp_path, chat, made):
    path = write_json(tmp_path, [llava(0, 3), llava(1, 1), llava(2, 2, image=False), llava(3, 4)])
    data = made(path, path, independent_turns=True, max_turns=3, batch_size=5)
    (batch,) = data.train_dataloader()
    assert batch.keys() == KEYS | {"part"} and batch["part"].shape == batch["ids"].shape
    for row, record in enumerate(batch["record"].tolist()):
        length = int(batch["length"][row])
        ids, part, supervised = (batch[name][row, :length] for name in ("ids", "part", "supervised"))
        shared = int((part == 0).sum())
        assert (part.diff() >= 0).all()
        assert shared == (0 if record == 2 else ids.tolist().index(IMAGE_ID) + 1)
        for number in range(1, int(part.max()) + 1):
            kept = (part == 0) | (part == number)
            answer = chat.text(ids[kept & supervised].tolist())
            question = f"what is {answer.replace(' ', '.')}?"
            asked = (question,) if record == 2 else (None, f"\n{question}")
            alone = chat.encode([Turn("user", asked), Turn("assistant", (answer,))])
            assert ids[kept].tolist() == alone.ids and supervised[kept].tolist() == alone.supervised
    assert images_of(batch) == [[] if record == 2 else [record] for record in batch["record"].tolist()]
    assert [len(batch["record"]) for batch in data.val_dataloader()] == [4]
    assert int(next(iter(data.val_dataloader()))["part"].max()) == 4


# ------------------------------------------------------------------ broken images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_replaced_counted_and_listed(tmp_path, made, num_workers):
    path = write_json(tmp_path, [llava(i) for i in range(16)], broken=(3, 12))
    (tmp_path / "pictures" / "7.png").unlink()
    report = tmp_path / "report" / "skipped.jsonl"
    data = made(path, num_workers=num_workers, report=str(report))
    loader = data.train_dataloader()
    first = list(loader)
    assert len(first) == 3 and not {3, 7, 12} & set(records(first)) and all(len(b["record"]) == 4 for b in first)
    loader.set_epoch(0)
    assert same(loader, first)
    assert set(loader.skipped) == {"broken image"} and loader.skipped["broken image"] >= 1
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert lines[0] == {"data": path, "record": "r7", "cause": "missing image", "detail": "pictures/7.png"}
    assert {line["record"] for line in lines[1:]} <= {"r3", "r12"} and len(lines) == len(set(map(str, lines)))
    assert all(line["cause"] == "broken image" and line["detail"].endswith("png") for line in lines[1:])


def test_a_file_that_is_gone_since_is_replaced_too(tmp_path, made):
    path = write_json(tmp_path, [llava(i) for i in range(4)])
    data = made(path)
    (tmp_path / "pictures" / "2.png").unlink()
    loader = data.train_dataloader()
    assert 2 not in records(loader) and loader.skipped == {"unreadable file": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_without_a_whole_image_end_the_run_with_a_sentence(tmp_path, made, num_workers):
    path = write_json(tmp_path, [llava(i) for i in range(4)], broken=(0, 1, 2, 3))
    with pytest.raises(UserError, match=r"Neither record r\d of .*train.json nor any of 99 records .*broken image: "):
        list(made(path, num_workers=num_workers).train_dataloader())


# ------------------------------------------------------------------ validation


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_gives_every_record_once_in_order_without_substitutes(tmp_path, made, num_workers):
    path = write_json(tmp_path, [llava(i, 3) for i in range(10)], broken=(5,))
    report = tmp_path / "skipped.jsonl"
    data = made(None, path, stage="validate", num_workers=num_workers, val_batch_size=4, report=str(report))
    loader = data.val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [batch["record"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 6, 7], [8, 9]]
        assert loader.skipped == 1 and loader.broken == [f"record r5 of {path}"] and len(loader) == 3
    assert json.loads(report.read_text()) == {
        "data": path, "record": "r5", "cause": "broken image", "detail": str(tmp_path / "pictures" / "5.png")
    }  # fmt: skip
    parts = ranks(data, 2, "val_dataloader")
    assert [records(part) for part in parts] == [[0, 2, 4, 6, 8], [1, 3, 7, 9]]
    assert data.test_dataloader() is not None and made(path, None).val_dataloader() == []


def test_a_batch_without_a_whole_image_does_not_come(tmp_path, made):
    path = write_json(tmp_path, [llava(i) for i in range(6)], broken=(2, 3))
    loader = made(None, path, stage="test", batch_size=2).test_dataloader()
    assert [batch["record"].tolist() for batch in loader] == [[0, 1], [4, 5]] and loader.skipped == 2


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("group", [False, True])
def test_resume_continues_with_the_very_next_batch(tmp_path, made, num_workers, group):
    path = write_json(tmp_path, [llava(i, i % 5 + 1, image=i % 4 > 0) for i in range(24)], broken=(3, 10, 11))
    for number in range(12, 24):
        if number % 4:
            (tmp_path / "pictures" / f"{number}.png").write_bytes(noisy_jpeg(number))
    options = {"num_workers": num_workers, "group_by_length": group, "shuffle_turns": True, "max_turns": 3}
    data = made(path, **options)
    loader = data.train_dataloader()
    loader.set_epoch(2)
    whole = list(loader)
    assert len(whole) == 8
    for position in (1, 5):
        loader.set_epoch(0)
        loader.set_epoch(2)
        for _ in itertools.islice(loader, position):
            pass
        stream = io.BytesIO()
        torch.save(loader.state_dict(), stream)
        stream.seek(0)
        resumed = made(path, **options | {"num_workers": 2 - num_workers}).train_dataloader()
        resumed.load_state_dict(torch.load(stream, weights_only=True))
        resumed.set_epoch(2)  # as Lightning does, after iter
        assert same(resumed, whole[position:])
    resumed.set_epoch(3)
    loader.set_epoch(3)
    assert same(resumed, loader)
    with pytest.warns(UserWarning, match="another group_by_length than the checkpoint's"):
        made(path, **options | {"group_by_length": not group}).train_dataloader().load_state_dict(
            loader.state_dict() | {"position": 3}
        )


def test_the_global_generators_are_not_touched(tmp_path, made):
    path = write_json(tmp_path, [llava(i, 3) for i in range(8)])
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    data = made(path, path, shuffle_turns=True, group_by_length=True)
    assert len(list(data.train_dataloader())) == 2
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


# ------------------------------------------------------------------ real data


def test_photographs_and_conversations_that_others_made(shared_data, tmp_path, chat, made):
    archive = shared_data / "vqa" / "flickr8k_llava.tar"
    with tarfile.open(archive) as tar:
        (tmp_path / "all.json").write_bytes(tar.extractfile("flickr8k/flickr8k_llava.json").read())
    conversations = json.loads((tmp_path / "all.json").read_text())
    loader = made(str(tmp_path / "all.json"), images=str(archive), batch_size=25, image_size=32).train_dataloader()
    batches = list(loader)
    assert len(set(records(batches))) == 250 and loader.skipped == {}
    for batch in batches[:2]:
        assert batch["image"].shape == (25, 3, 32, 32) and batch["image"].float().std() > 20
        for record, answers in zip(batch["record"].tolist(), said(chat, batch), strict=True):
            expected = [
                turn["value"].strip() for turn in conversations[record]["conversations"] if turn["from"] == "gpt"
            ]
            assert answers == expected
    with tarfile.open(shared_data / "vqa" / "mllm_demo.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    demo = made(str(Path(tmp_path) / "mllm_demo" / "mllm_demo.json"), batch_size=6)
    (batch,) = demo.train_dataloader()
    assert len(batch["record"]) == 6 and (batch["ids"] == IMAGE_ID).sum() == len(batch["image"]) > 6
