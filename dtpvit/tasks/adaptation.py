"""Making a pretrained encoder cheaper without labels: its trunk stands still, its reducers learn to change nothing."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from dtpvit.encoder import VisionEncoder
from dtpvit.errors import UserError
from dtpvit.evaluation.agreement import dense_output, divergence
from dtpvit.interop.pretrained import Pretrained
from dtpvit.tasks.fitting import fit_weights
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.learning_modes import train_reducers
from dtpvit.tasks.optimization import warmup_cosine

__all__ = ["Adaptation", "adapt_encoder"]

logger = logging.getLogger(__name__)


class Adaptation(ImageTask):
    """Trains nothing but the reducers, so that the pooled encoder's output stays the dense one's; no labels.

    Batches are uint8 images, shape (B, 3, H, W), half of which are mirrored here. The dense output comes from the same
    weights, so there is no second model. With ``estimator="imitation"`` nothing follows a vote: the weights of the
    means get the exact gradient of the divergence, the predictor that of its imitation of the exact segments.

    Args:
        pretrained: A model whose trunk has reducers.
        learning_rate: After a tenth of the steps; from there half a cosine to 0.
        max_nonfinite: Steps with a NaN or infinite loss, in a row, after which the run stops.

    Raises:
        UserError: If the reducers have nothing to learn.
    """

    def __init__(self, pretrained: Pretrained, *, learning_rate: float = 3e-3, max_nonfinite: int = 20) -> None:
        super().__init__()
        self.model, self.classes = pretrained.model, pretrained.num_classes > 0
        self.head = pretrained.head
        self._pretrained = pretrained
        self.learning_rate = learning_rate
        self.model.requires_grad_(False)
        self.trunk.reducers.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError("the reducers have no parameters; to adapt an encoder it needs a predictor that can learn")
        self.prepare(pretrained.mean, pretrained.std, max_nonfinite)

    @property
    def trunk(self) -> VisionEncoder:
        return self._pretrained.trunk

    def forward(self, images: Tensor) -> Tensor:
        """Logits or features of uint8 images."""
        return self.head(VisionEncoder.forward(self.trunk, self.normalise(images)).pooled)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.model.eval()
        train_reducers(self.trunk)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        images = self.normalise(batch)
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
        dense = dense_output(self.trunk, images, self.head)
        encoding = VisionEncoder.forward(self.trunk, images)
        far = divergence(self.head(encoding.pooled), dense, classes=self.classes).mean()
        self.log("train/divergence", far.detach(), prog_bar=True)
        for name, loss in encoding.losses.items():
            self.log(f"train/{name}", loss.detach(), prog_bar=True)
        return torch.stack([far, *encoding.losses.values()]).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trunk.reducers.parameters(), lr=self.learning_rate, weight_decay=0.0)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(total // 10, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adapt_encoder(
    pretrained: Pretrained,
    images: Tensor,
    *,
    steps: int = 150,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """Fit and teach the reducers of a pretrained model, in place.

    Args:
        pretrained: With reducers that learn, best with the router ``local`` and the estimator ``imitation``.
        images: Unlabelled, uint8, shape (N, 3, H, W).
        steps: Optimizer steps; 0 only fits the weights.
        batch_size: Images a step.
        learning_rate: Highest.
        seed: Of the order of images, of which are mirrored, and of the draws of the fit.
        device: Where to train; the model is left on the CPU.

    Returns:
        ``pretrained``, in evaluation mode.
    """
    place = torch.device(device)
    torch.manual_seed(seed)
    task = Adaptation(pretrained, learning_rate=learning_rate).to(place)
    pretrained.model.eval()
    batches = [pretrained.normalise(batch.to(place)) for batch in images.split(batch_size)]
    for block, share in fit_weights(pretrained, batches, seed=seed).items():
        logger.info("block %d: the fit explains %.0f %% of how much tokens matter", block, 100 * share)
    if steps:
        _train(task, images, steps, batch_size, seed, place)
    pretrained.model.to("cpu").eval().requires_grad_(False)
    return pretrained


def _train(task: Adaptation, images: Tensor, steps: int, batch_size: int, seed: int, device: torch.device) -> None:
    size = min(batch_size, len(images))
    # One epoch of as many steps as asked for: the images in a new order each time they run out.
    sampler = RandomSampler(images, num_samples=steps * size, generator=torch.Generator().manual_seed(seed))  # pyright: ignore
    loader = DataLoader(images, batch_size=size, sampler=sampler)  # pyright: ignore[reportArgumentType]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else max(1, steps // 10), leave=True)],
    )
    with warnings.catch_warnings():
        for meant in ("many workers", "in eval mode at the start", "`isinstance.treespec, LeafSpec.` is deprecated"):
            warnings.filterwarnings("ignore", message=f".*{meant}")
        trainer.fit(task, loader)
