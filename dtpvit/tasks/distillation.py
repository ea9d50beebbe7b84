"""What a student with fewer tokens learns from a dense teacher: its answers, and its tokens where they were."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, mse_loss

from dtpvit.encoder import Encoding
from dtpvit.encoder.tokens import Tokens
from dtpvit.errors import UserError
from dtpvit.interop.dense_weights import Transfer, load_dense
from dtpvit.interop.image_models import image_model, pixel_statistics, vision_config
from dtpvit.interop.timm_models import TimmEncoder

__all__ = ["Teacher", "TeacherOptions", "logits_loss", "tokens_loss"]

logger = logging.getLogger(__name__)
LogitsLoss = Literal["none", "soft", "hard"]
TokensLoss = Literal["none", "cosine", "mse"]


class TeacherOptions(TypedDict, total=False):
    """Arguments of :class:`Teacher`, as a YAML gives them; ``model`` and ``init`` are needed."""

    model: str | dict[str, Any]
    init: str
    logits: LogitsLoss
    temperature: float
    logits_weight: float
    tokens: TokensLoss
    tokens_weight: float


def logits_loss(student: Tensor, teacher: Tensor, kind: LogitsLoss, temperature: float) -> Tensor:
    """Distance of two answers, each of shape (B, C), a scalar.

    ``"soft"``: KL divergence at a temperature, times its square (Hinton et al., "Distilling the Knowledge in a Neural
    Network", 2015); ``"hard"``: cross-entropy with the teacher's choice (Touvron et al., "DeiT", 2021).
    """
    student, teacher = student.float(), teacher.float()
    if kind == "hard":
        return cross_entropy(student, teacher.argmax(1))
    ours, theirs = (log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def tokens_loss(student: Tokens, teacher: Tokens, kind: TokensLoss) -> Tensor:
    """Distance of the student's tokens, spread back to the patches they stand for, to the teacher's, a scalar.

    ``"cosine"``: 1 - cosine; ``"mse"``: squared difference; mean over the patches that the student neither
    dropped nor masked.
    """
    kept = student.kept_patches().float()
    ours, theirs = student.unpool().float(), teacher.unpool().float()
    if kind == "cosine":
        distance = 1 - cosine_similarity(ours, theirs, dim=1)
    else:
        distance = mse_loss(ours, theirs, reduction="none").mean(1)
    return (distance * kept).sum() / kept.sum().clamp(min=1)


class Teacher:
    """A frozen classifier that sees what the student sees.

    No module, so that neither checkpoints nor weight averages nor DDP take its weights for the student's.

    Args:
        student: For its classes, width and grid.
        model: Name or config, as the student's.
        init: Its weights (:func:`dtpvit.interop.dense_weights.load_dense`), the classifier included.
        logits: What to learn from its answers, see :func:`logits_loss`; ``"none"`` leaves them out.
        temperature: Of soft answers.
        logits_weight: Share of the answers' loss, from 0 to 1; the labels' loss has the rest.
        tokens: Which distance of the tokens to add, see :func:`tokens_loss`; ``"none"`` leaves it out.
        tokens_weight: What that distance is multiplied by.

    Raises:
        UserError: If an option, or its weights, classes, width, grid or image size do not fit.
    """

    def __init__(
        self,
        student: TimmEncoder,
        *,
        model: str | Mapping[str, Any],
        init: str,
        logits: LogitsLoss = "soft",
        temperature: float = 1.0,
        logits_weight: float = 0.5,
        tokens: TokensLoss = "none",
        tokens_weight: float = 1.0,
    ) -> None:
        for name, kind, known in (("logits", logits, LogitsLoss), ("tokens", tokens, TokensLoss)):
            if kind not in get_args(known):
                raise UserError(f"the teacher's {name} is {kind!r}; expected one of {', '.join(get_args(known))}")
        if temperature <= 0:
            raise UserError(f"the teacher's temperature is {temperature}; expected more than 0")
        if not 0 <= logits_weight <= 1:
            raise UserError(f"the teacher's logits_weight is {logits_weight}; expected a share, from 0 to 1")
        self.logits: LogitsLoss = logits
        self.tokens: TokensLoss = tokens
        self.temperature, self.logits_weight, self.tokens_weight = temperature, logits_weight, tokens_weight
        self.model = image_model(model, student.num_classes).requires_grad_(False).eval()
        transfer = load_dense(self.model, init)
        logger.info("teacher %s", transfer)
        self._check(student, init, transfer)
        self._mean, self._std = (torch.tensor(v).view(1, 3, 1, 1) for v in pixel_statistics(vision_config(model)))

    def _check(self, student: TimmEncoder, init: str, transfer: Transfer) -> None:
        head = "visual.trunk.head.weight"
        if self.logits != "none" and head not in transfer.taken:
            found = transfer.left.get(head, "it has no classifier")
            raise UserError(
                f"the teacher {init} does not know the {student.num_classes} classes of this task ({found}); "
                "give one that does, or the teacher logits: none"
            )
        if self.model.image_size != student.image_size:
            found, wanted = (f"{size[0]}x{size[1]}" for size in (self.model.image_size, student.image_size))
            raise UserError(f"the teacher sees images of {found}, the student of {wanted}; give both one image_size")
        mine, theirs = (student.dim, student.grid_size), (self.model.dim, self.model.grid_size)
        if self.tokens != "none" and mine != theirs:
            raise UserError(
                f"the teacher's tokens have width and grid {theirs}, the student's {mine}; choose a teacher of the "
                "same width and patch, or give the teacher tokens: none"
            )

    def to(self, device: torch.device) -> Teacher:
        """Move it, in place."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def answer(self, images: Tensor) -> tuple[Tensor, Encoding]:
        """Logits, shape (B, C), and encoding of images on [0, 1], not normalised, shape (B, 3, H, W)."""
        encoding = self.model.encode((images - self._mean) / self._std)
        return self.model.head(encoding.pooled), encoding

    def teach(
        self, loss: Tensor, logits: Tensor, encoding: Encoding, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to be followed, and its new parts by name.

        Args:
            loss: On the labels, a scalar.
            logits: The student's, shape (B, C).
            encoding: The student's.
            images: On [0, 1], shape (B, 3, H, W).
        """
        answers, taught = self.answer(images)
        parts: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            if self.logits != "none":
                parts["distill_logits"] = logits_loss(logits, answers, self.logits, self.temperature)
                loss = (1 - self.logits_weight) * loss + self.logits_weight * parts["distill_logits"]
            if self.tokens != "none":
                parts["distill_tokens"] = tokens_loss(encoding.tokens, taught.tokens, self.tokens)
                loss = loss + self.tokens_weight * parts["distill_tokens"]
        return loss, parts
