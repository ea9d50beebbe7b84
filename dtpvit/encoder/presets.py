"""Published sizes, flat numbers only.

Names are timm's: ``vit_{size}_patch{patch}_{image}`` and, for the trunks of CLIP,
``vit_{size}_patch{patch}_clip_{image}``.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["SIZES", "preset"]

# width, blocks, heads: Dosovitskiy et al. 2021 (base, large); Touvron et al. 2021 (tiny, small)
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
PATCHES = (8, 14, 16, 32)

_NAME = re.compile(r"(?:vit|deit)_(?P<size>[a-z]+)_patch(?P<patch>\d+)(?P<clip>_clip)?_(?P<image>\d+)$")


def preset(name: str) -> dict[str, Any]:
    """Constructor arguments of :class:`dtpvit.encoder.VisionEncoder` behind a published name.

    >>> preset("vit_tiny_patch16_224")["dim"]
    192

    Raises:
        ValueError: If the name is unknown, with the names there are.
    """
    match = _NAME.match(name)
    if not match or match["size"] not in SIZES or int(match["patch"]) not in PATCHES:
        sizes, patches = "|".join(SIZES), "|".join(map(str, PATCHES))
        raise ValueError(f"no encoder is called {name!r}; expected vit_({sizes})_patch({patches})[_clip]_(image size)")
    dim, depth, num_heads = SIZES[match["size"]]
    clip = match["clip"] is not None
    return {
        "image_size": int(match["image"]),
        "patch_size": int(match["patch"]),
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "pre_norm": clip,
        "patch_bias": not clip,
        "eps": 1e-5 if clip else 1e-6,
    }
