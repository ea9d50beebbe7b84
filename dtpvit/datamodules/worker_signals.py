"""Loader workers that go on when the whole job is told to end, so that the step under way can."""

from __future__ import annotations

import os
import signal
from threading import Thread

__all__ = ["outlive_signals"]


def outlive_signals(worker: int) -> None:
    """Make this worker end only when its parent says so or is gone; a ``worker_init_fn`` of torch's DataLoader.

    SLURM and ``kill -- -GROUP`` signal every process of a job. A worker that obeyed would take the training down with
    an error in the middle of a step. SIGTERM must not be ignored altogether: that is how torch ends a worker that is
    stuck. Nothing changes where the system cannot tell who sent a signal (macOS).

    Args:
        worker: Its number, which does not matter.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey_parent, name="obey-parent", daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
