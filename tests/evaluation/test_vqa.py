"""``dtpvit vqa``, from files to a file, on a model that knows three colours."""

import json
import shutil
import tarfile

import pytest
from colour_assistant import COLOURS, IS_RED, NAME, plain

from dtpvit.cli import main
from dtpvit.datamodules.image_places import image_places
from dtpvit.evaluation import vqa as command
from dtpvit.evaluation.answering import answer_questions
from dtpvit.evaluation.vqa_questions import ImageQuestion
from dtpvit.interop.assistant import load_assistant


@pytest.fixture
def data(tmp_path):
    """Images, questions of several lengths about them, and the right answers."""
    (tmp_path / "images").mkdir()
    questions, answers = [], []
    for number, colour in enumerate([*COLOURS] * 3):
        plain(colour).save(tmp_path / "images" / f"{number}.png")
        for text, right in [(NAME, colour), (IS_RED, "yes" if colour == "red" else "no")]:
            questions.append({"question_id": len(questions), "image": f"{number}.png", "text": text})
            answers.append({"question_id": len(answers), "answer": right})
    questions.append({"question_id": "alone", "text": NAME})
    answers.append({"question_id": "alone", "answer": "no"})
    write(tmp_path / "questions.jsonl", questions)
    write(tmp_path / "answers.jsonl", answers)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def vqa(model, data, *options, out="out.jsonl"):
    arguments = ["--checkpoint", model, "--questions", data / "questions.jsonl", "--images", data / "images"]
    return main(["vqa", *map(str, [*arguments, "--out", data / out, "--max-new-tokens", 8, *options])])


def scored(data):
    return ["--answers", data / "answers.jsonl", "--metric", "exact"]


def test_questions_are_answered_in_their_order_and_scored(colour_assistant, data, capsys):
    target = data / "scores.json"
    assert vqa(colour_assistant, data, *scored(data), "--batch-size", 4, "--json", target) == 0
    rows, asked, right = read(data / "out.jsonl"), read(data / "questions.jsonl"), read(data / "answers.jsonl")
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in asked]
    assert [row["text"] for row in rows] == [row["answer"] for row in right]
    assert all(row["prompt_tokens"] > row["visual_tokens"] > 0 for row in rows[:-1]) and not rows[-1]["visual_tokens"]
    printed = capsys.readouterr().out
    tokens = [row["visual_tokens"] for row in rows[:-1]]
    assert "accuracy        100.00%" in printed and "questions           19" in printed
    mean = f"{sum(tokens) / len(tokens):6.1f}   an image ({min(tokens)} to {max(tokens)})"
    assert f"visual tokens   {mean}" in printed and min(tokens) < max(tokens)
    record = json.loads(target.read_text())
    assert record["score"] == {"accuracy": 1} and record["skipped"] == {} and record["blind"] is False
    assert record["prefill_ms"] > 0 and record["questions_per_second"] > 0
    assert record["visual_tokens"] == {"mean": pytest.approx(sum(tokens) / 18), "min": min(tokens), "max": max(tokens)}


def test_what_is_answered_does_not_depend_on_the_batch(colour_assistant, data):
    assistant = load_assistant(colour_assistant)
    questions = [
        ImageQuestion(number, text, images)
        for number, (text, images) in enumerate(
            [(NAME, ("0.png",)), (IS_RED, ("1.png", "2.png")), (NAME + " " + IS_RED, ("1.png",)), ("no", ())] * 2
        )
    ]
    found = []
    for size in (1, 3, 8):
        batches = answer_questions(
            assistant, questions, image_places(data / "images"), batch_size=size, max_new_tokens=8
        )
        rows = [row for batch in batches for row in batch]
        assert [row["question_id"] for row in rows] == list(range(8))
        found.append([(row["text"], row["visual_tokens"], row["prompt_tokens"]) for row in rows])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 4


