"""DynamicViT: a predictor says which tokens stay; in training those that go are masked, in evaluation removed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.boundaries import straight_through
from dtpvit.encoder.ops.noise import logistic_noise
from dtpvit.encoder.ops.selection import weighted_sums
from dtpvit.encoder.reducers.base import Reduction
from dtpvit.encoder.reducers.precision import FullPrecision
from dtpvit.encoder.reducers.selection import TokenSelection, select
from dtpvit.encoder.tokens import Tokens

__all__ = ["DynamicViT"]


class DynamicViT(TokenSelection):
    """ "A dynamic token sparsification framework to prune redundant tokens progressively and dynamically".

    Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021. Training
    draws for each patch whether it stays, a Gumbel-softmax sample from ``tokens.seed``, hard in value and soft in
    gradient; what was once let go stays gone. All tokens are kept, but from here on no other sees those that go
    (:func:`dtpvit.encoder.ops.policy.policy_attention`), which saves nothing and lets the task teach the predictor.
    Evaluation keeps the patches with the highest log-probability to stay, in descending order.

    Published for blocks 3, 6 and 9 with a keep rate rho a stage, ``{"3,6,9": {"class_path": "DynamicViT", "each":
    {"keep": [0.7, 0.49, 0.343]}}}``, on a pretrained trunk that learns at a hundredth of the predictors' rate, with
    a dense teacher. No other reducer can follow it in training.

    Args:
        dim: Width D of the tokens.
        keep: Share of the image's original patches that are left behind this stage, in (0, 1]; in evaluation
            int(keep * N), at least one.
        ratio_weight: Weight of the ratio loss, the squared difference of each image's share kept and ``keep``.
        stages: Over how many of these reducers the ratio loss is averaged.

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    draws = "training"
    drops = True
    masks = True
    heat_of = "keep probability"

    def __init__(self, dim: int, *, keep: float, ratio_weight: float = 2.0, stages: int = 3) -> None:
        super().__init__(keep)
        self.ratio_weight, self.stages = ratio_weight, stages
        self.keep_predictor = _Predictor(dim)

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        return tokens * self.keep_predictor.macs(dim)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if self.keep == 1 and not self.training:
            return Reduction(tokens)
        layout = tokens.layout
        before = tokens.size.new_ones(layout.total) if tokens.policy is None else tokens.policy
        with torch.autocast(tokens.features.device.type, enabled=False):
            stay, go = self.keep_predictor(tokens.features, before.masked_fill(layout.prefix, 0.0), layout).unbind(1)
        if not self.training:
            return Reduction(self._selected(tokens, stay), heat=stay.detach().exp)
        if tokens.seed is None:
            raise ValueError("training needs tokens.seed, from which the noise of each image follows")
        logits = stay - go + logistic_noise(tokens.seed[layout.image], layout.position).to(stay.dtype)
        stays = straight_through((logits > 0).to(logits.dtype), logits, 1.0) * before
        policy = stays.masked_fill(layout.prefix, 1.0)
        return Reduction(replace(tokens, policy=policy), {"ratio": self._ratio_loss(stays, tokens)})

    def _selected(self, tokens: Tokens, scores: Tensor) -> Tokens:
        layout, patches = tokens.layout, tokens.patches
        most = (patches.lengths.to(torch.float64) * self.keep).to(torch.int64).clamp(min=1)
        wanted = torch.minimum(most, layout.lengths - layout.num_prefix)
        lengths = wanted + layout.num_prefix
        if patches.uniform:
            limit = layout.num_prefix + max(1, int(patches.longest * self.keep))
            after = layout.resized(lengths, lambda length: min(length, limit))
        else:
            after = Layout.fetched(lengths, layout.num_prefix)
        return select(tokens, scores, wanted, after)

    def _ratio_loss(self, stays: Tensor, tokens: Tokens) -> Tensor:
        layout = tokens.layout
        count = (layout.lengths - layout.num_prefix).to(stays.dtype)
        share = weighted_sums(stays.masked_fill(layout.prefix, 0.0)[:, None], torch.ones_like(stays), layout)
        target = (self.keep * tokens.patches.lengths / count).clamp(max=1.0)
        return self.ratio_weight / self.stages * (share.squeeze(1) / count - target).square().mean()


class _Predictor(FullPrecision):
    """Log-probabilities to stay and to go, from a token and the mean of those of its image that are still there."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.embed = nn.Linear(dim, dim)
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, there: Tensor, layout: Layout) -> Tensor:
        """Log-probabilities, shape (T, 2).

        Args:
            features: Shape (T, D).
            there: 1 for patches that are still there, 0 for others and for prefix tokens, shape (T,).
            layout: Of the T tokens.
        """
        x = nn.functional.gelu(self.embed(self.norm(features.to(self.embed.weight.dtype))))
        own, shared = x.split((x.shape[1] // 2, x.shape[1] - x.shape[1] // 2), dim=1)
        there = there.to(x.dtype)
        count = weighted_sums(torch.ones_like(there)[:, None], there, layout)
        mean = weighted_sums(shared, there, layout) / count.clamp(min=1.0)
        return self.score(torch.cat((own, mean[layout.image]), dim=1)).log_softmax(1)

    @staticmethod
    def macs(dim: int) -> int:
        """Multiply-accumulates for each token."""
        return dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + 2 * (dim // 4)
