"""Latency of one image and of eight: dense and pooled, dynamic and fixed, in PyTorch, compiled, in ONNX Runtime.

python -m benchmarks.latency --images DIR --output docs/results/latency.md
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.record import heading, pages, table
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.errors import UserError
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.measuring import Quartiles, alternate, speed_ups
from dtpvit.evaluation.towers import Tower, load_tower, twin_tower
from dtpvit.interop.onnx_file import write_onnx

Platform = Literal["eager", "compile", "onnx"]

TITLES = {"eager": "PyTorch", "compile": "torch.compile", "onnx": "ONNX Runtime"}
CALIBRATED_ON = 64  # images

_WHAT = """\
Milliseconds an image, medians over {rounds} rounds in which every cell of a table runs in turn, each on the same
{images} images; in brackets how many times faster than the dense model on the same platform, the median of the ratios
within a round. fp32, weights random. Dynamic: the threshold was set so that {calibrated} images keep the nominal
share, so an image has more tokens or fewer. Fixed: every image has the nominal number. Each compiled or exported model
was compared with PyTorch on the same images first; the largest difference was {difference:.0e}.
"""


def latency(
    images: str | None = None,
    models: list[str] = ["DTP-ViT-B-32-{rate}x", "dtp_vit_tiny_patch16_224_{rate}x"],  # noqa: B006 (never changed)
    rates: list[int] = [2, 4, 10],  # noqa: B006
    batch_sizes: list[int] = [1, 8],  # noqa: B006
    platforms: list[Platform] = ["eager", "compile", "onnx"],  # noqa: B006
    count: int = 8,
    rounds: int = 9,
    threads: int | None = None,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Measure the forward pass of image towers.

    Args:
        images: Folder or shards of real images; random pixels if not given.
        models: Names of ours with ``{rate}`` in them; at 1 they are dense.
        rates: Compressions.
        batch_sizes: Images at a time; each divides ``count``.
        platforms: eager, compile, onnx; the last on a CPU only.
        count: Images of a run.
        rounds: Measured runs of each cell.
        threads: Of PyTorch and of ONNX Runtime; PyTorch's own number if not given.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    if any(count % batch for batch in batch_sizes):
        raise UserError(f"{count} images cannot be cut into batches of {batch_sizes}; give another --count")
    place = chosen_device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    tables, worst = list[str](), 0.0
    for model in models:
        towers = _towers(model, rates, images, place)
        pixels = towers[0].tower.pixels(images, count)[0].to(place)
        for batch in batch_sizes:
            with TemporaryDirectory() as folder:
                runs, difference = _runs(towers, list(pixels.split(batch)), platforms, Path(folder))
                worst = max(worst, difference)
                gc.collect()
                gc.freeze()  # the models, or each collection between two runs walks through them
                seconds = alternate(runs, place, rounds=rounds)
                runs.clear()
                gc.unfreeze()
                torch.compiler.reset()
            tables.append(f"## {model.split('{rate}')[0].rstrip('-_')}, batch {batch}\n")
            tables.append(_table(towers, pixels, seconds, platforms))
            # Written after each table: a machine that others use may not leave the time for all of them.
            what = _WHAT.format(rounds=rounds, images=count, calibrated=CALIBRATED_ON, difference=worst)
            pages([heading("Latency", place), what, *tables], output)


@dataclass(frozen=True)
class _Way:
    """A row of the table: a model with one budget."""

    name: str
    tower: Tower
    is_static: bool


def _towers(model: str, rates: list[int], images: str | None, device: torch.device) -> list[_Way]:
    """The dense model, and each rate with a dynamic and with a fixed budget, the same weights."""
    found = list[_Way]()
    for rate in (1, *rates):
        torch.manual_seed(0)
        tower = load_tower(model.format(rate=rate))
        tower.whole.to(device).eval().requires_grad_(False)
        if rate == 1:
            found.append(_Way("dense", tower, True))
            continue
        fixed = twin_tower(tower)
        with torch.no_grad():  # in training mode predictors find their threshold
            tower.image.train()
            tower.encode(tower.pixels(images, CALIBRATED_ON)[0].to(device))
            tower.image.eval()
        assert fixed.trunk is not None
        for reducer in fixed.trunk.reducers.values():
            assert isinstance(reducer, DynamicPooling)
            reducer.fix_budget()
        found += [_Way(f"{rate}x, dynamic", tower, False), _Way(f"{rate}x, fixed", fixed, True)]
    return found


def _runs(
    ways: list[_Way], batches: list[Tensor], platforms: list[Platform], folder: Path
) -> tuple[dict[str, Callable[[], object]], float]:
    """What to time, by platform and row, and the largest difference of any to PyTorch."""
    runs, worst = dict[str, Callable[[], object]](), 0.0
    for way in ways:
        eager = way.tower.image
        for platform in platforms:
            if platform != "eager" and not way.is_static:
                continue
            forward = _forward(platform, eager, folder / f"{way.name}.onnx")
            with torch.no_grad():
                worst = max(worst, float((forward(batches[0]) - eager(batches[0])).abs().max()))
            runs[f"{platform}, {way.name}"] = partial(_run, forward, batches)
    return runs, worst


@torch.no_grad()
def _run(forward: Callable[[Tensor], Tensor], batches: list[Tensor]) -> None:
    for batch in batches:
        forward(batch)


def _forward(platform: Platform, model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    if platform == "eager":
        return model
    if platform == "compile":
        return torch.compile(model, fullgraph=True, dynamic=False)
    import onnxruntime

    write_onnx(model, path)  # pyright: ignore[reportArgumentType]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def _table(ways: list[_Way], pixels: Tensor, seconds: dict[str, list[float]], platforms: list[Platform]) -> str:
    rows = []
    for way in ways:
        with torch.no_grad():
            encoding = way.tower.encode(pixels)[1]
        assert encoding is not None
        lengths = encoding.tokens.lengths - encoding.tokens.num_prefix
        spread = f"{lengths.float().mean():.1f} ({lengths.min()}-{lengths.max()})"
        cells = [_cell(seconds, platform, way.name, len(pixels)) for platform in platforms]
        rows.append([way.name, spread, f"{way.tower.macs(encoding.layouts) / 1e9:.2f}", *cells])
    return table(["", "patch tokens", "GMACs", *(TITLES[platform] for platform in platforms)], rows)


def _cell(seconds: dict[str, list[float]], platform: Platform, name: str, images: int) -> str:
    key, dense = f"{platform}, {name}", f"{platform}, dense"
    if key not in seconds:
        return ""
    ratio = speed_ups({key: seconds[key], dense: seconds[dense]}, dense)[key].median
    return f"{1e3 * Quartiles.of(seconds[key]).median / images:.1f} ({ratio:.2f})"


if __name__ == "__main__":
    auto_cli(latency, as_positional=False)
