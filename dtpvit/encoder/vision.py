"""The Vision Transformer that every task shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dtpvit.encoder.cost import ImageCost
from dtpvit.encoder.encoding import Encoding
from dtpvit.encoder.entering import EnteredBlock, enter
from dtpvit.encoder.image_encoder import ImageEncoder, patch_grid
from dtpvit.encoder.layers import Block, PatchEmbed, resize_position_embedding
from dtpvit.encoder.layout import BlockLayouts, Layout
from dtpvit.encoder.ops.entropy import pixel_entropy
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["VisionEncoder"]

ReducerMaker = Callable[[int], TokenReducer]


class VisionEncoder(ImageEncoder):
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

    num_prefix = 1

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
        super().__init__(
            image_size=image_size, patch_size=patch_size, dim=dim, readout=readout, in_channels=in_channels
        )
        self.depth = depth
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
    def needs_pixel_entropy(self) -> bool:
        """Whether a reducer goes by the pixels of the patches, which only the image knows."""
        made = self.reducers.values()
        return any(isinstance(reducer, TokenReducer) and "pixel_entropy" in reducer.needs for reducer in made)

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
        grid = patch_grid(pixels, self.patch_embed.patch_size)
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
        seeds = self.checked_seeds(images, seeds)
        entropy = pixel_entropy(images, self.patch_embed.patch_size) if self.needs_pixel_entropy else None
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = self.norm_pre(x)
        return Tokens.from_dense(x, num_prefix=1, grid=self.grid_size, seed=seeds, pixel_entropy=entropy)

    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, thresholds: Mapping[int, Tensor] | None = None
    ) -> Encoding:
        return self.encode_until(self.depth, images, seeds=seeds, thresholds=thresholds)

    def encode_until(
        self,
        depth: int,
        images: Tensor,
        *,
        seeds: Tensor | None = None,
        thresholds: Mapping[int, Tensor] | None = None,
    ) -> Encoding:
        """The first ``depth`` blocks alone, with their reducers; the final norm belongs to all of them only.

        Args:
            depth: Blocks to run, at least 0.
            images, seeds, thresholds: See :meth:`ImageEncoder.forward`.

        Raises:
            ValueError: If there are not so many blocks.
        """
        if not 0 <= depth <= self.depth:
            raise ValueError(f"depth is {depth}; the encoder has {self.depth} blocks")
        tokens = self.embed(images, seeds)
        losses: dict[str, Tensor] = {}
        layouts: list[BlockLayouts] = []
        compression: dict[int, float] = {}
        for index in range(depth):
            entered = self.enter_block(index, tokens, (thresholds or {}).get(index))
            if entered.reduction is not None:
                losses |= {f"block{index}/{name}": loss for name, loss in entered.reduction.losses.items()}
                fewer = _patch_tokens(entered.reduction.tokens.layout)
                compression[index] = _patch_tokens(tokens.layout) / max(1, fewer)
            layouts.append(entered.layouts)
            tokens = self._run(entered.rest, entered.tokens)
        if depth == self.depth:
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

    @torch.no_grad()
    def reductions(self, images: Tensor, *, seeds: Tensor | None = None) -> dict[int, tuple[Tokens, Reduction]]:
        """What came to each reducer and what it handed back, by block: for pictures; an encoding keeps none of it.

        Args:
            images, seeds: See :meth:`ImageEncoder.forward`.
        """
        tokens = self.embed(images, seeds)
        found: dict[int, tuple[Tokens, Reduction]] = {}
        for index in range(self.depth):
            entered = self.enter_block(index, tokens)
            if entered.reduction is not None:
                found[index] = tokens, entered.reduction
            if len(found) == len(self.reducers):
                break
            tokens = self._run(entered.rest, entered.tokens)
        return found

    def enter_block(self, index: int, tokens: Tokens, threshold: Tensor | None = None) -> EnteredBlock:
        """Block ``index`` up to and including its reducer; ``threshold`` as in :class:`Evidence`."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        if str(index) not in self.reducers:
            return EnteredBlock(tokens, block, BlockLayouts.of(tokens.layout))
        reducer = self.reducers[str(index)]
        assert isinstance(reducer, TokenReducer)
        return enter(block, reducer, tokens, threshold=threshold, run=self._run)

    def cost(self, layouts: tuple[BlockLayouts, ...]) -> ImageCost:
        start = layouts[0].arrived.lengths.to(torch.float64)
        full, reduced, reducers = (torch.zeros_like(start) for _ in range(3))
        shortened = False
        for index, (block, seen) in enumerate(zip(self.blocks[: len(layouts)], layouts, strict=True)):
            assert isinstance(block, Block)
            asking, asked = seen.attention.lengths.to(torch.float64), seen.keys.lengths.to(torch.float64)
            reducer = self.reducers[str(index)] if str(index) in self.reducers else None
            inside = False
            if reducer is not None:
                assert isinstance(reducer, TokenReducer)
                inside = reducer.place == "inside"
                arrived = seen.arrived.lengths.to(torch.float64)
                reducers += _reducer_macs(reducer, arrived, self.dim, block.attn.num_heads)
                reducers += reducer.output_macs(seen.reduced.lengths.to(torch.float64), self.dim)
                shortened = shortened or not inside
            part = reduced if shortened else full
            part += block.attn.macs(asking, asked)
            shortened = shortened or inside
            part = reduced if shortened else full
            part += block.mlp.macs(seen.mlp.lengths.to(torch.float64))
        return ImageCost(torch.full_like(start, self._patch_macs), full, reducers, reduced, torch.zeros_like(start))

    def dense_macs(self) -> float:
        tokens = torch.tensor(self.grid_size[0] * self.grid_size[1] + 1.0, dtype=torch.float64)
        blocks = (block for block in self.blocks if isinstance(block, Block))
        return self._patch_macs + float(sum(block.attn.macs(tokens) + block.mlp.macs(tokens) for block in blocks))

    @property
    def _patch_macs(self) -> int:
        return self.patch_embed.proj.weight.numel() * self.grid_size[0] * self.grid_size[1]


def _reducer_macs(reducer: TokenReducer, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
    """Of the decision, and of the evidence for it: keys are there anyway, the class token's row is one more product."""
    evidence = tokens * dim if "class_attention" in reducer.needs else torch.zeros_like(tokens)
    return reducer.macs(tokens, dim, num_heads) + evidence


def _patch_tokens(layout: Layout) -> int:
    return layout.total - layout.batch * layout.num_prefix
