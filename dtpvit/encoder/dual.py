"""The dual encoder of contrastive pretraining, both towers packed, under open_clip's parameter names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from dtpvit.encoder.encoding import Encoding
from dtpvit.encoder.image_encoder import ImageEncoder
from dtpvit.encoder.text import TextTower

__all__ = ["DualEncoder", "VisualTower"]


class VisualTower(nn.Module):
    """A vision encoder and the projection into the space shared with text.

    Args:
        trunk: The encoder.
        embed_dim: Width of the shared space.
    """

    def __init__(self, trunk: ImageEncoder, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(trunk.dim, embed_dim, bias=False)))

    @property
    def image_size(self) -> tuple[int, ...]:
        return self.trunk.image_size

    def encode(
        self, images: Tensor, *, seeds: Tensor | None = None, thresholds: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Encoding]:
        """Features, shape (B, embed_dim), not normalised, and the encoding; see :meth:`ImageEncoder.forward`."""
        encoding = self.trunk(images, seeds=seeds, thresholds=thresholds)
        return self.head(encoding.pooled), encoding

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images)[0]


class DualEncoder(TextTower):
    """Image and text towers with a learned temperature; the text tower's parameters lie at the top, as in open_clip.

    Args:
        visual: The image tower.
        embed_dim: Width of the shared space.
        text: Arguments of :class:`TextTower`.
        init_logit_scale: Logarithm of the initial scale of the logits.
        init_logit_bias: Initial bias of the logits (SigLIP), or None for none.
    """

    def __init__(
        self,
        visual: VisualTower,
        embed_dim: int,
        *,
        text: Mapping[str, Any],
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__(embed_dim, **text)
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of both towers in the backward pass."""
        self.visual.trunk.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features of images of shape (B, 3, H, W): shape (B, embed_dim)."""
        features = self.visual(images)
        return unit(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features of captions of shape (B, context): shape (B, embed_dim)."""
        features = super().forward(text)
        return unit(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        """Normalised image and text features, each (B, embed_dim), the scale of the logits, and their bias if any."""
        outputs = (self.encode_image(images, normalize=True), self.encode_text(text, normalize=True))
        outputs = (*outputs, self.logit_scale.exp())
        return outputs if self.logit_bias is None else (*outputs, self.logit_bias)
