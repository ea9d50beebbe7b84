"""Files of questions, answers and predictions, and ``dtpvit score`` over them."""

import json

import pytest

from dtpvit.cli import main
from dtpvit.errors import UserError
from dtpvit.evaluation.json_rows import read_rows
from dtpvit.evaluation.vqa_questions import ImageQuestion, Majority, read_questions
from dtpvit.evaluation.vqa_references import References
from dtpvit.evaluation.vqa_scores import Choice

CONVERSATION = {
    "id": "one",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "brown"},
    ],
}


@pytest.fixture
def write(tmp_path):
    """Write rows, one a line, and return the path."""

    def write(name, rows):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def run(*arguments):
    return main([str(argument) for argument in arguments])


# Rows


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("form", ["lines", "list", "data", "annotations", "by id"])
def test_rows_in_every_form_that_benchmarks_come_in(tmp_path, form, indent):
    rows = [{"question_id": "1", "text": "line\u2028separator"}, {"question_id": "2"}]
    content = {
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "list": json.dumps(rows, indent=indent),
        "data": json.dumps({"version": 1, "data": rows}, indent=indent),
        "annotations": json.dumps({"info": {}, "annotations": rows}, indent=indent),
        "by id": json.dumps({row["question_id"]: {**row} for row in rows}, indent=indent),
    }[form]
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    assert [row.fields for row in read_rows(str(path))] == rows


def test_a_file_of_one_row_is_no_table_of_rows(write):
    assert [row.fields for row in read_rows(write("one.jsonl", [{"question_id": 1}]))] == [{"question_id": 1}]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"question_id": 1}', "", '{"question_id": 2'], "line 3: this is no JSON"),
        (['[{"question_id": 1},', '{"question_id": }]'], "line 2: this is no JSON"),
        (['{"question_id": 1}', "[1, 2]"], r"line 2: found \[1, 2\]; expected a JSON object"),
        (["", ""], "has no rows"),
        (["7"], "line 1: found 7"),
    ],
)
def test_broken_files_are_named_with_their_line(write, lines, told):
    with pytest.raises(UserError, match=told):
        read_rows(write("broken.jsonl", lines))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    for name, told in [("absent.jsonl", "No such file"), (".", "directory"), ("latin.jsonl", "UTF-8")]:
        with pytest.raises(UserError, match=told):
            read_rows(str(tmp_path / name))


# Questions


