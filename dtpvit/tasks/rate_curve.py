"""The loss of a learning-rate range test as a curve: what it suggests, as a table and as a picture."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["RateCurve"]


@dataclass(frozen=True)
class RateCurve:
    """Losses of steps whose learning rate rose exponentially.

    The suggestion is where the smoothed loss falls most steeply over the logarithm of the rate, before its minimum.
    Lightning's is over the rate itself, which divides by it: on flat noise it is the lowest rate, whatever that is.

    Attributes:
        rates: Base learning rates, rising.
        losses: Of the steps taken with them.
    """

    FEWEST: ClassVar[int] = 20
    """Steps below which the noise of batches is not told from a slope."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @cached_property
    def smoothed(self) -> Tensor:
        """Means of neighbouring losses under a Gaussian as wide as a 25th of the curve, float64, shape (steps,).

        Centred, so that the curve is not moved towards higher rates. A loss that has exploded counts as one as far
        above the start as the lowest is below it; else its neighbours would vanish.
        """
        losses = torch.tensor(self.losses, dtype=torch.float64)
        index = torch.arange(len(losses), dtype=torch.float64)
        weights = torch.exp(-0.5 * ((index[:, None] - index) / self._width) ** 2)
        return weights @ losses.nan_to_num(nan=math.inf).clamp(max=self._ceiling) / weights.sum(1)

    @property
    def lowest(self) -> float | None:
        """The rate at which the smoothed loss is lowest; None where there is no suggestion."""
        return None if self.suggestion is None else self.rates[self._valley]

    @cached_property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls most steeply; None if it does not fall by more than batches differ."""
        before = self.smoothed[: self._valley + 1]
        if len(before) < 3:
            return None
        # What the mean of a window would vary by if the loss had no trend. Six of these: in 1 of 100 noises.
        scatter = torch.tensor(self.losses[: len(before)], dtype=torch.float64).diff().std() / math.sqrt(2)
        noise = scatter / math.sqrt(2 * math.sqrt(math.pi) * self._width)
        if before.max() - before[-1] <= 6 * noise + 1e-6 * before.abs().max():
            return None
        exponents = torch.tensor(self.rates[: len(before)], dtype=torch.float64).log10()
        return self.rates[int(torch.gradient(before, spacing=(exponents,))[0].argmin())]

    def write(self, path: Path) -> None:
        """Write the curve as a CSV file."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["learning_rate", "loss", "smoothed_loss"])
            for row in zip(self.rates, self.losses, self.smoothed.tolist(), strict=True):
                writer.writerow([f"{value:.6g}" for value in row])

    def draw(self, path: Path) -> None:
        """Draw the curve as a picture.

        Raises:
            ImportError: If matplotlib is missing.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.rates, self.losses, ".", color="C0", alpha=0.35, label="loss of each step")
        axes.plot(self.rates, self.smoothed.tolist(), color="C0", label="smoothed")
        if self.suggestion is not None:
            height = float(self.smoothed[self.rates.index(self.suggestion)])
            axes.axvline(self.suggestion, color="C3", linewidth=1)
            axes.plot(self.suggestion, height, "o", color="C3", label=f"suggestion: {self.suggestion:.1e}")
        finite = [loss for loss in self.losses if loss < self._ceiling]
        margin = 0.05 * (self._ceiling - min(finite, default=0.0)) or 1.0
        axes.set(xlabel="base learning rate, of which each parameter group has its multiple", ylabel="training loss")
        axes.set(xscale="log", ylim=(min(finite, default=0.0) - margin, self._ceiling + margin))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)

    @property
    def _width(self) -> float:
        return max(1.5, len(self.losses) / 25)

    @cached_property
    def _valley(self) -> int:
        return int(self.smoothed.argmin())

    @property
    def _ceiling(self) -> float:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        first = finite[: max(3, len(self.losses) // 10)]
        start = sum(first) / max(1, len(first))
        return 2 * start - min(finite, default=start)
