"""Image towers that are not ours, as encoders: dense references in front of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dtpvit.encoder import BlockLayouts, Encoding, ImageEncoder, Tokens
from dtpvit.encoder.cost import ImageCost

__all__ = ["ForeignEncoder"]


class ForeignEncoder(ImageEncoder):
    """Any tower of timm's, or of an open_clip model that has one of timm's, whose last features lie on a grid.

    The plain Vision Transformers of both libraries are better built as ours, with the same weights and nothing foreign:
    here are the others, such as SigLIP's (attention pooling), ConvNeXt and Swin. No token is reduced in them.

    Args:
        name: timm's name of a model, or ``open_clip:NAME``.
        pretrained: A tag that timm or open_clip download, or a file of weights; None leaves them random, to be loaded
            with a checkpoint.
        image_size: Side of the images, or (height, width), in pixels.

    Raises:
        ValueError: If there is no such model, or its features form no grid.
    """

    num_prefix = 0

    def __init__(
        self, *, name: str, pretrained: str | None = None, image_size: int | tuple[int, int] = 224, **unused: Any
    ) -> None:
        if unused:
            raise ValueError(f"a foreign tower takes name, pretrained and image_size, not {', '.join(sorted(unused))}")
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        tower = _tower(name, pretrained, size)
        rows, columns, dim, macs = _measured(tower, size)
        # A stand-in for the patch size: towers exist whose patches leave pixels at the border over.
        super().__init__(image_size=size, patch_size=math.gcd(*size), dim=dim, readout="mean", in_channels=3)
        self.grid_size, self._macs = (rows, columns), macs
        self.tower = tower
        self.reducers = nn.ModuleDict()

    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, thresholds: Mapping[int, Tensor] | None = None
    ) -> Encoding:
        self.checked_seeds(images, seeds)
        features = _on_grid(self.tower, self.tower.forward_features(images)).flatten(1, 2)  # pyright: ignore
        tokens = Tokens.from_dense(features, grid=self.grid_size)
        return Encoding(tokens, self.read_out(tokens), layouts=(BlockLayouts.of(tokens.layout),))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        tower: Any = self.tower
        tower.set_grad_checkpointing(enable)

    def cost(self, layouts: tuple[BlockLayouts, ...]) -> ImageCost:
        nothing = torch.zeros(layouts[0].arrived.batch, dtype=torch.float64, device=layouts[0].arrived.lengths.device)
        return ImageCost(nothing, nothing + self._macs, nothing, nothing, nothing)

    def dense_macs(self) -> float:
        return self._macs


def _tower(name: str, pretrained: str | None, size: tuple[int, int]) -> nn.Module:
    """The part that gives features on a grid, without pooling and head."""
    library, _, model = name.rpartition(":")
    if library == "open_clip":
        import open_clip

        try:
            whole = open_clip.create_model(model, pretrained=pretrained, force_image_size=size)
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(str(error).splitlines()[0]) from error
        trunk = getattr(whole.visual, "trunk", None)
        if trunk is None:
            raise ValueError(f"{model} has no tower of timm's; build it as ours, with init {model}:TAG")
        return trunk
    import timm

    try:
        file = {"file": pretrained} if pretrained and "." in pretrained.rsplit("/", 1)[-1] else None
        tag = model if file or not pretrained else f"{model}.{pretrained}"
        options: dict[str, Any] = {
            "pretrained": pretrained is not None,
            "pretrained_cfg_overlay": file,
            "num_classes": 0,
        }
        try:
            return timm.create_model(tag, img_size=size, **options)
        except TypeError:  # a convolutional network takes images of any size
            return timm.create_model(tag, **options)
    except Exception as error:
        raise ValueError(f"timm has no {name} with {pretrained or 'random weights'}: {error}") from error


def _on_grid(tower: nn.Module, features: Tensor) -> Tensor:
    """Whatever ``forward_features`` gives, as (B, rows, columns, D), class and register tokens left out."""
    if features.ndim == 3:
        patches = features[:, getattr(tower, "num_prefix_tokens", 0) :]
        embed: Any = getattr(tower, "patch_embed", None)
        grid = getattr(embed, "grid_size", None)
        if grid is None or grid[0] * grid[1] != patches.shape[1]:
            raise ValueError(f"the features of {type(tower).__name__} form no grid")
        return patches.unflatten(1, grid)
    if features.ndim != 4:
        raise ValueError(f"the features of {type(tower).__name__} form no grid")
    channels_last = getattr(tower, "output_fmt", "NCHW") == "NHWC"
    return features if channels_last else features.permute(0, 2, 3, 1)


def _measured(tower: nn.Module, size: tuple[int, int]) -> tuple[int, int, int, float]:
    """Rows, columns and width of the features, and multiply-accumulates of an image."""
    training, counter = tower.training, FlopCounterMode(display=False)
    tower.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        features: Any = tower.forward_features(torch.zeros(1, 3, *size))  # pyright: ignore[reportCallIssue]
    tower.train(training)
    _, rows, columns, dim = _on_grid(tower, features).shape
    return rows, columns, dim, counter.get_total_flops() / 2
