"""What a visual language model is judged by while it trains."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric, SumMetric

from dtpvit.encoder import ImageEncoder
from dtpvit.evaluation.cost import image_macs
from dtpvit.interop.visual_language import Read

__all__ = ["InstructionValidation"]


class InstructionValidation(nn.Module):
    """Figures of one pass over held-out conversations, summed over all ranks.

    ``loss``: mean over supervised tokens. ``exact``: share of answers of which every token is the most likely one after
    the true ones before it: for the first answer of a conversation the same as greedy generation's exact match.
    ``visual_tokens``, ``gmacs``: of an image, in its encoder. ``cut_tokens``: text tokens that did not fit into
    ``max_length``. ``conversations``, ``answers``: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        metrics: dict[str, Metric] = {name: MeanMetric() for name in ("loss", "exact", "visual_tokens", "gmacs")}
        metrics |= {"visual_tokens_min": MinMetric(), "visual_tokens_max": MaxMetric()}
        metrics |= {name: SumMetric() for name in ("cut_tokens", "conversations", "answers")}
        self.metrics = nn.ModuleDict(metrics)

    def reset(self) -> None:
        """Forget the last pass."""
        for metric in self._metrics().values():
            metric.reset()

    def update(self, read: Read, trunk: ImageEncoder) -> None:
        """Take in a batch, whose images ``trunk`` has encoded."""
        metrics = self._metrics()
        metrics["cut_tokens"].update(read.cut.sum())
        metrics["conversations"].update(float(len(read.cut)))
        if len(read.targets):
            metrics["loss"].update(cross_entropy(read.logits, read.targets, reduction="none"))
            exact = exact_answers(read)
            metrics["exact"].update(exact)
            metrics["answers"].update(float(len(exact)))
        if read.encoding is not None:
            metrics["gmacs"].update(image_macs(trunk, read.encoding).float() / 1e9)
            tokens = read.encoding.tokens
            lengths = (tokens.lengths - tokens.num_prefix).to(torch.float32)
            for name in ("visual_tokens", "visual_tokens_min", "visual_tokens_max"):
                metrics[name].update(lengths)

    def results(self) -> dict[str, Tensor]:
        """The figures of the pass that there are, the same on all ranks, which call this together."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")  # a rank without an image
            found = {name: metric.compute() for name, metric in self._metrics().items()}
        return {name: value for name, value in found.items() if torch.isfinite(value)}

    def _metrics(self) -> dict[str, Metric]:
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, Metric)}


def exact_answers(read: Read) -> Tensor:
    """1 for each answer whose tokens are all the most likely ones, else 0; float32, shape (answers,)."""
    wrong = (read.logits.argmax(-1) != read.targets).to(torch.float32)
    answers = int(read.turn[-1]) + 1
    return (wrong.new_zeros(answers).index_add_(0, read.turn, wrong) == 0).to(torch.float32)
