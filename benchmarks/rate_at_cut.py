"""The share of boundaries of a trained predictor against where its logits are cut, and how many tokens images get.

python -m benchmarks.rate_at_cut --checkpoint FILE --images data/flowers/test --plot docs/concepts/rate.png
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.errors import UserError
from dtpvit.evaluation.towers import load_tower
from dtpvit.output_file import output_file


@torch.no_grad()
def rate_at_cut(checkpoint: str, images: str, plot: str, count: int = 100) -> None:
    """Draw it and print the figures.

    Args:
        checkpoint: Of a run with DynamicPooling and a dynamic budget.
        images: Folder of images, or shards.
        plot: Picture to write.
        count: Images to use.

    Raises:
        UserError: If the encoder has no such reducer.
    """
    from matplotlib.figure import Figure

    target, tower = output_file(plot), load_tower(checkpoint)
    assert isinstance(tower.trunk, VisionEncoder) and target is not None
    pixels, _ = tower.pixels(images, count)
    tokens, reduction = next(iter(tower.trunk.eval().reductions(pixels).values()))
    reducer = next(iter(tower.trunk.reducers.values()))
    if not isinstance(reducer, DynamicPooling) or reducer.boundary_calibration is None:
        raise UserError(f"{checkpoint} has no calibrated threshold; expected DynamicPooling with a dynamic budget")
    wanted, most = reducer.segments_wanted(tokens.layout)
    logits = reducer.boundary_predictor(tokens, reducer.line(tokens), wanted, most)[tokens.layout.free]
    patches = len(pixels) * tokens.patches.lengths[0].item()
    calibrated = reducer.boundary_calibration.boundary_threshold.item()

    def rate(cut: float) -> float:
        """Segments for each patch; the first patch of each image starts one in any case."""
        return ((logits > cut).sum().item() + len(pixels)) / patches

    figure = Figure(figsize=(8, 3), layout="constrained")
    curve, counts = figure.subplots(1, 2)
    cuts = torch.linspace(logits.quantile(0.01).item(), logits.quantile(0.999).item(), 200).tolist()
    curve.plot(cuts, [rate(cut) for cut in cuts])
    for place, name in ((0.0, "logit 0"), (calibrated, "calibrated")):
        curve.plot(place, rate(place), "o", label=f"{name}: {rate(place):.3f}")
        print(f"cut at {place:.3f} ({name}): {rate(place):.3f} segments a patch")
    curve.axhline(1 / reducer.compression, color="grey", linewidth=0.8, label=f"asked for: {1 / reducer.compression:g}")
    curve.set(xlabel="cut", ylabel="segments a patch")
    curve.legend(frameon=False)
    each = (reduction.tokens.layout.lengths - reduction.tokens.num_prefix).tolist()
    counts.hist(each, bins=20)
    counts.set(xlabel="tokens of an image, calibrated", ylabel="images")
    print(f"tokens an image: {min(each)} to {max(each)}, mean {sum(each) / len(each):.1f}")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    auto_cli(rate_at_cut, as_positional=False)
