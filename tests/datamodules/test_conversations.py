"""Instruction records: forms, places of images, where images lie, and what is left out for which cause."""

import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conversation_files import llava, write_json
from hypothesis import given
from hypothesis import strategies as st
from labelled_files import plain_png
from shard_files import write_tar

from dtpvit.datamodules.conversation_parts import piece_of
from dtpvit.datamodules.conversation_record import BadRecord, Conversation, Question, parse_conversation
from dtpvit.datamodules.conversations import Skipped, read_conversations
from dtpvit.datamodules.image_places import Place, read_place
from dtpvit.datamodules.skipped_report import SkippedReport
from dtpvit.errors import UserError
from dtpvit.interop.chat import Turn


def human(*values):
    """A record whose questions are given; the answers are "a0", "a1", ..."""
    pairs = [({"from": "human", "value": value}, {"from": "gpt", "value": f"a{i}"}) for i, value in enumerate(values)]
    return {"conversations": [turn for pair in pairs for turn in pair]}


def asked(record, num_images):
    places = [Place(str(number)) for number in range(num_images)]
    return [question.asked for question in parse_conversation(record, "r", places).questions]


# ------------------------------------------------------------------ records


def test_llavas_form_and_sharegpts_are_one():
    turns = [("system", "be brief"), ("human", "<image>\nwhat?"), ("gpt", "a cat"), ("human", "sure?"), ("gpt", "yes")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    other = {"messages": [{"role": names[role], "content": text} for role, text in turns]}
    found = parse_conversation(record, "r", [Place("x")])
    assert found == parse_conversation(other, "r", [Place("x")])
    assert found == Conversation(
        "r", (Place("x"),), "be brief", (Question((0, "\nwhat?"), "a cat"), Question(("sure?",), "yes"))
    )
    assert Conversation.load(found.dump()) == found
    assert piece_of(found).turns == [
        Turn("system", ("be brief",)),
        *(Turn("user", (None, "\nwhat?")), Turn("assistant", ("a cat",))),
        *(Turn("user", ("sure?",)), Turn("assistant", ("yes",))),
    ]


def test_the_first_places_are_the_images_and_the_rest_is_text():
    assert asked(human("<image>\na", "b"), 1) == [(0, "\na"), ("b",)]
    assert asked(human("a <image> b <image>", "<image> c <image>"), 3) == [("a ", 0, " b ", 1), (2, " c <image>")]
    assert asked(human("a <image><image> b"), 1) == [("a ", 0, "<image> b")]
    assert asked(human("<image>a<image>"), 0) == [("<image>a<image>",)]
    assert asked(human("<image>"), 1) == [(0,)]
    assert asked(human("a", "b"), 2) == [(0, 1, "\na"), ("b",)]
    with pytest.raises(BadRecord, match="fewer places than images"):
        asked(human("a <image>"), 2)


def test_an_answers_image_tag_is_text():
    record = human("<image> what?")
    record["conversations"][1]["value"] = "an <image>"
    assert parse_conversation(record, "r", [Place("x")]).questions == (Question((0, " what?"), "an <image>"),)


@given(st.lists(st.lists(st.sampled_from(["<image>", "a", "\n", "<im", "age>", "é"])).map("".join), min_size=1))
def test_no_text_is_lost(texts):
    count = sum(text.count("<image>") for text in texts)
    for images in range(1, count + 1):
        found = asked(human(*texts), images)
        said = ["".join("<image>" if isinstance(part, int) else part for part in parts) for parts in found]
        assert said == texts
        assert [part for parts in found for part in parts if isinstance(part, int)] == list(range(images))


@pytest.mark.parametrize(
    ("turns", "cause"),
    [
        ([("human", "q"), ("gpt", " \n")], "empty answer"),
        ([("human", "q"), ("gpt", "a"), ("human", "q"), ("gpt", "")], "empty answer"),
        ([("human", "q"), ("gpt", None)], "empty answer"),
        ([("human", "q")], "no answer"),
        ([("human", "q"), ("gpt", "a"), ("human", "q")], "no answer"),
        ([("system", "s")], "no answer"),
        ([], "no answer"),
        ([("gpt", "a"), ("human", "q")], "answer before question"),
        ([("human", "q"), ("human", "q"), ("gpt", "a")], "turns out of order"),
        ([("human", "q"), ("gpt", "a"), ("gpt", "a")], "turns out of order"),
        ([("human", "q"), ("system", "s"), ("gpt", "a")], "turns out of order"),
        ([("human", "q"), ("bing", "a")], "unknown role"),
        ([(None, "q"), ("gpt", "a")], "unknown role"),
        ([(["human"], "q"), ("gpt", "a")], "unknown role"),
        ([("human", 3), ("gpt", "a")], "unreadable record"),
        ([("human", None), ("gpt", "a")], "unreadable record"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(turns, cause):
    with pytest.raises(BadRecord) as bad:
        parse_conversation({"conversations": [{"from": role, "value": text} for role, text in turns]}, "r", [])
    assert bad.value.cause == cause


# ------------------------------------------------------------------ pieces


LONG = Conversation("r", (), "s", (Question((0, "\nq0"), "a0"), *(Question((f"q{i}",), f"a{i}") for i in range(1, 5))))


def test_a_piece_has_the_images_of_the_questions_before_it():
    pieces = [piece_of(LONG, first, 2) for first in (0, 2, 4)]
    assert [piece.images for piece in pieces] == [[0]] * 3
    assert [[q.answer for q in piece.questions] for piece in pieces] == [["a0", "a1"], ["a2", "a3"], ["a4"]]
    assert [piece.turns[1].parts for piece in pieces] == [(None, "\nq0"), (None, "\n", "q2"), (None, "\n", "q4")]
    assert all(piece.turns[0] == Turn("system", ("s",)) for piece in pieces)
    two = Conversation("r", (), None, (Question((0,), "a"), Question(("x", 1), "b"), Question(("y", 2), "c")))
    assert piece_of(two, 1).images == [0, 1, 2] and piece_of(two, 2).images == [0, 1, 2]
    assert piece_of(two, 1, 1).turns[0].parts == (None, "\n", "x", None)
    assert piece_of(two, 0, 2).images == [0, 1]


def test_shuffled_questions_leave_the_image_in_front():
    orders = set()
    for seed in range(20):
        piece = piece_of(LONG, shuffle=str(seed))
        assert piece == piece_of(LONG, shuffle=str(seed)) and piece.images == [0]
        first = piece.turns[1].parts
        assert first[:2] == (None, "\n") and all(None not in turn.parts for turn in piece.turns[2:])
        orders.add(tuple(question.answer for question in piece.questions))
        assert sorted(question.answer for question in piece.questions) == ["a0", "a1", "a2", "a3", "a4"]
        parts = [piece_of(LONG, start, 2, str(seed)) for start in (0, 2, 4)]
        assert tuple(question.answer for part in parts for question in part.questions) in orders
        assert all(part.images == [0] for part in parts)
    assert len(orders) > 10


# ------------------------------------------------------------------ files


def test_json_and_jsonl_hold_the_same(tmp_path):
    records = [llava(0), llava(1, 3), llava(2, image=False)]
    one = read_conversations(write_json(tmp_path, records))
    other = read_conversations(write_json(tmp_path, records, name="train.jsonl"))
    assert [one[i] for i in range(3)] == [other[i] for i in range(3)] and one.skipped == other.skipped == []
    assert [conversation.id for conversation in one] == ["r0", "r1", "r2"]
    assert one.has_image.tolist() == [True, True, False] and one.num_questions.tolist() == [1, 3, 1]
    assert one.number.tolist() == [0, 1, 2]
    assert one.lengths[0] == len("\nwhat is 0.0?") + len("0 0") and len(one.lengths) == 5
    assert read_place(one[1].images[0]) == plain_png(1)


def test_several_images_of_one_record(tmp_path):
    record = human("<image><image> which?") | {"image": ["pictures/3.png", "pictures/1.png"]}
    (found,) = read_conversations(write_json(tmp_path, [record]))
    assert [read_place(place) for place in found.images] == [plain_png(3), plain_png(1)] and found.id == "0"
    write_json(tmp_path, [human("") | {"images": record["image"]}], name="other.json")
    assert next(iter(read_conversations(str(tmp_path / "other.json")))).images == found.images


@pytest.mark.parametrize("top", ["", "./", "data/", "./data/"])
def test_images_in_a_tar(tmp_path, top):
    data = write_json(tmp_path / "a", [llava(0), llava(1)])
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number in (1, 0):
            tar.add(tmp_path / "a" / "pictures" / f"{number}.png", f"{top}pictures/{number}.png")
    found = read_conversations(data, str(tmp_path / "images.tar"))
    assert [read_place(conversation.images[0]) for conversation in found] == [plain_png(0), plain_png(1)]
    assert {place.path for conversation in found for place in conversation.images} == {str(tmp_path / "images.tar")}


def test_shards_have_their_images_beside_the_records(tmp_path):
    two = human("<image> or <image>?") | {"image": ["x", "y"]}
    unnamed = human("what?")
    samples = {
        "a": {"jpg": plain_png(0), "json": json.dumps(llava(0) | {"image": "elsewhere/7.jpg"}).encode()},
        "b": {"json": json.dumps(llava(1, image=False)).encode()},
        "c": {"1.png": plain_png(3), "0.png": plain_png(2), "json": json.dumps(two).encode()},
        "d": {"json": json.dumps(unnamed).encode(), "png": plain_png(4)},
        "e": {"json": json.dumps(llava(5)).encode()},
        "f": {"json": b"{", "png": plain_png(4)},
        "g": {"png": plain_png(4)},
    }
    write_tar(tmp_path / "00000.tar", samples)
    write_tar(tmp_path / "00001.tar", {"h": {"json": json.dumps(llava(6, image=False)).encode()}})
    found = read_conversations(str(tmp_path))
    pictures = [[read_place(place) for place in conversation.images] for conversation in found]
    assert pictures == [[plain_png(0)], [], [plain_png(2), plain_png(3)], [plain_png(4)], []]
    assert found[3].questions[0].asked == (0, "\nwhat?")
    assert [(one.record, one.cause) for one in found.skipped] == [("r5", "missing image"), ("5", "unreadable record")]
    with pytest.raises(UserError, match="shards, which have their images in them"):
        read_conversations(str(tmp_path), str(tmp_path))


def test_what_cannot_be_used_is_left_out_counted_and_listed(tmp_path, caplog):
    bad = [
        llava(3) | {"image": "pictures/gone.png"},
        llava(4) | {"image": "nowhere/4.png"},
        {"id": "odd", "conversations": [{"from": "bing", "value": "x"}]},
        ["no record"],
        llava(5) | {"image": 5},
        {"id": "none"},
    ]
    data = write_json(tmp_path, [llava(0), llava(1)])
    Path(data).write_text(json.dumps([llava(0), *bad, llava(1)]))
    with caplog.at_level(logging.WARNING):
        found = read_conversations(data)
    assert [conversation.id for conversation in found] == ["r0", "r1"] and found.number.tolist() == [0, 7]
    assert [(one.record, one.cause) for one in found.skipped] == [
        *(("r3", "missing image"), ("r4", "missing image"), ("odd", "unknown role")),
        *(("4", "unreadable record"), ("r5", "unreadable record"), ("none", "unreadable record")),
    ]
    assert found.skipped[0].detail == "pictures/gone.png" and "bing" in found.skipped[2].detail
    assert "6 records cannot be used (unreadable record: 3, missing image: 2, unknown role: 1)" in caplog.text
    report = SkippedReport(tmp_path / "run" / "skipped.jsonl")
    report.add(data, found.skipped)
    report.add(data, found.skipped[:2] + [Skipped("r0", "broken image", "x")])
    SkippedReport(report.path).add(data, found.skipped)
    lines = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert len(lines) == 7 and lines[0] == {
        "data": data, "record": "r3", "cause": "missing image", "detail": "pictures/gone.png"
    }  # fmt: skip


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["human", "gpt", "<image>", "pictures/0.png", "\ud800", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "image", "images", "conversations", "messages", "from", "value", "role", "content"]),
            inner,
        )
    ),
    max_leaves=12,
)


