"""How many addresses became usable samples, by img2dataset's word and by reading."""

import json

import pytest
from shard_files import pair, shared, write_shards, write_tar

from dtpvit.datamodules.shard_count import cause_of_status, count
from dtpvit.datamodules.shards import count_samples, expand_shards, shard_counts
from dtpvit.errors import UserError


def write_stats(folder, number, successes, **statuses):
    total = successes + sum(statuses.values())
    stats = {"count": total, "successes": successes, "status_dict": {"success": successes} | statuses}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))


@pytest.fixture
def crawl(tmp_path):
    """Three shards of 6, 0 and 3 samples, for which 20 addresses were asked."""
    folder = tmp_path / "crawl"
    write_shards(folder, [6, 0, 3])
    write_stats(folder, 0, 6, **{"HTTP Error 404: Not Found": 3, "<urlopen error timed out>": 1})
    write_stats(folder, 1, 0, **{"The read operation timed out": 2})
    write_stats(folder, 2, 3, **{"Image decoding error": 4, "HTTP Error 404: NOT FOUND": 1})
    return folder


def counted(tmp_path, *shards, **options):
    count([str(shard) for shard in shards], json=str(tmp_path / "count.json"), **options)
    return json.loads((tmp_path / "count.json").read_text())


def test_the_answer_is_that_of_img2dataset(crawl, tmp_path, capsys):
    record = counted(tmp_path, crawl)
    assert (record["usable"], record["addresses"], record["shards"]) == (9, 20, 3)
    assert record["causes"] == {"HTTP 404": 4, "not an image, or a broken one": 4, "timed out": 3}
    said = capsys.readouterr().out
    assert said.startswith("9 of 20 addresses are usable (45 %), in 3 shards.\n")
    assert [line.split() for line in said.splitlines()[2:4]] == [
        ["usable", "9", "45.00"],
        ["HTTP", "404", "4", "20.00"],
    ]


def test_sizes_are_those_open_clip_adds_up_and_training_finds(crawl, tmp_path):
    counted(tmp_path, crawl)
    assert json.loads((crawl / "sizes.json").read_text()) == {"00000.tar": 6, "00001.tar": 0, "00002.tar": 3}
    for stats in crawl.glob("*_stats.json"):
        stats.unlink()
    assert [name[-9:] for name in expand_shards(str(crawl))] == ["00000.tar", "00002.tar"]
    assert count_samples(expand_shards(str(crawl))) == 9


def test_counting_a_part_leaves_the_sizes_of_the_rest(crawl, tmp_path):
    counted(tmp_path, crawl)
    (crawl / "00001.tar").unlink()
    write_stats(crawl, 2, 2)
    counted(tmp_path, crawl / "00002.tar")
    assert json.loads((crawl / "sizes.json").read_text()) == {"00000.tar": 6, "00002.tar": 2}


def test_what_was_downloaded_is_believed_only_until_it_is_read(crawl, tmp_path, capsys):
    write_tar(crawl / "00002.tar", {"0": pair(0), "1": {"jpg": b"", "txt": b"x"}, "2": {"jpg": b"x"}}, stats=False)
    (crawl / "00000.tar").write_bytes((crawl / "00000.tar").read_bytes()[: 2 * 3 * 1024])
    record = counted(tmp_path, crawl, deep=True, workers=1)
    read = record["sizes"][str(crawl / "00000.tar")]
    assert 0 < read < 6 and record["usable"] == read + 1
    assert record["causes"]["in _stats.json, not in the shard"] == 6 - read
    assert (record["causes"]["no image"], record["causes"]["no caption"]) == (1, 1)
    assert record["usable"] + sum(record["causes"].values()) == record["addresses"] == 20
    assert "unreadable shard: 1, named by `dtpvit data check`" in capsys.readouterr().out
    assert shard_counts([str(crawl / "00000.tar")]) == [6]  # what training goes by, until the shards are repaired


def test_unfinished_shards_are_named_and_counted_only_by_reading(crawl, tmp_path, capsys):
    (crawl / "00002_stats.json").unlink()
    record = counted(tmp_path, crawl)
    assert (record["usable"], record["addresses"]) == (6, 12) and len(record["without_stats"]) == 1
    assert "unfinished: 00002.tar; they are not counted" in capsys.readouterr().out
    assert "00002.tar" not in json.loads((crawl / "sizes.json").read_text())
    record = counted(tmp_path, crawl, deep=True, workers=2)
    assert (record["usable"], record["addresses"]) == (9, 15)
    assert json.loads((crawl / "sizes.json").read_text())["00002.tar"] == 3


def test_without_any_stats_deep_is_asked_for(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", {"x": pair(0)}, stats=False)
    with pytest.raises(UserError, match=r"None of the 1 shards.*give --deep"):
        count([str(tmp_path / "a")])
    assert counted(tmp_path, tmp_path / "a", deep=True, workers=1)["usable"] == 1


def test_shards_of_one_name_do_not_share_a_size(tmp_path):
    write_shards(tmp_path / "a", [1])
    write_shards(tmp_path / "b", [2])
    with pytest.raises(UserError, match="count each folder by itself"):
        count([str(tmp_path / "a"), str(tmp_path / "b")], out=str(tmp_path / "sizes.json"))
    count([str(tmp_path / "a"), str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "sizes.json").read_text()) == {"00000.tar": 2}


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        ("HTTP Error 403: Forbidden", "HTTP 403"),
        ("<urlopen error [Errno -2] Name or service not known>", "host not found"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "certificate refused"),
        ("<urlopen error [Errno 111] Connection refused>", "connection refused or lost"),
        ("[Errno 104] Connection reset by peer", "connection refused or lost"),
        ("IncompleteRead(100 bytes read, 4000 more expected)", "answer cut off"),
        ("Use of image disallowed by X-Robots-Tag directive", "refused by X-Robots-Tag"),
        ("image too small", "image too small"),
        ("x" * 90, "x" * 59 + "…"),
    ],
)
def test_messages_that_differ_by_address_are_one_cause(status, cause):
    assert cause_of_status(status) == cause


@pytest.mark.parametrize(
    "stats", ["[]", "{}", '{"successes": "9"}', '{"successes": -1}', "{" * 9, '{"successes": true}']
)
def test_stats_that_are_none_are_not_believed(tmp_path, stats):
    shard = write_tar(tmp_path / "a" / "0.tar", {"x": pair(0)}, stats=False)
    (tmp_path / "a" / "0_stats.json").write_text(stats)
    assert shard_counts([shard]) == [None]


def test_real_shards(tmp_path):
    record = counted(
        tmp_path, shared("captions/flickr8k_sq224"), deep=True, workers=1, out=str(tmp_path / "sizes.json")
    )
    assert record["usable"] == record["addresses"] == 2000 and not record["causes"]
