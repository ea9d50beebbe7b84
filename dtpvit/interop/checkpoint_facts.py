"""What a checkpoint says about how its weights came to be: nothing is guessed, what it does not hold is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import Tensor

__all__ = ["CheckpointFacts", "checkpoint_facts"]

_RECIPE = (
    *("learning_rate", "weight_decay", "optimizer", "warmup_steps", "accum_freq"),
    *("template", "tune_projector", "tune_language_model", "tune_vision"),
)


@dataclass(frozen=True)
class CheckpointFacts:
    """Facts in plain values.

    Attributes:
        model: The name or config that the model was built from; None where none is recorded.
        data: Where the training data were, as the user named them, without the folders above; None if not recorded.
        batch_size: Samples of a process's step; None likewise.
        epochs: Whole epochs trained; None for bare weights.
        steps: Optimizer steps; None likewise.
        recipe: Options of the training, by name.
        started_from: Files or names of weights that were there before, by what they were for.
        metrics: What was monitored, as of the last validation before these weights were saved.
    """

    model: Any
    data: str | None
    batch_size: int | None
    epochs: int | None
    steps: int | None
    recipe: dict[str, Any]
    started_from: dict[str, str]
    metrics: dict[str, float]


def checkpoint_facts(content: Mapping[str, Any]) -> CheckpointFacts:
    """Read the content of a checkpoint, of Lightning's or of bare weights.

    Args:
        content: As of :func:`dtpvit.interop.weight_files.read_checkpoint`.
    """
    options = content.get("hyper_parameters") or {}
    data = next((part for part in content.values() if isinstance(part, dict) and "train_data" in part), {})
    progress = ((content.get("loops") or {}).get("fit_loop") or {}).get("epoch_progress", {})
    started = {"weights": options.get("init"), "language model": options.get("language_model")}
    return CheckpointFacts(
        model=_plain(options.get("model", options.get("encoder"))),
        data=_places(data["train_data"]) if data else None,
        batch_size=data.get("batch_size"),
        epochs=progress.get("current", {}).get("processed"),
        steps=content.get("global_step"),
        recipe={name: _plain(options[name]) for name in _RECIPE if options.get(name) is not None},
        started_from={what: _place(str(name)) for what, name in started.items() if name is not None},
        metrics=_metrics(content),
    )


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    """What Lightning's checkpoint callbacks watched."""
    states = (content.get("callbacks") or {}).values()
    watched = [state for state in states if isinstance(state, dict) and state.get("monitor")]
    scores = {state["monitor"]: state.get("current_score") for state in watched}
    return {name: float(score) for name, score in scores.items() if isinstance(score, Tensor | float | int)}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _places(named: str | Sequence[str]) -> str:
    return ", ".join(map(_place, [named] if isinstance(named, str) else named))


def _place(path: str) -> str:
    """A path that is absolute is of one machine, and may have its user's name in it: its end is enough."""
    found = PurePath(path)
    return "/".join(found.parts[1:][-2:]) if found.is_absolute() or path.startswith("~") else path
