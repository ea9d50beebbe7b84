"""Spoilt files through every reader: what is accepted, what is refused, whether anything else ever happens.

    python -m benchmarks.fuzz --inputs 100000 --out docs/results/fuzzing.md

Input ``n`` of a target is a function of ``--seed``, target and ``n`` alone. Each target is read in a process of its
own, which may take a bounded amount of memory; an input that takes longer than ``--patience``, raises what is not an
error of ours, or kills the process is a fault, and named: ``--only TARGET --first N --inputs 1`` reads it again.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.fuzz_targets import TARGETS, Target
from benchmarks.record import heading, pages, table

_ALLOWANCE = 4 << 30  # bytes of address space beside what the process has at its start


@dataclass
class Found:
    """What came of a target's inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0  # CPU seconds
    peak: int = 0  # bytes beside what the process had at its start

    def add(self, number: int, outcome: str, fault: str | None, seconds: float, peak: int) -> None:
        """One input."""
        self.outcomes[outcome] += 1
        self.slowest, self.peak = max(self.slowest, seconds), max(self.peak, peak)
        if fault is not None:
            self.faults[number] = fault


class Hang(BaseException):
    """Not an Exception, which readers catch."""


def main(argv: list[str] | None = None) -> dict[str, Found]:
    """Fuzz, print and write the table; the exit status is 1 if there are faults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together, or of the one of --only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--only", choices=[target.name for target in TARGETS], help="one target")
    parser.add_argument("--patience", type=float, default=20.0, help="CPU seconds for an input")
    parser.add_argument("--out", help="Markdown file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    targets = [target for target in TARGETS if options.only in (None, target.name)]
    parts = sum(target.share for target in targets)
    found = dict[str, Found]()
    for target in targets:
        wanted = max(1, round(options.inputs * target.share / parts))
        found[target.name] = fuzz(target, options.first, wanted, options.seed, options.patience)
        _show(target.name, found[target.name])
    pages([heading("Fuzzing: spoilt files through every reader", torch.device("cpu")), _table(found)], options.out)
    return found


def fuzz(target: Target, first: int, wanted: int, seed: int, patience: float) -> Found:
    """Read the inputs in a process, and from where that died on in another one."""
    context = multiprocessing.get_context("fork")
    found, number = Found(), first
    while number < first + wanted:
        ours, theirs = context.Pipe(duplex=False)
        numbers = range(number, first + wanted)
        process = context.Process(target=_read_all, args=(target, numbers, seed, patience, theirs))
        process.start()
        theirs.close()
        try:
            while number < first + wanted:
                found.add(number, *ours.recv())
                number += 1
        except EOFError:
            process.join()
            found.add(number, "fault", f"the process ended with {process.exitcode}", 0.0, 0)
            number += 1
        process.join()
    return found


def _read_all(target: Target, numbers: range, seed: int, patience: float, answer: Any) -> None:
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)
    logging.disable()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg and libtiff say there what they think of a file
    seeds, before = target.seeds(), _resident()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ALLOWANCE, held + _ALLOWANCE))
    for number in numbers:
        data = target.mutate(seeds, Random(f"{seed} {target.name} {number}"))
        start, fault = time.process_time(), None
        signal.setitimer(signal.ITIMER_PROF, patience)
        signal.setitimer(signal.ITIMER_REAL, 30 * patience)  # for one that waits, on however busy a machine
        try:
            with tempfile.TemporaryDirectory() as folder:
                outcome = target.read(data, Path(folder))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "fault"
            fault = f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        answer.send((outcome, fault, time.process_time() - start, max(0, _resident() - before)))


def _hang(*unused: object) -> None:
    raise Hang("took too long")


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _show(name: str, found: Found) -> None:
    print(f"{name}: {found.outcomes.total():,} inputs, {len(found.faults)} faults, slowest {found.slowest:.2f} s")
    for number, what in list(found.faults.items())[:20]:
        print(f"  {number}: {what}", flush=True)


def _table(found: dict[str, Found]) -> str:
    rows = []
    for name, one in found.items():
        refused = {cause: number for cause, number in one.outcomes.most_common() if cause not in ("accepted", "fault")}
        causes = ", ".join(f"{cause} {number:,}" for cause, number in list(refused.items())[:6])
        rest = sum(list(refused.values())[6:])
        rows.append([
            name, f"{one.outcomes.total():,}", f"{one.outcomes['accepted']:,}", f"{sum(refused.values()):,}",
            len(one.faults), f"{one.slowest:.2f}", one.peak >> 20, causes + (f", others {rest:,}" if rest else ""),
        ])  # fmt: skip
    total = sum(one.outcomes.total() for one in found.values())
    faults = sum(len(one.faults) for one in found.values())
    rows.append(
        ["all", f"{total:,}", f"{sum(one.outcomes['accepted'] for one in found.values()):,}", "", faults, "", "", ""]
    )
    header = ["target", "inputs", "accepted", "refused", "faults", "slowest, CPU s", "peak memory, MiB more", "causes"]
    return table(header, rows)


if __name__ == "__main__":
    raise SystemExit(any(found.faults for found in main().values()))
