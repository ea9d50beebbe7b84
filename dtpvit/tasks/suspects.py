"""Which samples the steps had whose loss was no finite number, kept for whoever wants to look at them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Suspects"]


class Suspects:
    """The samples of the optimizer step at hand, and of the bad ones just before it, on this rank."""

    def __init__(self) -> None:
        self._step: list[Any] = []
        self._bad: list[dict[str, Any]] = []

    def see(self, batch: Any) -> None:
        """Note a batch of the present step: its ``key``, or for conversations ``record``, a number in the data file.

        Numbers stay where they are until they are written, for reading them would wait for the device.
        """
        if isinstance(batch, Mapping):
            self._step.append(batch.get("key", batch.get("record")))

    def acquit(self) -> None:
        """The step was sound."""
        self._step, self._bad = [], []

    def keep(self, *, epoch: int, step: int, loss: Tensor) -> None:
        """The step was not.

        Args:
            epoch: From 0.
            step: Optimizer steps before it.
            loss: Of this rank; it may be finite where that of another rank, or a gradient, is not.
        """
        self._bad.append({"epoch": epoch, "step": step, "loss": loss.detach(), "keys": self._step})
        self._step = []

    def write(self, path: Path) -> bool:
        """Write a line of JSON for each bad step; False if no batch said which samples it is of."""
        rows = [row for row in self._bad if any(keys is not None for keys in row["keys"])]
        if not rows:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                keys = [key for part in row["keys"] if part is not None for key in _plain(part)]
                file.write(json.dumps({**row, "loss": str(float(row["loss"])), "keys": keys}) + "\n")
        return True


def _plain(keys: Any) -> list[str] | list[int]:
    return keys.tolist() if isinstance(keys, Tensor) else list(keys)
