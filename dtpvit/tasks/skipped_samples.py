"""Telling, at the end of an epoch, which samples the loaders could not use."""

from __future__ import annotations

import logging
from typing import Any

import lightning

from dtpvit.datamodules.bad_share import Seen, too_many_bad
from dtpvit.datamodules.samples import CAUSES
from dtpvit.encoder.ops.collectives import add_up, gather_objects

__all__ = ["check_skipped", "report_skipped", "report_unread"]

logger = logging.getLogger(__name__)


def report_skipped(task: lightning.LightningModule) -> None:
    """Log the samples that could not be used, by cause, over all ranks, which call this together."""
    skipped = _skipped_on_all_ranks(task)
    for cause, count in skipped.items():
        task.log(f"data/skipped/{cause.replace(' ', '_')}", float(count))
    if skipped and task.trainer.is_global_zero:
        causes = ", ".join(f"{count} {cause}" for cause, count in skipped.items())
        logger.warning("epoch %d: skipped %s", task.current_epoch + 1, causes)


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
        error = too_many_bad(seen, max_skipped, _skipped_on_all_ranks(task), [one for rank in examples for one in rank])
        assert error is not None
        raise error


def _skipped_on_all_ranks(task: lightning.LightningModule) -> dict[str, int]:
    mine = getattr(task.trainer.train_dataloader, "skipped", {})
    mine = mine if isinstance(mine, dict) else {}
    counts = add_up(*(mine.get(cause, 0) for cause in CAUSES), device=task.device)
    return {cause: count for cause, count in zip(CAUSES, counts, strict=True) if count}


def report_unread(task: lightning.LightningModule) -> None:
    """Log how many images an evaluation is without, over all ranks, which call this together."""
    trainer = task.trainer
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    (count,) = add_up(sum(getattr(loader, "skipped", 0) for loader in loaders), device=task.device)
    if count and trainer.is_global_zero:
        broken = [name for loader in loaders for name in getattr(loader, "broken", [])]
        such_as = f", such as {broken[0]}" if broken else ""
        logger.warning("images that could not be read or have no label, and do not count: %d%s", count, such_as)
