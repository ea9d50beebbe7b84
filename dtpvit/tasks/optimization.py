"""Parameter groups, the learning-rate schedule, and the guard against a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtpvit.errors import UserError
from dtpvit.interop.timm_models import TimmEncoder
from dtpvit.tasks.shards import local

__all__ = ["NonFiniteGuard", "clip_shards", "decay_groups", "layer_groups", "optimizer_and_schedule", "warmup_cosine"]

_NO_DECAY = ("pos_embed", "cls_token", "positional_embedding", "position_bias", "group_embed")


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; biases, norms, scalars and position embeddings do not."""
    decay, rest = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _NO_DECAY
            (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def layer_groups(
    model: TimmEncoder,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    predictor_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups with a learning rate a layer, which falls by ``layer_decay`` from each block to the one before.

    timm's groups (Bao et al., "BEiT", 2022): the head has the full rate, the last block and the final norm one factor
    less. Reducers are new beside weights that are not, so they leave their block's group and have a rate of their own.

    Args:
        model: Its parameters that require no gradient are left out.
        learning_rate: Of the head.
        weight_decay: Of matrices; biases, norms, the class token and positions do not decay.
        layer_decay: In (0, 1]; 1 gives every layer the same rate.
        predictor_lr_scale: Rate of the reducers over that of the head.
    """
    found = param_groups_layer_decay(
        model, weight_decay=weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    reducing = {id(parameter) for parameter in model.reducers.parameters()}
    groups: list[dict[str, Any]] = []
    for group in found:
        for mine, scale in ((False, group["lr_scale"]), (True, predictor_lr_scale)):
            params = [parameter for parameter in group["params"] if (id(parameter) in reducing) == mine]
            if params:
                rate = {"lr": learning_rate * scale, "weight_decay": group["weight_decay"]}
                groups.append({"params": params, **rate})
    return groups


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


def optimizer_and_schedule(task: lightning.LightningModule, groups: list[dict[str, Any]]) -> Any:
    """What ``configure_optimizers`` returns: one of timm's optimizers, linear warm-up, half a cosine to the run's end.

    Args:
        task: Of its hyper-parameters: ``optimizer``, ``learning_rate``, ``betas``, ``eps`` and ``warmup_steps``, or
            ``warmup_ratio``, its share of the run.
        groups: Of parameters.
    """
    options = task.hparams
    # One kernel for all tensors. Under mixed precision Lightning refuses to clip gradients before a fused step.
    extra: dict[str, Any] = (
        {"fused": True} if options["optimizer"] == "adamw" and task.trainer.precision == "32-true" else {}
    )
    if options["optimizer"] != "sgd":
        extra |= {"betas": tuple(options["betas"]), "eps": options["eps"]}
    try:
        optimizer = create_optimizer_v2(groups, opt=options["optimizer"], lr=options["learning_rate"], **extra)
    except (ValueError, TypeError) as error:
        raise UserError(f"the optimizer {options['optimizer']!r} cannot be made: {error}") from error
    if task.trainer.estimated_stepping_batches == math.inf:
        raise UserError("the schedule needs the end of the run; give --trainer.max_epochs or --trainer.max_steps")
    total = int(task.trainer.estimated_stepping_batches)
    warmup = (
        min(options["warmup_steps"], total) if "warmup_steps" in options else round(options["warmup_ratio"] * total)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(warmup, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def clip_shards(parameters: Iterable[nn.Parameter], limit: float, algorithm: str) -> None:
    """Clip gradients of which some are cut between the ranks and the others are the same on all; they call it together.

    Args:
        parameters: Of the model.
        limit: Largest norm of all gradients together, or largest entry.
        algorithm: ``"norm"`` or ``"value"``.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [local(grad) for grad in grads]
    if not parts:  # the guard has dropped them, on all ranks
        return
    if algorithm == "value":
        for part in parts:
            part.clamp_(-limit, limit)
        return
    cut = [isinstance(grad, DTensor) for grad in grads]
    shares, same = (
        torch.nn.utils.get_total_norm([part for part, is_cut in zip(parts, cut, strict=True) if is_cut is wanted])
        for wanted in (True, False)
    )
    squared = shares.square().to(parts[0].device)
    torch.distributed.all_reduce(squared)
    total = (squared + same.square().to(squared)).sqrt()
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor)


class NonFiniteGuard:
    """Skips a step whose loss or gradient is NaN or infinite on any rank, and counts such steps.

    A gradient scaler (fp16) makes gradients overflow on purpose while it looks for its scale, which it halves after
    each such step. Down to a scale of 1 that is a search, and counted apart; at 1 and below the gradients overflow by
    themselves, which means what it means without a scaler.

    Args:
        patience: Consecutive skipped steps after which the run stops.

    Attributes:
        skipped: Steps in all, without those of a search.
        in_a_row: Of these, the ones since the last sound step.
        searched: Steps that a scaler left out in search of its scale.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.skipped = self.in_a_row = self.searched = 0

    def finite_everywhere(self, values: Iterable[Tensor]) -> bool:
        """Whether all values are finite on all ranks."""
        norm = torch.nn.utils.get_total_norm([local(value.detach()) for value in values])
        flag = torch.isfinite(norm).to(torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def after_backward(self, loss: Tensor, parameters: Iterable[nn.Parameter], *, scale: float | None = None) -> bool:
        """Drop all gradients if the loss or one of them is not finite, so that the optimizer's step changes nothing.

        Args:
            loss: Of this rank.
            parameters: Of the model, whose gradients a scaler has already unscaled.
            scale: That a gradient scaler multiplied the loss by, which skips the step itself, so that nothing is
                dropped; None without a scaler.

        Returns:
            Whether the step is sound, the same on all ranks.
        """
        parameters = list(parameters)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.finite_everywhere([loss, *grads]):
            self.in_a_row = 0
            return True
        if scale is None:
            for parameter in parameters:
                parameter.grad = None
        elif scale > 1 and self.finite_everywhere([loss]):
            self.searched += 1
            return False
        self.skipped += 1
        self.in_a_row += 1
        return False

    def give_up(self, listed: str) -> None:
        """Stop the run if too many steps in a row were skipped.

        Args:
            listed: Where their samples are listed, for the message; empty if nowhere.

        Raises:
            UserError: After ``patience`` of them, the same on all ranks.
        """
        if self.in_a_row >= self.patience:
            raise UserError(
                f"the loss or its gradient was NaN or infinite for {self.in_a_row} steps in a row; lower the learning "
                "rate, clip gradients (--trainer.gradient_clip_val 1.0), or use --trainer.precision 32-true" + listed
            )
