"""Telling, at the end of an epoch and of a validation, which samples the loaders could not use."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from dtpvit.datamodules.bad_share import Seen, too_many_bad
from dtpvit.datamodules.samples import CAUSES
from dtpvit.encoder.ops.collectives import add_up, gather_objects
from dtpvit.evaluation.run_record import judged_on

if TYPE_CHECKING:
    from dtpvit.tasks.image_task import ImageTask

__all__ = ["check_skipped", "log_validation", "report_skipped"]

logger = logging.getLogger(__name__)
_UNREAD = "unreadable or incomplete"


def report_skipped(task: lightning.LightningModule) -> None:
    """Log the samples that could not be used, by cause, over all ranks, which call this together."""
    skipped = _on_all_ranks([task.trainer.train_dataloader], task.device)
    for cause, count in skipped.items():
        task.log(f"data/skipped/{cause.replace(' ', '_')}", float(count))
    if skipped and task.trainer.is_global_zero:
        logger.warning("epoch %d: skipped %s", task.current_epoch + 1, _in_words(skipped))


def check_skipped(task: lightning.LightningModule) -> None:
    """Stop if more samples than ``max_skipped`` allows cannot be used.

    The ranks call this together and judge by their sums, so that all stop or none: one alone would leave the others
    waiting for it.

    Raises:
        UserError: Naming causes, examples and the option.
    """
    loader: Any = task.trainer.train_dataloader
    max_skipped = getattr(loader, "max_skipped", 1.0)
    if max_skipped >= 1:
        return
    seen = Seen(*add_up(*loader.seen, device=task.device))
    if too_many_bad(seen, max_skipped, {}, []):
        examples = gather_objects(loader.examples)
        skipped = _on_all_ranks([loader], task.device)
        error = too_many_bad(seen, max_skipped, skipped, [one for rank in examples for one in rank])
        assert error is not None
        raise error


def log_validation(
    task: ImageTask, figures: Mapping[str, float | Tensor], *, shown: Sequence[str] = (), stage: str = "val"
) -> None:
    """Log a validation's figures, what they are of and what they are without; the ranks call this together.

    What they are of goes to the loggers with them, and what was left out as ``skipped``. Both are said in a line after
    the first validation, and again where one says something else.

    Args:
        task: That was validated.
        figures: The same on all ranks; those that ``judged_on`` says are numbers of samples.
        shown: Figures that the progress bar has.
        stage: Goes before the names.
    """
    trainer = task.trainer
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    skipped = _on_all_ranks(loaders, task.device)
    for name, value in {**figures, **({"skipped": float(sum(skipped.values()))} if skipped else {})}.items():
        task.log(f"{stage}/{name}", value, prog_bar=name in shown, add_dataloader_idx=False)
    if trainer.sanity_checking or not trainer.is_global_zero:
        return
    said = f"{'test' if trainer.testing else 'validation'} of {judged_on(figures) or 'no sample'}"
    said += f"; left out: {_in_words(skipped)}{_such_as(loaders)}" if skipped else ""
    if said != task.judged_on:
        logger.log(logging.WARNING if skipped else logging.INFO, "%s", said)
        task.judged_on = said


def _on_all_ranks(loaders: Sequence[Any], device: torch.device) -> dict[str, int]:
    """What the loaders could not use, by cause; those of evaluation may have no more than the number."""
    mine = Counter[str]()
    for loader in loaders:
        skipped = getattr(loader, "skipped", {})
        mine.update(skipped if isinstance(skipped, dict) else {_UNREAD: skipped})
    causes = (*CAUSES, _UNREAD)
    counts = add_up(*(mine[cause] for cause in causes), device=device)
    return {cause: count for cause, count in zip(causes, counts, strict=True) if count}


def _in_words(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in skipped.items())


def _such_as(loaders: Sequence[Any]) -> str:
    """The first example of this rank's."""
    named = [name for loader in loaders for name in getattr(loader, "broken", [])]
    named += [where for loader in loaders for _, where in getattr(loader, "examples", [])]
    return f", such as {' '.join(named[0].split())[:200]}" if named else ""
