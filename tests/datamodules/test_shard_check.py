"""What a check finds, and that a repaired copy has it no more."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shard_files import jpeg, pair, shared, tokenize, write_shards, write_tar

from dtpvit.cli import main
from dtpvit.datamodules import shard_repair
from dtpvit.datamodules.samples import ImageText, SkippedSample
from dtpvit.datamodules.shard_check import FOUND, check
from dtpvit.datamodules.shard_keys import KeysOverShards
from dtpvit.datamodules.shards import expand_shards
from dtpvit.datamodules.tars import read_members
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform


def bomb():
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    return stream.getvalue()


BAD = {
    "ok0": pair(0),
    "cut": pair(1, jpeg(1)[:150]),
    "zero": pair(2, b""),
    "html": pair(3, b"<html>not here</html>"),
    "bomb": {"png": bomb(), "txt": b"caption 4"},
    "mute": {"jpg": jpeg(5)},
    "blank": {"jpg": jpeg(6), "txt": b" \n"},
    "latin": {"jpg": jpeg(7), "txt": "caption d\xe9j\xe0 7".encode("latin-1"), "json": b"{}"},
    "emoji": {"jpg": jpeg(8, (30, 15)), "txt": "👩‍🚀 עברית 8".encode()},
    "long": {"jpg": jpeg(9), "txt": b"x" * 100_000},
    "named": {"jpg": jpeg(10), "cls": b"3"},
    "listed": {"jpg": jpeg(11), "json": b'{"captions": ["one 11", "", "two 11"]}'},
}
CAUSES = {
    "broken image": ["cut", "html"],
    "no image": ["zero"],
    "oversized image": ["bomb"],
    "no caption": ["mute", "blank"],
    "caption not UTF-8": ["latin"],
}
USABLE = ["ok0", "latin", "emoji", "long", "named", "listed"]


def checked(folder, *options):
    """The command's exit code and record."""
    report = Path(folder).parent / "check.json"
    code = main(["data", "check", str(folder), "--workers", "1", "--json", str(report), *map(str, options)])
    return code, json.loads(report.read_text())


def found(record):
    return {cause: [where for _, where in problems] for cause, problems in record["problems"].items()}


