"""Loader workers that outlive a signal to the whole job, so that the step under way can end, and not the training.

SLURM and ``kill -- -GROUP`` signal every process of a job. A worker that obeyed would take the training down with an
error in the middle of a step. Where the training is killed, torch ends a worker whose parent has changed; under the
start method ``forkserver``, Python 3.14's default, that is the fork server, which in turn lives as long as its workers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["end_with_parent", "obey_parent_alone", "started"]

_FOR_THE_JOB = {signal.SIGTERM, signal.SIGUSR1}


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """``iter(loader)``, whose workers begin with SIGTERM and SIGUSR1 blocked, where they are forked from this thread.

    Workers of a fork server block them later, and a thread that a library has by then lets them through.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_JOB)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone(worker: int) -> None:
    """End this worker with its parent, or when that sends SIGTERM, as torch does where one is stuck; a
    ``worker_init_fn``.

    Args:
        worker: Its number, which does not matter.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_JOB)
    end_with_parent()
    if hasattr(signal, "sigwaitinfo"):
        parent: Any = parent_process()
        Thread(target=_obey, args=(parent.pid,), name="obey-parent", daemon=True).start()
    else:  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def end_with_parent() -> None:
    """End this process with the one that it was made for; a pool's ``initializer``.

    Where that one is killed, the processes of a ``ProcessPoolExecutor`` wait for work for ever.
    """
    parent: Any = parent_process()
    Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
