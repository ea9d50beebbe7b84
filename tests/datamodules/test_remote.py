"""Shards that lie elsewhere: the same bytes whatever happens on the way, or a shard skipped and counted."""

import io
from pathlib import Path

import fsspec
import pytest
from shard_files import numbers, pair, tokenize, write_shards, write_tar
from web_server import serving

from dtpvit.datamodules import remote
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.remote import RETRIES, RemoteStream
from dtpvit.datamodules.samples import ImageText, read_samples
from dtpvit.datamodules.tars import BrokenTar, read_members
from dtpvit.interop.preprocessing import eval_transform


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that would have been made."""
    made = []
    monkeypatch.setattr(remote, "sleep", made.append)
    return made


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a" / "00000.tar", {f"{n:03d}": pair(n) for n in range(40)})


def content(path):
    return Path(path).read_bytes()


def collect(address):
    causes = []
    return list(read_samples(address, lambda cause, where: causes.append(cause))), causes


def by_path(files, trouble):
    """Answer with the file of a path, except where ``trouble(handler, data, number)`` has answered."""

    def answer(handler, path, number):
        data = files[path]
        if not trouble(handler, data, number):
            handler.give(data)

    return answer


def fails(times, how):
    def trouble(handler, data, number):
        if not 1 <= number <= times:
            return False
        if how == "busy":
            handler.give(b"later", status=503)
        elif how == "cut off":
            handler.give(data, stop=700 * number)
        else:
            handler.close_connection = True  # hangs up without a word
        return True

    return trouble


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("how", ["busy", "cut off", "hangs up"])
def test_a_server_that_fails_twice_is_asked_again(shard, pauses, how, ranges):
    with serving(by_path({"/a/00000.tar": content(shard)}, fails(2, how)), ranges) as server:
        address = f"{server.address}/a/00000.tar"
        assert collect(address) == collect(shard)
        # Without ranges the first GET is one for the headers, which come whole; who hangs up is asked twice by aiohttp.
        failures = 1 if how == "hangs up" or (how == "cut off" and not ranges) else 2
        assert pauses == [remote._pause(address, failure) for failure in range(1, failures + 1)]


def test_a_server_that_never_answers_costs_its_shard_only(shard, pauses, caplog):
    with serving(by_path({"/a/00000.tar": b""}, fails(99, "busy"))) as server:
        assert collect(f"{server.address}/a/00000.tar") == ([], ["unreadable shard"])
    assert len(pauses) == RETRIES and "gave up after 6 attempts" in caplog.text


def test_what_is_refused_for_good_is_asked_once(pauses, caplog):
    with serving(lambda handler, path, number: handler.give(b"", status=404)) as server:
        assert collect(f"{server.address}/a/00000.tar") == ([], ["unreadable shard"])
    assert not pauses and "00000.tar" in caplog.text
    assert collect("memory://nowhere/00000.tar") == ([], ["unreadable shard"])
    assert collect("nothing-of-the-kind://x/00000.tar") == ([], ["unreadable shard"])
    assert not pauses


def test_pauses_double_are_bounded_and_differ_by_address():
    for address in ("https://x/0.tar", "https://x/1.tar"):
        made = [remote._pause(address, failure) for failure in range(1, 12)]
        assert all(min(30, 2**n) / 2 <= pause <= min(30, 2**n) for n, pause in enumerate(made))
    assert remote._pause("https://x/0.tar", 1) != remote._pause("https://x/1.tar", 1)


def test_object_stores_are_read_through_fsspec(shard):
    with fsspec.open("memory://bucket/a/00000.tar", "wb") as file:
        file.write(content(shard))
    assert collect("memory://bucket/a/00000.tar") == collect(shard)


def test_a_store_that_drops_the_connection_goes_on_where_it_was(shard, pauses, monkeypatch):
    data, opened = content(shard), []

    class Dropping(io.BytesIO):
        """Breaks once it has given as much as its number among the connections allows."""

        def read(self, size=-1):
            if self.tell() + size > 9000 * len(opened):
                raise ConnectionResetError("dropped")
            return super().read(size)

    def connect(address, block):
        opened.append(address)
        return Dropping(data)

    monkeypatch.setattr(remote, "_opened", connect)
    assert len(data) > 4 * 9000
    with RemoteStream("s3://bucket/00000.tar") as stream:
        assert b"".join(stream.read(512) for _ in range(40_000 // 512)) == data[: 40_000 // 512 * 512]
    assert len(opened) == 5 and len(pauses) == 4


def test_commands_that_fail_are_run_again(shard, tmp_path, pauses):
    count = tmp_path / "count"
    failing = f"pipe:echo x >> {count}; head -c 3000 {shard}; test $(wc -l < {count}) -gt 2 && tail -c +3001 {shard}"
    assert [data for _, data in read_members(failing)] == [data for _, data in read_members(shard)]
    assert len(pauses) == 2


def test_an_archive_that_is_short_for_good_is_cut_off(shard, pauses):
    data = content(shard)
    with serving(lambda handler, path, number: handler.give(data[:5000])) as server:
        with pytest.raises(BrokenTar, match="cut off"):
            list(read_members(f"{server.address}/0.tar"))
    with pytest.raises(BrokenTar, match="cut off"):
        list(read_members(f"pipe:head -c 5000 {shard}"))
    assert not pauses


@pytest.mark.parametrize("workers", [0, 2])
def test_retries_change_neither_order_nor_resume(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    local = write_shards(tmp_path / "a", [9, 8, 7, 6])
    files = {f"/a/{number:05d}.tar": content(path) for number, path in enumerate(local)}
    recipe = ImageText(eval_transform(8), tokenize)

    def loader(shards):
        return ResumableLoader(shards, recipe, batch_size=4, num_workers=workers, num_samples=30, shuffle_buffer=5)

    expected = numbers(loader(local))
    cut = fails(10_000, "cut off")
    twice = by_path(files, lambda handler, data, number: bool(number % 3) and cut(handler, data, number))
    with serving(twice) as server:
        shards = [f"{server.address}{path}" for path in files]
        whole = loader(shards)
        assert numbers(whole) == expected
        first = loader(shards)
        batches = iter(first)
        begun = numbers([next(batches) for _ in range(3)])
        resumed = loader(shards)
        resumed.load_state_dict(first.state_dict())
        assert begun + numbers(resumed) == expected
        assert max(server.requests.values()) > 3
