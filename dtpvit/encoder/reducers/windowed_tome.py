"""Token merging within small windows of the grid, which leaves a grid of half the side."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.noise import uniform_noise
from dtpvit.encoder.ops.window_matching import Windows, match_targets, places_by_noise, places_by_part, windows_of
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.merging import merge
from dtpvit.encoder.tokens import Tokens

__all__ = ["WindowedToMe"]

Matching = Literal["random", "two_rounds", "parts"]


class WindowedToMe(TokenReducer):
    """Token merging window by window, so that the tokens still form a grid: of each window of 4 x 4, 4 are left.

    Aditya Kane, "WinToMe", in the repository of NAT with token merging, 2023, on Bolya et al., "Token Merging: Your ViT
    But Faster", ICLR 2023. Within a window a quarter of the tokens are targets and every other goes into the one whose
    key, averaged over heads, is most similar to its own by cosine; they are averaged by size. The targets come in
    raster order. Partial windows at the border keep one token for each 2 x 2 part. Prefix tokens take no part.

    Which tokens are targets is drawn for all windows of an image alike: from its seed in training, once and for all in
    evaluation.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        window: Side of the windows, even; 1 leaves everything as it is.
        matching: ``"random"``: targets anywhere; ``"two_rounds"``: half of the tokens are left after a first round and
            half of these after a second, so that sources meet each other; ``"parts"``: one target in each 2 x 2 part,
            its first in evaluation.
        by_size: Whether what goes together is averaged by size, and counts by size from then on. Published, between the
            levels of an encoder trained with it: a plain mean, and every token left counts for as many patches as the
            others, here and in the read-out.
        proportional: Size-proportional attention in later blocks; published: none.

    Raises:
        ValueError: If an argument is out of range, or the tokens form no grid any more.
    """

    place = "inside"
    needs = frozenset({"keys"})
    needs_grid = True
    fixed = True
    draws = "training"

    def __init__(
        self,
        dim: int,
        *,
        window: int = 4,
        matching: Matching = "random",
        by_size: bool = True,
        proportional: bool = True,
    ) -> None:
        super().__init__()
        if window != 1 and (window < 2 or window % 2):
            raise ValueError(f"the window is {window} tokens wide; expected an even number, or 1")
        if matching not in get_args(Matching):
            raise ValueError(f"matching is {matching!r}; expected one of {', '.join(get_args(Matching))}")
        if proportional and not by_size:
            raise ValueError(
                "proportional attention goes by sizes, which by_size=False makes alike; set it to False too"
            )
        self.window, self.matching, self.proportional = window, matching, proportional
        self.averages = by_size

    def extra_repr(self) -> str:
        options = f"by_size={self.averages}, proportional={self.proportional}"
        return f"window={self.window}, matching={self.matching!r}, {options}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        return self.patch_macs(tokens - 1, dim, num_heads)  # the class token takes no part

    def patch_macs(self, patches: Tensor, dim: int, num_heads: int) -> Tensor:
        """:meth:`macs` of tokens without a prefix, in windows that are full."""
        if self.window == 1:
            return torch.zeros_like(patches)
        targets = self.window**2 // 4
        pairs = patches * 2 * targets + patches / 2 * targets if self.matching == "two_rounds" else patches * targets
        return pairs * (dim // num_heads)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if self.window == 1:
            return Reduction(tokens)
        if tokens.grid is None:
            raise ValueError("windowed merging needs tokens that form a grid; put it before every other reducer")
        assert evidence.keys is not None
        layout, (rows, columns) = tokens.layout, tokens.grid
        windows = windows_of(rows, columns, self.window, tokens.features.device)
        grid = -(-rows // 2), -(-columns // 2)
        prefix = layout.num_prefix
        after = Layout.uniform_of(layout.batch, prefix + grid[0] * grid[1], prefix, tokens.features.device)
        weighed = tokens if self.averages else replace(tokens, size=torch.ones_like(tokens.size))
        keys, size = (x.unflatten(0, (layout.batch, -1))[:, prefix:] for x in (evidence.keys.detach(), weighed.size))
        with torch.autocast(keys.device.type, enabled=False):
            found = self._match(keys[:, windows.cell], size[:, windows.cell], windows, self._noise(tokens))
        coarse = windows.coarse.expand(layout.batch, -1, -1).gather(2, found)
        row = prefix + coarse.flatten(1)[:, windows.place]
        row = torch.cat((torch.arange(prefix, device=row.device).expand(layout.batch, -1), row), dim=1)
        destination = (row + after.first[:, None]).flatten()
        merged = merge(weighed, destination, after, proportional=self.proportional)
        if not self.averages:
            patches = tokens.size.view(layout.batch, -1)[:, prefix:].sum(1)
            share = (patches / (after.longest - prefix))[after.image]
            merged = replace(merged, size=share.masked_fill(after.prefix, 1.0))
        return Reduction(merged.on_grid(grid))

    def _noise(self, tokens: Tokens) -> Tensor:
        """Shape (B or 1, 1, 2 P), the second half for a second round."""
        place = torch.arange(2 * self.window**2, device=tokens.features.device)
        if not self.training:
            noise = place.float() if self.matching == "parts" else uniform_noise(torch.zeros_like(place), place)
            return noise[None, None]
        if tokens.seed is None:
            raise ValueError("windowed merging needs tokens.seed in training, from which the targets follow")
        return uniform_noise(tokens.seed[:, None, None], place)

    def _match(self, keys: Tensor, size: Tensor, windows: Windows, noise: Tensor) -> Tensor:
        """Number within its window of the target that each place goes into, (B, W, P).

        Args:
            keys: (B, W, P, E).
            size: (B, W, P).
            windows: The windows.
            noise: (B or 1, 1, 2 P).
        """
        places = self.window**2
        now, later = noise[..., :places], noise[..., places:]
        if self.matching == "parts":
            return match_targets(keys, places_by_part(now, windows))
        if self.matching == "random":
            return match_targets(keys, places_by_noise(now, windows.cells, windows.parts, places // 4))
        half = (windows.cells + 1) // 2
        first = match_targets(keys, places_by_noise(now, windows.cells, half, places // 2))
        filled = torch.arange(places, device=keys.device) < windows.cells[:, None]
        share = keys * (size * filled)[..., None]  # of a sum whose cosine is that of the mean
        merged = torch.zeros_like(keys[:, :, : places // 2]).scatter_add(2, first[..., None].expand_as(keys), share)
        second = match_targets(merged, places_by_noise(later[..., : places // 2], half, windows.parts, places // 4))
        return second.gather(2, first)
