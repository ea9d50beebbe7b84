"""Native segmentation: tokens are assigned, softly, to the groups that the next stage works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layers import Mlp
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.grouping import (
    around,
    by_group,
    cells_of,
    groups_around,
    local_matrix,
    offsets_from,
    sum_around,
)
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.precision import FullPrecision
from dtpvit.encoder.tokens import Tokens

__all__ = ["Grouping", "SpatialGrouping"]

Scope = Literal["local", "dense"]
_EPS = 1e-6
_TEMPERATURES = (0.01, 5.0)  # beyond, the softmax is flat or saturated


@dataclass(frozen=True)
class Grouping:
    """Groups, and what share each token has in each (A_up of the paper, whose rows sum to one).

    Attributes:
        features: Shape (B, G, D').
        shares: Local: (B, G, S, 9), as :mod:`dtpvit.encoder.ops.grouping` lays them out; dense: (B, N, G).
        grid: Rows and columns of the tokens.
        stride: Between groups, of a local grouping; 0 of a dense one.
    """

    features: Tensor
    shares: Tensor
    grid: tuple[int, int]
    stride: int

    def matrix(self) -> Tensor:
        """Shares of each token in all groups, shape (B, N, G): masks; products over stages are masks of pixels."""
        return local_matrix(self.shares, self.grid, self.stride) if self.stride else self.shares

    def mass(self, weight: Tensor) -> Tensor:
        """What each group gets if every token shares out its weight: (B, N) to (B, G)."""
        if not self.stride:
            return (self.shares * weight[..., None]).sum(1)
        grouped = by_group(weight.unflatten(1, self.grid)[..., None], self.stride)
        return sum_around((self.shares * grouped).sum(2)[..., None], *self._coarse)[..., 0]

    def chosen(self) -> Tensor:
        """Group in which each token has most, int64, shape (B, N)."""
        if not self.stride:
            return self.shares.argmax(-1)
        index, _ = groups_around(*self._coarse, self.shares.device)
        best = self.shares.argmax(-1)
        found = index.expand(len(best), -1, -1).gather(2, best)
        return cells_of(found, self.grid, self.stride).flatten(1)

    @property
    def _coarse(self) -> tuple[int, int]:
        return _coarse(self.grid, self.stride)


def _coarse(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of groups; a last one may have fewer tokens."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


class SpatialGrouping(FullPrecision, TokenReducer):
    """ "Our spatial grouping layer dynamically assigns tokens to a reduced set of tokens".

    Braso, Osep, Leal-Taixe, "Native Segmentation Vision Transformers", NeurIPS 2025. The groups start from a strided
    convolution; in each of a few rounds, with the same weights, every token shares itself out among the groups by a
    softmax, and every group adds to itself the normed mean of its shares, then the normed output of an MLP. Prefix
    tokens take no part. The arithmetic is float32.

    A group is no mean of the tokens that ``source`` names, those with their largest share in it; its ``size`` is the
    sum of all shares. The paper's bias for each pair of token and group is here one of where the group lies from the
    token.

    Args:
        dim: Width of the tokens.
        scope: ``"local"``: a token has shares in the 3 x 3 groups around the one it lies on; ``"dense"``: in all.
        stride: Tokens on each side for a group; 1 leaves everything as it is.
        groups: For dense grouping, so many groups instead, which start from learned vectors and lie nowhere.
        out_dim: Width of the groups, that of the tokens where left out; only an encoder of several levels can have
            another.
        iterations: Rounds.
        mlp_ratio: Hidden width of the MLP over that of the groups.
        proportional: Size-proportional attention in later blocks.

    Raises:
        ValueError: If an argument is out of range, or the tokens form no grid any more.
    """

    needs_grid = True
    fixed = True
    averages = False

    def __init__(
        self,
        dim: int,
        *,
        scope: Scope = "local",
        stride: int = 2,
        groups: int | None = None,
        out_dim: int | None = None,
        iterations: int = 3,
        mlp_ratio: float = 2.0,
        proportional: bool = False,
    ) -> None:
        super().__init__()
        if scope not in get_args(Scope):
            raise ValueError(f"scope is {scope!r}; expected one of {', '.join(get_args(Scope))}")
        if stride < 1 or iterations < 1 or (groups is not None and groups < 1):
            raise ValueError(f"stride, iterations and groups are {stride}, {iterations}, {groups}; expected 1 or more")
        if groups is not None and scope == "local":
            raise ValueError("a number of groups needs scope dense; local groups lie on the grid")
        self.scope, self.stride, self.groups, self.iterations = scope, stride, groups, iterations
        self.dim, self.out_dim, self.proportional = dim, out_dim or dim, proportional
        width = self.out_dim
        if self.keeps_all:
            return
        self.norm = nn.LayerNorm(dim)
        self.key, self.value = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        for projection in (self.key, self.value, self.query):
            nn.init.xavier_uniform_(projection.weight, gain=0.5)
        self.log_temperature = nn.Parameter(torch.tensor(-0.5 * math.log(width)))
        self.start_norm, self.update_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = Mlp(width, int(mlp_ratio * width))
        if groups is None:
            self.reach = 1 if scope == "local" else 2
            self.start = nn.Conv2d(dim, width, kernel_size=stride, stride=stride)
            self.position_bias = nn.Parameter(torch.zeros(stride**2, (2 * self.reach + 1) ** 2))
        else:
            self.group_embed = nn.Parameter(torch.randn(1, groups, width))

    @property
    def keeps_all(self) -> bool:
        """Whether it changes nothing."""
        return self.stride == 1 and self.groups is None

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, stride={self.stride}, groups={self.groups}, iterations={self.iterations}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        return self.patch_macs(tokens - 1)  # the class token takes no part

    def patch_macs(self, patches: Tensor) -> Tensor:
        """:meth:`macs` of tokens without a prefix, on a grid whose sides the stride divides."""
        if self.keeps_all:
            return torch.zeros_like(patches)
        width = self.out_dim
        groups = patches / self.stride**2 if self.groups is None else torch.full_like(patches, self.groups)
        seen = 9 if self.scope == "local" else groups
        once = 2 * patches * self.dim * width
        if self.groups is None:
            once = once + patches * self.dim * width
        each = groups * width**2 + 2 * patches * seen * width + self.mlp.macs(groups)
        return once + self.iterations * each

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        return Reduction(tokens if self.keeps_all else self.pooled(tokens, self.group(tokens)))

    def group(self, tokens: Tokens) -> Grouping:
        """Share the tokens out; needs more than a stride of 1."""
        if tokens.grid is None:
            raise ValueError("spatial grouping needs tokens that form a grid; put it before every other reducer")
        if tokens.num_prefix and self.out_dim != self.dim:
            raise ValueError(f"the class token has width {self.dim} and the groups {self.out_dim}; leave out_dim out")
        layout = tokens.layout
        patches = tokens.features.unflatten(0, (layout.batch, -1))[:, layout.num_prefix :]
        with torch.autocast(patches.device.type, enabled=False):
            return self._group(patches.unflatten(1, tokens.grid).to(self.key.weight.dtype))

    def pooled(self, tokens: Tokens, found: Grouping) -> Tokens:
        """The prefix and the groups, the size of a group being what it got of the patches."""
        layout, prefix = tokens.layout, tokens.num_prefix
        groups = found.features.shape[1]
        after = Layout.uniform_of(layout.batch, prefix + groups, prefix, found.features.device)
        features, size = found.features.to(tokens.features.dtype), tokens.size.view(layout.batch, -1)
        size = torch.cat((size[:, :prefix], found.mass(size[:, prefix:].to(found.shares)).detach().to(size)), dim=1)
        if prefix:
            features = torch.cat((tokens.prefix_features(), features), dim=1)
        own = torch.arange(prefix, device=size.device).expand(layout.batch, -1)
        row = torch.cat((own, prefix + found.chosen()), dim=1)
        destination = (row + after.first[:, None]).flatten()
        left = tokens.regrouped(
            features.flatten(0, 1), destination, after, size.flatten(), proportional=self.proportional
        )
        if self.groups is not None:
            return left
        return left.on_grid(_coarse(found.grid, self.stride))

    def _group(self, x: Tensor) -> Grouping:
        """Of tokens (B, R, C, D)."""
        normed, grid = self.norm(x), (x.shape[1], x.shape[2])
        keys, values, out = self.key(normed), self.value(normed), self.start_norm(self._start(x)).expand(len(x), -1, -1)
        temperature = self.log_temperature.exp().clamp(*_TEMPERATURES)
        rows, columns = _coarse(grid, self.stride)
        local = self.scope == "local"
        keys, values = (by_group(k, self.stride) if local else k.flatten(1, 2) for k in (keys, values))
        bias, empty = self._bias(grid, x.device), None
        if local:
            empty = by_group(torch.ones_like(x[:1, :, :, :1]), self.stride) == 0
        for _ in range(self.iterations):
            query = self.query(out)
            if local:
                query = around(query.unflatten(1, (rows, columns)))
            logits = temperature * (keys @ query.transpose(-1, -2)) + bias
            shares = logits.softmax(-1)
            if empty is not None:
                shares = shares.masked_fill(empty, 0.0)
            total, mass = shares.transpose(-1, -2) @ values, shares.sum(-2)[..., None]
            if local:
                total, mass = sum_around(total, rows, columns), sum_around(mass, rows, columns)
            out = out + self.update_norm(total / (mass + _EPS))
            out = out + self.mlp_norm(self.mlp(out))
        return Grouping(out, shares, grid, self.stride if local else 0)

    def _start(self, x: Tensor) -> Tensor:
        """(B or 1, G, D')."""
        if self.groups is not None:
            return self.group_embed
        filled = pad(x.permute(0, 3, 1, 2), (0, -x.shape[2] % self.stride, 0, -x.shape[1] % self.stride))
        return self.start(filled).flatten(2).transpose(1, 2)

    def _bias(self, grid: tuple[int, int], device: torch.device) -> Tensor | float:
        """Local: (G, S, 9), minus infinity beyond the border; dense: (N, G)."""
        if self.groups is not None:
            return 0.0
        if self.scope == "dense":
            return self.position_bias.flatten()[offsets_from(grid, self.stride, self.reach, device)]
        rows, columns = _coarse(grid, self.stride)
        _, beyond = groups_around(rows, columns, device)
        return self.position_bias.expand(rows * columns, -1, -1).masked_fill(beyond[:, None, :], -torch.inf)
