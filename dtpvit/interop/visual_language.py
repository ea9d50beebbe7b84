"""An image encoder in front of a causal language model, which reads each image's tokens as words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dtpvit.encoder import Encoding, VisionEncoder
from dtpvit.encoder.projector import Projector
from dtpvit.errors import UserError
from dtpvit.interop.language_model import answer_logits
from dtpvit.interop.splicing import IGNORED, independent_parts, splice
from dtpvit.interop.timm_models import TimmEncoder

__all__ = ["Generated", "Read", "Select", "VisualLanguageModel"]

Select = Literal["pooled", "pre_pool"]


@dataclass(frozen=True)
class Read:
    """What the language model said where it was supervised.

    Attributes:
        logits: float32, shape (n, vocabulary).
        targets: Token ids, shape (n,).
        turn: Which answer of the batch each belongs to, counted from 0, int64, shape (n,).
        encoding: Of the images; None without any.
        cut: Text tokens of each sample that did not fit, shape (B,).
    """

    logits: Tensor
    targets: Tensor
    turn: Tensor
    encoding: Encoding | None
    cut: Tensor


@dataclass(frozen=True)
class Generated:
    """What the language model said.

    Attributes:
        ids: Token ids of each answer, padded on the right, shape (B, N).
        counts: Tokens of each image, shape (M,).
        prompt: Tokens of each prompt, its images' included, shape (B,).
    """

    ids: Tensor
    counts: Tensor
    prompt: Tensor


class VisualLanguageModel(nn.Module):
    """Encoder, projector and language model, after LLaVA (Liu et al., NeurIPS 2023; LLaVA-1.5, CVPR 2024).

    An image is as many words as it has patch tokens, which may be another number for each.

    Args:
        vision: The image encoder.
        language_model: A causal language model of transformers.
        projector: ``"linear"`` or ``"mlp2x_gelu"``.
        position: Tell the language model where each token lies and how many patches it stands for.
        select: ``"pooled"``: the tokens at the end of the encoder; ``"pre_pool"``: those that enter its first
            reducer, the patches as they were, for reference.
        select_layer: ``-1``: after the last block and the final norm; ``-2``: after the last block but one, without
            the norm, as LLaVA-1.5 takes them; and so on. Of pooled tokens only.

    Raises:
        UserError: If an argument does not fit the encoder.
    """

    def __init__(
        self,
        vision: TimmEncoder,
        language_model: nn.Module,
        *,
        projector: str = "mlp2x_gelu",
        position: bool = False,
        select: Select = "pooled",
        select_layer: int = -1,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.language_model = language_model
        self.depth = _depth(vision, select, select_layer)
        config: Any = language_model.config
        try:
            self.projector = Projector(vision.dim, config.get_text_config().hidden_size, projector, position=position)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def embedding(self) -> nn.Module:
        """Token ids to the language model's inputs."""
        return cast("Any", self.language_model).get_input_embeddings()

    def see(self, images: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor, Encoding]:
        """Images as words.

        Args:
            images: Normalised, shape (M, 3, H, W), at least one.
            seeds: See :meth:`dtpvit.encoder.ImageEncoder.forward`.

        Returns:
            Tokens of all images, end to end, shape (T, D); how many each has, shape (M,); what the encoder made.

        Raises:
            UserError: If the encoder masks tokens in training, where it removes them afterwards.
        """
        if self.depth is None:
            encoding = self.vision.encode(images, seeds=seeds)
        else:
            assert isinstance(self.vision, VisionEncoder)
            encoding = self.vision.encode_until(self.depth, images, seeds=seeds)
        tokens = encoding.tokens
        if tokens.policy is not None:
            raise UserError(
                "the encoder's reducer masks tokens in training, which a language model would read all the same; "
                "tune no reducers, or take others"
            )
        return self.projector(tokens, self.vision.grid_size), tokens.lengths - tokens.num_prefix, encoding

    def read(
        self, batch: Mapping[str, Tensor], images: Tensor, *, max_length: int, unseen: Tensor | None = None
    ) -> Read:
        """Read conversations and predict what was answered in them.

        Args:
            batch: ``ids`` (B, L), ``length`` (B,), ``supervised`` (B, L); where there are, ``image_seed`` (M,), and
                ``part`` (B, L), as of :func:`dtpvit.interop.splicing.independent_parts`, for questions that do not see
                each other.
            images: Normalised, shape (M, 3, H, W).
            max_length: Most tokens of a sample, its images' included; what is longer loses text from its end.
            unseen: Added to every word: a zero that carries the gradient to parts which this batch does not use.
        """
        embedding: Any = self.embedding
        visual, counts, encoding = images.new_zeros(0), images.new_zeros(0, dtype=torch.int64), None
        if len(images):
            visual, counts, encoding = self.see(images, batch.get("image_seed"))
        text = splice(batch["ids"], batch["length"], batch["supervised"], counts, max_length=max_length)
        embeds = embedding(text.ids)
        embeds = text.embedded(embeds, visual) if len(images) else embeds
        embeds = embeds if unseen is None else embeds + unseen
        answers = text.labels[:, 1:] != IGNORED
        begins = answers & ~nn.functional.pad(answers, (1, 0))[:, :-1]
        turn = begins.flatten().cumsum(0)[answers.flatten()] - 1
        mask, positions = text.mask, None
        if "part" in batch:
            mask, positions = independent_parts(text, batch["part"])
        logits = answer_logits(self.language_model, embeds, mask, nn.functional.pad(answers, (0, 1)), positions)
        return Read(logits, text.labels[:, 1:][answers], turn, encoding, text.cut)

    @torch.no_grad()
    def generate(self, ids: Tensor, length: Tensor, images: Tensor, *, max_length: int, **options: Any) -> Generated:
        """Answer, greedily unless ``options`` say otherwise.

        Args:
            ids: Prompts, padded on the right, shape (B, L).
            length: Their tokens, shape (B,).
            images: Normalised, shape (M, 3, H, W).
            max_length: Most tokens of a prompt, its images' included.
            **options: Of transformers' ``generate``.

        Raises:
            UserError: If a prompt is longer than ``max_length``.
        """
        embedding, model = cast("Any", self.embedding), cast("Any", self.language_model)
        visual, counts = images.new_zeros(0), images.new_zeros(0, dtype=torch.int64)
        if len(images):
            visual, counts, _ = self.see(images)
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        text = splice(ids, length, nothing, counts, max_length=max_length, left=True)
        if cut := int(text.cut.max()):
            raise UserError(f"a prompt is {cut} tokens longer than max_length, {max_length}; shorten it")
        embeds = embedding(text.ids)
        embeds = text.embedded(embeds, visual) if len(images) else embeds
        said = model.generate(inputs_embeds=embeds, attention_mask=text.mask.long(), **{"do_sample": False, **options})
        return Generated(said, counts, text.mask.sum(1))


def _depth(vision: TimmEncoder, select: str, select_layer: int) -> int | None:
    """Blocks to run; None for all that there are."""
    if select not in get_args(Select):
        raise UserError(f"select is {select!r}; expected {' or '.join(get_args(Select))}")
    if select == "pooled" and select_layer == -1:
        return None
    if not isinstance(vision, VisionEncoder):
        raise UserError(
            f"a {type(vision).__name__} gives its last tokens only; leave select and select_layer as they are"
        )
    if select == "pooled":
        if not -vision.depth <= select_layer < 0:
            raise UserError(f"select_layer is {select_layer}; expected -1 to {-vision.depth}")
        return vision.depth + 1 + select_layer
    if not vision.reducers:
        raise UserError("select is pre_pool, and the encoder has no reducers; leave it at pooled")
    return min(int(block) for block in vision.reducers)
