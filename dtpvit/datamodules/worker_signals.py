"""Loader workers that go on when the whole job is told to end, so that the step under way can.

SLURM and ``kill -- -GROUP`` signal every process of a job. A worker that obeyed would take the training down with an
error in the middle of a step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from threading import Thread
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["obey_parent_alone", "started"]


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """``iter(loader)``, whose workers begin with SIGTERM and SIGUSR1 blocked, as they inherit it from this thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone(worker: int) -> None:
    """End this worker when its parent sends SIGTERM, as torch does where one is stuck; a ``worker_init_fn``.

    Args:
        worker: Its number, which does not matter.
    """
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=_obey, name="obey-parent", daemon=True).start()
    else:  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _obey() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
