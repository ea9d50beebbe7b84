"""Making a pretrained encoder cheaper without labels: its trunk stands still, its reducers learn to change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from dtpvit.encoder import DualEncoder, VisionEncoder
from dtpvit.errors import UserError
from dtpvit.interop.pretrained import Pretrained
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.learning_modes import train_reducers
from dtpvit.tasks.optimization import warmup_cosine

__all__ = ["Adaptation", "dense_output", "divergence"]

Head = Callable[[Tensor], Tensor]


@torch.no_grad()
def dense_output(trunk: VisionEncoder, images: Tensor, head: Head) -> Tensor:
    """What the encoder gives if none of its reducers acts; shape (B, ...) as of ``head``."""
    tokens = trunk.embed(images)
    for block in trunk.blocks:
        tokens = block(tokens)
    return head(trunk.read_out(tokens.with_features(trunk.norm(tokens.features))))


def divergence(found: Tensor, dense: Tensor, *, classes: bool) -> Tensor:
    """How far an output moved, of each image, shape (B,).

    Args:
        found: Of the pooled encoder, shape (B, D).
        dense: Of the dense one, likewise.
        classes: Whether they are logits, whose Kullback-Leibler divergence is taken, in nats; of features it is 1 - the
            cosine.
    """
    if classes:
        ours, theirs = log_softmax(found.float(), dim=1), log_softmax(dense.float(), dim=1)
        return kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return 1 - (normalize(found.float(), dim=1) * normalize(dense.float(), dim=1)).sum(1)


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
        self.learning_rate = learning_rate
        self.model.requires_grad_(False)
        self.trunk.reducers.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError("the reducers have no parameters; to adapt an encoder it needs a predictor that can learn")
        self.prepare(pretrained.mean, pretrained.std, max_nonfinite)

    @property
    def trunk(self) -> VisionEncoder:
        return self.model.visual.trunk if isinstance(self.model, DualEncoder) else self.model

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
