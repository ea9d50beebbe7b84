"""Labelled images to train a classifier on: class folders, flat ImageNet folders, webdataset shards."""

import logging
from typing import Any

from dtpvit.datamodules.augment import Augmentation, Unaugmented
from dtpvit.datamodules.bad_share import check_max_skipped
from dtpvit.datamodules.image_files import ImageFileLoader
from dtpvit.datamodules.labelled import LabelledLoader, check_batching
from dtpvit.datamodules.labelled_index import LabelledIndex, index_labelled
from dtpvit.datamodules.labelled_recipe import LabelledImage
from dtpvit.datamodules.labelled_training import (
    TrainingImages,
    check_head,
    check_same_classes,
    check_shards,
    find_training_images,
)
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.prompts import load_classnames
from dtpvit.datamodules.trained_data import TrainedData
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import EvalTransform, eval_transform, height_width

__all__ = ["LabelledImages"]

logger = logging.getLogger(__name__)


class LabelledImages(TrainedData):
    """Trains on {"image": uint8 (B, 3, H, W), "label": int64 (B,), "seed": int64 (B,)} batches.

    Validation gives every image once, in order, as {"image", "label"}. The defaults are DeiT's (Touvron et al.,
    "Training data-efficient image transformers", 2021) but for ``repeats``, there 3; its Mixup, CutMix and random
    erasing are of batches, and the task's. The pixels of a training image are a function of its name, the epoch,
    ``seed`` and the number of the repeat: neither workers nor a resume change them.

    Attributes:
        augments: Whether the pixels of a training image change from epoch to epoch; the task's cache asks.

    Args:
        train: A folder of class folders, a flat folder of ImageNet files (wnids in their names), or shards of images
            with ``.cls`` (a folder, a brace list or a glob).
        val: Images to validate on, likewise, but shards must be local and uncompressed; None validates on nothing.
        classnames: File of class names, one a line, in label order; None takes those that come with the images.
        labels: What the labels of both mean, as of ``index_labelled``; "folders" numbers a part of ImageNet's classes.
        batch_size: Per process.
        val_batch_size: Per process; None is ``batch_size``.
        num_workers: Loader processes per training process.
        image_size: Pixels, or (height, width); None asks the model (``image_size``).
        num_classes: Of the model's head; None asks the model (``num_classes``).
        augment: False gives training images the transform of validation, the same pixels in every epoch, whatever the
            arguments of the next line and ``train_interpolation`` are: what linear probing with cached features needs.
        crop_scale, crop_ratio, flip, vertical_flip, auto_augment, color_jitter: As of ``Augmentation``.
        repeats: How often an image occurs in its epoch, which stays as long (Hoffer et al. 2020). Not of shards.
        crop_pct: Share of the short side that the validation's centre crop keeps; DeiT's is 1.0 at 384 pixels.
        interpolation: Of resizing, one of PIL's.
        train_interpolation: Of training crops, if another one, or "random"; None is ``interpolation``.
        limit_train: Keep this many training images, evenly over the classes. Not of shards.
        num_samples: Samples per epoch over all processes, of shards; None takes the sum of their ``_stats.json``, or,
            if these are missing, counts.
        shuffle_buffer: Undecoded samples of shards that each worker holds back for shuffling.
        seed: Of shuffling, augmentation and the samples' own seeds.
        max_skipped: Share of bad samples above which the run stops, over all processes and as soon as 500 of an epoch's
            are known; 1 never stops.
        get_data: Where the missing data is explained, for the error message ("see data/imagenet/README.md").
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        classnames: str | None = None,
        labels: str = "auto",
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        image_size: int | tuple[int, int] | None = None,
        num_classes: int | None = None,
        augment: bool = True,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float | list[float] | None = None,
        repeats: int = 1,
        crop_pct: float = 0.9,
        interpolation: str = "bicubic",
        train_interpolation: str | None = None,
        limit_train: int | None = None,
        num_samples: int | None = None,
        shuffle_buffer: int = 2000,
        seed: int = 0,
        max_skipped: float = 0.1,
        get_data: str | None = None,
    ) -> None:
        super().__init__()
        check_batching(batch_size, num_workers)
        check_batching(batch_size if val_batch_size is None else val_batch_size, num_workers)
        if repeats < 1:
            raise UserError(f"repeats is {repeats}; give 1 for none, or how often an image occurs in its epoch.")
        self.train, self.val, self.classnames_file, self.labels = train, val, classnames, labels
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.image_size, self.num_classes = num_workers, image_size, num_classes
        self.augments = augment
        self.augmentation: dict[str, Any] = {
            "crop_scale": crop_scale,
            "crop_ratio": crop_ratio,
            "flip": flip,
            "vertical_flip": vertical_flip,
            "auto_augment": auto_augment,
            "color_jitter": color_jitter,
            "interpolation": train_interpolation or interpolation,
        }
        self.repeats, self.crop_pct, self.interpolation = repeats, crop_pct, interpolation
        self.limit_train, self.num_samples, self.shuffle_buffer = limit_train, num_samples, shuffle_buffer
        self.seed, self.get_data = seed, get_data
        self.max_skipped = check_max_skipped(max_skipped)
        # Whatever is wrong with these is said before any data is looked for.
        Augmentation(32, **self.augmentation)
        self._eval_transform(32)
        self._training: TrainingImages | None = None
        self._val: LabelledIndex | None = None
        self._classes = 0
        self._names: list[str] | None = None

    @property
    def classnames(self) -> list[str] | None:
        """Class names in label order, after ``setup``; None for shards that come without."""
        return self._names

    def setup(self, stage: str | None = None) -> None:
        """Find all data and compare their classes with each other and with the model's head.

        Raises:
            UserError: If data is missing, there is none for this stage, or the classes do not fit.
        """
        if stage == "fit" and self.train is None:
            raise UserError("There are no training images; set train to a folder of class folders, or to shards.")
        if self.val is None and (stage in ("validate", "test", "predict") or self.train is None):
            raise UserError("There is nothing to evaluate on; set val to a folder of class folders, or to shards.")
        with self._saying_where():
            self._find(stage)
        self.image_size = self._from_model("image_size", self.image_size)
        self._check_classes()
        if self.val is None:
            logger.warning("no validation: val is not set")

    def train_dataloader(self) -> ImageFileLoader | ResumableLoader[Any, Any]:
        """A loader that shuffles, resumes in mid-epoch, and gives all ranks equally many full batches."""
        assert self.image_size is not None and self._training is not None
        augmentation = Augmentation(self.image_size, **self.augmentation)
        transform = augmentation if self.augments else Unaugmented(self._eval_transform(self.image_size))
        recipe = LabelledImage(transform, self._classes, self.seed)
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "seed": self.seed,
            "max_skipped": self.max_skipped,
            "rank": self._rank,
            "world_size": self._world_size,
        }
        if not self._training.shards:
            return ImageFileLoader(self._training.files, recipe, repeats=self.repeats, fixed=self._overfits, **options)
        return ResumableLoader(
            self._training.shards,
            recipe,
            num_samples=self._training.num_samples,
            shuffle_buffer=0 if self._overfits else self.shuffle_buffer,
            **options,
        )

    def val_dataloader(self) -> LabelledLoader | list[Any]:
        """Every image of ``val`` once over all ranks; no loader without ``val``."""
        if self._val is None:
            return []
        assert self.image_size is not None
        return LabelledLoader(
            self._val,
            image_size=height_width(self.image_size),
            batch_size=self.val_batch_size,
            num_workers=self.num_workers,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            rank=self._rank,
            world_size=self._world_size,
        )

    def test_dataloader(self) -> LabelledLoader | list[Any]:
        """The validation loader."""
        return self.val_dataloader()

    def predict_dataloader(self) -> LabelledLoader | list[Any]:
        """The validation loader."""
        return self.val_dataloader()

    def _eval_transform(self, image_size: int | tuple[int, int]) -> EvalTransform:
        return eval_transform(image_size, crop_pct=self.crop_pct, interpolation=self.interpolation)

    def _find(self, stage: str | None) -> None:
        names = None if self.classnames_file is None else load_classnames(self.classnames_file)
        if stage in ("fit", None) and self.train is not None:
            self._training = find_training_images(
                self.train,
                classnames=names,
                labels=self.labels,
                limit=self.limit_train,
                num_samples=self.num_samples,
            )
            if self._training.shards and self.repeats > 1:
                raise UserError(
                    f"repeats is {self.repeats}, but {self.train} is shards, whose samples are read once a pass: "
                    "set repeats to 1, or train on a folder of images."
                )
        if self.val is not None:
            self._val = index_labelled(self.val, classnames=names, labels=self.labels)

    def _check_classes(self) -> None:
        training, val = self._training, self._val
        if training is not None and val is not None:
            assert self.val is not None
            check_same_classes(training, val, self.val)
        head = self._from_model("num_classes", self.num_classes)
        if self._of_model("num_classes") not in (None, head):
            raise UserError(
                f"num_classes of the data is {head} where the model's head has {self._of_model('num_classes')}: "
                "leave it out of the data, for the model is asked, or give the model as many."
            )
        found = [(self.train, training), (self.val, val)]
        self._classes, self._names = head, None
        for data, classes in found:
            if classes is None or classes.num_classes is None:
                continue
            names = classes.classnames or (load_classnames(None) if classes.num_classes == 1000 else None)
            check_head(str(data), classes.num_classes, names, head)
            self._names = self._names or names
        if training is not None:
            self._training = check_shards(training, head)
