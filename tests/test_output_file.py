"""What a command writes stands there whole or not at all, and what cannot be written is one sentence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtpvit.evaluation.picture_page import SlidingPanel, write_page
from dtpvit.evaluation.picture_sheet import Panel, write_sheet
from dtpvit.evaluation.segment_pictures import Drawing
from dtpvit.output_file import write_json, write_picture, write_text

ROOT = Path(__file__).parents[1]


def panel(caption: str = "") -> Panel:
    return Panel(Drawing.of_photo(np.zeros((8, 8, 3), np.uint8)), caption)


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.html"])
def test_a_picture_that_cannot_be_finished_leaves_the_old_one(name, tmp_path, monkeypatch):
    def flush(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="No space left"):
        if name.endswith(".html"):
            write_page(tmp_path / name, "", "", ["own"], [[SlidingPanel("", [panel()])]], 0)
        else:
            write_sheet(tmp_path / name, [""], [[panel()]])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"old"}


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [1])
    assert os.read(reader, 100) == b"[\n  1\n]\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_pictures_are_of_the_kind_of_their_ending_and_names_need_not_be_text(tmp_path):
    for ending, kind in ((".png", "PNG"), (".JPG", "JPEG"), (".webp", "WEBP")):
        write_picture(tmp_path / f"a{ending}", Image.new("RGB", (4, 4)))
        with Image.open(tmp_path / f"a{ending}") as picture:
            assert picture.format == kind
    write_text(tmp_path / "a.txt", "name\udcff")
    assert (tmp_path / "a.txt").read_text() == "name?"


def test_words_of_the_page_may_stand_in_what_is_shown(tmp_path):
    words = "HEADING ABOUT MARKS LAST START RAMP PHOTOS ROWS"
    write_page(tmp_path / "a.html", words, words, [words], [[SlidingPanel(words, [panel(words)])]], 0)
    page = (tmp_path / "a.html").read_text()
    assert page.count("<symbol ") == page.count("<section ") == 1
    assert len(re.findall(words, page)) == 6  # title, heading, command, slider, figure, caption


def ended(command: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a line for the shell, in which `python` is this one."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = command.replace("python", sys.executable)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, env=whole, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_meets_a_full_disk_is_one_sentence(unbuffered):
    code, _, said = ended("python -m dtpvit --version > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert code == 2 and said.count("\n") == 1
    assert said.endswith("a file could not be written (No space left on device); make room and start again\n")


def test_output_may_be_closed():
    assert ended("python -m dtpvit help >&- 2>&-") == (0, "", "")
    assert ended("python -m dtpvit report nowhere 2>&-") == (2, "", "")


def test_letters_that_a_terminal_lacks_do_not_end_a_command():
    code = """from dtpvit.cli import main; main(['help']); print('\\u2588\\udcff')"""
    assert ended(f'python -c "{code}"', PYTHONIOENCODING="ascii")[1].endswith("\\u2588\\udcff\n")
