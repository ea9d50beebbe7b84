"""Loader workers end with whoever trains, whatever way they were started, and at no signal to the whole job."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
from shard_files import write_shards

TRAINER = """
import multiprocessing, sys, time

def main():
    multiprocessing.set_start_method(sys.argv[1])
    import torch
    from shard_files import tokenize
    from dtpvit.datamodules.loader import ResumableLoader
    from dtpvit.datamodules.samples import ImageText
    from dtpvit.interop.preprocessing import eval_transform
    torch.set_num_threads(1)
    recipe = ImageText(eval_transform(8), tokenize)
    batches = iter(ResumableLoader(sys.argv[2:], recipe, batch_size=2, num_samples=1000, num_workers=2))
    next(batches), next(batches)  # one of each worker
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@contextmanager
def started(command):
    """A process that is killed at the end, or when nothing has come of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    patience = Timer(300, process.kill)
    patience.start()
    try:
        yield process
    finally:
        patience.cancel()
        process.kill()
        process.wait()
        process.stdout.close()  # unread: a worker that lives on holds its other end


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_training_and_not_with_a_signal_to_the_job(method, tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), method, *write_shards(tmp_path / "shards", [20, 20])]
    with started(command) as trainer:
        workers = [int(word) for word in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(map(running, workers))
        if method == "fork":  # elsewhere libraries have threads before a signal can be blocked
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
            assert not until(lambda: not all(map(running, workers)), seconds=1.0)
    assert until(lambda: not any(map(running, workers)))


POOL = """
import os, sys, time
from pathlib import Path

def work(shard):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    if sys.argv[1] == "draw":
        from dtpvit.datamodules import shapes
        shapes._write_shard = work
        shapes.generate_shapes(Path(sys.argv[2]), shapes.ShapesParameters(), processes=2)
    else:
        from dtpvit.datamodules.shard_survey import survey_shards
        list(survey_shards(["0", "1"], work, 2))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("what", ["draw", "survey"])
def test_processes_that_draw_or_survey_end_with_a_killed_command(what, tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    with started([sys.executable, str(tmp_path / "pool.py"), what, str(tmp_path / "shapes")]) as command:
        workers = [int(command.stdout.readline()) for _ in range(2)]
        assert len({*workers}) == 2 and all(map(running, workers))
    assert until(lambda: not any(map(running, workers)))
