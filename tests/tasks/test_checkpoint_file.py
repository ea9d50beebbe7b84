"""Checkpoint files: a full disk, damage, formats; see tests/test_killed_runs.py for kills."""

import resource
from contextlib import contextmanager

import pytest
import torch

from dtpvit.errors import UserError
from dtpvit.interop import checkpoint_format
from dtpvit.interop.checkpoint_format import FORMAT, FORMAT_KEY
from dtpvit.interop.weight_files import damage, read_checkpoint
from dtpvit.tasks.checkpoint_file import CheckpointFiles, remove_partial, whole_checkpoints


@contextmanager
def disk_of(size):
    """No file grows beyond so many bytes: what writing meets on a full disk, but for the error's number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(step=1, size=1000):
    return {"global_step": step, "pytorch-lightning_version": "2.6.0", "state_dict": {"weight": torch.randn(size)}}


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_which(tmp_path):
    files = CheckpointFiles()
    with (
        disk_of(50_000),
        pytest.raises(UserError, match=r"last.ckpt could not be written \(.+\); there is no earlier checkpoint"),
    ):
        files.save_checkpoint(content(size=100_000), tmp_path / "run" / "last.ckpt")
    assert list((tmp_path / "run").iterdir()) == []
    files.save_checkpoint(content(step=7), tmp_path / "run" / "last.ckpt")
    with (
        disk_of(50_000),
        pytest.raises(UserError, match=r"the last good checkpoint is .+last.ckpt \(step 7\); make room"),
    ):
        files.save_checkpoint(content(step=8, size=100_000), tmp_path / "run" / "last.ckpt")
    assert files.load_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 7
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.ckpt"]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    for name in ("last.ckpt", "last.ckpt.partial", "epoch000-step7.ckpt.partial", "mine.partial"):
        (tmp_path / name).write_bytes(b"?")
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "mine.partial"]


def test_damage_is_seen_wherever_it_is(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(content(size=5000), path)
    whole = path.read_bytes()
    assert damage(path) is None
    hole = whole[: len(whole) // 2] + bytes(512) + whole[len(whole) // 2 + 512 :]
    for broken in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], hole, b"text" * 99):
        path.write_bytes(broken)
        assert damage(path), len(broken)
    torch.save(content(step=3), tmp_path / "b.ckpt")
    assert list(whole_checkpoints(tmp_path)) == [tmp_path / "b.ckpt"]


@pytest.mark.parametrize(("place", "bit"), [(8, 0x01), (8, 0x20), (8, 0x40), (6, 0x80), (10, 0x04)], ids=str)
def test_a_tampered_directory_is_damage(place, bit, tmp_path):
    """The file seems encrypted, patched, of a version to come, compressed in a way of old."""
    torch.save(content(), tmp_path / "a.ckpt")
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    data[data.index(b"PK\1\2") + place] ^= bit
    (tmp_path / "a.ckpt").write_bytes(data)
    assert damage(tmp_path / "a.ckpt") == "cannot be read to its end"
    assert list(whole_checkpoints(tmp_path)) == []


def test_checkpoints_of_before_the_number_are_brought_up_to_date(tmp_path, monkeypatch):
    torch.save(content(), tmp_path / "old.ckpt")
    assert read_checkpoint(tmp_path / "old.ckpt")[FORMAT_KEY] == FORMAT
    renamed = {"weight": "kernel"}

    def second(found):
        found["state_dict"] = {renamed[name]: value for name, value in found["state_dict"].items()}

    monkeypatch.setattr(checkpoint_format, "FORMAT", 3)
    monkeypatch.setitem(checkpoint_format.MIGRATIONS, 2, second)
    for number in (None, 1, 2):
        torch.save(content() | ({} if number is None else {FORMAT_KEY: number}), tmp_path / "old.ckpt")
        assert list(read_checkpoint(tmp_path / "old.ckpt")["state_dict"]) == ["kernel"]
        assert list(CheckpointFiles().load_checkpoint(tmp_path / "old.ckpt")["state_dict"]) == ["kernel"]
    torch.save(content() | {FORMAT_KEY: 3}, tmp_path / "new.ckpt")
    assert list(read_checkpoint(tmp_path / "new.ckpt")["state_dict"]) == ["weight"]


def test_foreign_files_are_left_as_they_are(tmp_path):
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "timm.pth")
    assert list(read_checkpoint(tmp_path / "timm.pth")) == ["head.weight"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (FORMAT + 1, rf"a.ckpt has format {FORMAT + 1}, dtpvit .+ reads up to {FORMAT}; upgrade dtpvit"),
        ("two", "says 'two' where the number of its format belongs"),
        (0, "says 0 where"),
    ],
)
def test_a_newer_format_is_refused_in_a_sentence(number, message, tmp_path):
    torch.save(content() | {FORMAT_KEY: number}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "a.ckpt")
