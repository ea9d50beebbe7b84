"""Image-text pairs in tar shards, as img2dataset writes them, and what a contrastive run is validated on."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dtpvit.datamodules.bad_share import check_max_skipped
from dtpvit.datamodules.labelled import LabelledLoader
from dtpvit.datamodules.labelled_index import LabelledIndex, index_labelled
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.prompts import load_classnames, load_templates
from dtpvit.datamodules.samples import ImageText
from dtpvit.datamodules.shards import expand_shards
from dtpvit.datamodules.trained_data import TrainedData
from dtpvit.datamodules.transforms import train_transform
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform, height_width

__all__ = ["ImageTextShards"]

logger = logging.getLogger(__name__)
Prompts = tuple[list[str], list[Callable[[str], str]]]


class ImageTextShards(TrainedData):
    """Trains on {"image": uint8 (B, 3, H, W), "text": int64 (B, context), "seed": int64 (B,)} batches.

    Validation gives a list of loaders: the pairs of ``val``, then the labelled images of ``zeroshot``.

    Args:
        train: Training shards: a folder, brace list or glob, several joined by ``::``, or a list of these.
        val: Shards of pairs held out for retrieval.
        zeroshot: Labelled images for zero-shot classification (ImageNet's folders, shards with ``.cls``).
        zeroshot_classnames: File of class names, one a line; None takes those that come with the images.
        zeroshot_templates: "openai", "simple", "none", or a file of prompts with ``{c}``.
        zeroshot_required: Whether missing ``zeroshot`` images stop the run; else it goes on without, and says so.
        batch_size: Per process.
        val_batch_size: Per process; None is ``batch_size``.
        num_workers: Loader processes per training process.
        num_samples: Samples per epoch over all processes; None takes the sum of the shards' ``_stats.json``.
        image_size: Pixels, or (height, width); None asks the model (``image_size``).
        tokenize: Captions -> int64 tensor (n, context); None asks the model (``tokenize``).
        crop_scale: Shares of the image's area that a training crop keeps, least and most.
        flip: Mirror half of the training images (captions that say left and right then lie).
        shuffle_buffer: Undecoded samples that each worker holds back for shuffling.
        captions_field: List of captions in a sample's json, of which each epoch takes one.
        seed: Of shuffling, crops and the samples' own seeds.
        max_skipped: Share of bad samples above which the run stops, over all processes and as soon as 500 of an epoch's
            are known; 1 never stops.
        get_data: Where the missing data is explained, for the error message ("see data/cc12m/README.md").
    """

    def __init__(
        self,
        *,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        zeroshot: str | None = None,
        zeroshot_classnames: str | None = None,
        zeroshot_templates: str = "openai",
        zeroshot_required: bool = True,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        num_samples: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        tokenize: Callable[[list[str]], Tensor] | None = None,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        flip: bool = False,
        shuffle_buffer: int = 2000,
        captions_field: str | None = "captions",
        seed: int = 0,
        max_skipped: float = 0.1,
        get_data: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (val_batch_size is not None and val_batch_size < 1) or num_workers < 0:
            raise UserError(
                f"The batch sizes are {batch_size} and {val_batch_size}, with {num_workers} workers; "
                "give at least 1 sample and at least 0 workers."
            )
        self.train, self.val, self.zeroshot = train, val, zeroshot
        self.zeroshot_classnames, self.zeroshot_templates = zeroshot_classnames, zeroshot_templates
        self.zeroshot_required = zeroshot_required
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.num_samples = num_workers, num_samples
        self.image_size, self.tokenize = image_size, tokenize
        self.crop_scale, self.flip = (float(crop_scale[0]), float(crop_scale[1])), flip
        self.shuffle_buffer, self.captions_field = shuffle_buffer, captions_field
        self.seed, self.get_data = seed, get_data
        self.max_skipped = check_max_skipped(max_skipped)
        self._train_shards: list[str] = []
        self._val_shards: list[str] = []
        self._index: LabelledIndex | None = None
        self._prompts: Prompts | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find all data and read the prompts, so that whatever is missing is said before any work starts.

        Raises:
            UserError: If data is missing, or there is none for this stage.
        """
        if stage == "fit" and self.train is None:
            raise UserError("There are no training shards; set train to a folder or list of shards.")
        if stage in ("fit", None) and self.train is not None:
            self._train_shards = self._shards(self.train)
        if self.val is not None:
            self._val_shards = self._shards(self.val)
        one_path = self.zeroshot is not None and not re.search(r"[{*?\[]|::", self.zeroshot)
        if self.zeroshot is not None and not self.zeroshot_required and one_path and not Path(self.zeroshot).exists():
            logger.warning("no zero-shot validation: %s does not exist", self.zeroshot)
            self.zeroshot = None
        if self.zeroshot is not None:
            self._find_zeroshot(self.zeroshot)
        if stage in ("validate", "test", "predict") and self.val is None and self.zeroshot is None:
            raise UserError("There is nothing to evaluate on; set val to shards, or zeroshot to labelled images.")
        self.image_size = self._from_model("image_size", self.image_size)
        self.tokenize = self._from_model("tokenize", self.tokenize)

    @property
    def zeroshot_prompts(self) -> Prompts | None:
        """Class names in label order and prompt templates, after ``setup``; None without ``zeroshot``."""
        return self._prompts

    @property
    def zeroshot_class_indices(self) -> list[int] | None:
        """Classes that are candidates, after ``setup``; None for all."""
        return None if self._index is None else self._index.class_indices

    def train_dataloader(self) -> ResumableLoader[Any, Any]:
        """A loader that shuffles, resumes in mid-epoch, and gives all ranks equally many full batches."""
        assert self.image_size is not None and self.tokenize is not None
        transform = train_transform(self.image_size, scale=self.crop_scale, flip=self.flip)
        return ResumableLoader(
            self._train_shards,
            ImageText(transform, self.tokenize, self.seed, self.captions_field),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            num_samples=self.num_samples,
            shuffle_buffer=0 if self._overfits else self.shuffle_buffer,
            seed=self.seed,
            max_skipped=self.max_skipped,
            rank=self._rank,
            world_size=self._world_size,
        )

    def val_dataloader(self) -> list[ResumableLoader[Any, Any] | LabelledLoader]:
        """Image-text pairs, if ``val`` is given, then labelled images, if ``zeroshot`` is given."""
        assert self.image_size is not None and self.tokenize is not None
        loaders: list[ResumableLoader[Any, Any] | LabelledLoader] = []
        if self.val is not None:
            # One fixed caption an image: retrieval results must not change from epoch to epoch.
            recipe = ImageText(eval_transform(self.image_size), self.tokenize, self.seed, None)
            loaders.append(
                ResumableLoader(
                    self._val_shards,
                    recipe,
                    batch_size=self.val_batch_size,
                    num_workers=self.num_workers,
                    train=False,
                    rank=self._rank,
                    world_size=self._world_size,
                )
            )
        if self._index is not None:
            loaders.append(
                LabelledLoader(
                    self._index,
                    image_size=height_width(self.image_size),
                    batch_size=self.val_batch_size,
                    num_workers=self.num_workers,
                    rank=self._rank,
                    world_size=self._world_size,
                )
            )
        return loaders

    def test_dataloader(self) -> list[ResumableLoader[Any, Any] | LabelledLoader]:
        """The validation loaders."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[ResumableLoader[Any, Any] | LabelledLoader]:
        """The validation loaders."""
        return self.val_dataloader()

    def _find_zeroshot(self, data: str) -> None:
        names = None if self.zeroshot_classnames is None else load_classnames(self.zeroshot_classnames)
        self._index = index_labelled(data, classnames=names)
        self._prompts = load_classnames(self._index.classnames), load_templates(self.zeroshot_templates)

    def _shards(self, spec: str | list[str]) -> list[str]:
        """The shards of ``spec``; if they are not there, the sentence also says where to get them."""
        with self._saying_where():
            return expand_shards(spec)
