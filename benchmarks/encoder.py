"""Image towers against open_clip's dense ones, in the same run: time, FLOPs and memory, and packing against padding.

python -m benchmarks.encoder --images DIR --output docs/results/encoder.md
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from jsonargparse import auto_cli

from benchmarks.padded import PaddedTower
from benchmarks.record import heading, pages, table
from dtpvit.encoder import BlockLayouts, Layout, VisualTower
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.classifier import Precision, autocast
from dtpvit.evaluation.comparison import Measured, measure_cost
from dtpvit.evaluation.measuring import Quartiles, alternate, speed_ups
from dtpvit.evaluation.towers import Tower, load_tower


def encoder(
    images: str | None = None,
    patches: list[int] = [32, 16],  # noqa: B006 (never changed)
    batch_sizes: list[int] = [64, 16],  # noqa: B006
    precisions: list[Precision] = ["fp32", "bf16"],  # noqa: B006
    packing: bool = True,
    rounds: int = 5,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Measure B/32 at 2x, 4x and 10x, and B/16 at 4x, 4x after four blocks and 10x.

    Args:
        images: Folder or shards of real images; without them only random pixels at the nominal rate.
        patches: Of 32 and 16, which to measure.
        batch_sizes: One for each of ``patches``.
        precisions: In which to measure.
        packing: Whether to compare packing with padding too, on B/32.
        rounds: Measured runs of each step.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    parts = [heading("Image towers: FLOPs saved and time saved", place), _WHAT]
    for patch, batch in zip(patches, batch_sizes, strict=True):
        for precision in precisions:
            for source in [None, images] if images else [None]:
                kind = "random pixels, nominal rate" if source is None else "real images, counts vary"
                parts.append(f"## B/{patch}, batch {batch}, {precision}, {kind}\n")
                parts.append(_table(_measure(patch, batch, precision, source, rounds, place)))
                print(*parts[-2:], sep="\n", file=sys.stderr)
        if patch == 32 and packing:
            parts.append(_PACKING)
            parts.append(_packing([batch, 4 * batch], images, rounds, place))
    pages(parts, output)


_WHAT = """\
Medians over rounds in which all models run in turn; speed-ups are medians of the ratios within a round, quartiles in
brackets. Forward is evaluation; training is forward and backward, in training mode, where counts vary from image to
image. On random pixels a predictor never trained keeps the nominal number of every image in evaluation; on real images
its threshold is set so that this batch keeps the nominal share. GMACs are of the forward pass, counted from what each
block saw, boundary predictor included. Efficiency = speed-up / FLOP ratio, of forward and backward in training. Saved
activations: what is allocated between forward and backward; in bf16 autocast's copies of the weights are among them,
the same for all models.
"""


_PACKING = """\
## Packed against padded to the batch's longest, B/32 10x, training step, fp32 (on a GPU bf16)

The same weights and images; padded, every block behind the reducer works on as many tokens an image as the longest
has. The last column is what the arithmetic allows: patch embedding and full blocks cost the same either way.
"""


def _names(patch: int) -> list[str]:
    rates = ["2x", "4x", "10x"] if patch == 32 else ["4x", "4x-4p8", "10x"]
    return [f"ViT-B-{patch}", *(f"DTP-ViT-B-{patch}-{rate}" for rate in rates)]


def _measure(
    patch: int, batch: int, precision: Precision, source: str | None, rounds: int, device: torch.device
) -> list[Measured]:
    torch.manual_seed(0)
    towers = [load_tower(name) for name in _names(patch)]
    pixels = {tower.name: tower.pixels(source, batch)[0] for tower in towers}
    return measure_cost(towers, pixels, device, precision=precision, rounds=rounds, calibrate=source is not None)


def _table(results: list[Measured]) -> str:
    base = results[0].timings["training"]
    rows = []
    for result in results:
        forward, training = result.timings["forward"], result.timings["training"]
        spread = next(iter(result.tokens.values()), None)
        rows.append(
            [
                result.name,
                "" if spread is None else f"{spread.mean:.1f} ({spread.min}-{spread.max})",
                f"{result.gmacs:.2f}",
                f"{forward.images_per_second:.1f}",
                f"{forward.speed_up:.2f} ({forward.low:.2f}-{forward.high:.2f})",
                f"**{forward.efficiency:.2f}**",
                f"{training.images_per_second:.1f}",
                f"{training.speed_up:.2f} ({training.low:.2f}-{training.high:.2f})",
                f"**{training.efficiency:.2f}**",
                f"{training.kept_bytes / base.kept_bytes:.3f}",
            ]
        )
    header = ["model", "tokens", "GMACs", "forward, images/s", "speed-up", "efficiency"]
    header += ["training, images/s", "speed-up", "efficiency", "saved activations, of dense"]
    return table(header, rows)


def _packing(batches: list[int], source: str | None, rounds: int, device: torch.device) -> str:
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    rows = []
    for batch in batches:
        tower = load_tower("DTP-ViT-B-32-10x")
        images = tower.pixels(source, batch)[0].to(device)
        packed = tower.image.to(device).train()
        assert isinstance(packed, VisualTower)
        padded = PaddedTower(packed)
        macs = [_macs(tower, packed.trunk(images).layouts, pad) for pad in (True, False)]

        def step(model: torch.nn.Module, packed: VisualTower = packed, images: torch.Tensor = images) -> None:
            for parameter in packed.parameters():
                parameter.grad = None
            with autocast(device, precision):
                model(images).square().mean().backward()

        steps = {"padded": partial(step, padded), "packed": partial(step, packed)}
        seconds = alternate(steps, device, rounds=rounds, warmup=1)
        ratio = speed_ups(seconds, "padded")["packed"]
        times = [f"{Quartiles.of(seconds[name]).median:.2f}" for name in steps]
        speed = f"**{ratio.median:.2f}** ({ratio.low:.2f}-{ratio.high:.2f})"
        rows.append([batch, *times, speed, f"{macs[0] / macs[1]:.2f}"])
    return table(["batch", "padded, s", "packed, s", "times faster", "MACs, padded / packed"], rows)


def _macs(tower: Tower, layouts: tuple[BlockLayouts, ...], pad: bool) -> float:
    """Mean MACs of an image, each block counted at its longest image if padded."""
    seen = [BlockLayouts(*(_filled(part) for part in (b.arrived, b.attention, b.keys, b.mlp))) for b in layouts]
    return tower.macs(tuple(seen) if pad else layouts)


def _filled(layout: Layout) -> Layout:
    return Layout.uniform_of(layout.batch, layout.longest, layout.num_prefix, layout.lengths.device)


if __name__ == "__main__":
    auto_cli(encoder, as_positional=False)
