"""From an encoder's tokens to the width of a language model."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from dtpvit.encoder.tokens import Tokens

__all__ = ["Projector"]

_OCTAVES = 6  # down to a 32nd of the image's side: finer than a patch of a 14 x 14 grid is told apart


class Projector(nn.Module):
    """A linear layer or an MLP on each patch token, after Liu et al., "Improved Baselines with Visual Instruction
    Tuning", CVPR 2024 (LLaVA-1.5). Prefix tokens are left out.

    A language model numbers the tokens it is given, which says where a patch of a full grid lay, but not where a
    segment did, nor how large it was. With ``position`` the mean place of each token's patches and their number are
    added before the layers, by a linear map of sines and cosines that starts at zero.

    Args:
        dim: Width of the tokens.
        out_dim: Width of the language model.
        kind: ``"linear"``, or ``"mlp2x_gelu"`` (any number of layers).
        position: Whether to say where a token lies and how many patches it stands for.

    Raises:
        ValueError: If the kind is none of these.
    """

    def __init__(self, dim: int, out_dim: int, kind: str = "mlp2x_gelu", *, position: bool = False) -> None:
        super().__init__()
        match = re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)
        if match is None:
            raise ValueError(f"the projector is {kind!r}; expected linear or mlp2x_gelu")
        layers: list[nn.Module] = [nn.Linear(dim, out_dim)]
        for _ in range(1, int(match[1] or 1)):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.layers = nn.Sequential(*layers)
        self.place = nn.Linear(4 * _OCTAVES + 1, dim, bias=False) if position else None
        if self.place is not None:
            nn.init.zeros_(self.place.weight)

    def forward(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        """Tokens of all images, end to end, without prefixes.

        Args:
            tokens: T in all, of width D.
            grid: Rows and columns of the patches that ``tokens.source`` speaks of.

        Returns:
            Shape (T - B * prefix, out_dim).
        """
        features = tokens.without_prefix(tokens.features)
        if self.place is not None:
            features = features + self.place(tokens.without_prefix(where(tokens, grid)).to(features.dtype))
        return self.layers(features)


def where(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Sines and cosines of the mean place of each token's patches, and the logarithm of their number.

    Args:
        tokens: T in all.
        grid: Rows and columns of the patches.

    Returns:
        float32, shape (T, 25); of prefix tokens nothing is meant by it.
    """
    rows, columns = grid
    patch = tokens.patches.position
    places = torch.stack(((patch // columns + 0.5) / rows, (patch % columns + 0.5) / columns))
    mean = torch.stack([tokens.patch_mean(place) for place in places.to(torch.float32)], dim=1)
    angles = (torch.pi * mean[:, :, None] * 2.0 ** torch.arange(_OCTAVES, device=mean.device)).flatten(1)
    return torch.cat((angles.sin(), angles.cos(), tokens.size.clamp(min=1.0).log()[:, None]), dim=1)
