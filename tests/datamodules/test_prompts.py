import pickle

import pytest
from open_clip.zero_shot_metadata import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
)

from dtpvit.datamodules.prompts import Template, load_classnames, load_templates
from dtpvit.errors import UserError


def test_no_specification_means_the_thousand_imagenet_names():
    names = load_classnames(None)
    assert names == list(IMAGENET_CLASSNAMES)
    assert len(names) == 1000
    assert names[0] == "tench"


def test_names_come_from_a_file_in_its_order(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffzebra\r\n  café au lait \r\napple\r\n\r\n".encode())
    assert load_classnames(str(file)) == ["zebra", "café au lait", "apple"]
    assert load_classnames(["zebra", "apple"]) == ["zebra", "apple"]


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"one\n\nthree\n", "place 2 of 3"), (b"\n \n", "no class names"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_file_that_would_shift_labels_is_refused(tmp_path, content, found):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=found):
        load_classnames(str(file))


def test_a_missing_names_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file of class names"):
        load_classnames(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("spec", "theirs"), [("openai", OPENAI_IMAGENET_TEMPLATES), ("simple", SIMPLE_IMAGENET_TEMPLATES)]
)
def test_known_sets_are_open_clips(spec, theirs):
    ours = load_templates(spec)
    assert [template("tench") for template in ours] == [template("tench") for template in theirs]


def test_none_is_the_bare_name():
    assert [template("a {} b") for template in load_templates("none")] == ["a {} b"]


def test_templates_from_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {c}.\n\n{} in the wild\n  {c}, or {}?  \n")
    prompts = [template("newt") for template in load_templates(str(file))]
    assert prompts == ["a photo of a newt.", "newt in the wild", "newt, or newt?"]


def test_a_name_is_never_taken_for_a_pattern():
    assert Template("a {c}")(r"\1 {} {c} %s") == r"a \1 {} {c} %s"


def test_templates_from_a_file_can_be_pickled(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {c}")
    assert pickle.loads(pickle.dumps(load_templates(str(file))))[0]("newt") == "a newt"


@pytest.mark.parametrize(("content", "found"), [("a {c}\na photo of {name}\n", "line 2"), ("\n", "holds no templates")])
def test_a_template_file_without_placeholders_is_refused(tmp_path, content, found):
    file = tmp_path / "templates.txt"
    file.write_text(content)
    with pytest.raises(UserError, match=found):
        load_templates(str(file))


def test_an_unknown_set_is_refused():
    with pytest.raises(UserError, match=r"openai80 is no file .* openai, simple, none"):
        load_templates("openai80")
