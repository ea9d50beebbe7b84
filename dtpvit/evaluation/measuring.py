"""Time and memory of a step, on machines that other people use too."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Memory", "Quartiles", "alternate", "machine", "memory_of_step", "speed_ups", "versions"]

Step = Callable[[], object]


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of several measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def alternate(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    rounds: int = 7,
    warmup: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; every round runs all of them, in turn from either end.

    What disturbs the machine for a while then disturbs all candidates alike, and the ratio within a round holds where
    the times themselves do not.

    Args:
        steps: What to measure, by name.
        device: Where they run; waited for before the clock is read.
        rounds: Measured runs of each.
        warmup: Runs of each before that.
        progress: Called after each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-warmup, rounds):
        names = list(steps)
        for name in names if number % 2 else names[::-1]:
            gc.collect()
            started = _now(device)
            steps[name]()
            if number >= 0:
                seconds[name].append(_now(device) - started)
            else:
                _now(device)
            progress()
    return seconds


def speed_ups(seconds: Mapping[str, list[float]], reference: str) -> dict[str, Quartiles]:
    """How many times faster than the reference each candidate was, round by round."""
    base = seconds[reference]
    return {
        name: Quartiles.of([theirs / mine for theirs, mine in zip(base, times, strict=True)])
        for name, times in seconds.items()
    }


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Memory:
    """Bytes that a step took beyond what was allocated before it.

    Attributes:
        peak: Most at any moment.
        kept: Still allocated after the forward pass, for the backward pass; 0 if there is none.
    """

    peak: int
    kept: int


def memory_of_step(forward: Callable[[], torch.Tensor], device: torch.device, *, backward: bool) -> Memory:
    """Memory of one step, from the allocator's own record.

    What autograd keeps is what is alive between forward and backward: activations, masks and index tables alike,
    whichever way they are held. Gradients of parameters must exist beforehand, so that they do not count.

    Args:
        forward: Returns the loss, or anything without ``backward``.
        device: Where it runs. On a CPU scratch space inside a library's kernel is not seen.
        backward: Whether to run the backward pass.
    """
    gc.collect()
    if device.type == "cuda":
        return _memory_on_cuda(forward, device, backward)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its start and stop, and a missing GPU
    marks: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = forward()
        marks.append(time.time_ns())
        if backward:
            result.backward()
        del result
    recorded: Any = record.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = peak = kept = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        if event.start_ns() <= marks[0]:
            kept = now
    return Memory(peak, kept if backward else 0)


def _memory_on_cuda(forward: Callable[[], torch.Tensor], device: torch.device, backward: bool) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = forward()
    kept = torch.cuda.memory_allocated(device) - before
    if backward:
        result.backward()
    return Memory(torch.cuda.max_memory_allocated(device) - before, kept if backward else 0)


def machine(device: torch.device) -> str:
    """The device in words: what a reader needs to judge a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, source = platform.machine(), Path("/proc/cpuinfo")
    if source.is_file():
        lines = source.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    """Versions of what decides about speed."""
    packages = {"torch": "torch", "open_clip": "open_clip_torch", "timm": "timm"}
    found = {name: version(package) for name, package in packages.items()}
    return {"dtpvit": version("dtpvit"), "python": platform.python_version(), **found}
