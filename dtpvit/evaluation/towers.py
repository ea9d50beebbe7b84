"""Image towers to be measured: ours, open_clip's and timm's, behind one face."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from dtpvit.datamodules.real_images import real_images
from dtpvit.datamodules.transforms import eval_transform
from dtpvit.encoder import BlockLayouts, DualEncoder, Encoding, VisionEncoder
from dtpvit.errors import UserError
from dtpvit.evaluation.cost import counted_macs, image_cost
from dtpvit.interop.loading import LoadedClip, load_clip
from dtpvit.interop.model_config import NAMES, trunk_config
from dtpvit.interop.timm_models import TRUNKS, TimmVisionEncoder

__all__ = ["Tower", "dense_counterpart", "load_tower"]

_WEIGHTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Tower:
    """An image tower and, of a dual encoder, the text tower beside it.

    Attributes:
        name: As it was asked for.
        model: The model's own name, of a config or a checkpoint too; ``custom`` where it has none.
        image: Pixels (B, 3, H, W) to features.
        trunk: The encoder inside, where it is one of ours.
        embed_dim: Outputs of the projection or classifier behind our trunk.
        whole: The dual encoder, or the tower itself.
        image_size: Height and width in pixels.
        mean: Channel means of the normalisation, on [0, 1].
        std: Channel standard deviations, likewise.
        resize_mode: How images are brought to size.
        tokenize: Captions to token ids, of a dual encoder.
    """

    name: str
    model: str
    image: nn.Module
    trunk: VisionEncoder | None
    embed_dim: int
    whole: nn.Module
    image_size: tuple[int, int]
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD
    resize_mode: str = "shortest"
    tokenize: Callable[[list[str]], Tensor] | None = None

    def encode(self, images: Tensor) -> tuple[Tensor, Encoding | None]:
        """Features, and what our encoder reports of itself."""
        if self.trunk is None:
            found = self.image(images)
            return (found if isinstance(found, Tensor) else found[0]), None
        encoded: Any = self.image.encode(images)  # pyright: ignore[reportCallIssue]
        if isinstance(encoded, Encoding):
            return self.image.head(encoded.pooled), encoded  # pyright: ignore[reportCallIssue]
        return encoded

    def pixels(self, source: str | None, count: int) -> tuple[Tensor, list[str]]:
        """A normalised batch of the size that the tower takes, float32, shape (count, 3, H, W), and captions.

        Args:
            source: Folder of images, or shards; None gives random pixels, to every tower the same.
            count: Images.

        Raises:
            UserError: If there are fewer.
        """
        if source is None:
            return torch.randn(count, 3, *self.image_size, generator=torch.Generator().manual_seed(0)), []
        raw, captions = real_images(source, count, eval_transform(self.image_size, resize_mode=self.resize_mode))
        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (raw - mean) / std, captions

    def macs(self, layouts: tuple[BlockLayouts, ...], *, training: bool = False) -> float:
        """Mean multiply-accumulates of an image, forward or forward and backward: from what our blocks saw, or, of a
        tower not of ours, counted."""
        if self.trunk is not None:
            cost = image_cost(self.trunk, layouts, self.embed_dim)
            return float((cost.training if training else cost.total).mean())
        place = next(self.image.parameters())
        example = torch.zeros(1, 3, *self.image_size, device=place.device, dtype=place.dtype)
        return counted_macs(self.image, example, backward=training)


def load_tower(spec: str) -> Tower:
    """The tower behind a name, a config or a checkpoint.

    Args:
        spec: A name of ours, of open_clip's or of timm's; a YAML of ``dtpvit fit``; a checkpoint of ours; a folder that
            ``dtpvit export`` wrote.

    Raises:
        UserError: If it is none of these.
    """
    path = Path(spec).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _of_clip(spec, load_clip(_model_of_config(path)))
    if path.suffix in _WEIGHTS:
        return _of_clip(spec, load_clip(checkpoint=path))
    if path.is_dir() and (path / "open_clip_config.json").is_file():
        return _of_clip(spec, load_clip(f"local-dir:{path}"))
    import open_clip
    import timm

    if spec in NAMES or spec in open_clip.list_models() or ":" in spec:
        with _quiet():
            return _of_clip(spec, load_clip(spec))
    if timm.is_model(spec) or spec.startswith("dtp_vit."):
        try:
            return _of_timm(spec, timm.create_model(spec, num_classes=0))  # a classifier is no part of an image tower
        except RuntimeError as error:  # of a tag that does not exist, say
            raise UserError(f"timm cannot make {spec!r}: {error}") from error
    raise UserError(
        f"there is no model, config or checkpoint {spec!r}; give a name of ours, open_clip's or timm's, or a file"
    )


def dense_counterpart(tower: Tower) -> Tower:
    """What a tower of ours is compared with if nobody says: open_clip's or timm's dense model of the same shape where
    the name tells which, else the same encoder without its reducers.

    Raises:
        UserError: If the tower is not one of ours.
    """
    if tower.trunk is None:
        raise UserError(f"{tower.name} is not one of dtpvit's; name a --reference")
    if tower.model in NAMES:
        return load_tower("-".join(tower.model.removeprefix("DTP-").split("-")[:3]))
    if tower.model in TRUNKS:
        return load_tower(str(trunk_config(tower.model)["preset"]))
    twin = copy.deepcopy(tower.whole)
    image: Any = twin.visual if isinstance(twin, DualEncoder) else twin
    trunk = image.trunk if isinstance(twin, DualEncoder) else image
    trunk.reducers = nn.ModuleDict()
    return replace(tower, name=f"{tower.name}, without reducers", image=image, trunk=trunk, whole=twin)


def _of_clip(name: str, loaded: LoadedClip) -> Tower:
    model: Any = loaded.model
    ours = isinstance(loaded.model, DualEncoder)
    return Tower(
        name=name,
        model=loaded.name,
        image=model.visual,
        trunk=model.visual.trunk if ours else None,
        embed_dim=model.visual.head.proj.out_features if ours else 0,
        whole=model,
        image_size=loaded.image_size,
        mean=loaded.mean,
        std=loaded.std,
        resize_mode=loaded.resize_mode,
        tokenize=loaded.tokenize,
    )


def _of_timm(name: str, model: nn.Module) -> Tower:
    about: dict[str, Any] = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    _, height, width = about["input_size"]
    ours = isinstance(model, TimmVisionEncoder)
    return Tower(
        name=name,
        model=name,
        image=model,
        trunk=model if ours else None,
        embed_dim=model.num_classes if ours else 0,
        whole=model,
        image_size=(height, width),
        mean=tuple(about.get("mean", OPENAI_DATASET_MEAN)),
        std=tuple(about.get("std", OPENAI_DATASET_STD)),
    )


def _model_of_config(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no config {path}; give a YAML of `dtpvit fit`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return content["model"]["init_args"]["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"the config {path} names no model at model.init_args.model; give a YAML of a task") from error


class _quiet:
    """Keeps open_clip from warning that a model to be timed has random weights: that is what is wanted."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *unused: object) -> None:
        logging.disable(logging.NOTSET)
