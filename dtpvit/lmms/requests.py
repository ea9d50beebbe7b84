"""Requests as lmms-eval makes them, answered in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dtpvit.errors import UserError
from dtpvit.interop.assistant import Assistant, Question
from dtpvit.interop.chat import Turn

__all__ = ["Request", "answer_requests", "question_of"]

_MAX_NEW_TOKENS = 1024  # lmms-eval's own for LLaVA, where a task says nothing
_MARK = "<image>"
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        context: The question.
        options: ``max_new_tokens``, ``until`` (a text or several that end an answer), ``do_sample``, ``temperature``,
            ``top_p``, ``top_k``, ``num_beams``; others are of other models and not used.
        images: Gives its images; asked for once, shortly before they are needed.
    """

    context: str
    options: Mapping[str, Any]
    images: Callable[[], Sequence[Any] | None]


def answer_requests(
    assistant: Assistant,
    requests: Sequence[Request],
    *,
    batch_size: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Answer requests, those of equal options in batches, long ones first.

    Args:
        assistant: Answers.
        requests: What to answer.
        batch_size: Requests at a time.
        progress: Called after each batch with how many it had.

    Returns:
        Texts, in the order of the requests.

    Raises:
        UserError: If a request comes with anything but images, or the model refuses it.
    """
    groups = dict[str, list[int]]()
    for place, request in enumerate(requests):
        groups.setdefault(json.dumps(dict(request.options), sort_keys=True, default=str), []).append(place)
    found = dict[int, str]()
    for places in groups.values():
        options = requests[places[0]].options
        order = sorted(places, key=lambda place: -len(requests[place].context))
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            questions = [question_of(requests[place].context, requests[place].images() or ()) for place in batch]
            answers = assistant.answer(questions, **_generation(options))
            until = options.get("until") or ()
            ends = [until] if isinstance(until, str) else [end for end in until if end]
            found |= {place: _cut(answer.text, ends) for place, answer in zip(batch, answers, strict=True)}
            progress(len(batch))
    return [found[place] for place in range(len(requests))]


def question_of(context: str, images: Sequence[Any]) -> Question:
    """A question with its images at its ``<image>`` marks, or in front of it where these are not as many.

    Raises:
        UserError: If one of them is no image.
    """
    for image in images:
        if not isinstance(image, Image.Image):
            raise UserError(f"a task hands over a {type(image).__name__}; dtpvit answers questions about images alone")
    pictures = tuple(image.convert("RGB") for image in images)
    texts = context.split(_MARK)
    if not pictures or len(texts) != len(pictures) + 1:
        return Question.of(context, *pictures)
    parts: list[str | None] = [part for text in texts for part in (None, text)][1:]
    return Question((Turn("user", tuple(part for part in parts if part != "")),), pictures)


def _generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's options as transformers has them; a temperature of 0 means greedy."""
    found: dict[str, Any] = {"max_new_tokens": int(options.get("max_new_tokens") or _MAX_NEW_TOKENS)}
    if (options.get("num_beams") or 1) > 1:
        found["num_beams"] = options["num_beams"]
    if options.get("do_sample") and options.get("temperature", 1.0) != 0:
        found |= {"do_sample": True}
        found |= {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    return found


def _cut(text: str, ends: Sequence[str]) -> str:
    """What stands before the first of several texts."""
    for end in ends:
        text = text.split(end, 1)[0]
    return text
