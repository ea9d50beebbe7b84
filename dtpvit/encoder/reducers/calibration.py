"""The threshold that evaluation uses, learned from what training saw."""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.reducers.precision import FullPrecision

__all__ = ["BoundaryCalibration", "MeanThreshold"]


class BoundaryCalibration(FullPrecision):
    """Keeps the distribution of recent clean logits and the threshold that gives the target rate on them.

    Each training step leaves its logits' quantile function, at ``resolution`` evenly spaced levels, in a window of the
    last ``window`` steps; the threshold is the quantile of the whole window. Against a histogram this needs no range
    fixed beforehand (logits start within 0.01 of each other and end tens apart), and it is exact to 1/resolution. It
    is set anew at every training step, so that no validation and no checkpoint can meet a stale one.

    All state is persistent, float32, and the same on every rank.
    """

    boundary_window: Tensor
    boundary_share: Tensor
    boundary_threshold: Tensor

    def __init__(self, *, window: int = 8, resolution: int = 512) -> None:
        super().__init__()
        self.register_buffer("boundary_window", torch.full((window, resolution), float("nan")))
        self.register_buffer("boundary_share", torch.full((window,), float("nan")))
        self.register_buffer("boundary_threshold", torch.tensor(float("nan")))

    @torch.no_grad()
    def observe(self, logits: Tensor, share: float) -> None:
        """Take in one training step.

        Args:
            logits: Clean logits of all free tokens of the step, over all ranks and micro-batches, shape (F,).
            share: Share of them that the target rate wants above the threshold.
        """
        if len(logits) == 0:
            return
        resolution = self.boundary_window.shape[1]
        # Named: where all of a model is bfloat16, Lightning makes that the default.
        level = (torch.arange(resolution, device=logits.device, dtype=torch.float32) + 0.5) / resolution
        row = logits.to(torch.float32).sort().values[(level * len(logits)).long()]
        # The window slides; copying 32 KiB a step is cheaper than a position that every rank must agree on.
        window = torch.cat((self.boundary_window[1:], row[None]))
        shares = torch.cat((self.boundary_share[1:], torch.full_like(self.boundary_share[:1], share)))
        # A step whose logits are not all numbers is as if it had not been.
        whole = row.isfinite().all()
        self.boundary_window.copy_(torch.where(whole, window, self.boundary_window))
        self.boundary_share.copy_(torch.where(whole, shares, self.boundary_share))
        seen = self.boundary_window.flatten().sort().values  # NaN, not yet filled, sorts last
        known = (~self.boundary_share.isnan()).sum()
        cut = ((1 - self.boundary_share.nanmean().nan_to_num()) * known * resolution).round().long()
        last = (known * resolution - 1).clamp(min=0)
        around = torch.stack(((cut - 1).clamp(min=0), torch.minimum(cut, last)))
        threshold = seen.index_select(0, around).mean()
        threshold = torch.where(cut == 0, -torch.inf, torch.where(cut > last, torch.inf, threshold))
        self.boundary_threshold.copy_(torch.where(known > 0, threshold, torch.nan))


class MeanThreshold(FullPrecision):
    """The mean of the thresholds of past steps: of all of them at first, then fading over the last ``window``.

    NaN until there was a step. All state is persistent, float32, and the same on every rank.
    """

    threshold: Tensor
    steps: Tensor

    def __init__(self, *, window: int = 100) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.register_buffer("steps", torch.tensor(0.0))

    @torch.no_grad()
    def observe(self, threshold: Tensor) -> None:
        """Take in a step's threshold, a scalar; one that is no number is as if it had not been."""
        whole = threshold.isfinite()
        steps = self.steps + 1
        before = torch.where(self.steps == 0, threshold, self.threshold)
        mean = before + (threshold - before) / steps.clamp(max=self.window)
        self.threshold.copy_(torch.where(whole, mean, self.threshold))
        self.steps.copy_(torch.where(whole, steps, self.steps))
