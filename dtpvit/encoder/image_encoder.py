"""What every image encoder is to the tasks, to evaluation and to the libraries that load it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtpvit.encoder.cost import ImageCost
from dtpvit.encoder.encoding import Encoding
from dtpvit.encoder.layout import BlockLayouts
from dtpvit.encoder.ops.exportable import means_by_product
from dtpvit.encoder.ops.noise import checksum, draw_seeds
from dtpvit.encoder.ops.segments import Segments, group_sums, pool_segments
from dtpvit.encoder.reducers.base import TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module, ABC):
    """Images to packed tokens and one vector each.

    A subclass sets ``reducers`` and whatever else it is made of behind ``super().__init__``, and says what its parts
    cost.

    Attributes:
        image_size: Height and width of the images, in pixels.
        grid_size: Rows and columns of the patches that ``Tokens.source`` speaks of.
        dim: Width D of what comes out.
        readout: ``"class"``: the first class token; ``"mean"``: mean over tokens, weighted by the patches each stands
            for.
        num_prefix: Class tokens in front of each image's patches.
        in_channels: Colour channels.
        reducers: The reducers that were placed in it, by block; what belongs to its architecture is not among them.
        grad_checkpointing: Whether blocks are recomputed in the backward pass.
    """

    num_prefix: int = 0
    reducers: nn.ModuleDict

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        dim: int,
        readout: Literal["class", "mean"],
        in_channels: int,
    ) -> None:
        super().__init__()
        known = ("class", "mean") if self.num_prefix else ("mean",)
        if readout not in known:
            raise ValueError(f"readout is {readout!r}; expected {' or '.join(known)}")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grid_size = patch_grid(self.image_size, patch_size)
        self.dim, self.readout, self.in_channels = dim, readout, in_channels
        self.grad_checkpointing = False

    @abstractmethod
    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, thresholds: Mapping[int, Tensor] | None = None
    ) -> Encoding:
        """Encode a batch.

        Args:
            images: Normalised, shape (B, C, H, W).
            seeds: One int64 an image from which its noise in training follows, shape (B,); drawn from torch's
                generator where absent. In evaluation a checksum of the image stands in.
            thresholds: Training thresholds by block, where the caller fixes them
                (see :class:`dtpvit.encoder.evidence.Evidence`).
        """

    @abstractmethod
    def cost(self, layouts: tuple[BlockLayouts, ...]) -> ImageCost:
        """Multiply-accumulates of each image of a batch, without a projection behind the encoder.

        Args:
            layouts: What the halves of each block saw, from :class:`dtpvit.encoder.Encoding`; where only the first
                blocks ran, theirs alone.
        """

    @abstractmethod
    def dense_macs(self) -> float:
        """Multiply-accumulates of an image in the same encoder without token reduction."""

    @property
    def needs_seed(self) -> bool:
        """Whether a reducer makes random choices in the present mode."""
        when = ("training", "always") if self.training else ("always",)
        return any(reducer.draws in when for reducer in self._all_reducers())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def after_backward(self) -> None:
        """To be called once a training step's gradients are complete, before the optimizer's step."""
        for reducer in self._all_reducers():
            reducer.after_backward()

    def read_out(self, tokens: Tokens) -> Tensor:
        """One vector an image from normed tokens, shape (B, D)."""
        layout = tokens.layout
        if self.readout == "class":
            return tokens.prefix_features()[:, 0]
        weight = tokens.size.masked_fill(layout.prefix, 0.0)
        weight = weight if tokens.policy is None else weight * tokens.policy
        total = group_sums(weight, layout.image, layout.batch)
        images = Segments(layout.image, layout.first, None, layout.opening, weight, total.clamp(min=1.0))
        if torch.compiler.is_exporting():
            return means_by_product(tokens.features, images, layout.batch)
        return pool_segments(tokens.features, torch.zeros_like(weight), images)

    def checked_seeds(self, images: Tensor, seeds: Tensor | None) -> Tensor | None:
        """The seeds that reducers draw from, where they do, once the images have the size the encoder was made for.

        Raises:
            ValueError: If they have another.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            found, wanted = "x".join(map(str, images.shape[-2:])), "x".join(map(str, self.image_size))
            raise ValueError(f"images are {found}, the encoder was made for {wanted}; give it another image_size")
        if seeds is None and self.needs_seed:
            return draw_seeds(len(images), images.device) if self.training else checksum(images)
        return seeds

    def _all_reducers(self) -> Iterator[TokenReducer]:
        return (module for module in self.modules() if isinstance(module, TokenReducer))

    def _run(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """A block or a part of one, recomputed in the backward pass if so wished."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *arguments, use_reentrant=False)
        return part(*arguments)


def patch_grid(image_size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: If the size is not a multiple of the patch.
    """
    rows, columns = (side // patch_size for side in image_size)
    if (rows * patch_size, columns * patch_size) != tuple(image_size) or not rows * columns:
        raise ValueError(f"image size {image_size[0]}x{image_size[1]} is not a multiple of the patch size {patch_size}")
    return rows, columns