def test_images_may_lie_in_a_tar(colour_assistant, data):
    assert vqa(colour_assistant, data) == 0
    with tarfile.open(data / "images.tar", "w") as tar:
        tar.add(data / "images", "images")
    assert vqa(colour_assistant, data, "--images", data / "images.tar", out="of_tar.jsonl") == 0
    texts = [[row["text"] for row in read(data / name)] for name in ("out.jsonl", "of_tar.jsonl")]
    assert texts[0] == texts[1]


def test_blind_nothing_is_seen_of_an_image_but_that_it_is_there(colour_assistant, data, capsys):
    assert vqa(colour_assistant, data, *scored(data), "--blind", "true") == 0
    said = {row["prompt"]: set() for row in read(data / "out.jsonl")}
    for row in read(data / "out.jsonl")[:-1]:
        said[row["prompt"]].add((row["text"], row["visual_tokens"]))
    assert [len(answers) for answers in said.values()] == [1, 1]
    assert "100.00%" not in capsys.readouterr().out


def test_the_majority_of_training_answers_stands_beside(colour_assistant, data, capsys):
    turns = [(NAME, "red"), (NAME, "green"), (NAME, "green"), (IS_RED, "no")]
    conversations = [
        {"from": who, "value": text} for turn in turns for who, text in zip(["human", "gpt"], turn, strict=True)
    ]
    (data / "train.json").write_text(json.dumps([{"id": 0, "conversations": conversations}]))
    assert vqa(colour_assistant, data, *scored(data), "--majority", data / "train.json") == 0
    expected = (3 + 6) / 19  # green of three colours, no of three
    assert f"(majority of the training answers {expected:.2%})" in capsys.readouterr().out


# Broken images


def test_broken_and_missing_images_are_skipped_counted_and_left_out(colour_assistant, data, capsys):
    (data / "images" / "0.png").unlink()
    (data / "images" / "1.png").write_bytes((data / "images" / "1.png").read_bytes()[:50])
    (data / "images" / "2.png").unlink()
    (data / "images" / "2.png").mkdir()
    assert vqa(colour_assistant, data, *scored(data), "--batch-size", 3) == 0
    rows = read(data / "out.jsonl")
    assert [(row.get("skipped"), row.get("detail")) for row in rows[:7]] == [
        *[("missing image", "0.png")] * 2,
        *[("broken image", "1.png")] * 2,
        *[("unreadable file", "2.png")] * 2,
        (None, None),
    ]
    assert all(row["text"] == "" for row in rows[:6])
    printed = capsys.readouterr().out
    assert "skipped              6   (broken image: 2, missing image: 2, unreadable file: 2;" in printed
    assert "accuracy        100.00%" in printed


def test_a_question_too_long_for_the_model_is_skipped_and_its_batch_is_not(colour_assistant, data, capsys):
    write(data / "questions.jsonl", [{"question_id": 0, "text": "why " * 400}, {"question_id": 1, "text": NAME}])
    assert vqa(colour_assistant, data) == 0
    long, short = read(data / "out.jsonl")
    assert "longer than max_length, 256" in long["detail"] and short["text"] == "no"
    assert "skipped              1   (refused by the model: 1;" in capsys.readouterr().out


def test_where_no_question_has_an_answer_that_is_an_error(colour_assistant, data, capsys):
    shutil.rmtree(data / "images")
    (data / "images").mkdir()
    write(data / "questions.jsonl", read(data / "questions.jsonl")[:2])
    assert vqa(colour_assistant, data) == 2
    assert "none of the 2 questions has an answer (missing image: 0.png; " in capsys.readouterr().err


