"""The share of boundaries of a trained predictor against where its logits are cut, and how many tokens images get.

python -m benchmarks.rate_at_cut --checkpoint FILE --images data/flowers/test --plot docs/concepts/rate.png
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jsonargparse import auto_cli
from torch import Tensor

from dtpvit.encoder import ImageEncoder, VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.errors import UserError
from dtpvit.evaluation.towers import load_tower
from dtpvit.output_file import output_file


@dataclass(frozen=True)
class CutBoundaries:
    """Boundaries at the first reducer of an encoder.

    Attributes:
        logits: Of all places but each image's first, which starts a segment in any case.
        calibrated: The threshold of evaluation.
        asked: Segments for each patch that the reducer is to leave.
        patches: Of all images together.
        tokens: Of each image behind the reducer in evaluation, without prefix.
    """

    logits: Tensor
    calibrated: float
    asked: float
    patches: int
    tokens: list[int]

    def rate(self, cut: float) -> float:
        """Segments for each patch if logits above ``cut`` start one."""
        return ((self.logits > cut).sum().item() + len(self.tokens)) / self.patches


@torch.no_grad()
def cut_boundaries(trunk: ImageEncoder | None, images: Tensor) -> CutBoundaries:
    """Run an encoder up to its first reducer.

    Args:
        trunk: The encoder.
        images: Normalised, shape (B, C, H, W).

    Raises:
        UserError: If that reducer has no calibrated threshold.
    """
    reducer = next(iter(trunk.reducers.values()), None) if isinstance(trunk, VisionEncoder) else None
    calibration = reducer.boundary_calibration if isinstance(reducer, DynamicPooling) else None
    if calibration is None or calibration.boundary_threshold.isnan():
        raise UserError("found no calibrated threshold; give a checkpoint trained with DynamicPooling, budget dynamic")
    assert isinstance(trunk, VisionEncoder) and isinstance(reducer, DynamicPooling)
    came, reduction = next(iter(trunk.eval().reductions(images).values()))
    wanted, most = reducer.segments_wanted(came.layout)
    logits = reducer.boundary_predictor(came, reducer.line(came), wanted, most)[came.layout.free]
    return CutBoundaries(
        logits,
        calibration.boundary_threshold.item(),
        1 / reducer.compression,
        came.patches.total,
        (reduction.tokens.lengths - came.num_prefix).tolist(),
    )


def rate_at_cut(checkpoint: str, images: str, plot: str, count: int = 100) -> None:
    """Draw it and print the figures.

    Args:
        checkpoint: Of a run with DynamicPooling and a dynamic budget.
        images: Folder of images, or shards.
        plot: Picture to write.
        count: Images to use.
    """
    from matplotlib.figure import Figure

    target, tower = output_file(plot), load_tower(checkpoint)
    assert target is not None
    found = cut_boundaries(tower.trunk, tower.pixels(images, count)[0])
    figure = Figure(figsize=(8, 3), layout="constrained")
    curve, counts = figure.subplots(1, 2)
    low, high = (found.logits.quantile(share).item() for share in (0.01, 0.999))
    cuts = torch.linspace(low, high, 200).tolist()
    curve.plot(cuts, [found.rate(cut) for cut in cuts])
    for cut, name in ((0.0, "logit 0"), (found.calibrated, "calibrated")):
        curve.plot(cut, found.rate(cut), "o", label=f"{name}: {found.rate(cut):.3f}")
        print(f"cut at {cut:.3f} ({name}): {found.rate(cut):.3f} segments a patch")
    curve.axhline(found.asked, color="grey", linewidth=0.8, label=f"asked for: {found.asked:g}")
    curve.set(xlabel="cut", ylabel="segments a patch")
    curve.legend(frameon=False)
    counts.hist(found.tokens, bins=20)
    counts.set(xlabel="tokens of an image, calibrated", ylabel="images")
    least, most, mean = min(found.tokens), max(found.tokens), sum(found.tokens) / len(found.tokens)
    print(f"tokens an image: {least} to {most}, mean {mean:.1f}")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    auto_cli(rate_at_cut, as_positional=False)
