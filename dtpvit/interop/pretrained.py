"""A pretrained dense encoder, timm's or open_clip's, in our modules, with token reducers put in front of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from dtpvit.encoder import DualEncoder, VisionEncoder
from dtpvit.errors import UserError
from dtpvit.interop.create import build_clip
from dtpvit.interop.dense_weights import Transfer, load_dense
from dtpvit.interop.image_models import image_model, pixel_statistics, vision_config
from dtpvit.interop.model_config import model_config
from dtpvit.interop.preprocessing import normalised
from dtpvit.interop.timm_models import TimmVisionEncoder
from dtpvit.interop.weight_files import read_checkpoint, state_of

__all__ = ["Pretrained", "load_pretrained"]


@dataclass(frozen=True)
class Pretrained:
    """A model and what goes in and comes out.

    Attributes:
        model: What checkpoints hold: a dual encoder, or a classifier under timm's names.
        config: What ``model`` builds from, plain values.
        num_classes: Classes of the output, 0 where it is features.
        mean: Channel means that images are normalised with, on [0, 1].
        std: Channel standard deviations, likewise.
        transfer: What became of each tensor of the weights.
    """

    model: DualEncoder | TimmVisionEncoder
    config: dict[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transfer: Transfer

    @property
    def is_clip(self) -> bool:
        return isinstance(self.model, DualEncoder)

    @property
    def trunk(self) -> VisionEncoder:
        """The vision encoder."""
        if not isinstance(self.model, DualEncoder):
            return self.model
        assert isinstance(self.model.visual.trunk, VisionEncoder)
        return self.model.visual.trunk

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """What follows the read-out: (B, D) to (B, num_classes) logits, or to (B, D') features."""
        return self.model.visual.head if isinstance(self.model, DualEncoder) else self.model.head

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images, shape (B, 3, H, W), to what the model takes."""
        return normalised(images, self.mean, self.std)


def load_pretrained(
    model: str,
    init: str | None = None,
    reducers: Mapping[Any, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Pretrained:
    """Build a dense model by name, with its weights.

    Args:
        model: timm's name of a Vision Transformer (``deit_tiny_patch16_224``), or open_clip's of a CLIP with one
            (``ViT-B-32``, or with a tag, ``ViT-B-32:laion2b_s34b_b79k``).
        init: Weights: a file, or a tag as of :func:`dtpvit.interop.dense_weights.load_dense`; what timm or open_clip
            download under the model's name where it is left out.
        reducers: For each block that a reducer precedes, ``{"class_path": ..., "init_args": ...}``.
        mean: Channel means on [0, 1]; None takes those of timm's or open_clip's model.
        std: Channel standard deviations, likewise.

    Raises:
        UserError: If the name is neither, or the weights are missing or do not fit.
    """
    import open_clip

    name, _, tag = model.partition(":")
    source = init or (model if tag or name not in open_clip.list_models() else None)
    if source is None:
        raise UserError(f"{name} comes with several weights; name them, {name}:TAG, or give a file with --init")
    if name in open_clip.list_models():
        config = _dense_clip(name, open_clip.get_model_config(name) or {})
        config["vision"]["reducers"] = dict(reducers or {})
        weights = open_clip.get_pretrained_cfg(*source.split(":", 1)) if ":" in source else {}
        if weights.get("quick_gelu"):
            config["vision"]["act"] = config["text"]["act"] = "quick_gelu"
        built, classes = build_clip(model_config(config)), 0
        known = tuple(weights.get("mean") or OPENAI_DATASET_MEAN), tuple(weights.get("std") or OPENAI_DATASET_STD)
    else:
        config = {**vision_config(name), "reducers": dict(reducers or {})}
        classes = _classes(source)
        built = image_model(config, classes if classes > 1 else 0)
        known = pixel_statistics({"preset": name if _is_file(source) else source})
    assert isinstance(built, DualEncoder | TimmVisionEncoder)
    transfer = load_dense(built, source)
    if classes > 1 and "visual.trunk.head.weight" not in transfer.taken:
        raise UserError(f"the classifier of {source} does not fit {name}: {transfer.left or transfer.fresh}")
    built.eval().requires_grad_(False)
    return Pretrained(built, config, classes, tuple(mean or known[0]), tuple(std or known[1]), transfer)


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors") or Path(source).exists()


def _classes(source: str) -> int:
    """Outputs of the classifier that comes with the weights, 0 if none does."""
    if _is_file(source):
        head = state_of(read_checkpoint(source)).get("head.weight")
        return 0 if head is None else len(head)
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(source)
    return 0 if known is None else known.num_classes


_CLIP_TOWER = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_CLIP_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}


def _dense_clip(name: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our config of an open_clip model whose towers are plain Transformers.

    Raises:
        UserError: If they are not.
    """
    vision, text = theirs.get("vision_cfg", {}), theirs.get("text_cfg", {})
    other = sorted((set(vision) - _CLIP_TOWER) | (set(text) - _CLIP_TEXT))
    if other or not isinstance(vision.get("layers"), int):
        raise UserError(f"{name} is no CLIP with a plain Vision Transformer (it has {', '.join(other) or 'stages'})")
    act = "quick_gelu" if theirs.get("quick_gelu") else "gelu"
    shape = {"dim": vision["width"], "depth": vision["layers"], "mlp_ratio": vision.get("mlp_ratio", 4.0)}
    shape |= {"num_heads": vision["width"] // vision.get("head_width", 64), "patch_size": vision["patch_size"]}
    clip = {"pre_norm": True, "patch_bias": False, "eps": 1e-5, "act": act}
    return {
        "embed_dim": theirs["embed_dim"],
        "vision": {"image_size": vision["image_size"], **shape, **clip},
        "text": {"context_length": 77, "vocab_size": 49408, **text, "act": act},
    }