def test_questions_in_llavas_form(write):
    rows = [
        {"question_id": 7, "image": "a.jpg", "text": "<image>\nWhat?", "category": "default"},
        {"question_id": "x", "text": "Without an image?"},
        {"question_id": 8, "image": ["a.jpg", "b.jpg"], "text": "Which is older?"},
        CONVERSATION,
    ]
    assert read_questions(write("questions.jsonl", rows)) == [
        ImageQuestion(7, "What?", ("a.jpg",)),
        ImageQuestion("x", "Without an image?"),
        ImageQuestion(8, "Which is older?", ("a.jpg", "b.jpg")),
        ImageQuestion("one/0", "What is it?", ("a.jpg",)),
        ImageQuestion("one/1", "Which colour?", ("a.jpg",)),
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "What?"}, '"question_id" is None'),
        ({"question_id": True, "text": "What?"}, '"question_id" is True'),
        ({"question_id": 1}, '"text" is None'),
        ({"question_id": 1, "text": " "}, '"text" is'),
        ({"question_id": 1, "text": "What?", "image": 5}, '"image" is 5'),
        ({"question_id": 0, "text": "Again?"}, "asks question_id 0 again, after .*line 1"),
        ({"id": 1, "conversations": [{"value": "What?"}]}, "unknown role .*expected a conversation as LLaVA's"),
        ({"id": 1, "conversations": "What?"}, "unreadable record .*expected a conversation as LLaVA's"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(write, row, told):
    path = write("questions.jsonl", [{"question_id": 0, "text": "Again?"}, row])
    with pytest.raises(UserError, match=f"line 2: .*{told}|line 2: {told}"):
        read_questions(path)


# References


def test_what_is_right_is_read_for_each_metric(write):
    humans = [{"answer": "red", "answer_id": number} for number in range(10)]
    rows = [
        ("exact", {"question_id": 1, "answer": "cat"}, ("cat",)),
        ("exact", {"question_id": 1, "answers": ["cat", 2]}, ("cat", "2")),
        ("exact", {"question_id": 1, "answer": 0}, ("0",)),
        ("vqa", {"question_id": 1, "answers": humans}, ("red",) * 10),
        ("pope", {"question_id": 1, "label": "yes"}, True),
        ("pope", {"question_id": 1, "answer": "No"}, False),
        ("scienceqa", {"question_id": 1, "answer": 1, "choices": ["a", "b"]}, Choice("B", 2)),
        ("scienceqa", {"question_id": 1, "answer": "E"}, Choice("E", 5)),
    ]
    for metric, row, expected in rows:
        assert References(write("answers.jsonl", [row]), metric).find("1", "").answer == expected


@pytest.mark.parametrize(
    ("metric", "row", "told"),
    [
        ("exact", {}, '"answer" is None'),
        ("exact", {"answers": []}, '"answer" is \\[\\]'),
        ("exact", {"answer": {"a": 1}}, '"answer" is'),
        ("vqa", {"answers": ["a", "b", "c"]}, "has 3 of the ten humans' answers"),
        ("pope", {"label": "maybe"}, "'maybe'; metric pope expects yes or no"),
        ("scienceqa", {"answer": 2, "choices": ["a", "b"]}, '"answer" is 2 of 2 choices'),
        ("scienceqa", {"answer": "c"}, "'c' of 5 choices"),
        ("scienceqa", {"answer": -1}, "-1 of 5 choices"),
    ],
)
def test_references_without_an_answer_are_named(write, metric, row, told):
    with pytest.raises(UserError, match=told):
        References(write("answers.jsonl", [{"question_id": 1, **row}]), metric)


def test_an_answer_belongs_to_the_question_that_was_asked(write):
    path = write("answers.jsonl", [{"question_id": 1, "text": "Is there a dog?", "label": "yes"}])
    references = References(path, "pope")
    assert references.find(1, "Is there a dog?\nAnswer in one word.").answer
    with pytest.raises(UserError, match=r"'is there a cat\?', but in .*line 1, it is 'Is there a dog\?'"):
        references.find(1, "is there a cat?")
    with pytest.raises(UserError, match="no answer to question 2"):
        references.find(2, "")
    with pytest.raises(UserError, match=r"line 2: question_id 1 has another answer than in .*line 1"):
        References(
            write("twice.jsonl", [{"question_id": 1, "label": "yes"}, {"question_id": 1, "label": "no"}]), "pope"
        )


def test_textvqa_is_found_by_image_and_question(tmp_path, write, capsys):
    """Its own file, and LLaVA's questions, of which those about one image share their id."""
    asked = [("what brand?", ["nokia"] * 8 + ["phone"] * 2), ("What year?", ["1998"] * 2 + ["unanswerable"] * 8)]
    data = [
        {"question_id": 40 + number, "image_id": "f0a", "question": question, "answers": humans}
        for number, (question, humans) in enumerate(asked)
    ]
    (tmp_path / "textvqa.json").write_text(json.dumps({"data": data}))
    said = ["Nokia", "1998"]
    prompts = [f"{question}\nReference OCR token: 1998\nAnswer shortly." for question, _ in asked]
    rows = [{"question_id": "f0a", "prompt": p, "text": t} for p, t in zip(prompts, said, strict=True)]
    path = write("answers.jsonl", rows)
    assert run("score", "--predictions", path, "--answers", tmp_path / "textvqa.json", "--metric", "vqa") == 0
    printed = capsys.readouterr().out
    assert "vqa accuracy    80.00%" in printed and "unanswered" not in printed


# Majority


def test_the_majority_answers_what_training_mostly_does_to_that_question(write):
    def record(number, *pairs):
        turns = [
            {"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        return {"id": number, "conversations": turns}

    rows = [
        record(0, ("<image>\nIs it red?", "no"), ("What is it?", "circle")),
        record(1, ("is it  red?", "yes"), ("What is it?", "square")),
        record(2, ("Is it red?\n<image>", "no"), ("Is it big?", "yes")),
        record(3, ("Is it small?", "yes")),
        {"id": 4, "conversations": "broken"},
    ]
    majority = Majority(write("train.jsonl", rows))
    asked = ["Is it red?", "What is it?", "Is it big?", "Never asked?"]
    assert [majority.answer(question) for question in asked] == ["no", "circle", "yes", "yes"]  # ties: the first
    with pytest.raises(UserError, match="no question with an answer"):
        Majority(write("none.jsonl", [{"id": 0, "conversations": []}]))


# The command


def test_scores_are_printed_and_written_with_groups_and_majority(write, tmp_path, capsys):
    questions = [("a", "Is there a cat?", "yes", "random"), ("b", "Is there a dog?", "no", "adversarial")]
    answers = write("pope.json", [{"question_id": i, "text": q, "label": a, "category": c} for i, q, a, c in questions])
    said = [{"question_id": i, "prompt": q, "text": "Yes", "image": ["x.jpg"], "visual_tokens": 4 + 2 * n}
            for n, (i, q, _, _) in enumerate(questions)]  # fmt: skip
    train = write(
        "train.jsonl",
        [{"id": 0, "conversations": [{"from": "human", "value": "Other?"}, {"from": "gpt", "value": "no"}]}],
    )
    target = tmp_path / "scores.json"
    arguments = ["--answers", answers, "--metric", "pope", "--majority", train, "--json", target]
    assert run("score", "--predictions", write("said.jsonl", said), *arguments) == 0
    printed = capsys.readouterr().out
    assert "accuracy        50.00%   (majority of the training answers 50.00%)" in printed
    assert "  adversarial    0.00%   (of 1)" in printed
    assert "visual tokens      5.0   an image (4 to 6)" in printed
    record = json.loads(target.read_text())
    assert record["score"] == {"accuracy": 0.5, "precision": 0.5, "recall": 1, "F1": 2 / 3, "yes ratio": 1}
    assert record["majority"]["yes ratio"] == 0 and record["groups"]["random"] == [1, 1.0]
    assert record["visual_tokens"] == {"mean": 5, "min": 4, "max": 6}


def test_scienceqa_is_reported_by_subject_context_and_grade(tmp_path, write, capsys):
    problems = {
        "1": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png",
              "grade": "grade2", "subject": "natural science"},
        "4": {"question": "Who?", "choices": ["a", "b", "c"], "answer": 0, "hint": "see", "image": None,
              "grade": "grade8", "subject": "language science"},
        "5": {"question": "Why?", "choices": ["a", "b", "c"], "answer": 2, "hint": "", "image": None,
              "grade": "grade7", "subject": "social science"},
    }  # fmt: skip
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    said = [{"question_id": "1", "text": "B"}, {"question_id": "4", "text": "C"}]
    arguments = ["--answers", tmp_path / "problems.json", "--metric", "scienceqa", "--json", tmp_path / "scores.json"]
    assert run("score", "--predictions", write("said.jsonl", said), *arguments) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["groups"] == {
        "G1-6": [1, 1.0], "G7-12": [1, 0.0], "IMG": [1, 1.0], "LAN": [1, 0.0], "NAT": [1, 1.0], "TXT": [1, 0.0],
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "unanswered           1" in printed and "unread           0.00%" in printed


def test_llavas_training_form_serves_as_its_own_answers(write, capsys):
    path = write("conversations.jsonl", [CONVERSATION])
    said = [
        {"question_id": "one/0", "prompt": "What is it?", "text": "dog"},
        {"question_id": "one/1", "text": "Brown!"},
    ]
    arguments = ["--predictions", write("said.jsonl", said), "--answers", path, "--metric", "exact"]
    assert run("score", *arguments) == 0
    assert "accuracy        100.00%" in capsys.readouterr().out
    assert run("score", *arguments, "--strict", "true") == 0
    assert "accuracy         0.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "options", "told"),
    [
        ([{"question_id": 1}], [], '"text" is None'),
        ([{"question_id": 1, "text": "a"}] * 2, [], "line 2: answers question_id 1 again"),
        ([{"question_id": 9, "text": "a"}], [], "no answer to question 9"),
        (
            [{"question_id": 1, "text": "", "skipped": "broken image", "detail": "a.jpg"}],
            [],
            "none of the 1 questions has an answer",
        ),
        ([{"question_id": 1, "text": "a"}], ["--metric", "bleu"], "exact"),
        ([{"question_id": 1, "text": "a"}], ["--metric", "vqa", "--strict", "true"], "--strict is for --metric exact"),
        ([{"question_id": 1, "text": "a"}], ["--json", "no/such/folder.json"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_a_sentence(write, capsys, said, options, told):
    answers = write("answers.jsonl", [{"question_id": 1, "answer": "a"}])
    arguments = ["--predictions", write("said.jsonl", said), "--answers", answers]
    arguments += options if "--metric" in options else ["--metric", "exact", *options]
    assert run("score", *arguments) == 2
    sentence = capsys.readouterr().err
    assert told in sentence and "Traceback" not in sentence and sentence.count("\n") == 1


def test_the_majority_of_easy_vqa_is_the_published_splits(shared_data, write, tmp_path, capsys):
    """67.0 % of its test questions are answered by their text alone."""
    import tarfile

    with tarfile.open(shared_data / "vqa" / "easy_vqa.tar") as tar:
        files = {
            split: json.load(tar.extractfile(f"easy_vqa/{split}/questions.json"))  # pyright: ignore
            for split in ("train", "test")
        }
    train = [
        {"id": i, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for i, (question, answer, _) in enumerate(files["train"])
    ]
    rows = [{"question_id": i, "prompt": q, "text": "", "answer": a} for i, (q, a, _) in enumerate(files["test"])]
    path = write("test.jsonl", rows)
    arguments = ["--predictions", path, "--answers", path, "--metric", "exact"]
    assert run("score", *arguments, "--majority", write("train.jsonl", train), "--json", tmp_path / "s.json") == 0
    assert round(json.loads((tmp_path / "s.json").read_text())["majority"]["accuracy"], 3) == 0.670