def rewrite_stats(shard, **changes):
    path = Path(str(shard).replace(".tar", "_stats.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_kind_of_bad_sample_is_named(tmp_path, capsys):
    write_tar(tmp_path / "a" / "00000.tar", BAD)
    code, record = checked(tmp_path / "a")
    assert code == FOUND and found(record) == CAUSES
    assert (record["samples"], record["usable"]) == (12, 6)
    assert record["percentiles"]["width"]["100"] == 30 and record["percentiles"]["width / height"]["50"] == 1.2
    lengths = record["caption_lengths"]
    assert (lengths["1-15"], lengths["65536-"], sum(lengths.values())) == (5, 1, 6)
    said = capsys.readouterr().out
    assert said.startswith("6 of 12 samples are usable (50 %), in 1 shards.") and "00000.tar: bomb" in said


def test_what_is_usable_is_what_training_uses(tmp_path):
    shard = write_tar(tmp_path / "a" / "00000.tar", {key: parts for key, parts in BAD.items() if key != "named"})
    recipe, used = ImageText(eval_transform(8), tokenize), []
    for raw in recipe.read(shard, lambda cause, where: None):
        try:
            recipe.decode(raw, 0)
            used.append(raw.key.rpartition("/")[2])
        except SkippedSample:
            pass
    assert used == [key for key in USABLE if key != "named"]
    assert checked(tmp_path / "a")[1]["usable"] == len(used)


def test_a_repaired_copy_is_clean_and_says_what_was_lost(tmp_path, capsys):
    source = Path(write_tar(tmp_path / "a" / "00000.tar", BAD))
    rewrite_stats(source, count=20, status_dict={"success": 12, "HTTP Error 404: Not Found": 8}, duration=3.5)
    before = source.read_bytes()
    code, _ = checked(tmp_path / "a", "--repair", tmp_path / "b")
    assert code == FOUND and source.read_bytes() == before
    assert "Wrote 6 samples in 1 shards" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000.tar", "00000_stats.json", "sizes.json"]
    copied = list(read_members(str(tmp_path / "b" / "00000.tar")))
    assert list(dict.fromkeys(name.split(".")[0] for name, _ in copied)) == USABLE
    for name, data in copied:
        key, ending = name.split(".")
        assert data == BAD[key][ending] or (name == "latin.txt" and data.decode() == "caption d\ufffdj\ufffd 7")
    assert len(copied) == sum(len(BAD[key]) for key in USABLE)
    stats = json.loads((tmp_path / "b" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["duration"]) == (20, 6, 3.5)
    assert stats["status_dict"] == {"success": 6, "HTTP Error 404: Not Found": 8, "no image": 1, "no caption": 2} | {
        "broken image": 2,
        "oversized image": 1,
    }
    assert json.loads((tmp_path / "b" / "sizes.json").read_text()) == {"00000.tar": 6}
    assert checked(tmp_path / "b")[0] == 0
    assert checked(tmp_path / "b", "--repair", tmp_path / "c")[0] == 0
    assert (tmp_path / "c" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()


def test_shards_that_are_damaged_empty_missing_or_unfinished(tmp_path, capsys):
    shards = [Path(shard) for shard in write_shards(tmp_path / "a", [4, 0, 3, 2, 0, 1, 2])]
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    shards[2].unlink()
    shards[3].write_bytes(b"")
    rewrite_stats(shards[4], successes=2)
    Path(str(shards[5]).replace(".tar", "_stats.json")).unlink()
    code, record = checked(tmp_path / "a", "--repair", tmp_path / "b")
    by_shard = {cause: [Path(shard).name for shard, _ in problems] for cause, problems in record["problems"].items()}
    assert code == FOUND and by_shard == {
        "missing shard": ["00002.tar"],
        "unreadable shard": ["00000.tar", "00003.tar"],
        "wrong number of samples": ["00000.tar", "00003.tar", "00004.tar"],
        "unfinished shard": ["00005.tar"],
    }
    assert record["empty_shards"] == 1 and "cut off" in record["problems"]["unreadable shard"][0][1]
    assert "1 shards are empty, as their _stats.json says" in capsys.readouterr().out
    code, record = checked(tmp_path / "b")
    assert code == FOUND and list(record["problems"]) == ["missing shard"]  # which no copy can bring back
    assert [name[-9:] for name in expand_shards(str(tmp_path / "b"))] == ["00000.tar", "00005.tar", "00006.tar"]


def test_a_shard_of_nothing_is_a_problem_where_no_stats_explain_it(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", {}, stats=False)
    code, record = checked(tmp_path / "a")
    assert code == FOUND and found(record) == {"empty shard": ["no samples"]}


def test_keys_that_occur_twice(tmp_path, capsys):
    path = tmp_path / "a" / "00000.tar"
    write_tar(path, {"x": pair(0), "y": pair(1)})
    with tarfile.open(path, "a") as tar:
        for ending, data in pair(2).items():
            member = tarfile.TarInfo(f"x.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write_tar(tmp_path / "a" / "00001.tar", {"y": pair(3)})
    code, record = checked(tmp_path / "a", "--repair", tmp_path / "b")
    assert code == FOUND and found(record) == {"duplicate key": ["x"]}
    assert record["keys_in_several_shards"]["number"] == 1
    assert "1 keys occur in several shards (y in 00000.tar and 00001.tar)" in capsys.readouterr().out
    assert dict(read_members(str(tmp_path / "b" / "00000.tar")))["x.jpg"] == jpeg(0)
    assert checked(tmp_path / "b")[0] == 0


def test_shared_keys_are_all_found():
    keys = KeysOverShards()
    for shard in range(30):
        keys.add(f"{shard}.tar", [f"{shard * 90 + place:09d}" for place in range(100)])
    number, examples = keys.shared(examples=400)
    assert number == 29 * 10 and examples["000000095"] == ["0.tar", "1.tar"] and len(examples) == 290
    assert KeysOverShards().shared() == (0, {})


def test_several_processes_find_the_same(tmp_path):
    write_shards(tmp_path / "a", [3, 4, 2], broken=(1, 8))
    one = checked(tmp_path / "a")[1]
    two = checked(tmp_path / "a", "--workers", 2, "--repair", tmp_path / "b")[1]
    assert one == two and found(one)["broken image"] == ["000000001", "000000008"]
    assert checked(tmp_path / "b")[0] == 0


@pytest.mark.parametrize(
    ("shards", "out", "sentence"),
    [
        (["a"], "a", "holds the shards themselves"),
        (["a"], "b", "already holds 00000.tar: give --repair an empty folder"),
        (["a", "b"], "c", "2 of the shards are called 00000.tar"),
        (["pipe:cat a/00000.tar"], "c", "would have no name"),
        (["a"], "a/00000.tar/c", "cannot be made"),
    ],
)
def test_nothing_is_ever_overwritten(tmp_path, monkeypatch, shards, out, sentence):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "a", [1])
    write_shards(tmp_path / "b", [1])
    before = {path: path.read_bytes() for path in tmp_path.glob("?/*")}
    with pytest.raises(UserError, match=sentence):
        check(shards, repair=out, workers=1)
    assert {path: path.read_bytes() for path in tmp_path.glob("?/*")} == before


def test_a_full_disk_leaves_whole_shards_only(tmp_path, monkeypatch):
    write_shards(tmp_path / "a", [3, 3])
    add, calls = shard_repair._add, []

    def limited(tar, key, parts):
        calls.append(key)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        add(tar, key, parts)

    monkeypatch.setattr(shard_repair, "_add", limited)
    with pytest.raises(UserError, match=r"failed \(No space left on device\)"):
        check([str(tmp_path / "a")], repair=str(tmp_path / "b"), workers=1)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000.tar", "00000_stats.json"]


def test_real_shards_are_clean(tmp_path):
    source = shared("captions/flickr8k_ar256") / "00000.tar"
    code = main(["data", "check", str(source), "--workers", "1", "--json", str(tmp_path / "check.json")])
    record = json.loads((tmp_path / "check.json").read_text())
    assert code == 0 and record["usable"] == 500 and record["percentiles"]["short side"]["50"] == 256
