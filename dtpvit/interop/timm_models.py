"""Our encoders as timm models: timm's contract around them, same parameter names."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dtpvit.encoder import Encoding, ImageEncoder, Tokens, VisionEncoder
from dtpvit.interop.create import build_trunk
from dtpvit.interop.model_config import trunk_config

__all__ = ["TRUNKS", "TimmEncoder", "TimmVisionEncoder", "register", "timm_class"]

TRUNKS: tuple[str, ...] = tuple(
    f"dtp_vit_{size}_patch{patch}{clip}_224_{rate}x{late}"
    for size in ("tiny", "small", "base", "large")
    for patch in (16, 32)
    for clip in ("", "_clip")
    for rate in (1, 2, 4, 10)
    for late in ("", "_4p8")
    if not (rate == 1 and late)
)


class TimmEncoder(ImageEncoder):
    """Mixed into an encoder, in front of it: the methods that timm and open_clip call, under the same parameter names.

    ``forward`` gives (B, D), or (B, num_classes) with a classifier; ``forward_features`` gives tokens spread back to
    the patches they stand for, so that a segmentation or detection head sees the grid it expects.
    """

    def __init__(self, *, num_classes: int = 0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.num_features = self.head_hidden_size = self.embed_dim = self.dim
        self.num_prefix_tokens = self.num_prefix
        self.num_classes = num_classes
        self.head = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg = self.default_cfg = {
            "input_size": (self.in_channels, *self.image_size),
            "num_classes": num_classes,
            "classifier": "head",
            "first_conv": next(name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)),
        }

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.head(self.encode(images).pooled)

    def encode(self, images: Tensor, **options: Any) -> Encoding:
        """What the encoder itself returns."""
        return super().forward(images, **options)  # pyright: ignore[reportAbstractUsage]

    def forward_features(self, images: Tensor) -> Tensor:
        """Normed class token, if any, and patches, shape (B, 1 + N, D); patches of one token share its features."""
        return self._spread(self.encode(images).tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Read out what :meth:`forward_features` returned, as :meth:`forward` does.

        Raises:
            ValueError: If that is the mean over tokens and patches do not show what a token counts for in it: behind
                reducers that drop patches, share them out, or give them other weights.
        """
        if self.readout == "mean":
            for reducer in self._all_reducers():
                if not reducer.counts_patches:
                    raise ValueError(
                        f"behind {type(reducer).__name__} a mean over patches is not the mean over tokens that is read "
                        "out; call the model itself"
                    )
        pooled = x[:, 0] if self.readout == "class" else x[:, self.num_prefix :].mean(1)
        return pooled if pre_logits else self.head(pooled)

    def _spread(self, tokens: Tokens) -> Tensor:
        patches = tokens.unpool().unflatten(0, (tokens.patches.batch, tokens.patches.longest))
        return torch.cat((tokens.prefix_features(), patches), dim=1) if self.num_prefix else patches

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; ``global_pool``: ``"token"`` or ``"avg"`` change the read-out, ``""`` keeps it."""
        if global_pool:
            known = {"token": "class", "avg": "mean"} if self.num_prefix else {"avg": "mean"}
            if global_pool not in known:
                raise ValueError(f"global_pool is {global_pool!r}; expected {', '.join(known)} or nothing")
            self.readout = known[global_pool]
        self.num_classes = num_classes
        self.head = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of the class token and of whatever says positions."""
        ends = ("pos_embed", "cls_token", "position_bias", "group_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates and partial freezing; what leaves a level belongs to it."""
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^levels\.(\d+)\.transition", (99999,)),
                (r"^norm", (99999,)),
            ],
        }


class TimmVisionEncoder(TimmEncoder, VisionEncoder):
    """:class:`VisionEncoder` with the methods that timm and open_clip call; ``forward_intermediates`` too gives tokens
    spread back to patches."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after the blocks ``indices`` (all, or the last n), spread back to patches.

        Returns:
            The list alone, or (final features as of :meth:`forward_features`, list); each entry of shape (B, D, rows,
            columns) or, with ``output_fmt="NLC"``, (B, N, D), in a pair with the prefix tokens if those are asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; expected NCHW or NLC")
        take, last = feature_take_indices(self.depth, indices)
        tokens = self.embed(x)
        found = []
        for index in range(last + 1 if stop_early else self.depth):
            tokens = self.run_block(index, tokens)
            if index in take:
                features = self.norm(tokens.features) if norm else tokens.features
                spread = self._spread(tokens.with_features(features))
                grid = spread[:, 1:]
                if output_fmt == "NCHW":
                    grid = grid.transpose(1, 2).unflatten(2, self.grid_size).contiguous()
                found.append((grid, spread[:, :1]) if return_prefix_tokens else grid)
        if intermediates_only:
            return found
        return self._spread(tokens.with_features(self.norm(tokens.features))), found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates and partial freezing; a reducer belongs to its block."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^(?:blocks|reducers)\.(\d+)", None), (r"^norm", (99999,))],
        }


@cache
def timm_class(cls: type[ImageEncoder]) -> type[TimmEncoder]:
    """An encoder's class with the methods that timm and open_clip call."""
    if cls is VisionEncoder:
        return TimmVisionEncoder
    return type(f"Timm{cls.__name__}", (TimmEncoder, cls), {"__doc__": cls.__doc__})


def _entry_point(name: str, config: Callable[[Any], dict[str, Any]]) -> Callable[..., TimmEncoder]:
    def build(pretrained: bool = False, **arguments: Any) -> TimmEncoder:
        tag = arguments.pop("pretrained_cfg", None)
        arguments.pop("pretrained_cfg_overlay", None)
        arguments.pop("cache_dir", None)
        if pretrained:
            raise ValueError(f"{name} has no pretrained weights; give a checkpoint")
        if arguments.pop("patch_drop_rate", None):
            raise ValueError("patch dropout breaks the neighbourhoods that boundaries are drawn in; leave it at 0")
        pool = arguments.pop("global_pool", None)
        for theirs, ours in (("img_size", "image_size"), ("drop_path_rate", "drop_path"), ("in_chans", "in_channels")):
            if theirs in arguments:
                arguments[ours] = arguments.pop(theirs)
        if pool:
            arguments["readout"] = "class" if pool == "token" else "mean"
        return build_trunk(config(tag), timm_class, **arguments)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: see dtpvit.interop.model_config.trunk_config."
    return build


def register() -> None:
    """Tell timm our names, and ``dtp_vit.{json}`` for every variant that has none; safe to call again."""
    from timm.models import is_model

    for name in TRUNKS:
        if not is_model(name):
            register_model(_entry_point(name, lambda tag, name=name: trunk_config(name)))
    if not is_model("dtp_vit"):
        register_model(_entry_point("dtp_vit", lambda tag: trunk_config(f"dtp_vit.{tag}")))
