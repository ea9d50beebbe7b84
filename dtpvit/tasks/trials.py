"""Short trainings of a copy of a task, to find settings by: nothing validated, nothing logged, nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng

from dtpvit.errors import UserError

__all__ = ["TRIAL", "trial_of"]

TRIAL: dict[str, Any] = {
    # Lightning's tuner sets the number of steps itself, but validates after every epoch and ends with the last one.
    "max_epochs": -1,
    "max_steps": 1_000_000,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "val_check_interval": None,
    "check_val_every_n_epoch": sys.maxsize,
    "num_sanity_val_steps": 0,
    "fast_dev_run": False,
    "logger": False,
}
"""The options of a ``lightning.Trainer`` in which one for trials differs from one for the run."""


@contextmanager
def trial_of(task: LightningModule, after_batch: Callable[[Any], None]) -> Iterator[LightningModule]:
    """A copy of ``task`` to try something with; in the block torch's, numpy's and Python's generators are isolated.

    Args:
        task: Without a trainer yet. It stays as it is.
        after_batch: Told of every training batch what ``on_train_batch_end`` is told, the outputs. A callback would
            not do: Lightning's tuner takes all of them away.

    Raises:
        UserError: If nothing of it learns.
    """
    if not any(parameter.requires_grad for parameter in task.parameters()):
        raise UserError(f"nothing of this {type(task).__name__} learns; give it a mode in which some parameters do.")
    copy = deepcopy(task)
    before = copy.on_train_batch_end

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        before(outputs, batch, batch_idx)
        after_batch(outputs)

    copy.on_train_batch_end = on_train_batch_end
    with isolate_rng():
        yield copy
