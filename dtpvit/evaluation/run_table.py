"""Runs of one task beside each other: what they reached and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dtpvit.evaluation.run_model import RunModel, nominal_gmacs, run_model, run_task
from dtpvit.evaluation.run_record import RunRecord, judged_on

__all__ = ["COLUMNS", "QUALITY", "ComparedRun", "RunGroup", "grouped"]

QUALITY: dict[str, str] = {
    "val/acc1": "top-1, %",
    "val/acc5": "top-5, %",
    "val/zeroshot_acc1": "zero-shot top-1, %",
    "val/zeroshot_acc5": "zero-shot top-5, %",
    "val/text_retrieval_recall@1": "text R@1, %",
    "val/image_retrieval_recall@1": "image R@1, %",
    "val/exact": "exact answers, %",
}
"""Metrics of a validation that are shares, and their titles; the first that a group has is the one it is judged by."""

COLUMNS: dict[str, str] = {
    "model": "What the config builds; a reducer acts before or in the block that is named, counted from 0.",
    "GMACs": "Multiply-accumulates of an image in its encoder, / 1e9, mean of the last validation; ≈: no validation "
    "says, so that of the untrained model at its nominal rate, on random pixels.",
    "epochs": "Worked through, of those asked for.",
    "memory, MiB": "Mean over epochs of the most that a process held in training: on a GPU what torch allocated, else "
    "the resident set.",
    "step, s": "Mean over all training steps, waiting for data included.",
    "images/s": "Samples of all processes in a second of training, mean over steps.",
    "tokens": "Of an image behind the last reducer, mean of the last validation; else of the last epoch of training.",
    "compression": "Patches in for each patch token out, in the last epoch of training.",
    "remarks": "Among others, what the figures of the last validation are of, over all processes and without what "
    "could not be read, and the samples skipped by the epoch that skipped most.",
}
"""Columns that need a word, and the word."""


@dataclass
class ComparedRun:
    """A run and what its row says.

    Attributes:
        record: What its folder holds.
        number: Place in the report, from 0, by which its colour goes.
        task: Of :func:`dtpvit.evaluation.run_model.run_task`.
    """

    record: RunRecord
    number: int
    task: str

    @cached_property
    def model(self) -> RunModel:
        return run_model(self.record)

    @cached_property
    def gmacs(self) -> tuple[float | None, bool]:
        """GMACs of an image, and whether a validation says so."""
        measured = self.record.last("val/gmacs")
        return (nominal_gmacs(self.record), False) if measured is None else (measured, True)

    @property
    def data(self) -> str:
        """What it was judged on, as far as the config says."""
        options = self.record.at("data", "init_args") or {}
        named = next((options[name] for name in ("val", "zeroshot", "root", "train") if options.get(name)), None)
        return str(named or self.record.at("data", "class_path") or "")

    def cells(self) -> dict[str, str]:
        """Its row, by column; columns without a value are left out."""
        record, (gmacs, measured) = self.record, self.gmacs
        found: dict[str, str | None] = {
            "model": self.model.name,
            "GMACs": _number(gmacs, ".3f" if measured else "≈ .3f"),
            "resolution": self.model.resolution,
            "patch": self.model.patch,
            "epochs": self._epochs(),
            **{title: _number(record.last(metric), ".1f", 100) for metric, title in QUALITY.items()},
            "memory, MiB": _number(record.mean("peak_memory_mib"), ".0f"),
            "step, s": _number(record.mean("step_seconds"), ".3g"),
            "images/s": _number(record.mean("samples_per_second"), ".1f"),
            "tokens": _number(self._tokens(), ".1f"),
            "compression": _number(self._latest("compression"), ".2f"),
            "remarks": "; ".join(self.remarks()),
        }
        return {name: text for name, text in found.items() if text}

    def remarks(self) -> list[str]:
        """What is missing, cannot be read, or happened on the way, and what the figures are of."""
        record, found = self.record, list(self.record.missing)
        if self.unfinished:
            found.insert(0, f"in epoch {(record.epochs or 0) + 1} of {self._asked}: stopped, or still training")
        if record.curves and not any(name.startswith("val/") for name in record.curves):
            found.append("no validation yet")
        figures = {
            name[4:]: points[-1][1] for name, points in record.curves.items() if name.startswith("val/") and points
        }
        if told := judged_on(figures):
            found.append(f"judged on {told}")
        if len(record.starts) > 1:
            found.append(f"continued {len(record.starts) - 1} times" if len(record.starts) > 2 else "continued once")
        found += [f"{count} records skipped: {cause}" for cause, count in record.skipped.items()]
        if not record.skipped and (causes := record.skipped_samples()):
            told = ", ".join(f"{cause} {count}" for cause, count in causes.items())
            found.append(f"skipped samples: up to {sum(causes.values())} an epoch ({told})")
        if left_out := record.left_out():
            found.append(f"left out of the last validation: {left_out}")
        if steps := record.last("train/skipped_steps"):
            found.append(f"skipped steps: {steps:.0f}")
        return found

    @property
    def unfinished(self) -> bool:
        """Whether fewer epochs are known to be complete than were asked for."""
        return self.record.epochs is not None and self.record.epochs < self._asked

    @property
    def _asked(self) -> int:
        asked = self.record.at("trainer", "max_epochs")
        return asked if isinstance(asked, int) and asked > 0 else 0

    def _epochs(self) -> str:
        done, asked = self.record.epochs, self._asked
        if done is None:
            return f"0 of {asked}" if asked else ""
        return f"{done} of {asked}" if done < asked else str(done)

    def _tokens(self) -> float | None:
        validated = map(self.record.last, ("val/tokens", "val/zeroshot_tokens", "val/visual_tokens"))
        return next((tokens for tokens in validated if tokens is not None), self._latest("tokens_mean"))

    def _latest(self, column: str) -> float | None:
        return self.record.efficiency[-1].get(column) if self.record.efficiency else None


@dataclass(frozen=True)
class RunGroup:
    """Runs whose figures may be held against each other.

    Attributes:
        title: Task and data.
        runs: In the order they were given.
    """

    title: str
    runs: list[ComparedRun]

    @property
    def quality(self) -> str | None:
        """The metric that the group is judged by; None if no run was validated."""
        return next((name for name in QUALITY if any(run.record.curves.get(name) for run in self.runs)), None)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles behind the name, and each run's cells, without the columns that no run fills."""
        rows = [run.cells() for run in self.runs]
        order = ["model", "GMACs", "resolution", "patch", "epochs", *QUALITY.values()]
        order += ["memory, MiB", "step, s", "images/s", "tokens", "compression", "remarks"]
        titles = [title for title in order if any(title in row for row in rows)]
        return titles, [[row.get(title, "") for title in titles] for row in rows]


def grouped(records: Sequence[RunRecord]) -> list[RunGroup]:
    """Runs by task, and by the data that they are judged on."""
    runs = [ComparedRun(record, number, run_task(record)) for number, record in enumerate(records)]
    keys = dict.fromkeys((run.task, run.data) for run in runs)
    return [
        RunGroup(", ".join(filter(None, key)) or "Unknown task", [run for run in runs if (run.task, run.data) == key])
        for key in keys
    ]


def _number(value: float | None, form: str, times: float = 1) -> str | None:
    if value is None:
        return None
    start, _, form = form.rpartition(" ")
    return f"{start} {value * times:{form}}".strip()