# Going on


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(colour_assistant, data, monkeypatch, capsys):
    assert vqa(colour_assistant, data, out="whole.jsonl") == 0
    real = command.answer_questions

    def killed_after_two_batches(*arguments, **options):
        for number, rows in enumerate(real(*arguments, **options)):
            if number == 2:
                raise Killed
            yield rows

    monkeypatch.setattr("dtpvit.evaluation.answering._BATCHES", 1)  # rows come out batch by batch
    monkeypatch.setattr(command, "answer_questions", killed_after_two_batches)
    with pytest.raises(Killed):
        vqa(colour_assistant, data, "--batch-size", 4)
    assert len(read(data / "out.jsonl")) == 8
    with (data / "out.jsonl").open("a") as file:
        file.write('{"question_id": 8, "te')  # torn while it was written
    monkeypatch.undo()
    capsys.readouterr()
    assert vqa(colour_assistant, data, *scored(data), "--batch-size", 4) == 0
    assert "accuracy        100.00%" in capsys.readouterr().out
    texts = [[(row["question_id"], row["text"]) for row in read(data / name)] for name in ("out.jsonl", "whole.jsonl")]
    assert texts[0] == texts[1]

    def untouched(*arguments):
        raise AssertionError("a finished file needs no model")

    before = (data / "out.jsonl").read_bytes()
    monkeypatch.setattr(command, "load_assistant", untouched)
    assert vqa(colour_assistant, data, *scored(data)) == 0
    assert (data / "out.jsonl").read_bytes() == before and "accuracy        100.00%" in capsys.readouterr().out


def test_a_file_of_other_answers_is_refused_and_left_alone(colour_assistant, data, tmp_path, capsys):
    assert vqa(colour_assistant, data) == 0
    before = (data / "out.jsonl").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(colour_assistant, other)
    config = json.loads((other / "dtpvit_config.json").read_text())
    (other / "dtpvit_config.json").write_text(json.dumps(config))  # without its line breaks: other bytes
    assert vqa(other, data) == 2
    assert "has answers with checkpoint" in capsys.readouterr().err
    assert vqa(colour_assistant, data, "--blind", "true") == 2
    assert "has answers with blind False, now it is True; give another --out" in capsys.readouterr().err
    questions = read(data / "questions.jsonl")
    write(data / "questions.jsonl", questions[:3])
    assert vqa(colour_assistant, data) == 2
    assert "has 19 answers to 3 questions" in capsys.readouterr().err
    write(data / "questions.jsonl", [questions[0], *questions[2:], {"question_id": "new", "text": "new"}])
    assert vqa(colour_assistant, data) == 2
    assert "answers question 1 where 2 is asked now" in capsys.readouterr().err
    assert (data / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content", ['[{"question_id": 0, "text": "mine"}]', '{"question_id": 0, "prompt": "mine"}', "x"]
)
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_file_of_something_else_is_never_written_to(colour_assistant, data, capsys, content, end):
    (data / "out.jsonl").write_text(content + end)
    assert vqa(colour_assistant, data) == 2
    assert (data / "out.jsonl").read_text() == content + end
    assert "out.jsonl" in capsys.readouterr().err


# Mistakes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--questions", "broken.jsonl"], "broken.jsonl, line 2: this is no JSON"),
        (["--questions", "twice.jsonl"], "line 2: asks question_id 1 again, after"),
        (["--images", "absent"], "absent is neither a folder nor a .tar"),
        (["--answers", "answers.jsonl", "--metric", "bleu"], "exact"),
        (["--answers", "answers.jsonl"], "give both --answers FILE and --metric"),
        (["--metric", "exact"], "give both --answers FILE and --metric"),
        (["--majority", "answers.jsonl"], "--majority needs them"),
        (["--answers", "few.jsonl", "--metric", "exact"], "few.jsonl has no answer to question 1"),
        (["--checkpoint", "absent.ckpt"], "absent.ckpt does not exist"),
        (["--out", "no/such/folder.jsonl"], "cannot be written"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--device", "cuda:99"], "cannot be used here"),
    ],
)
def test_mistakes_are_told_before_any_work(colour_assistant, data, monkeypatch, capsys, options, told):
    (data / "broken.jsonl").write_text('{"question_id": 1, "text": "a"}\n{"question_id": 2\n')
    write(data / "twice.jsonl", [{"question_id": 1, "text": "a"}] * 2)
    write(data / "few.jsonl", [{"question_id": 0, "answer": "red"}])
    monkeypatch.chdir(data)
    assert vqa(colour_assistant, data, *options) == 2
    sentence = capsys.readouterr().err
    assert told in sentence and sentence.startswith("dtpvit: ") and sentence.count("\n") == 1
    assert not (data / "out.jsonl").exists()
