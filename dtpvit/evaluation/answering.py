"""Many questions answered in batches: like lengths together, images read ahead, nothing broken stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from dtpvit.datamodules.samples import SkippedSample, decode_image
from dtpvit.errors import UserError
from dtpvit.evaluation.vqa_questions import ImageQuestion
from dtpvit.interop.assistant import Assistant, Question

__all__ = ["answer_questions"]

_BATCHES = 16  # of these many the questions are sorted

Loaded = tuple[Image.Image, ...] | str


def answer_questions(
    assistant: Assistant,
    questions: Sequence[ImageQuestion],
    folder: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[list[dict[str, Any]]]:
    """Answer questions, those of like length in one batch.

    Args:
        assistant: Answers.
        questions: What to ask.
        folder: Where their images are.
        batch_size: Questions at a time.
        max_new_tokens: Most tokens of an answer.
        blind: Paint every image in the mean colour, which is zero for the encoder.
        progress: Called after each batch with how many questions it had.

    Yields:
        Rows in the order of the questions, as soon as all those before them are there: ``question_id``, ``prompt``,
        ``text``, ``image`` (files), ``visual_tokens`` (of all its images), ``prompt_tokens``, ``prefill_ms`` and
        ``seconds`` (a question's share of its batch's; of everything, reading included). What cannot be answered has
        ``skipped``, the cause, and an empty text.
    """

    def load(batch: list[int]) -> list[Loaded]:
        return [_images(questions[place], folder) for place in batch]

    batches = _batches(questions, batch_size)
    found, written = dict[int, dict[str, Any]](), 0
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(load, batches[0])
        for number, batch in enumerate(batches):
            started, images = time.perf_counter(), coming.result()
            if number + 1 < len(batches):
                coming = reader.submit(load, batches[number + 1])
            if blind:
                images = [each if isinstance(each, str) else _blinded(each, assistant) for each in images]
            rows = _answered(assistant, [questions[place] for place in batch], images, max_new_tokens)
            seconds = (time.perf_counter() - started) / len(batch)
            found |= {place: {**row, "seconds": seconds} for place, row in zip(batch, rows, strict=True)}
            ready = list[dict[str, Any]]()
            while written in found:
                ready.append(found.pop(written))
                written += 1
            progress(len(batch))
            yield ready


def _batches(questions: Sequence[ImageQuestion], size: int) -> list[list[int]]:
    """Places of questions; within a window the longest come first, so that memory runs out at once if at all."""
    window, batches = size * _BATCHES, list[list[int]]()
    for start in range(0, len(questions), window):
        places = range(start, min(start + window, len(questions)))
        order = sorted(places, key=lambda place: (-len(questions[place].images), -len(questions[place].text)))
        batches += [order[first : first + size] for first in range(0, len(order), size)]
    return batches


def _images(question: ImageQuestion, folder: Path) -> Loaded:
    """The images of a question, or why there are none."""
    images = list[Image.Image]()
    for name in question.images:
        try:
            images.append(decode_image((folder / name).read_bytes()))
        except OSError as error:
            return f"{name}: {error.strerror or 'unreadable file'}"
        except SkippedSample as error:
            return f"{name}: {error.cause}"
    return tuple(images)


def _blinded(images: tuple[Image.Image, ...], assistant: Assistant) -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", image.size, assistant.image_fill) for image in images)


def _answered(
    assistant: Assistant, questions: Sequence[ImageQuestion], images: Sequence[Loaded], max_new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each question."""
    pairs = list(zip(questions, images, strict=True))
    asked = [Question.of(question.text, *each) for question, each in pairs if not isinstance(each, str)]
    answers = iter(_answers(assistant, asked, max_new_tokens))
    return [
        {"question_id": question.id, "prompt": question.text, "image": list(question.images)}
        | (_skipped(each) if isinstance(each, str) else next(answers))
        for question, each in pairs
    ]


def _answers(assistant: Assistant, questions: Sequence[Question], max_new_tokens: int) -> list[dict[str, Any]]:
    """What the model says; of a question that it refuses, such as one too long for it, its sentence."""
    if not questions:
        return []
    try:
        answers = assistant.answer(questions, max_new_tokens=max_new_tokens)
    except UserError as error:
        if len(questions) == 1:
            return [_skipped(str(error))]
        return [row for question in questions for row in _answers(assistant, [question], max_new_tokens)]
    return [
        {
            "text": answer.text,
            "visual_tokens": answer.visual_tokens,
            "prompt_tokens": answer.prompt_tokens,
            "prefill_ms": 1e3 * answer.batch_prefill_s / len(questions),
        }
        for answer in answers
    ]


def _skipped(cause: str) -> dict[str, Any]:
    return {"text": "", "skipped": cause}
