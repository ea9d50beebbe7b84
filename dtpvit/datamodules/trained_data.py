"""What a data module asks of the run that it belongs to: its place among the ranks, and the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L

from dtpvit.errors import UserError

__all__ = ["TrainedData"]

T = TypeVar("T")


class TrainedData(L.LightningDataModule):
    """A data module that works with a trainer and without.

    Attributes:
        get_data: Where missing data is explained, for the error message ("see data/cc12m/README.md").
    """

    get_data: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of its training data: where they were, as the user named them."""
        found = {"train_data": getattr(self, "train", None), "batch_size": getattr(self, "batch_size", None)}
        return {} if found["train_data"] is None else found

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _overfits(self) -> bool:
        """To overfit a few batches they must be the same in every epoch."""
        return self.trainer is not None and bool(getattr(self.trainer, "overfit_batches", 0))

    def _from_model(self, name: str, given: T | None) -> T:
        """The value given, or else the model's attribute of that name."""
        if given is not None:
            return given
        if (value := self._of_model(name)) is None:
            raise UserError(f"The data module has no {name} and no model to ask for it; set {name}.")
        return value

    def _of_model(self, name: str) -> Any:
        """The model's attribute of that name; None without a model or attribute."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, name, None)

    @contextmanager
    def _saying_where(self) -> Iterator[None]:
        """Adds to a sentence about data that are not there where to get them."""
        try:
            yield
        except UserError as error:
            if self.get_data is None:
                raise
            raise UserError(f"{str(error).rstrip('.')} ({self.get_data}).") from None
