"""What every training loader shares: the place in an epoch, saved and continued as Lightning does it."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, Self

from torch.utils.data import DataLoader

from dtpvit.errors import UserError

__all__ = ["Resumable", "steps_per_epoch"]


class Resumable(ABC):
    """Epoch and position of a loader that continues in mid-epoch.

    Not a DataLoader, on purpose: Lightning leaves its sampler alone, and saves and restores it through
    ``state_dict`` and ``load_state_dict``.

    Attributes:
        steps: Batches per epoch on every rank; None is one pass for evaluation.
    """

    steps: int | None
    batch_sampler = None  # Lightning asks whoever has a ``sampler`` for this too
    _loader: DataLoader[Any]
    _epoch: int
    _position: int  # batches of this epoch that were given out
    _salt: int  # of the shuffle; not 0 after a resume that could not be exact
    _resuming: bool

    @property
    def sampler(self) -> Self | None:
        """Where Lightning looks for ``set_epoch``; None in evaluation, whose epoch never changes."""
        return self if self.steps is not None else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; a position loaded for another is forgotten."""
        if epoch != self._epoch:
            self._start_epoch(epoch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Exact if the layout (the class says what belongs to it) is the same; else, with a warning, as many
        batches are left, drawn from a new shuffle of all data.
        """
        self._start_epoch(int(state["epoch"]))
        position = int(state["position"])
        if self.steps is not None and position >= self.steps:
            self._start_epoch(self._epoch + 1)
            return
        self._resuming = True
        self._position, self._salt = position, int(state["salt"])
        if self._continues(state):
            return
        known = state.get("layout", {})
        changed = [name for name, value in self._layout().items() if known.get(name) != value]
        warnings.warn(
            f"The data loader has another {', '.join(changed) or 'number of ranks'} than the checkpoint's, "
            "so the rest of this epoch is drawn from a new shuffle, not exactly continued.",
            stacklevel=2,
        )
        self._salt = position + 1

    @abstractmethod
    def _layout(self) -> dict[str, int | None]:
        """What must be the same for an exact continuation, in plain Python."""

    def _continues(self, state: dict[str, Any]) -> bool:
        """Whether the state fits this loader, whose position and salt are already set from it."""
        return state.get("layout") == self._layout()

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position, self._salt = epoch, 0, 0
        self._resuming = False

    def _stop_workers(self) -> None:
        if self._loader.num_workers and self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None

    @property
    def _iterator(self) -> Any:
        """Lightning shuts the workers down through this name at the end of a run."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value


def steps_per_epoch(num_samples: int, batch_size: int, world_size: int) -> int:
    """Full batches per epoch on every rank.

    Raises:
        UserError: If there is not even one.
    """
    steps = num_samples // (batch_size * world_size)
    if steps == 0:
        raise UserError(
            f"The {num_samples} training samples do not fill one batch of {batch_size} on {world_size} "
            "rank(s): lower batch_size or add data."
        )
    return steps
