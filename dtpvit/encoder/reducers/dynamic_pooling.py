"""Dynamic token pooling: a learned predictor says where segments start, the patches of a segment are averaged."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dtpvit.encoder.evidence import Evidence, Need
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.boundaries import (
    band_loss,
    batch_threshold,
    binomial_loss,
    imitation_loss,
    ratio_loss,
    straight_through,
    top_per_image,
)
from dtpvit.encoder.ops.collectives import add_up, gather_columns
from dtpvit.encoder.ops.noise import logistic_noise
from dtpvit.encoder.ops.regression import regress_votes
from dtpvit.encoder.ops.rows import take_rows
from dtpvit.encoder.reducers.base import JointThreshold, Reduction
from dtpvit.encoder.reducers.baseline import GradientBaseline
from dtpvit.encoder.reducers.boundary_pooling import BoundaryPooling
from dtpvit.encoder.reducers.calibration import BoundaryCalibration
from dtpvit.encoder.reducers.routers import ROUTERS, EntropyRouter, entropy_rise, exact_starts
from dtpvit.encoder.tokens import Tokens

__all__ = ["DynamicPooling"]


class DynamicPooling(BoundaryPooling, JointThreshold):
    """ "Dynamic token pooling [...] allows for variable-size segments", here of an image's patches.

    Nawrot et al., "Efficient Transformers with Dynamic Token Pooling", ACL 2023, with the corrections that images
    need: the tail is a segment of its own, the task teaches the boundaries, evaluation is deterministic and an image's
    result depends on that image alone.

    While training, logistic noise on the logits makes the decision a Gumbel-sigmoid sample, hard in value and soft in
    gradient. The noise is a function of ``tokens.seed``. In evaluation there is none.

    Args:
        dim: Width D of the tokens.
        compression: Tokens in for each token out.
        router: What scores the places: ``"mlp"``, ``"cosine"``, ``"local"``, ``"entropy"``, ``"minimum_variance"`` or
            ``"sensitivity"`` (:mod:`dtpvit.encoder.reducers.routers`); entropy learns nothing, and the last two are
            exact and have a fixed budget.
        estimator: How the task teaches the predictor: ``"regression"`` of the symmetric votes
            (:mod:`dtpvit.encoder.ops.regression`), or straight through ``"symmetric"`` votes, ``"dtp"``'s
            averaging weights or H-Net's ``"gate"`` (:mod:`dtpvit.encoder.ops.segments`); or ``"imitation"``: training
            uses the segments of the ``teacher``, which the predictor learns to name.
        teacher: Of imitation: ``"variance"``, the exact segments of least variance, or ``"entropy"``, those between the
            highest rises of the pixels' entropy, as Nawrot et al. supervise theirs.
        rate: What holds the mean rate: ``"quantile"``, the threshold is the quantile of the whole batch's noisy logits
            that gives it, over all ranks; or one of the published losses ``"binomial"`` (a prior on each image's
            count), ``"ratio"`` (H-Net's, on this process's batch) and ``"band"`` (a hinge on each image's rate), with
            threshold 0.
        rate_weight: Weight of the rate loss.
        band: Half-width of the band around 1 / compression, as a share of it.
        budget: ``"dynamic"``: counts vary from image to image; ``"fixed"``: the top ceil(N / compression) logits of
            each image, so that shapes are static.
        order: ``"raster"``, ``"serpentine"`` or ``"hilbert"``.
        proportional: Size-proportional attention after pooling.
        temperature: Of the straight-through gradient; at 1 it is that of the probability itself.
        noise: Logistic noise on the logits while training. Without it training decides as evaluation does; with a rate
            loss both then have a boundary wherever its probability is above 1/2, as in H-Net, and the rate is only what
            the loss has made of it.
        null_token: Whether a learned token is put in front of the segments, as the method's language models have it.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        compression: float,
        router: Literal["mlp", "cosine", "local", "entropy", "minimum_variance", "sensitivity"] = "mlp",
        estimator: Literal["regression", "symmetric", "dtp", "gate", "imitation"] = "regression",
        teacher: Literal["variance", "entropy"] = "variance",
        rate: Literal["quantile", "binomial", "ratio", "band"] = "quantile",
        rate_weight: float = 1.0,
        band: float = 0.2,
        budget: Literal["dynamic", "fixed"] = "dynamic",
        order: Literal["raster", "serpentine", "hilbert"] = "hilbert",
        proportional: bool = True,
        temperature: float = 0.5,
        noise: bool = True,
        null_token: bool = False,
    ) -> None:
        vote = "symmetric" if estimator in ("regression", "imitation") else estimator
        super().__init__(compression, order=order, proportional=proportional, estimator=vote)
        if router not in ROUTERS:
            raise ValueError(f"router is {router!r}; expected one of {', '.join(ROUTERS)}")
        if rate not in ("quantile", "binomial", "ratio", "band"):
            raise ValueError(f"rate is {rate!r}; expected quantile, binomial, ratio or band")
        if budget not in ("dynamic", "fixed"):
            raise ValueError(f"budget is {budget!r}; expected dynamic or fixed")
        if teacher not in ("variance", "entropy"):
            raise ValueError(f"teacher is {teacher!r}; expected variance or entropy")
        self.rate, self.rate_weight, self.band = rate, rate_weight, band
        self.temperature = temperature
        shifts = rate == "quantile" and estimator != "imitation"
        self.boundary_predictor = ROUTERS[router](dim, initial_rate=None if shifts else 1 / compression)
        self.fixed = budget == "fixed" or self.boundary_predictor.decides
        self.cut_at_half = not (noise or self.fixed or rate == "quantile")
        self.holds_rate = not self.cut_at_half
        self.boundary_calibration = None if self.fixed or self.cut_at_half else BoundaryCalibration()
        if self.fixed and rate != "quantile":
            raise ValueError(f"rate {rate!r} has nothing to hold where the budget is fixed; leave it at quantile")
        if estimator in ("regression", "imitation") and rate != "quantile":
            raise ValueError(
                f"estimator {estimator!r} leaves the rate to the threshold; with rate {rate!r} use another"
            )
        if rate != "quantile" and not self.boundary_predictor.learned:
            raise ValueError(f"rate {rate!r} steers what learns, and router {router!r} does not; leave it at quantile")
        self.learns = learns = self.boundary_predictor.learned and not self.boundary_predictor.decides
        self.regress = learns and estimator == "regression"
        self.imitate = learns and estimator == "imitation"
        self.noisy = noise and learns and not self.imitate
        self.draws = "training" if self.noisy else "never"
        self.teacher = teacher
        self.heat_of = "boundary probability" if self.boundary_predictor.learned else "boundary score"
        # A threshold that follows the logits lets them drift; a rate loss holds them in place.
        drifts = learns and rate == "quantile" and not (self.regress or self.imitate)
        self.boundary_baseline = GradientBaseline() if drifts else None
        self.boundary_null = nn.Parameter(torch.randn(1, dim)) if null_token else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rate={self.rate!r}, budget={'fixed' if self.fixed else 'dynamic'}"

    @property
    def needs(self) -> frozenset[Need]:
        taught = self.imitate and self.training and self.teacher == "entropy"
        by_pixels = taught or isinstance(self.boundary_predictor, EntropyRouter)
        return frozenset({"pixel_entropy"}) if by_pixels else frozenset()

    def fix_budget(self) -> None:
        """Keep the top ceil(N / compression) logits of each image from now on, whatever the threshold learned.

        The weights stay. Counts then follow the rate image by image instead of on average, and shapes are static.
        """
        self.fixed, self.cut_at_half, self.holds_rate, self.boundary_calibration = True, False, True, None

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        return self.boundary_predictor.macs(tokens, dim, self.compression)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        order = self.line(tokens)
        layout = tokens.layout
        with torch.autocast(tokens.features.device.type, enabled=False):
            wanted, most = self.segments_wanted(layout)
            weights = self.boundary_predictor.weights(tokens)
            weighted = tokens if weights is None else replace(tokens, size=tokens.size * weights)
            logits = self.boundary_predictor(_detached(weighted) if self.imitate else weighted, order, wanted, most)
            scores = self._add_noise(logits, tokens)
            if self.boundary_baseline is not None and scores.requires_grad:
                scores = self.boundary_baseline(scores, ~layout.opening)
            hard, cut, joint = self._decide(logits, scores, layout, wanted, evidence)
            losses = {}
            if self.imitate and self.training:
                hard = self._taught(weighted, order, wanted, most)
                losses = {"imitation": imitation_loss(logits, hard, layout)}
            if self.imitate or not self.learns:
                starts = hard
            elif cut is None:
                starts = regress_votes(hard, logits, layout)
            else:
                starts = straight_through(hard, scores - cut, self.temperature)
            starts = torch.where(layout.opening, torch.ones_like(starts), starts)
        known = self.fixed or (self.imitate and self.training)
        fixed = most if known and layout.uniform else None
        pooled = self.pool(tokens, starts, order, fixed=fixed, weights=weights)
        if self.boundary_null is not None:
            pooled = _put_in_front(pooled, self.boundary_null)
        heat = None
        if not (self.training or self.boundary_predictor.decides):
            heat = partial(self._probability, logits.detach(), order, layout, wanted)
        return Reduction(pooled, {**losses, **self._losses(starts, scores, layout)}, joint, heat=heat)

    def _add_noise(self, logits: Tensor, tokens: Tokens) -> Tensor:
        if not (self.training and self.noisy):
            return logits
        if tokens.seed is None:
            raise ValueError("training needs tokens.seed, from which the noise of each image follows")
        layout = tokens.layout
        return logits + logistic_noise(tokens.seed[layout.image], layout.position).to(logits.dtype)

    def _decide(
        self, logits: Tensor, scores: Tensor, layout: Layout, wanted: Tensor, evidence: Evidence
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hard starts, shape (T,); what scores are cut at, where a gradient straight through the cut needs it; and in
        training the free scores."""
        straight = self.learns and not (self.regress or self.imitate)
        if self.cut_at_half:
            cut = scores.new_full((), 0.0 if self.compression > 1 else float("-inf"))
            return (scores > cut).to(scores.dtype), cut if straight else None, None
        calibration = self.boundary_calibration
        if calibration is None or not self.training:
            taken = top_per_image(scores.detach(), layout.opening, layout, wanted - 1)
            cut = _cut(scores.detach(), taken, layout) if straight else None
            if calibration is not None:
                # Chosen on the device: to ask whether there is a threshold would synchronise.
                threshold = calibration.boundary_threshold.to(scores)
                taken = torch.where(threshold.isnan(), taken, scores > threshold)
                cut = None if cut is None else torch.where(threshold.isnan(), cut, threshold)
            return taken.to(scores.dtype), cut, None
        joint = torch.stack((logits.detach(), scores.detach())).index_select(1, layout.free)
        threshold = evidence.threshold
        if threshold is None:
            threshold = self.set_threshold(joint, layout.total - layout.batch * layout.num_prefix, layout.batch)
        threshold = threshold.to(scores)
        return (scores > threshold).to(scores.dtype), threshold if straight else None, joint

    def _probability(self, logits: Tensor, order: Tensor | None, layout: Layout, wanted: Tensor) -> Tensor:
        """How likely a boundary is under logistic noise, 1/2 where evaluation cuts, packed order, shape (T,)."""
        cut = torch.zeros_like(logits)
        if not self.cut_at_half:
            cut = _cut(logits, top_per_image(logits, layout.opening, layout, wanted - 1), layout)
        if self.boundary_calibration is not None:
            threshold = self.boundary_calibration.boundary_threshold.to(logits)
            cut = torch.where(threshold.isnan(), cut, threshold)
        found = (logits - cut).sigmoid().masked_fill(layout.opening, 1.0)
        return found if order is None else torch.empty_like(found).scatter_(0, order, found)

    def _taught(self, tokens: Tokens, order: Tensor | None, wanted: Tensor, most: int) -> Tensor:
        """Starts that imitation teaches, in line order, float32, shape (T,)."""
        if self.teacher == "variance":
            return exact_starts(tokens, order, wanted, most)
        layout = tokens.layout
        return top_per_image(entropy_rise(tokens, order), layout.opening, layout, wanted - 1).to(torch.float32)

    def after_backward(self) -> None:
        if self.boundary_baseline is not None:
            self.boundary_baseline.settle()

    @torch.no_grad()
    def set_threshold(self, joint: Tensor, patches: int, images: int) -> Tensor:
        """Training threshold of a step, and calibration of the evaluation threshold, over all ranks.

        Args:
            joint: Clean and noisy logits of this rank's free tokens, shape (2, F).
            patches: Non-prefix tokens of this rank's images.
            images: How many images those are.

        Returns:
            A scalar: the quantile that gives the rate, or 0 where a rate loss holds it.
        """
        patches, images = add_up(patches, images, device=joint.device)
        joint = gather_columns(joint)
        count = round(patches / self.compression) - images
        if self.boundary_calibration is not None:
            self.boundary_calibration.observe(joint[0], min(1.0, max(0.0, count / max(1, joint.shape[1]))))
        if self.rate != "quantile":
            return joint.new_zeros(())
        return batch_threshold(joint[1], count)

    def _losses(self, starts: Tensor, scores: Tensor, layout: Layout) -> dict[str, Tensor]:
        if self.rate == "quantile" or not self.training:
            return {}
        target = 1 / self.compression
        patches = (layout.lengths - layout.num_prefix).to(starts.dtype)
        on_patches = starts.masked_fill(layout.prefix, 0.0)
        counts = torch.zeros_like(patches).index_add(0, layout.image, on_patches)
        if self.rate == "binomial":
            loss = binomial_loss(counts, patches, target)
        elif self.rate == "band":
            loss = band_loss(counts / patches, target * (1 - self.band), target * (1 + self.band))
        else:
            # Where a segment must start, it starts with probability one: in both shares or in neither.
            expected = torch.sigmoid(scores.index_select(0, layout.free)).sum() + layout.batch
            loss = ratio_loss(counts.detach().sum() / patches.sum(), expected / patches.sum(), target)
        return {"rate": self.rate_weight * loss}


def _detached(tokens: Tokens) -> Tokens:
    """What is named after the fact must not move to be named more easily."""
    return replace(tokens, features=tokens.features.detach(), size=tokens.size.detach())


def _cut(scores: Tensor, taken: Tensor, layout: Layout) -> Tensor:
    """Halfway between the lowest score taken and the highest left of each image, at each of its places, shape (T,)."""
    inf = scores.new_full((layout.batch,), float("inf"))
    free = ~layout.opening
    lowest = inf.scatter_reduce(0, layout.image, torch.where(free & taken, scores, inf[0]), "amin")
    highest = (-inf).scatter_reduce(0, layout.image, torch.where(free & ~taken, scores, -inf[0]), "amax")
    lowest = torch.where(lowest.isinf(), highest, lowest)
    highest = torch.where(highest.isinf(), lowest, highest)
    cut = (lowest + highest) / 2
    return torch.where(cut.isinf(), torch.zeros_like(cut), cut)[layout.image]


def _put_in_front(tokens: Tokens, extra: Tensor) -> Tokens:
    """Add one learned token, shape (1, D), behind the prefix tokens of every image; it becomes a prefix token."""
    old = tokens.layout
    host = None if old.host_lengths is None else [length + 1 for length in old.host_lengths]
    new = Layout(old.lengths + 1, old.longest + 1, old.total + old.batch, old.num_prefix + 1, host)
    rows = torch.cat((tokens.features, extra.to(tokens.features.dtype).expand(old.batch, -1)))
    inserted = new.position == old.num_prefix
    kept = old.first[new.image] + new.position - (new.position > old.num_prefix).long()
    index = torch.where(inserted, old.total + new.image, kept)
    inverse = torch.empty_like(index).scatter_(0, index, torch.arange(new.total, device=index.device))
    size = torch.cat((tokens.size, tokens.size.new_ones(old.batch)))[index]
    bias = tokens.key_bias
    bias = None if bias is None else torch.cat((bias, bias.new_zeros(old.batch)))[index]
    return replace(tokens, features=take_rows(rows, index, inverse), layout=new, size=size, key_bias=bias)