TEXT = st.sampled_from(["a", "<image> b", "\ud83d", "", None, 3])
TURNS = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "bing"]), "value": TEXT}), max_size=4)
NAMES = st.sampled_from(["pictures/0.png", "\udc00/\0", "gone", "..", "x" * 5000])
RECORDS = st.fixed_dictionaries(
    {"conversations": TURNS}, optional={"image": NAMES | st.lists(NAMES, max_size=2), "id": TEXT}
)


@given(record=JSON | RECORDS)
def test_no_record_ends_a_run(tmp_path_factory, record):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    data = Path(write_json(folder, [llava(0)]))
    data.write_text(json.dumps([record, llava(0)]))
    found = read_conversations(str(data))
    assert found[len(found) - 1].id == "r0" and len(found) + len(found.skipped) == 2
    assert len(found.limited(1)) == 1
    SkippedReport(folder / "skipped.jsonl").add(str(data), found.skipped)


def test_a_place_without_an_image_is_a_missing_image(tmp_path):
    lost = {name: value for name, value in llava(1).items() if name != "image"}
    spoken = llava(2, image=False)
    spoken["conversations"][0]["value"] = "what does <image> mean?"
    found = read_conversations(write_json(tmp_path, [llava(0), lost, spoken]), None)
    assert [(one.record, one.cause) for one in found.skipped] == [("r1", "missing image")] and len(found) == 2


