"""What the page of ``dtpvit demo`` shows of one image: segments, cost beside dense, and scores of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dtpvit.datamodules.prompts import Template
from dtpvit.datamodules.samples import SkippedSample, decode_image
from dtpvit.errors import UserError
from dtpvit.evaluation.classifier import build_classifier
from dtpvit.evaluation.compression_rates import set_compression
from dtpvit.evaluation.measuring import Quartiles, alternate, speed_ups
from dtpvit.evaluation.picture_sheet import Panel
from dtpvit.evaluation.seen_segments import seen_segments
from dtpvit.evaluation.show import heat_panel, segments_panel
from dtpvit.evaluation.towers import Tower, twin_tower, without_reducers
from dtpvit.interop.preprocessing import eval_transform, normalised

__all__ = ["MAX_BYTES", "DemoCost", "DemoTower", "DemoView", "read_photo"]

MAX_BYTES = 32 * 2**20
MAX_LABELS = 100
_REFUSALS = {
    "broken image": "is no image that can be read; give a whole JPEG, PNG, WebP, GIF, BMP or TIFF",
    "oversized image": "has more than 89 million pixels; give a smaller one",
}


@dataclass(frozen=True)
class DemoCost:
    """What one image costs.

    Attributes:
        tokens: Behind the last reducer, without class tokens.
        gmacs: Multiply-accumulates / 1e9, counted from what each block saw.
        milliseconds: Median of a few forward passes of this image alone.
    """

    tokens: int
    gmacs: float
    milliseconds: float


@dataclass(frozen=True)
class DemoView:
    """One image as one encoder sees it.

    Attributes:
        segments: What became of the patches.
        heat: What the first reducer went by; None where none has such a thing.
        cost: Of this image.
        dense: Of the same weights without reducers; None where the encoder has none to leave out.
        speed_up: How many times faster than dense, median of the ratios of neighbouring runs; None likewise.
        moved: Whether the compression that was asked for could be set.
        scores: By label, highest first: of a softmax over the labels, or each label's own under a sigmoid loss; empty
            without a text tower or without labels.
    """

    segments: Panel
    heat: Panel | None
    cost: DemoCost
    dense: DemoCost | None
    speed_up: float | None
    moved: bool
    scores: dict[str, float]


def read_photo(path: str | Path) -> Image.Image:
    """An image file as RGB, upright by its EXIF orientation.

    Raises:
        UserError: If it is no image, damaged, or too large in bytes or pixels.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"the file has {size / 2**20:.1f} MiB; give one of at most {MAX_BYTES // 2**20}")
    try:
        return decode_image(path.read_bytes())
    except SkippedSample as skipped:
        raise UserError(f"the file {_REFUSALS[skipped.cause]}") from skipped


class DemoTower:
    """An encoder that looks at one image at a time.

    Args:
        tower: One of ours; moved to ``device``.
        device: Where it runs.
        rounds: Forward passes from which times are medians.
    """

    def __init__(self, tower: Tower, device: torch.device, rounds: int = 5) -> None:
        self.tower, self.device, self.rounds = tower, device, rounds
        tower.whole.to(device).eval().requires_grad_(False)
        self._dense = without_reducers(tower)
        self._transform = eval_transform(tower.image_size, resize_mode=tower.resize_mode)

    @property
    def has_text(self) -> bool:
        """Whether labels can be scored."""
        return self.tower.tokenize is not None

    @torch.no_grad()
    def view(
        self,
        photo: Image.Image,
        compression: float | None = None,
        labels: Sequence[str] = (),
        prompt: str = "a photo of a {c}.",
    ) -> DemoView:
        """Look at an image.

        Args:
            photo: RGB, of any size; cropped and resized as in evaluation.
            compression: Patches for each token, above 1; None leaves the rates as they are.
            labels: What may be in the image.
            prompt: Text around a label, which stands at ``{c}``.

        Raises:
            UserError: If the prompt has no place for the label, or there are too many labels.
        """
        twin = twin_tower(self.tower)
        assert twin.trunk is not None
        moved = compression is None or set_compression(twin.trunk, compression)
        pixels = self._transform(photo)
        images = normalised(pixels[None], self.tower.mean, self.tower.std).to(self.device)
        (seen,) = seen_segments(twin.trunk, images)
        array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        features, gmacs, patches = *_encoded(twin, images), seen.source.size
        run = {"own": lambda: twin.encode(images)}
        dense, dense_gmacs = self._dense, 0.0
        if dense is not None:
            dense_gmacs = _encoded(dense, images)[1]
            run["dense"] = lambda: dense.encode(images)
        seconds = alternate(run, self.device, rounds=self.rounds, warmup=1)
        times = {name: 1e3 * Quartiles.of(values).median for name, values in seconds.items()}
        return DemoView(
            segments=segments_panel(array, seen),
            heat=None if seen.heat is None else heat_panel(array, seen),
            cost=DemoCost(seen.tokens, gmacs, times["own"]),
            dense=None if dense is None else DemoCost(patches, dense_gmacs, times["dense"]),
            speed_up=None if dense is None else speed_ups(seconds, "dense")["own"].median,
            moved=moved,
            scores=self._scores(features, labels, prompt),
        )

    def _scores(self, features: Tensor, labels: Sequence[str], prompt: str) -> dict[str, float]:
        names = list(dict.fromkeys(name.strip() for name in labels if name.strip()))
        if not names or self.tower.tokenize is None:
            return {}
        if len(names) > MAX_LABELS:
            raise UserError(f"there are {len(names)} labels; give at most {MAX_LABELS}")
        if "{c}" not in prompt:
            raise UserError(f"the prompt {prompt!r} has no place for the label; write {{c}} there")
        model: Any = self.tower.whole
        columns = build_classifier(model, self.tower.tokenize, names, [Template(prompt)], device=self.device)
        logits = model.logit_scale.exp() * (F.normalize(features.float(), dim=-1) @ columns)[0]
        bias = getattr(model, "logit_bias", None)
        scores = logits.softmax(0) if bias is None else (logits + bias).sigmoid()
        found = zip(names, scores.tolist(), strict=True)
        return dict(sorted(found, key=lambda pair: -pair[1]))


def _encoded(tower: Tower, images: Tensor) -> tuple[Tensor, float]:
    """Features, and GMACs."""
    features, encoding = tower.encode(images)
    assert encoding is not None
    return features, tower.macs(encoding.layouts) / 1e9
