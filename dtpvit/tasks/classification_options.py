"""What arguments and labels of a classification must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from dtpvit.errors import UserError

__all__ = ["check_labels", "check_options", "with_options"]

Made = TypeVar("Made")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments of :class:`dtpvit.tasks.classification.Classification` that do not go together.

    Raises:
        UserError: In a sentence about the first of them.
    """
    if options["num_classes"] < 2:
        raise UserError(f"num_classes is {options['num_classes']}; expected at least 2")
    smoothing, mode, teacher = options["label_smoothing"], options["mode"], options["teacher"]
    if not 0 <= smoothing < 1:
        raise UserError(f"label_smoothing is {smoothing}; expected at least 0 and less than 1")
    if not 0 < options["layer_decay"] <= 1:
        raise UserError(f"layer_decay is {options['layer_decay']}; expected more than 0 and at most 1")
    if mode == "linear_probe" and (options["compression_warmup"] or options["compression_delay"]):
        raise UserError("compression_warmup changes the trunk, which linear_probe keeps; use frozen or finetune")
    if mode == "adapt" and (options["mixing"] or teacher is not None):
        raise UserError("adapt learns from the model's own dense output; leave out mixing and teacher")
    if teacher is not None and not {"model", "init"} <= set(teacher):
        raise UserError(f"a teacher is given by {sorted(teacher)}; expected model, and init, its weights")
    if not options["cache_features"]:
        return
    if mode != "linear_probe":
        raise UserError(f"cache_features needs a trunk that stands still, and mode is {mode!r}; use linear_probe")
    if options["mixing"] or teacher is not None:
        raise UserError("cache_features shows the trunk an image only once; leave out mixing and teacher")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that the model has no class for.

    Args:
        labels: int64, shape (B,), on the host, where looking costs no synchronisation.
        num_classes: Of the model.

    Raises:
        UserError: With the first such label.
    """
    if not labels.numel():
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        found, last = low if low < 0 else high, num_classes - 1
        raise UserError(f"the data have label {found}, the model has classes 0 to {last}; give num_classes of the data")


def with_options(make: Callable[..., Made], options: Mapping[str, Any] | None, *fixed: Any, **more: Any) -> Made:
    """``make(*fixed, **more, **options)``.

    Raises:
        UserError: If it has no such options.
    """
    try:
        return make(*fixed, **more, **(options or {}))
    except TypeError as error:
        raise UserError(f"the options of {make.__name__.lower()} do not fit: {error}") from error
