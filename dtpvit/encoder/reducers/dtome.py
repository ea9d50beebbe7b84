"""Dynamic token merging: as many merges as an image has similar pairs, by a threshold learned on batches of images."""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.collectives import add_up, gather_columns
from dtpvit.encoder.ops.exportable import descending_ranks
from dtpvit.encoder.ops.matching import best_proposals, even_before_odd
from dtpvit.encoder.reducers.base import JointThreshold, Reduction, TokenReducer
from dtpvit.encoder.reducers.calibration import MeanThreshold
from dtpvit.encoder.reducers.merging import keys_in_cells, merge, packed_rows
from dtpvit.encoder.tokens import Tokens

__all__ = ["DToMe"]


class DToMe(TokenReducer, JointThreshold):
    """Token merging by a threshold on similarity instead of a count, so that a plain image loses more than a busy one.

    Dynamic Token Merging of "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs" (Wang et al., NeurIPS
    2025). Who is proposed to whom is as in :class:`dtpvit.encoder.reducers.ToMe`, inside a block and by its keys. In
    training mode images lose r tokens on average: the best ``images * r`` proposals of the whole batch, over all ranks,
    are accepted. The lowest of them is the step's threshold, whose running mean evaluation uses: there every proposal
    that reaches it is accepted, so that an image's result depends on that image alone.

    No training is needed, but thresholds are. They come from forward passes over unlabelled images, a few hundred at
    large batches, with only the reducers in training mode::

        encoder.eval().reducers.train()
        with torch.no_grad():
            for images in batches:
                encoder(images)
        encoder.eval()

    Until then evaluation accepts each image's own r best.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        r: Tokens that images lose on average.
        max_r: The most that one image loses, in training as in evaluation.
        proportional: As of :class:`dtpvit.encoder.reducers.ToMe`.

    Raises:
        ValueError: If ``r`` is no whole number from 0 on, or ``max_r`` is below it.
    """

    place = "inside"
    needs = frozenset({"keys"})

    def __init__(self, dim: int, *, r: int, max_r: int | None = None, proportional: bool = True) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 0:
            raise ValueError(f"r is {r!r}; expected a whole number of tokens, at least 0")
        if max_r is not None and max_r < r:
            raise ValueError(f"max_r is {max_r}; expected at least r, which is {r}")
        self.r, self.max_r, self.proportional = r, max_r, proportional
        self.calibration = MeanThreshold()

    def extra_repr(self) -> str:
        return f"r={self.r}, max_r={self.max_r}, proportional={self.proportional}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        if not self.r:
            return super().macs(tokens, dim, num_heads)
        even = (tokens / 2).ceil()
        return even * (tokens - even) * (dim // num_heads)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        layout = tokens.layout
        if not self.r:  # the same on every rank; where only this batch has nothing to merge, the others wait for it
            return Reduction(tokens)
        assert evidence.keys is not None
        with torch.autocast(evidence.keys.device.type, enabled=False):
            best, partner = best_proposals(*keys_in_cells(evidence.keys, layout))
        scores = best.flatten()[layout.unpadded][None] if self.training else None
        accepted = self._accept(best, scores, layout, evidence.threshold)
        target = torch.where(accepted, partner, torch.arange(layout.longest, device=best.device))
        after = Layout.fetched(layout.lengths - accepted.sum(1), layout.num_prefix)  # the one synchronisation
        order = even_before_odd(layout.longest, layout.num_prefix, best.device)
        rows = packed_rows(target, layout, order) + after.first[layout.image]
        return Reduction(merge(tokens, rows, after, proportional=self.proportional), scores=scores)

    def _accept(self, best: Tensor, scores: Tensor | None, layout: Layout, threshold: Tensor | None) -> Tensor:
        """Proposals that are accepted, bool, shape (B, N)."""
        rank = descending_ranks(best)
        if scores is None:
            calibrated = self.calibration.threshold.to(best)
            accepted = torch.where(calibrated.isnan(), rank < self.r, best >= calibrated)
        else:
            if threshold is None:
                threshold = self.set_threshold(scores, layout.total - layout.batch * layout.num_prefix, layout.batch)
            accepted = best >= threshold
        if self.max_r is not None:
            accepted &= rank < self.max_r
        return accepted & best.isfinite()

    @torch.no_grad()
    def set_threshold(self, joint: Tensor, patches: int, images: int) -> Tensor:
        """The lowest of the batch's ``images * r`` best proposals, over all ranks; evaluation learns it too.

        Args:
            joint: What this rank's tokens propose, -inf where nothing, shape (1, T).
            patches: Non-prefix tokens of this rank's images.
            images: How many images those are.
        """
        (images,) = add_up(images, device=joint.device)
        ordered = gather_columns(joint)[0].sort(descending=True).values
        proposals = ordered.isfinite().sum()
        last = (proposals.clamp(max=images * self.r) - 1).clamp(min=0)
        threshold = ordered.index_select(0, last[None])[0]
        self.calibration.observe(threshold)
        return threshold
