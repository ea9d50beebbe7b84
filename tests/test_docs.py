"""What the pages of ``docs/`` and the README show is what happens: Python runs, commands parse."""

import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import jsonargparse
import pytest
import yaml

from dtpvit._shorthands import SHORTHANDS
from dtpvit.cli import COMMANDS, main

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(REPOSITORY.glob("data/*/README.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind ``dtpvit`` of each command in a page's blocks."""
    for block in blocks(page, "bash", ""):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if found := re.match(r"\s*(?:\.venv/bin/)?dtpvit (.*)", line):
                yield shlex.split(found[1], comments=True)


PYTHON = [
    pytest.param(block, id=f"{page.relative_to(REPOSITORY)}-{number}")
    for page in PAGES
    # Not the README's, which test_readme.py runs, nor those of an exported folder: tests/interop/test_model_card.py.
    if DOCS in page.parents and page.name != "inference.md"
    for number, block in enumerate(blocks(page, "python"))
]
COMMAND_LINES = sorted({tuple(words) for page in PAGES for words in commands(page)})


@pytest.mark.parametrize("block", PYTHON)
def test_python_runs(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


class Parsed(Exception):
    """Raised in place of the work, once a command line has been understood."""


@pytest.fixture
def only_parse(monkeypatch):
    parse = jsonargparse.ArgumentParser.parse_args
    depth = []

    def parse_and_stop(self, *args, **kwargs):
        depth.append(1)
        try:
            found = parse(self, *args, **kwargs)
        finally:
            depth.pop()
        if not depth:
            raise Parsed
        return found

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_commands_parse(words, only_parse, capsys, monkeypatch):
    monkeypatch.setenv("DTPVIT_DEBUG", "1")
    if words == ("--help",):
        assert main(list(words)) == 0
        return
    config = [] if "validate" not in words or "--config" in words else ["--config", "configs/flowers224.yaml"]
    with pytest.raises(Parsed):
        main([*words, *config])


def test_there_is_something_to_check():
    assert len(PYTHON) >= 6 and len(COMMAND_LINES) >= 40
    assert {words[0] for words in COMMAND_LINES} >= {"fit", "show", "compare", "zeroshot", "cost", "adapt", "export"}


def options_of(name: str) -> set[str]:
    """Of a function its parameters; of Lightning's commands those that sentences name."""
    if COMMANDS[name].target is None:
        return {"config", "ckpt_path", "find", "help", *re.findall(r"^  --(\w+)", SHORTHANDS, re.MULTILINE)}
    module, function = COMMANDS[name].target.split(":")
    return {"help", *inspect.signature(getattr(importlib.import_module(module), function)).parameters}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_and_options_in_sentences_exist(page):
    for name, rest in re.findall(r"`dtpvit ((?:data )?\w+)([^`]*)`", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        assert name in COMMANDS, name
        for option in re.findall(r"--([\w-]+)", rest):
            assert option.replace("-", "_") in options_of(name), (name, option)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_the_command_that_drew_a_picture_is_beside_it(page):
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("!["):
            continue
        target = re.search(r"\]\(([^)]+)\)", line)[1]
        assert (page.parent / target).is_file(), target
        assert len(line.split("](")[0]) > 20, "say in words what is seen"
        near = "\n".join(lines[:12] if page.parent.name == "results" else lines[number + 1 : number + 8])
        assert re.search(r"^(dtpvit|python -m) ", near, re.MULTILINE), (page, target)


def test_no_page_is_left_out_of_the_navigation():
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/]+\.md", yaml.safe_dump(config["nav"])))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    there |= {f"data_sets/{path.parent.name}.md" for path in REPOSITORY.glob("data/*/README.md")}
    there |= {f"notebooks/{path.stem}.md" for path in DOCS.glob("notebooks/*.ipynb")} | {
        "contributing.md",
        "changelog.md",
    }
    assert there == listed
