"""The Vision Transformer that every task shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtpvit.encoder.encoding import Encoding
from dtpvit.encoder.entering import EnteredBlock, enter
from dtpvit.encoder.layers import Block, PatchEmbed, resize_position_embedding
from dtpvit.encoder.layout import BlockLayouts, Layout
from dtpvit.encoder.ops.entropy import pixel_entropy
from dtpvit.encoder.ops.exportable import means_by_product
from dtpvit.encoder.ops.noise import checksum, draw_seeds
from dtpvit.encoder.ops.segments import Segments, pool_segments
from dtpvit.encoder.reducers.base import TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["VisionEncoder"]

ReducerMaker = Callable[[int], TokenReducer]


class VisionEncoder(nn.Module):
    """A pre-norm Vision Transformer with token reducers before its blocks or in them.

    Without reducers it equals timm's ``vit_*`` models and, with ``pre_norm``, no ``patch_bias`` and eps 1e-5, the
    visual trunks of CLIP; parameter names are timm's.

    Args:
        image_size: Side of the images, or (height, width), in pixels.
        patch_size: Side of a patch, in pixels.
        dim: Width D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        reducers: For each block with a reducer, the reducer or what makes it from the width; its ``place`` says where
            it acts. Hierarchical pooling is two entries.
        readout: ``"class"``: the class token; ``"mean"``: mean over tokens, weighted by the patches each stands for.
        pre_norm: LayerNorm before the first block, as in CLIP.
        patch_bias: Bias of the patch projection.
        eps: Of every LayerNorm.
        act: ``"gelu"`` or ``"quick_gelu"``.
        drop_path: Stochastic depth at the last block; it rises linearly from 0.
        in_channels: Colour channels.

    Raises:
        ValueError: If image and patch size do not fit, a reducer is placed outside the blocks, or one that acts before
            attention needs evidence of it.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        reducers: Mapping[int, TokenReducer | ReducerMaker] | None = None,
        readout: Literal["class", "mean"] = "class",
        pre_norm: bool = False,
        patch_bias: bool = True,
        eps: float = 1e-6,
        act: str = "gelu",
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if readout not in ("class", "mean"):
            raise ValueError(f"readout is {readout!r}; expected class or mean")
        self.dim, self.depth, self.readout = dim, depth, readout
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grid_size = _grid(self.image_size, patch_size)
        self.patch_embed = PatchEmbed(dim, patch_size=patch_size, in_channels=in_channels, bias=patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], dim))
        self.norm_pre = nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=num_heads, mlp_ratio=mlp_ratio, act=act, eps=eps, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self._init_weights()
        self.reducers = nn.ModuleDict()  # after the trunk's own, so that a dense model draws the same weights
        for block, reducer in sorted((reducers or {}).items()):
            if not 0 <= block < depth:
                raise ValueError(f"a reducer is placed at block {block}; the encoder has blocks 0 to {depth - 1}")
            made = reducer if isinstance(reducer, TokenReducer) else reducer(dim)
            within = made.needs - {"pixel_entropy"}
            if made.place != "inside" and within:
                raise ValueError(f"{type(made).__name__} acts before attention and needs {sorted(within)} of it")
            self.reducers[str(block)] = made
        self.grad_checkpointing = False

    def _init_weights(self) -> None:
        # At width 768 this is the usual 0.02. Kept at narrow widths, that number leaves attention uniform and positions
        # invisible beside the patches for the first thousand steps.
        nn.init.normal_(self.pos_embed, std=self.dim**-0.5)
        nn.init.normal_(self.cls_token, std=self.dim**-0.5)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=(3 * self.dim) ** -0.5)
                nn.init.zeros_(module.bias)

    @property
    def needs_seed(self) -> bool:
        """Whether a reducer makes random choices in the present mode."""
        when = ("training", "always") if self.training else ("always",)
        return any(isinstance(reducer, TokenReducer) and reducer.draws in when for reducer in self.reducers.values())

    @property
    def needs_pixel_entropy(self) -> bool:
        """Whether a reducer goes by the pixels of the patches, which only the image knows."""
        made = self.reducers.values()
        return any(isinstance(reducer, TokenReducer) and "pixel_entropy" in reducer.needs for reducer in made)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_input_size(
        self, image_size: int | tuple[int, int] | None = None, img_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size and resample the position embedding; ``img_size`` is timm's name for the same.

        Raises:
            ValueError: If the size is not a multiple of the patch.
        """
        size = image_size if image_size is not None else img_size
        if size is None:
            return
        pixels = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        grid = _grid(pixels, self.patch_embed.patch_size)
        resized = resize_position_embedding(self.pos_embed.detach(), self.grid_size, grid, num_prefix=1)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.image_size, self.grid_size = pixels, grid

    def embed(self, images: Tensor, seeds: Tensor | None = None) -> Tokens:
        """Patch tokens behind the class token, positions added.

        Args:
            images: Normalised, shape (B, C, H, W).
            seeds: See :meth:`forward`.

        Raises:
            ValueError: If the images have another size.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            found, wanted = "x".join(map(str, images.shape[-2:])), "x".join(map(str, self.image_size))
            raise ValueError(f"images are {found}, the encoder was made for {wanted}; use set_input_size")
        if seeds is None and self.needs_seed:
            seeds = draw_seeds(len(images), images.device) if self.training else checksum(images)
        entropy = pixel_entropy(images, self.patch_embed.patch_size) if self.needs_pixel_entropy else None
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = self.norm_pre(x)
        return Tokens.from_dense(x, num_prefix=1, grid=self.grid_size, seed=seeds, pixel_entropy=entropy)

    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, thresholds: Mapping[int, Tensor] | None = None
    ) -> Encoding:
        """Encode a batch.

        Args:
            images: Normalised, shape (B, C, H, W).
            seeds: One int64 an image from which its noise in training follows, shape (B,); drawn from torch's
                generator where absent. In evaluation a checksum of the image stands in.
            thresholds: Training thresholds by block, where the caller fixes them (see :class:`Evidence`).
        """
        tokens = self.embed(images, seeds)
        losses: dict[str, Tensor] = {}
        layouts: list[BlockLayouts] = []
        compression: dict[int, float] = {}
        for index in range(self.depth):
            entered = self.enter_block(index, tokens, (thresholds or {}).get(index))
            if entered.reduction is not None:
                losses |= {f"block{index}/{name}": loss for name, loss in entered.reduction.losses.items()}
                fewer = _patch_tokens(entered.reduction.tokens.layout)
                compression[index] = _patch_tokens(tokens.layout) / max(1, fewer)
            layouts.append(entered.layouts)
            tokens = self._run(entered.rest, entered.tokens)
        tokens = tokens.with_features(self.norm(tokens.features))
        return Encoding(tokens, self.read_out(tokens), losses, tuple(layouts), compression)

    def run_block(self, index: int, tokens: Tokens) -> Tokens:
        """One block with its reducer, if it has one."""
        entered = self.enter_block(index, tokens)
        return self._run(entered.rest, entered.tokens)

    @torch.no_grad()
    def boundary_scores(
        self, images: Tensor, index: int, *, seeds: Tensor, thresholds: Mapping[int, Tensor]
    ) -> tuple[Tensor | None, int]:
        """Boundary logits at the reducer of block ``index``, for a threshold over several micro-batches.

        Args:
            images: Shape (B, C, H, W).
            index: Block of the reducer.
            seeds: Shape (B,).
            thresholds: Those of the reducers before this one.

        Returns:
            Clean and noisy logits of the free tokens, shape (2, F), or None for a reducer without a batch threshold;
            and the number of non-prefix tokens they came from.
        """
        tokens = self.embed(images, seeds)
        for earlier in range(index + 1):
            # Any given threshold keeps the reducer from looking for one of its own.
            threshold = thresholds.get(earlier, torch.zeros((), device=images.device))
            entered = self.enter_block(earlier, tokens, threshold)
            if earlier == index and entered.reduction is not None:
                return entered.reduction.scores, _patch_tokens(tokens.layout)
            tokens = self._run(entered.rest, entered.tokens)
        raise ValueError(f"block {index} has no reducer")

    def after_backward(self) -> None:
        """To be called once a training step's gradients are complete, before the optimizer's step."""
        for reducer in self.reducers.values():
            assert isinstance(reducer, TokenReducer)
            reducer.after_backward()

    def read_out(self, tokens: Tokens) -> Tensor:
        """One vector an image from normed tokens, shape (B, D)."""
        layout = tokens.layout
        if self.readout == "class":
            return tokens.prefix_features()[:, 0]
        weight = tokens.size.masked_fill(layout.prefix, 0.0)
        weight = weight if tokens.policy is None else weight * tokens.policy
        total = torch.zeros(layout.batch, device=weight.device).index_add_(0, layout.image, weight.detach())
        images = Segments(layout.image, layout.first, None, layout.opening, weight, total.clamp(min=1.0))
        if torch.compiler.is_exporting():
            return means_by_product(tokens.features, images, layout.batch)
        return pool_segments(tokens.features, torch.zeros_like(weight), images)

    def enter_block(self, index: int, tokens: Tokens, threshold: Tensor | None = None) -> EnteredBlock:
        """Block ``index`` up to and including its reducer; ``threshold`` as in :class:`Evidence`."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        if str(index) not in self.reducers:
            return EnteredBlock(tokens, block, BlockLayouts.of(tokens.layout))
        reducer = self.reducers[str(index)]
        assert isinstance(reducer, TokenReducer)
        return enter(block, reducer, tokens, threshold=threshold, run=self._run)

    def _run(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """A part of a block, recomputed in the backward pass if so wished."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *arguments, use_reentrant=False)
        return part(*arguments)


def _grid(image_size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    rows, columns = (side // patch_size for side in image_size)
    if (rows * patch_size, columns * patch_size) != tuple(image_size) or not rows * columns:
        raise ValueError(f"image size {image_size[0]}x{image_size[1]} is not a multiple of the patch size {patch_size}")
    return rows, columns


def _patch_tokens(layout: Layout) -> int:
    return layout.total - layout.batch * layout.num_prefix
