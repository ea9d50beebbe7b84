"""What a classifier is judged by, beside its accuracy: the tokens and multiply-accumulates it spends on an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["ClassificationValidation"]


class ClassificationValidation(nn.Module):
    """Figures of one pass over labelled images, summed over all ranks; ``images`` is how many there were.

    Args:
        num_classes: C; top-5 accuracy is left out where there are no more than five.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        top = {"acc1": 1} | ({"acc5": 5} if num_classes > 5 else {})
        metrics: dict[str, Metric] = {
            name: MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
            for name, k in top.items()
        }
        metrics |= {name: MeanMetric() for name in ("loss", "tokens", "gmacs")}
        metrics |= {"tokens_min": MinMetric(), "tokens_max": MaxMetric(), "images": SumMetric()}
        self.metrics = nn.ModuleDict(metrics)

    def reset(self) -> None:
        """Forget the last pass."""
        for metric in self._metrics().values():
            metric.reset()

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor, tokens: Tensor, macs: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: float32, shape (B, C).
            labels: int64, shape (B,).
            loss: Of each image, shape (B,).
            tokens: Of each image, shape (B,).
            macs: Of each image, shape (B,).
        """
        counts = tokens.float()
        figures = {"loss": loss.float(), "gmacs": macs.float() / 1e9, "images": torch.ones_like(counts)}
        for name, metric in self._metrics().items():
            if name.startswith("acc"):
                metric.update(logits, labels)
            else:
                metric.update(figures.get(name, counts))

    def results(self) -> dict[str, Tensor]:
        """All figures of the pass, the same on all ranks, which call this together."""
        return {name: metric.compute() for name, metric in self._metrics().items()}

    def _metrics(self) -> dict[str, Metric]:
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, Metric)}
