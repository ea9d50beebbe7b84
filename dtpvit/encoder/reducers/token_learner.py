"""Few tokens learned from all: each is a weighted sum over the image, by a map of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.rows import take_rows
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["TokenFuser", "TokenLearner"]

_WIDTH = 64  # of the hidden layer in both MLPs


class TokenLearner(TokenReducer):
    """Learns maps of weights over the image, and sums the tokens under each map to one.

    Ryoo et al., "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", NeurIPS 2021. In version 1.1 the
    maps are an MLP of each token and a softmax over the image, in version 1.0 four convolutions on the grid and a
    sigmoid. Every image gets as many tokens; prefix tokens stay, in front of them.

    Published once, behind three quarters of the blocks; halfway it halves the compute, ``{6: {"class_path":
    "TokenLearner", "init_args": {"num_tokens": 8}}}``. With ``fuse`` it surrounds a block: behind the block
    :class:`TokenFuser` brings what was learned back to all tokens, ``{"8-11": ... {"num_tokens": 16, "fuse": true}}``.

    Args:
        dim: Width D of the tokens.
        num_tokens: Learned tokens M; the paper's are 8 and 16.
        version: ``"1.1"`` or ``"1.0"``.
        fuse: Whether all tokens come back behind the block.

    Raises:
        ValueError: If an argument is out of range, or under version 1.0 the tokens form no grid.
    """

    averages = False
    soft = True
    fixed = True

    def __init__(self, dim: int, *, num_tokens: int, version: str = "1.1", fuse: bool = False) -> None:
        super().__init__()
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens!r}; expected a whole number, at least 1")
        if str(version) not in ("1.0", "1.1"):  # a YAML without quotes gives numbers
            raise ValueError(f"version is {version!r}; expected 1.0 or 1.1")
        self.num_tokens, self.version = num_tokens, str(version)
        self.needs_grid = self.version == "1.0"
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.maps = _convolutions(dim, num_tokens) if self.needs_grid else _mlp(dim, num_tokens, bias=False)
        self.fuser = TokenFuser(dim, num_tokens=num_tokens) if fuse else None

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, version={self.version!r}"

    @property
    def counts_patches(self) -> bool:
        return self.fuser is not None

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        patches, learned = tokens - 1, self.num_tokens  # beside the class token
        by_mlp = _WIDTH * (dim + learned)
        maps = patches * 9 * (dim + 3 * learned) * learned if self.needs_grid else patches * by_mlp
        fusing = patches * (by_mlp + learned * dim) + learned**2 * dim if self.fuser is not None else 0
        return maps + patches * learned * dim + fusing

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if self.needs_grid and tokens.grid is None:
            raise ValueError(
                "TokenLearner 1.0 needs tokens that form a grid, for its convolutions; version 1.1 does not"
            )
        layout, prefix = tokens.layout, tokens.num_prefix
        x = _patches(tokens.features, tokens)
        log_weight = self._log_weights(x, tokens)
        learned = torch.einsum("bnm,bnd->bmd", log_weight.exp().to(x.dtype), x)
        after = Layout.uniform_of(layout.batch, prefix + self.num_tokens, prefix, layout.lengths.device)
        features = torch.cat((tokens.prefix_features(), learned.to(x.dtype)), dim=1).flatten(0, 1)
        fewer = self._followed(tokens, features, log_weight.detach(), after)
        if self.fuser is None:
            return Reduction(fewer)
        fuser = self.fuser

        def restore(found: Tensor) -> Tensor:
            few = found.unflatten(0, (layout.batch, -1))
            whole = torch.cat((few[:, :prefix], x + fuser(few[:, prefix:], x)), dim=1).flatten(0, 1)
            return whole if layout.uniform else take_rows(whole, layout.unpadded, layout.padded, unread=layout.padding)

        return Reduction(fewer, restore=restore)

    def _log_weights(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Logarithm of what each patch token counts for in each learned one, float32, (B, N, M)."""
        if self.needs_grid:
            assert tokens.grid is not None
            grid = self.norm(x).transpose(1, 2).unflatten(2, tokens.grid)
            logits = self.maps(grid).flatten(2).transpose(1, 2)
        else:
            logits = self.maps(self.norm(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        size = 0.0 if tokens.key_bias is None else _patches(tokens.key_bias[:, None], tokens)
        if self.needs_grid:
            return logsigmoid(logits) + size
        outside = tokens.layout.padding[:, tokens.num_prefix :, None]
        return (logits + size).masked_fill(outside, float("-inf")).log_softmax(dim=1)

    def _followed(self, tokens: Tokens, features: Tensor, log_weight: Tensor, after: Layout) -> Tokens:
        """The learned tokens, with the patches that went into each by its share in their weights."""
        layout, prefix = tokens.layout, tokens.num_prefix
        outside = layout.padding[:, prefix:, None]
        share = log_weight.softmax(dim=2).masked_fill(outside, 0.0)
        mass = (share * _patches(tokens.size[:, None], tokens)).sum(1).to(tokens.size.dtype)
        size = torch.cat((mass.new_ones(layout.batch, prefix), mass), dim=1).flatten()
        row = prefix + log_weight.argmax(dim=2)
        head = torch.arange(prefix, device=row.device).expand(layout.batch, -1)
        destination = (after.first[:, None] + torch.cat((head, row), dim=1)).flatten()[layout.unpadded]
        return tokens.regrouped(features, destination, after, size, proportional=False)


class TokenFuser(nn.Module):
    """What the learned tokens became, mixed for every token of the image: (B, M, D) and (B, N, D) to (B, N, D).

    The linear map among the learned tokens starts at zero, so that at first nothing is mixed in.

    Args:
        dim: Width D.
        num_tokens: Learned tokens M.
    """

    def __init__(self, dim: int, *, num_tokens: int) -> None:
        super().__init__()
        self.norm_learned, self.norm_mixed, self.norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.among = nn.Linear(num_tokens, num_tokens, bias=False)  # the norm behind would take a bias away
        nn.init.zeros_(self.among.weight)
        self.mix = _mlp(dim, num_tokens, bias=True)

    def forward(self, learned: Tensor, x: Tensor) -> Tensor:
        among = self.among(self.norm_learned(learned).transpose(1, 2)).transpose(1, 2)
        return self.mix(self.norm(x)).sigmoid() @ self.norm_mixed(among)


def _patches(rows: Tensor, tokens: Tokens) -> Tensor:
    """Rows of the patch tokens padded to the longest image, (T, C) to (B, N, C)."""
    layout = tokens.layout
    cells = rows if layout.uniform else take_rows(rows, layout.padded, layout.unpadded)
    return cells.unflatten(0, (layout.batch, layout.longest))[:, tokens.num_prefix :]


def _mlp(dim: int, out: int, *, bias: bool) -> nn.Sequential:
    """Without the last bias where a softmax over positions would take it away."""
    return _initialised(nn.Sequential(nn.Linear(dim, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, out, bias=bias)))


def _convolutions(dim: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(dim, out, 3, padding=1, bias=False)]
    for _ in range(3):
        layers += [nn.GELU(), nn.Conv2d(out, out, 3, padding=1, bias=False)]
    return _initialised(nn.Sequential(*layers))


def _initialised(layers: nn.Sequential) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return layers
