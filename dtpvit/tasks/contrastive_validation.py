"""What a contrastive run is judged by: zero-shot classification and retrieval on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchmetrics import MeanMetric, Metric, SumMetric

from dtpvit.encoder.ops.collectives import gather_columns
from dtpvit.evaluation.classifier import build_classifier, label_ranks
from dtpvit.evaluation.cost import image_macs
from dtpvit.evaluation.retrieval import recall_at_k

if TYPE_CHECKING:
    from dtpvit.tasks.contrastive import Contrastive

__all__ = ["ContrastiveValidation"]


class ContrastiveValidation(nn.Module):
    """Collects over one validation pass, on all ranks: pairs for retrieval, labelled images for zero-shot."""

    def __init__(self) -> None:
        super().__init__()
        self.acc1, self.acc5 = MeanMetric(), MeanMetric()
        self.tokens, self.rate, self.zeroshot_tokens = MeanMetric(), MeanMetric(), MeanMetric()
        self.gmacs = MeanMetric()  # of the image tower, projection included
        self.zeroshot_images = SumMetric()
        self._classifier: Tensor | None = None
        self._column = torch.zeros(0, dtype=torch.int64)
        self._width = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def start(self, task: Contrastive) -> None:
        """Forget the last pass and encode the class prompts with the weights of now."""
        for metric in self.children():
            if isinstance(metric, Metric):
                metric.reset()
        self._pairs.clear()
        prompts: tuple[list[str], list[Callable[[str], str]]] | None
        data: Any = getattr(task.trainer, "datamodule", None)
        prompts = getattr(data, "zeroshot_prompts", None)
        self._classifier = None
        self._width = task.model.text_projection.shape[1]
        if prompts is not None:
            names, templates = prompts
            # ImageNet-A and -R have 200 of the 1,000 classes; the others are no candidates.
            columns = data.zeroshot_class_indices or list(range(len(names)))
            self._column = torch.full((len(names),), -1).index_copy(
                0, torch.tensor(columns), torch.arange(len(columns))
            )
            chosen = [names[column] for column in columns]
            progress = task.trainer.is_global_zero
            self._classifier = build_classifier(
                task.model, task.tokenize, chosen, templates, device=task.device, progress=progress
            )

    def step(self, task: Contrastive, batch: Any) -> None:
        """Take in a batch of pairs or of labelled images."""
        image, encoding = task.model.visual.encode(task.normalise(batch["image"]))
        lengths = encoding.tokens.lengths.to(torch.float32)
        self.gmacs.update(image_macs(task.trunk, encoding, self._width).float() / 1e9)
        if "text" in batch:
            self.tokens.update(lengths)
            self.rate.update((lengths - encoding.tokens.num_prefix) / encoding.tokens.patches.lengths)
            text = task.model.encode_text(batch["text"], normalize=True)
            self._pairs.append((normalize(image.float(), dim=-1), text.float()))
        elif self._classifier is not None:
            label = self._column.to(image.device)[batch["label"]]
            ranks = label_ranks(image, self._classifier, label)
            self.zeroshot_tokens.update(lengths)
            self.zeroshot_images.update(float(len(lengths)))
            self.acc1.update((ranks < 1).to(torch.float32))
            self.acc5.update((ranks < 5).to(torch.float32))

    def results(self) -> dict[str, float | Tensor]:
        """All figures of the pass, the same on all ranks; ``pairs`` and ``zeroshot_images`` are how many there were."""
        found: dict[str, float | Tensor] = {}
        # Every rank takes part in every collective, also one that was left without a pair.
        sides = zip(*self._pairs, strict=True) if self._pairs else [(torch.zeros(0, self._width),)] * 2
        device = self.tokens.device
        image, text = (gather_columns(torch.cat(tuple(side)).to(device).T).T for side in sides)
        self._pairs.clear()
        if len(image):
            found["pairs"] = float(len(image))
            found["tokens"], found["boundary_rate"] = self.tokens.compute(), self.rate.compute()
            places = torch.arange(len(image), device=device)
            found |= recall_at_k(image, text, torch.stack((places, places), dim=1))
        if self._classifier is not None:
            found["zeroshot_acc1"], found["zeroshot_acc5"] = self.acc1.compute(), self.acc5.compute()
            found["zeroshot_tokens"] = self.zeroshot_tokens.compute()
            found["zeroshot_images"] = self.zeroshot_images.compute()
        if found:
            found["gmacs"] = self.gmacs.compute()
        return found
