"""What a specification of shards names."""

import pytest
from shard_files import pair, shared, write_shards, write_tar

from dtpvit.datamodules.shards import count_samples, expand_shards, shard_counts
from dtpvit.errors import UserError


def names(shards):
    return [shard.rsplit("/", 2)[-2] + "/" + shard.rsplit("/", 1)[-1] for shard in shards]


def test_every_way_of_naming_shards_gives_the_same_list(tmp_path):
    shards = write_shards(tmp_path / "a", [1, 2, 3])
    more = write_shards(tmp_path / "b", [1])
    a, b = tmp_path / "a", tmp_path / "b"
    assert expand_shards(str(a)) == shards
    assert expand_shards(f"{a}/{{00000..00002}}.tar") == shards
    assert expand_shards(f"{a}/*.tar") == shards
    assert expand_shards(shards) == shards
    assert expand_shards(f"{a}/0000[12].tar") == shards[1:]
    assert expand_shards(f"{a}::{b}") == expand_shards([str(a), str(b)]) == shards + more
    assert expand_shards(f"{tmp_path}/{{a,b}}") == shards + more


def test_a_shard_named_twice_is_read_once(tmp_path):
    shards = write_shards(tmp_path / "a", [1, 2])
    assert expand_shards([f"{tmp_path}/a", shards[1]]) == shards


def test_addresses_and_commands_are_left_alone():
    web = "https://host/a/{00000..00001}.tar"
    assert expand_shards(web) == ["https://host/a/00000.tar", "https://host/a/00001.tar"]
    assert expand_shards("pipe:cat /nowhere/{0,1}.tar") == [
        "pipe:cat /nowhere/0.tar",
        "pipe:cat /nowhere/1.tar",
    ]
    assert count_samples(expand_shards(web)) is None


def test_counts_come_from_img2dataset(tmp_path):
    shards = write_shards(tmp_path / "a", [3, 4])
    assert count_samples(shards) == 7
    write_tar(tmp_path / "a" / "00002.tar", {"x": pair(1)}, stats=False)
    assert shard_counts(expand_shards(str(tmp_path / "a"))) == [3, 4, None]
    assert count_samples(expand_shards(str(tmp_path / "a"))) is None
    (tmp_path / "a" / "00002_stats.json").write_text("{broken")
    assert count_samples(expand_shards(str(tmp_path / "a"))) is None


def test_shards_without_a_success_are_dropped(tmp_path):
    write_shards(tmp_path / "a", [2, 0, 1])
    assert names(expand_shards(str(tmp_path / "a"))) == ["a/00000.tar", "a/00002.tar"]
    write_shards(tmp_path / "b", [0])
    with pytest.raises(UserError, match=r"All 1 shards .* are empty"):
        expand_shards(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("{0}/nothing", "nothing does not exist; give a folder"),
        ("{0}/a/{{00000..00004}}.tar", r"2 of the 5 shards .* do not exist, the first is .*00003\.tar"),
        ("{0}/empty", "No shards are at .* a folder with"),
        ("{0}/a/*.txt", "No shards are at .* a glob"),
        ("", "No shards are named"),
        ("::", "No shards are named"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(tmp_path, spec, sentence):
    write_shards(tmp_path / "a", [1, 1, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence) as error:
        expand_shards(spec.format(tmp_path))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_real_shards_of_img2dataset():
    shards = expand_shards(str(shared("captions/flickr8k_sq224")))
    assert names(shards) == [f"flickr8k_sq224/0000{i}.tar" for i in range(4)]
    assert count_samples(shards) == 2000
