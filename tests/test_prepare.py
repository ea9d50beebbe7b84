"""The scripts that make data sets ready: what they write can be read, and the test text stays out of training."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dtpvit.datamodules.conversations import read_conversations

transformers = pytest.importorskip("transformers", reason="needs the extra dtpvit[instruct]")
DATA = Path(__file__).parents[1] / "data"


def prepare(monkeypatch, name, *arguments):
    """Run ``data/NAME/prepare.py`` as from the command line."""
    script = DATA / name / "prepare.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def easy_vqa(tmp_path):
    """A repository laid out as the official one, of four pictures."""
    root = tmp_path / "easy-VQA" / "easy_vqa" / "data"
    for split, questions in [
        ("train", [["what shape?", "circle", 0], ["is it red?", "yes", 0], ["is it red?", "no", 1]]),
        ("test", [["what zebra?", "no", 0], ["what shape?", "triangle", 0], ["what shape?", "circle", 1]]),
    ]:
        (root / split / "images").mkdir(parents=True)
        (root / split / "questions.json").write_text(json.dumps(questions))
        for number in (0, 1):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / split / "images" / f"{number}.png")
    return tmp_path / "easy-VQA"


@pytest.mark.parametrize("packed", [False, True])
def test_easy_vqa(easy_vqa, tmp_path, monkeypatch, capsys, packed):
    source, out = easy_vqa, tmp_path / "out"
    if packed:
        source = tmp_path / "easy.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(easy_vqa, "easy-VQA")
    prepare(monkeypatch, "easy_vqa", source, "--out", out)
    assert "2 images with 3 questions to train on, 3 questions to test" in capsys.readouterr().out
    train, test = (read_conversations(str(out / f"{split}.json")) for split in ("train", "test"))
    assert train.skipped == test.skipped == []
    assert [one.id for one in train] == ["train-0", "train-1"] and train.num_questions.tolist() == [2, 1]
    assert train[0].questions[0].asked == (0, "\nwhat shape?") and train[0].questions[1].answer == "yes"
    assert [one.questions[0].answer for one in test] == ["no", "triangle", "circle"]
    questions, answers = jsonl(out / "questions.jsonl"), jsonl(out / "answers.jsonl")
    assert [row["question_id"] for row in questions] == [row["question_id"] for row in answers] == [o.id for o in test]
    assert questions[2] == {"question_id": "test-2", "image": "1.png", "text": "what shape?"}
    assert answers[1]["answer"] == "triangle" and (out / "test" / "images" / questions[0]["image"]).is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "language_model")
    assert "Ġshape" in tokenizer.get_vocab() and len(tokenizer("zebra")["input_ids"]) > 3
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "language_model").config.hidden_size == 128


def test_what_is_no_easy_vqa_is_refused(tmp_path, monkeypatch, capsys):
    for path, sentence in [(tmp_path, "no train/questions.json"), (tmp_path / "gone", "does not exist")]:
        with pytest.raises(SystemExit) as stopped:
            prepare(monkeypatch, "easy_vqa", path, "--out", tmp_path / "out")
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_easy_vqa_itself(shared_data, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, "easy_vqa", shared_data / "vqa" / "easy_vqa.tar", "--out", tmp_path)
    assert "4000 images with 38575 questions to train on, 9673 questions to test" in capsys.readouterr().out
    train = read_conversations(str(tmp_path / "train.json"))
    assert len(train) == 4000 and train.skipped == [] and int(train.num_questions.sum()) == 38575
    assert {one["answer"] for one in jsonl(tmp_path / "answers.jsonl")} <= {
        *("circle", "rectangle", "triangle", "yes", "no", "red", "green", "blue"),
        *("gray", "teal", "black", "yellow", "brown"),
    }


def test_flickr8k_photographs_are_split_by_image(shared_data, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, "flickr8k_vqa", shared_data / "vqa" / "flickr8k_llava.tar", "--out", tmp_path)
    assert "200 images to train on, 50 to test, with 100 yes-or-no questions" in capsys.readouterr().out
    train, test = (read_conversations(str(tmp_path / f"{split}.json")) for split in ("train", "test"))
    assert train.skipped == test.skipped == [] and (len(train), len(test)) == (200, 150)
    assert train.num_questions.tolist() == [3] * 200 and test.num_questions.tolist() == [1] * 150
    of_train, of_test = ({one.images[0].path for one in split} for split in (train, test))
    assert not of_train & of_test and (len(of_train), len(of_test)) == (200, 50)
    answers = [row["answer"] for row in jsonl(tmp_path / "answers.jsonl")]
    assert (answers.count("yes"), answers.count("no")) == (50, 50)
    assert (tmp_path / "images" / jsonl(tmp_path / "questions.jsonl")[0]["image"]).is_file()
