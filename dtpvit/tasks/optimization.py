"""Weight-decay groups, the learning-rate schedule, and the guard against a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NonFiniteGuard", "decay_groups", "warmup_cosine"]

_NO_DECAY = ("pos_embed", "cls_token", "positional_embedding")


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; biases, norms, scalars and position embeddings do not."""
    decay, rest = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _NO_DECAY
            (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step: linear over ``warmup`` steps, then half a cosine to 0 at ``total``.

    >>> factor = warmup_cosine(2, 6)
    >>> [round(factor(step), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


class NonFiniteGuard:
    """Skips a step whose loss or gradient is NaN or infinite on any rank, and gives up after too many in a row.

    Args:
        patience: Consecutive skipped steps after which the run stops.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0

    def finite_everywhere(self, values: Iterable[Tensor]) -> bool:
        """Whether all values are finite on all ranks."""
        norm = torch.nn.utils.get_total_norm([value.detach() for value in values])
        flag = torch.isfinite(norm).to(torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def after_backward(self, loss: Tensor, parameters: Iterable[nn.Parameter], *, scaled: bool) -> None:
        """Drop all gradients if the loss or one of them is not finite, so that the optimizer's step changes nothing.

        Args:
            loss: Of this rank.
            parameters: Of the model.
            scaled: Whether a gradient scaler (fp16) looks after the gradients; it expects to overflow at times and
                skips such steps itself, so that only the loss is looked at and nothing is dropped.

        Raises:
            RuntimeError: After ``patience`` such steps in a row.
        """
        parameters = list(parameters)
        grads = [] if scaled else [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.finite_everywhere([loss, *grads]):
            self.in_a_row = 0
            return
        if not scaled:
            for parameter in parameters:
                parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.patience:
            raise RuntimeError(
                f"the loss or its gradient was NaN or infinite for {self.in_a_row} steps in a row; lower the learning "
                "rate, clip gradients (--trainer.gradient_clip_val 1.0), or use --trainer.precision 32-true"
            )
