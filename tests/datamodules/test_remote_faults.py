"""Shards behind a server that resets, stalls, lies and trickles: no sample is lost that it ever gives whole."""

import socket
import struct
import time
from pathlib import Path

import fsspec
import pytest
from shard_files import numbers, pair, tokenize, write_shards, write_tar
from web_server import serving

from dtpvit.datamodules import remote
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.remote import RemoteStream
from dtpvit.datamodules.samples import ImageText, read_samples
from dtpvit.interop.preprocessing import eval_transform

SMALL = 8192


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short blocks, so that a shard is many requests; hardly a pause."""
    monkeypatch.setattr(remote, "_BLOCK", SMALL)
    monkeypatch.setattr(remote, "_PAUSE", 0.001)


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a" / "00000.tar", {f"{n:03d}": pair(n) for n in range(40)})


def reset(handler, data, part):
    """Headers, a part of what was asked for, and the connection gone (RST)."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.give(data, stop=part)
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.connection.close()


def stall(handler, data, part):
    handler.give(data, stop=part)
    handler.wfile.flush()
    time.sleep(1.5)


def trickle(handler, data, part):
    time.sleep(0.1)
    handler.give(data)


FAULTS = {
    "reset": reset,
    "stall": stall,
    "busy": lambda handler, data, part: handler.give(b"", status=503),
    "too many requests": lambda handler, data, part: handler.give(b"", status=429),
    "less than promised": lambda handler, data, part: handler.give(data, stop=part),
    "slow": trickle,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_costs_no_sample_and_is_asked_for_from_the_byte_on(shard, fault, monkeypatch):
    monkeypatch.setattr(remote, "_TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "RETRIES", 30)  # a busy machine is silent for half a second too
    data, sent, faults = Path(shard).read_bytes(), [], []

    def answer(handler, path, number):
        asked = handler.headers.get("Range")
        if number in (3, 4, 6):
            faults.append(fault)
            FAULTS[fault](handler, data, 700)
            return
        sent.append(asked)
        handler.give(data)

    causes = []
    skip = lambda cause, where: causes.append(where)  # noqa: E731
    with serving(answer) as server:
        found = list(read_samples(f"{server.address}/a/00000.tar", skip))
    assert found == list(read_samples(shard, skip)) and causes == [] and len(faults) == 3
    starts = [int(asked.split("=")[1].split("-")[0]) for asked in sent if asked]
    assert len(starts) >= len(data) // (2 * SMALL) and starts == sorted(starts), (
        "nothing is fetched from the beginning again"
    )


def test_a_server_that_promises_less_costs_what_it_withholds_and_no_more(shard):
    data, causes = Path(shard).read_bytes(), []
    with serving(lambda handler, path, number: handler.give(data[: len(data) // 2]), ranges=False) as server:
        found = list(read_samples(f"{server.address}/a/00000.tar", lambda cause, where: causes.append(cause)))
    assert causes == ["unreadable shard"] and found == list(read_samples(shard, None))[: len(found)]
    assert 15 < len(found) < 25


def test_a_plain_server_that_gives_a_little_at_a_time_is_waited_for(shard):
    data, causes = Path(shard).read_bytes(), []

    def answer(handler, path, number):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data), 5000):
            handler.wfile.write(data[start : start + 5000])
            handler.wfile.flush()
            time.sleep(0.005)
        handler.close_connection = True

    skip = lambda cause, where: causes.append(where)  # noqa: E731
    with serving(answer, ranges=False) as server:
        assert list(read_samples(f"{server.address}/a/00000.tar", skip)) == list(read_samples(shard, skip))
    assert causes == []


def test_a_shard_that_shrinks_is_refused():
    with fsspec.open("memory://shrinks.tar", "wb") as file:
        file.write(bytes(5000))
    with RemoteStream("memory://shrinks.tar") as stream:
        assert len(stream.read(3000)) == 3000
        stream.close()  # as after an error
        assert len(stream.read(1000)) == 1000
        stream.close()
        with fsspec.open("memory://shrinks.tar", "wb") as file:
            file.write(bytes(2000))
        with pytest.raises(OSError, match=r"gave up after 6 attempts .it is shorter than before"):
            stream.read(512)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_under_every_fault_at_once_gives_the_very_same_batches(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(remote, "_TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "RETRIES", 30)
    local = write_shards(tmp_path / "a", [9, 8, 7, 6])
    files = {f"/a/{number:05d}.tar": Path(path).read_bytes() for number, path in enumerate(local)}
    kinds, counted = list(FAULTS), []

    def answer(handler, path, number):
        if number % 2:
            kind = kinds[len(counted) % len(kinds)]
            counted.append(kind)
            FAULTS[kind](handler, files[path], 400)
        else:
            handler.give(files[path])

    def loader(shards):
        recipe = ImageText(eval_transform(8), tokenize)
        return ResumableLoader(shards, recipe, batch_size=5, num_workers=workers, num_samples=30, shuffle_buffer=5)

    expected = numbers(loader(local))
    with serving(answer) as server:
        shaken = loader([f"{server.address}{path}" for path in files])
        assert numbers(shaken) == expected and shaken.skipped == {}
    assert set(counted) == set(FAULTS)


# ------------------------------------------------------------------ object stores


@pytest.fixture
def s3(monkeypatch):
    """An S3 that runs here, where the packages for it are installed, with a bucket "shards"."""
    pytest.importorskip("s3fs", reason="needs s3fs and moto[server]")
    server = pytest.importorskip("moto.server", reason="needs s3fs and moto[server]").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("shards")
    yield system
    server.stop()


@pytest.fixture
def gs(monkeypatch):
    """A Google Cloud Storage that runs here, likewise."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google itself over gRPC
    gcsfs = pytest.importorskip("gcsfs", reason="needs gcsfs and gcp-storage-emulator")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcsfs and gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="shards")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield gcsfs.GCSFileSystem(token="anon")
    server.stop()


@pytest.mark.parametrize("store", ["s3", "gs"])
def test_an_object_store_is_read_like_a_file_and_trained_on(store, request, tmp_path):
    system = request.getfixturevalue(store)
    local = write_shards(tmp_path / "shards", [9, 8])
    for path in local:
        system.put(path, f"shards/{Path(path).name}")
    recipe = ImageText(eval_transform(8), tokenize)

    def loader(shards):
        return ResumableLoader(shards, recipe, batch_size=5, num_samples=15, shuffle_buffer=5)

    assert numbers(loader([f"{store}://shards/00000.tar", f"{store}://shards/00001.tar"])) == numbers(loader(local))
    causes = []
    assert list(read_samples(f"{store}://shards/gone.tar", lambda cause, where: causes.append(cause))) == []
    assert causes == ["unreadable shard"]
