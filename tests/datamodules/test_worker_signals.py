"""Loader workers end with whoever trains, whatever way they were started, and at no signal to the whole job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_training_and_not_with_a_signal_to_the_job(method, tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), method, *write_shards(tmp_path / "shards", [20, 20])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        workers = [int(word) for word in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(map(running, workers))
        if method == "fork":  # elsewhere libraries have threads before a signal can be blocked
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
            assert not until(lambda: not all(map(running, workers)), seconds=1.0)
    finally:
        trainer.kill()
        trainer.communicate()
    assert until(lambda: not any(map(running, workers)))
