"""How long the training part of an epoch took, and how much of that was waiting for data."""

from time import perf_counter

import torch

__all__ = ["StepClock"]


class StepClock:
    """Counts the time of training steps, from asking for a batch to having worked through it.

    It is told what happens and reads the wall clock; nothing is counted before :meth:`start`. Waiting counts with the
    step whose batch was waited for, so that it never exceeds the whole.

    Args:
        device: What the steps run on. Where the clock starts and stops, it waits until the device has done what it was
            given; never within a step: in between, the device may run behind the host.

    Attributes:
        seconds: Counted up to the last stop.
        waiting: Seconds of these in which a batch was asked for and not there yet.
        steps: Steps done since the start.
        started: Whether an epoch has begun and not ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = False
        self._reset()

    def _reset(self) -> None:
        self.seconds = self.waiting = 0.0
        self.steps = 0
        self._running_since: float | None = None
        self._asked: float | None = None
        self._waited = 0.0
        self._step_end = 0.0

    def start(self) -> None:
        """Begin an epoch. Until its first batch is there all time is waiting, the start of workers included."""
        self._reset()
        self.started = True
        self.go_on()
        self._asked = self._step_end = self._running_since or 0.0

    def finish(self) -> None:
        """End the epoch."""
        self.stop_after_step()
        self.started = False

    def ask(self) -> None:
        """A batch is asked for."""
        self.go_on()
        if self.started and self._asked is None:
            self._asked = perf_counter()

    def receive(self) -> None:
        """The batch is there."""
        if self._asked is not None:
            self._waited += perf_counter() - self._asked
            self._asked = None

    def step_done(self) -> None:
        """The host is through with a step."""
        self._step_end = perf_counter()
        self.waiting += self._waited
        self._waited = 0.0
        self.steps += 1

    def stop(self) -> bool:
        """Stop now; whether the clock was running."""
        if self._running_since is None:
            return False
        self._synchronise()
        self.seconds += perf_counter() - self._running_since
        self._running_since = None
        return True

    def stop_after_step(self) -> None:
        """Stop at the end of the last step, plus what the device still had to do for it."""
        if self._running_since is None:
            return
        before = perf_counter()
        self._synchronise()
        self.seconds += perf_counter() - before + max(0.0, self._step_end - self._running_since)
        self._running_since = self._asked = None
        self._waited = 0.0

    def go_on(self) -> None:
        """Run again if stopped within an epoch, without what the device was given meanwhile."""
        if self.started and self._running_since is None:
            self._synchronise()
            self._running_since = perf_counter()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