def test_a_broken_line_of_a_jsonl_is_one_record_less(tmp_path):
    data = write_json(tmp_path, [llava(0), llava(1)], name="train.jsonl")
    Path(data).write_text(Path(data).read_text().replace("\n", '\n{"id":\n\n'))
    found = read_conversations(data)
    assert len(found) == 2 and found.number.tolist() == [0, 2] and found.skipped[0].cause == "unreadable record"


def test_a_limit_keeps_the_same_records_and_a_larger_one_these_too(tmp_path):
    found = read_conversations(write_json(tmp_path, [llava(number, 2) for number in range(30)]))
    few, more = found.limited(5), found.limited(12)
    assert len(few) == 5 and len(more) == 12 and set(few.number) < set(more.number)
    assert few.number.tolist() == sorted(few.number.tolist()) != [0, 1, 2, 3, 4]
    assert [one.id for one in few] == [f"r{number}" for number in few.number] and len(few.lengths) == 10
    assert np.array_equal(found.limited(5).number, few.number) and len(found.limited(99)) == 30


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "no record that can be used \\(it is empty\\)"),
        (
            '[{"id": 1}, 2]',
            "no record that can be used \\(unreadable record: 2\\)",
        ),
        ("{}", "holds a dict where a list of conversations was expected"),
        ('{"a": 1}\n{"b": 2}', "is no JSON .* end its name in .jsonl"),
        (None, "cannot be read \\(No such file"),
    ],
)
def test_data_without_records_are_refused_in_a_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        read_conversations(str(tmp_path / "train.json"))
    assert "\n" not in str(error.value)


