"""A sheet shows what is in the shards, whatever people write under their images."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from shard_files import jpeg, pair, shared, write_shards, write_tar

from dtpvit.datamodules.contact_sheet import _choose, _wrap, show
from dtpvit.datamodules.shards import expand_shards
from dtpvit.errors import UserError

CAPTIONS = {
    "emoji": "👩‍🚀🎉 ride",
    "hebrew": "שלום עולם " * 20,
    "arabic": "مرحبا بالعالم",
    "long": "word " * 20_000,
    "one word": "w" * 100_000,
    "lines": "a\nb\tc\0d",
    "space": " \n ",
}


def captioned():
    samples = {key: {"jpg": jpeg(3), "txt": text.encode()} for key, text in CAPTIONS.items()}
    samples["surrogate"] = {"jpg": jpeg(3), "json": json.dumps({"caption": "half \ud83d of a pair"}).encode()}
    samples["latin"] = {"jpg": jpeg(3), "txt": "d\xe9j\xe0".encode("latin-1")}
    samples["label"] = {"jpg": jpeg(3), "cls": b"7"}
    return samples | {"broken": pair(0, b"<html>"), "thin": pair(0, jpeg(0, (2000, 1)))}


def drawn(folder, tmp_path, **options):
    show([str(folder)], str(tmp_path / "sheet.png"), **options)
    return np.array(Image.open(tmp_path / "sheet.png"))


def chosen(folder, count, seed):
    return [cell.where for cell in _choose(expand_shards(str(folder)), count, seed)]


def test_any_caption_and_image_can_be_drawn(tmp_path, capsys):
    write_tar(tmp_path / "a" / "0.tar", captioned())
    sheet = drawn(tmp_path / "a", tmp_path)
    assert "12 samples are in" in capsys.readouterr().out and sheet.shape[2] == 3
    photograph = np.array(Image.open(io.BytesIO(jpeg(3))))
    assert (sheet[8 + 90 : 8 + 110, 8 + 88 : 8 + 112] == photograph).all()
    texts = sheet[8 + 200 : 8 + 270]
    assert all((texts[:, 8 + 208 * place : 208 * (place + 1)] < 100).any() for place in range(8))


def test_the_sheet_is_a_function_of_shards_and_seed(tmp_path):
    write_shards(tmp_path / "a", [30, 1, 30])
    one, same = drawn(tmp_path / "a", tmp_path, count=9, seed=1), drawn(tmp_path / "a", tmp_path, count=9, seed=1)
    assert (one == same).all()
    picks = [tuple(chosen(tmp_path / "a", 9, seed)) for seed in range(20)]
    assert len(set(picks)) == 20 and all(len(set(pick)) == 9 for pick in picks)
    drawn_from = {where for pick in picks for where in pick}
    assert len(drawn_from) > 50 and {where[:9] for where in drawn_from} == {"00000.tar", "00001.tar", "00002.tar"}


def test_no_more_shards_are_read_than_images_are_shown(tmp_path):
    write_shards(tmp_path / "a", [3] * 10)
    picks = chosen(tmp_path / "a", 4, 0)
    assert len(picks) == 4
    assert {where[:9] for seed in range(30) for where in chosen(tmp_path / "a", 4, seed)} == {
        f"{number:05d}.tar" for number in range(10)
    }


def test_captions_are_cut_to_what_fits():
    assert _wrap("short") == ["short"] and _wrap("") == []
    lines = _wrap("many words of a caption " * 16)
    assert len(lines) == 4 and lines[-1].endswith("…")
    assert " ".join(lines)[:-1] in "many words of a caption " * 16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "count is 0"),
        ({"out": "sheet.tar"}, "does not end as a picture does"),
        ({"out": "nowhere/sheet.png"}, "cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch, options, sentence):
    write_shards(tmp_path / "a", [1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        show(["a"], **options)


def test_shards_without_a_pair_are_refused(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", {"x": {"txt": b"no image"}})
    with pytest.raises(UserError, match=r"No sample of .* has an image"):
        show([str(tmp_path / "a")], str(tmp_path / "sheet.png"))


def test_real_pairs(tmp_path):
    sheet = drawn(shared("captions/flickr8k_ar256"), tmp_path, count=10)
    assert sheet.shape[:2] == (2 * (200 + 5 * 14 + 8) + 8, 8 * 208 + 8) and sheet.std() > 40
