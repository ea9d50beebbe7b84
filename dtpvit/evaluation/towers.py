"""Image towers to be measured: ours, of dual encoders and classifiers, open_clip's and timm's, behind one face."""

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
from dtpvit.encoder import BlockLayouts, DualEncoder, Encoding, ImageEncoder, VisionEncoder
from dtpvit.errors import UserError
from dtpvit.evaluation.cost import counted_macs, image_cost
from dtpvit.interop.image_models import ImageClassifier, create_classifier, load_classifier, vision_config
from dtpvit.interop.instruction_models import is_instruction, load_encoder
from dtpvit.interop.loading import LoadedClip, Tokenize, is_classifier, load_clip
from dtpvit.interop.model_config import NAMES, replaced, trunk_config, with_vision
from dtpvit.interop.preprocessing import aspect_transform, eval_transform, normalised
from dtpvit.interop.pretrained import Pretrained
from dtpvit.interop.timm_models import TRUNKS, TimmEncoder
from dtpvit.interop.weight_files import read_checkpoint
from dtpvit.yaml_input import parse_yaml

__all__ = ["Tower", "dense_counterpart", "load_tower", "pretrained_tower", "twin_tower", "without_reducers"]

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
    trunk: ImageEncoder | None
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
        return normalised(raw, self.mean, self.std), captions

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
        spec: A name of ours, of open_clip's or of timm's; a YAML of ``dtpvit fit`` or a checkpoint of ours, of any
            task: a classifier with its head, of a visual language model its encoder; a folder that ``dtpvit export``
            wrote.

    Raises:
        UserError: If it is none of these.
    """
    path = Path(spec).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _of_config(spec, path)
    if path.suffix in _WEIGHTS:
        return _of_checkpoint(spec, path)
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
        UserError: If the tower is not one of ours, or an encoder whose levels are what reduces.
    """
    if tower.trunk is None:
        raise UserError(f"{tower.name} is not one of dtpvit's; name a --reference")
    if tower.model in NAMES:
        return load_tower("-".join(tower.model.removeprefix("DTP-").split("-")[:3]))
    if tower.model in TRUNKS and (dense := _timm_dense(tower)) is not None:
        return dense
    dense = without_reducers(tower)
    if dense is None:
        raise UserError(f"{tower.name} has no reducers to leave out; name a --reference")
    return dense


def twin_tower(tower: Tower) -> Tower:
    """A tower of ours with the same weights, whose reducers may be changed: rates and thresholds are its own."""
    whole = copy.deepcopy(tower.whole, {id(weight): weight for weight in tower.whole.parameters()})
    image: Any = whole.visual if isinstance(whole, DualEncoder) else whole
    trunk = image.trunk if isinstance(whole, DualEncoder) else image
    return replace(tower, image=image, trunk=trunk, whole=whole)


def without_reducers(tower: Tower) -> Tower | None:
    """The same encoder, dense, with the same weights; None of one whose levels are what reduces."""
    if not isinstance(tower.trunk, VisionEncoder):
        return None
    twin = twin_tower(tower)
    assert twin.trunk is not None
    twin.trunk.reducers = nn.ModuleDict()
    return replace(twin, name=f"{tower.name}, without reducers")


def pretrained_tower(name: str, loaded: Pretrained) -> Tower:
    """The tower of a pretrained model with reducers put in; of a CLIP with its text tower."""
    model: Any = loaded.model
    return Tower(
        name=name,
        model="custom",
        image=model.visual if loaded.is_clip else model,
        trunk=loaded.trunk,
        embed_dim=model.visual.head.proj.out_features if loaded.is_clip else loaded.num_classes,
        whole=model,
        image_size=(loaded.trunk.image_size[0], loaded.trunk.image_size[1]),
        mean=loaded.mean,
        std=loaded.std,
        tokenize=Tokenize(model.context_length) if loaded.is_clip else None,
    )


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


def _of_config(spec: str, path: Path) -> Tower:
    if not path.is_file():
        raise UserError(f"there is no config {path}; give a YAML of `dtpvit fit`")
    try:
        options = parse_yaml(path.read_text(encoding="utf-8"))["model"]["init_args"]
        words = "language_model" in options
        model = options["encoder" if words else "model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"the config {path} names no model at model.init_args.model, or encoder; give a YAML of a task, or the "
            "checkpoint that its encoder comes from"
        ) from error
    entries = options.get("vision") or {}
    if "num_classes" not in options and not words:
        return _of_clip(spec, load_clip(with_vision(model, entries) if entries else model))
    if entries:
        model = replaced(vision_config(model), entries)
    return _of_classifier(
        spec, create_classifier(model, options.get("num_classes", 0), options.get("mean"), options.get("std"))
    )


def _of_checkpoint(spec: str, path: Path) -> Tower:
    content = read_checkpoint(path, mmap=True)
    if is_classifier(content):
        return _of_classifier(spec, load_classifier(path))
    if is_instruction(content):
        loaded = load_encoder(path)
        aspect = content["hyper_parameters"].get("image_aspect", "pad")
        tower = _of_classifier(spec, loaded)
        return replace(tower, resize_mode=aspect_transform(tower.image_size, aspect).resize_mode)
    if "model" not in (content.get("hyper_parameters") or {}):
        raise UserError(
            f"checkpoint {path} does not record which model it is; give one of `dtpvit fit`, or the model's name"
        )
    return _of_clip(spec, load_clip(checkpoint=path))


def _of_classifier(name: str, loaded: ImageClassifier) -> Tower:
    model = loaded.model
    return Tower(
        name=name,
        model=loaded.name,
        image=model,
        trunk=model,
        embed_dim=model.num_classes,
        whole=model,
        image_size=(model.image_size[0], model.image_size[1]),
        mean=loaded.mean,
        std=loaded.std,
    )


def _timm_dense(tower: Tower) -> Tower | None:
    """timm's dense model of the same shape, with as many classes; None where timm has none."""
    import timm

    name = str(trunk_config(tower.model)["preset"])
    if not timm.is_model(name):
        return None
    classes = tower.embed_dim
    return _of_timm(f"{name}, {classes} classes" if classes else name, timm.create_model(name, num_classes=classes))


def _of_timm(name: str, model: nn.Module) -> Tower:
    about: dict[str, Any] = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    _, height, width = about["input_size"]
    ours = isinstance(model, TimmEncoder)
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


class _quiet:
    """Keeps open_clip from warning that a model to be timed has random weights: that is what is wanted."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *unused: object) -> None:
        logging.disable(logging.NOTSET)
