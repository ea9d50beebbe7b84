"""The same validation images, drawn again and again while the boundaries over them are learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dtpvit.errors import UserError
from dtpvit.evaluation.picture_sheet import Panel, sheet_image
from dtpvit.evaluation.seen_segments import SeenSegments, seen_segments
from dtpvit.evaluation.segment_pictures import Drawing, draw_histogram
from dtpvit.evaluation.show import heat_panel, segments_panel
from dtpvit.output_file import written_beside
from dtpvit.tasks.image_task import ImageTask

__all__ = ["SegmentMonitor"]


class SegmentMonitor(Callback):
    """Draws the segments of a few validation images, and counts those of some more, after validations.

    Writes ``pictures/epoch000.png`` and so on into the run's folder: a row an image, then histograms of the tokens of
    an image, of what the heat map shows and of the patches of a token. Loggers that take images (TensorBoard, Weights &
    Biases) are given the same picture as ``segments/images``, and the first two histograms as ``segments/tokens`` and
    ``segments/probability``; all loggers ``segments/boundary_rate``, tokens for each patch.

    The images are chosen in the first validation, some of every batch, and stay the same. Rank zero alone does all
    this, with its own images. It costs a forward pass over ``counted`` images, and training takes no notice.

    Args:
        every_n_epochs: Epochs from one picture to the next; drawn is only where there is a validation.
        images: How many are drawn.
        counted: How many are counted, at least ``images``.

    Raises:
        UserError: If a number is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, images: int = 4, counted: int = 64) -> None:
        super().__init__()
        if min(every_n_epochs, images, counted) < 1:
            raise UserError(
                f"every_n_epochs is {every_n_epochs}, images {images}, counted {counted}; expected at least 1 of each"
            )
        self.every_n_epochs, self.images, self.counted = every_n_epochs, images, max(images, counted)
        self._pixels = list[Tensor]()  # uint8, shape (3, H, W)
        self._chosen = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a sanity check has left, which sees a part of the images."""
        if not self._chosen:
            self._pixels.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep some images of every batch of the first validation."""
        pixels = batch.get("image") if isinstance(batch, dict) else None
        missing = 0 if self._chosen else self.counted - len(self._pixels)
        if trainer.is_global_zero and missing and isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
            batches = trainer.num_val_batches[dataloader_idx]  # infinite for a stream
            share = min(missing, max(1, math.ceil(self.counted / batches)))
            self._pixels += pixels[:: max(1, len(pixels) // share)][:share].cpu()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if it is time to."""
        self._chosen = not trainer.sanity_checking
        epoch = trainer.current_epoch
        wanted = not trainer.sanity_checking and trainer.state.fn == "fit" and (epoch + 1) % self.every_n_epochs == 0
        if not (wanted and self._pixels and isinstance(pl_module, ImageTask)):
            return
        seen = self._look(trainer, pl_module)
        picture = sheet_image(*_sheet(self._pixels, seen, self.images))
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.default_root_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(folder / f"epoch{epoch:03d}.png") as partial:
            picture.save(partial, "PNG")
        counts = np.array([image.tokens for image in seen])
        heats = _heats(seen)
        for logger in trainer.loggers:
            logger.log_metrics({"segments/boundary_rate": _rate(seen)}, step=trainer.global_step)
            _log(logger, np.asarray(picture), {"tokens": counts, "probability": heats}, trainer.global_step)

    def _look(self, trainer: Trainer, task: ImageTask) -> list[SeenSegments]:
        with trainer.precision_plugin.forward_context():
            return [
                image
                for part in torch.stack(self._pixels).split(32)
                for image in seen_segments(task.trunk, task.normalise(part.to(task.device)))
            ]


def _sheet(pixels: list[Tensor], seen: list[SeenSegments], images: int) -> tuple[list[str], list[list[Panel]]]:
    """Titles and rows of panels: so many images at even distances, then what all of them come to."""
    drawn = np.unique(np.linspace(0, len(pixels) - 1, images).round().astype(int))
    photos = [np.ascontiguousarray(pixels[place].permute(1, 2, 0).numpy()) for place in drawn]
    hot = seen[0].heat is not None
    titles = ["image", *([seen[0].heat_of] if hot else []), "segments"]
    rows = [
        [Panel(Drawing.of_photo(photo), ""), *([heat_panel(photo, one)] if hot else []), segments_panel(photo, one)]
        for photo, one in zip(photos, (seen[place] for place in drawn), strict=True)
    ]
    width, height = rows[0][0].size
    counts = np.array([image.tokens for image in seen])
    sizes = np.concatenate([np.unique(image.source[image.source >= 0], return_counts=True)[1] for image in seen])
    shown = [(counts, f"tokens of {len(seen)} images, rate {_rate(seen):.3f}"), (sizes, "patches of a token")]
    if hot:
        shown.insert(1, (_heats(seen), seen[0].heat_of))
    below = [
        Panel(draw_histogram(values, (height, width)), f"{what}: {values.min():.3g} to {values.max():.3g}")
        for values, what in shown
    ]
    return titles, [*rows, below]


def _rate(seen: list[SeenSegments]) -> float:
    """Tokens for each patch, over all images."""
    return sum(image.tokens for image in seen) / sum(image.source.size for image in seen)


def _heats(seen: list[SeenSegments]) -> np.ndarray:
    """What the heat maps show, at all patches of all images; empty where there are none."""
    found = [image.heat[np.isfinite(image.heat)] for image in seen if image.heat is not None]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def _log(logger: Any, picture: np.ndarray, histograms: dict[str, np.ndarray], step: int) -> None:
    """Hand picture and histograms to a logger that takes them."""
    filled = {f"segments/{name}": values for name, values in histograms.items() if values.size}
    if isinstance(logger, WandbLogger):
        import wandb  # pyright: ignore[reportMissingImports]

        logger.log_image("segments/images", [picture], step=step)
        made: dict[str, Any] = {
            name: wandb.Histogram(np_histogram=np.histogram(values, 32)) for name, values in filled.items()
        }
        logger.log_metrics(made, step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("segments/images", picture, step, dataformats="HWC")
        for name, values in filled.items():
            logger.experiment.add_histogram(name, values, step)
