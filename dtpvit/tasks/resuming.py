"""Going on within an epoch where a checkpoint left the data."""

from __future__ import annotations

import lightning

__all__ = ["continue_data"]


def continue_data(trainer: lightning.Trainer) -> None:
    """Hand the checkpoint's positions to the training loaders; to be called when training starts.

    Lightning does so when it makes the loaders, and forgets it where they are there before the checkpoint's loops are
    restored: ``estimated_stepping_batches``, which a learning-rate schedule needs, makes them that early. Without this
    a run resumed within an epoch sees the epoch's first batches again and never its last. Harmless where Lightning has
    done it: the positions are handed over only once.
    """
    trainer.fit_loop._load_combined_loader_states()
