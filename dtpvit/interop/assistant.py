"""Questions about images, answered by a trained model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dtpvit.encoder import ImageEncoder
from dtpvit.errors import UserError
from dtpvit.interop.chat import Chat, Turn
from dtpvit.interop.instruction_models import InstructionModel, load_instruction_model
from dtpvit.interop.preprocessing import aspect_transform, normalised
from dtpvit.interop.visual_language import VisualLanguageModel

__all__ = ["Answer", "Assistant", "Question", "load_assistant"]


@dataclass(frozen=True)
class Question:
    """A conversation that ends where the assistant is to speak, and its images in order of their places.

    Attributes:
        turns: The last is the user's.
        images: As many as the turns have places.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...] = ()

    @classmethod
    def of(cls, text: str, *images: Image.Image, system: str | None = None) -> Question:
        """One question, its images in front of the text, a line each, as LLaVA's data has them."""
        parts: list[str | None] = [part for _ in images for part in (None, "\n")]
        turns = (Turn("user", (*parts, text)),)
        return cls(turns if system is None else (Turn("system", (system,)), *turns), images)


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: Without the token that ends it.
        visual_tokens: Of all its images.
        prompt_tokens: Of text and images.
        batch_prefill_s: Seconds until the first token, encoder included, of the whole batch that it was in.
    """

    text: str
    visual_tokens: int
    prompt_tokens: int
    batch_prefill_s: float


class Assistant:
    """A model that answers questions about images, greedily unless told otherwise.

    Args:
        found: The model and what its inputs must look like.
        device: Where it runs; None leaves it where it is.

    Attributes:
        model: Encoder, projector and language model.
        chat: Turns to token ids and back.
        preprocess: An image of PIL to uint8 pixels.
        image_fill: The mean colour, which is zero for the encoder.
    """

    def __init__(self, found: InstructionModel, device: torch.device | str | None = None) -> None:
        self.model: VisualLanguageModel = found.model if device is None else found.model.to(device)
        self.chat: Chat = found.chat
        self.max_length: int = found.config["max_length"]
        self.image_fill = found.image_fill
        height, width = self.model.vision.image_size
        self.preprocess = aspect_transform((height, width), found.config["image_aspect"], found.image_fill)
        self._mean, self._std = found.config["mean"], found.config["std"]

    @property
    def encoder(self) -> ImageEncoder:
        return self.model.vision

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def answer(self, questions: Sequence[Question], max_new_tokens: int = 64, **options: Any) -> list[Answer]:
        """Answer questions in one batch.

        Args:
            questions: At least one.
            max_new_tokens: Most tokens of an answer.
            **options: Of transformers' ``generate``, such as ``do_sample`` and ``temperature``.

        Raises:
            UserError: If a question has not as many images as places, or is longer than the model allows.
        """
        for question in questions:
            places = sum(part is None for turn in question.turns for part in turn.parts)
            if places != len(question.images):
                raise UserError(f"a question has {len(question.images)} images for {places} places; give as many")
        prompts = [self.chat.prompt(question.turns) for question in questions]
        if not all(prompts):
            raise UserError("a question is empty; this model's chat template, of the first stage, reads images alone")
        ids = torch.full((len(prompts), max(map(len, prompts))), self.chat.pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        length = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        images = self._pixels([image for question in questions for image in question.images])
        clock = _FirstToken(self.device)
        said = self.model.generate(
            ids.to(self.device),
            length,
            images,
            max_length=self.max_length,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.chat.end_ids,
            pad_token_id=self.chat.pad_id,
            logits_processor=[clock],
            **options,
        )
        tokens = iter(said.counts.tolist())
        visual = [sum(next(tokens) for _ in question.images) for question in questions]
        rows = zip(said.ids.tolist(), visual, said.prompt.tolist(), strict=True)
        return [Answer(self._text(ids), count, prompt, clock.seconds) for ids, count, prompt in rows]

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        if not images:
            return torch.zeros(0, 3, *self.encoder.image_size, device=self.device)
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return normalised(pixels, self._mean, self._std)

    def _text(self, ids: list[int]) -> str:
        """Up to the token that ends an answer: padding behind it may be a word of the tokenizer."""
        end = next((place for place, token in enumerate(ids) if token in self.chat.end_ids), len(ids))
        return self.chat.text(ids[:end])


class _FirstToken:
    """Notes when the first logits come out; of transformers' kind of logits processor."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self._start = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.seconds:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds = time.perf_counter() - self._start
        return scores


def load_assistant(path: str | Path, device: torch.device | str | None = None) -> Assistant:
    """An assistant from a checkpoint of the instruction task, or from a folder as ``dtpvit export`` writes it.

    Raises:
        UserError: If it is neither, or its language model is not where it was.
    """
    return Assistant(load_instruction_model(path), device)
