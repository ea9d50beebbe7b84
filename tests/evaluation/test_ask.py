"""``dtpvit ask``, from the command line to the answer."""

import pytest
from colour_assistant import IS_RED, NAME, plain

from dtpvit.cli import main


@pytest.fixture
def images(tmp_path):
    for colour in ("red", "green", "blue"):
        plain(colour).save(tmp_path / f"{colour}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    return tmp_path


def test_each_question_gets_its_line_and_standard_error_says_what_it_took(colour_assistant, images, capsys):
    arguments = ["--checkpoint", str(colour_assistant), "--image", str(images / "red.png"), NAME, IS_RED]
    assert main(["ask", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == "red\nyes\n"
    last = printed.err.splitlines()[-1]
    assert last.startswith("dtpvit: ") and " visual tokens, prefill " in last and last.endswith(" ms")


def test_several_images_are_read_in_their_order_and_none_is_fine(colour_assistant, images, capsys):
    tokens = {}
    for names in (["green"], ["blue"], ["green", "blue"], []):
        options = [word for name in names for word in ("--image", str(images / f"{name}.png"))]
        assert main(["ask", "--checkpoint", str(colour_assistant), *options, "--max-new-tokens", "4", NAME]) == 0
        printed = capsys.readouterr()
        tokens[tuple(names)] = int(printed.err.splitlines()[-1].split()[1])
        assert len(names) != 1 or printed.out == f"{names[0]}\n"
    assert tokens["green", "blue"] == tokens["green",] + tokens["blue",] > 0 == tokens[()]


def test_a_system_prompt_comes_first(colour_assistant, images, capsys):
    from dtpvit.interop.assistant import Question, load_assistant

    arguments = ["--checkpoint", str(colour_assistant), "--image", str(images / "red.png"), "--system", "no no no red"]
    assert main(["ask", *arguments, NAME]) == 0
    asked = Question.of(NAME, plain("red"), system="no no no red")
    assert capsys.readouterr().out == load_assistant(colour_assistant).answer([asked], 256)[0].text + "\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image", "absent.png"], "absent.png cannot be read (No such file"),
        (["--image", "torn.png"], "torn.png is no whole image (broken image)"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--checkpoint", "absent.ckpt"], "absent.ckpt does not exist"),
        (["--checkpoint", "."], "holds no dtpvit_config.json"),
    ],
)
def test_mistakes_are_told_in_a_sentence(colour_assistant, images, monkeypatch, capsys, options, told):
    monkeypatch.chdir(images)
    assert main(["ask", "--checkpoint", str(colour_assistant), *options, NAME]) == 2
    sentence = capsys.readouterr().err
    assert told in sentence and sentence.startswith("dtpvit: ") and sentence.count("\n") == 1


def test_a_question_longer_than_the_model_reads_is_refused(colour_assistant, capsys):
    assert main(["ask", "--checkpoint", str(colour_assistant), "why " * 400]) == 2
    assert "longer than max_length, 256" in capsys.readouterr().err