def test_images_that_are_nowhere_are_refused_in_a_sentence(tmp_path):
    data = write_json(tmp_path, [llava(0)])
    with pytest.raises(UserError, match="neither a folder nor a"):
        read_conversations(data, str(tmp_path / "gone"))
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    with pytest.raises(UserError, match="no sound, uncompressed tar"):
        read_conversations(data, str(tmp_path / "cut.tar"))
    with pytest.raises(UserError, match=r"no record that can be used \(missing image: 1"):
        read_conversations(data, str(tmp_path / "pictures"))


# ------------------------------------------------------------------ real data


def test_llama_factorys_demo(shared_data, tmp_path):
    with tarfile.open(shared_data / "vqa" / "mllm_demo.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    found = read_conversations(str(tmp_path / "mllm_demo" / "mllm_demo.json"))
    assert found.skipped == [] and len(found) == 6
    assert len(found[0].images) == 2
    assert found[0].questions[1].asked == ("What are they doing?", 1)


def test_flickr8k_with_its_images_in_a_tar(shared_data, tmp_path):
    archive = shared_data / "vqa" / "flickr8k_llava.tar"
    with tarfile.open(archive) as tar:
        (tmp_path / "all.json").write_bytes(tar.extractfile("flickr8k/flickr8k_llava.json").read())
    found = read_conversations(str(tmp_path / "all.json"), str(archive))
    assert len(found) == 250 and found.skipped == [] and found.num_questions.sum() == 750
    assert read_place(found[0].images[0])[:2] == b"\xff\xd8"
