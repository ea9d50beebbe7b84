"""Many questions answered in batches: like lengths together, images read ahead, nothing broken stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from PIL import Image

from dtpvit.datamodules.image_places import ImagePlaces, read_place
from dtpvit.datamodules.samples import SkippedSample, decode_image
from dtpvit.errors import UserError
from dtpvit.evaluation.vqa_questions import ImageQuestion
from dtpvit.interop.assistant import Assistant, Question

__all__ = ["answer_questions"]

_BATCHES = 16  # of these many the questions are sorted

AnswerRow = dict[str, Any]
Loaded = tuple[Image.Image, ...] | AnswerRow


def answer_questions(
    assistant: Assistant,
    questions: Sequence[ImageQuestion],
    places: ImagePlaces,
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[list[AnswerRow]]:
    """Answer questions, those of like length in one batch.

    Args:
        assistant: Answers.
        questions: What to ask.
        places: Where their images are.
        batch_size: Questions at a time.
        max_new_tokens: Most tokens of an answer.
        blind: Paint every image in the mean colour, which is zero for the encoder.
        progress: Called after each batch with how many questions it had.

    Yields:
        Rows in the order of the questions, as soon as all those before them are there: ``question_id``, ``prompt``,
        ``text``, ``image`` (files), ``visual_tokens`` (of all its images), ``prompt_tokens``, ``prefill_ms`` and
        ``seconds`` (a question's share of its batch's; of everything, reading included). What cannot be answered has
        an empty text, ``skipped``, the cause, and ``detail``.
    """

    fill = assistant.image_fill if blind else None
    batches = _batches(questions, batch_size)
    found, written = dict[int, AnswerRow](), 0
    with ThreadPoolExecutor(1) as reader:

        def loading(batch: list[int]) -> Future[list[Loaded]]:
            return reader.submit(lambda: [_images(questions[index], places, fill) for index in batch])

        coming = loading(batches[0])
        for batch, following in zip_longest(batches, batches[1:]):
            started, images = time.perf_counter(), coming.result()
            if following is not None:
                coming = loading(following)
            rows = _answered(assistant, [questions[index] for index in batch], images, max_new_tokens)
            seconds = (time.perf_counter() - started) / len(batch)
            found |= {index: {**row, "seconds": seconds} for index, row in zip(batch, rows, strict=True)}
            progress(len(batch))
            ready = list[AnswerRow]()
            while written in found:
                ready.append(found.pop(written))
                written += 1
            yield ready


def _batches(questions: Sequence[ImageQuestion], size: int) -> list[list[int]]:
    """Indices of questions; within a window the longest come first, so that memory runs out at once if at all."""
    window, batches = size * _BATCHES, list[list[int]]()
    for start in range(0, len(questions), window):
        indices = range(start, min(start + window, len(questions)))
        order = sorted(indices, key=lambda index: (-len(questions[index].images), -len(questions[index].text)))
        batches += [order[first : first + size] for first in range(0, len(order), size)]
    return batches


def _images(question: ImageQuestion, places: ImagePlaces, fill: tuple[int, ...] | None) -> Loaded:
    """The images of a question, painted over where there is a colour to fill them with; or why there are none."""
    images = list[Image.Image]()
    for name in question.images:
        try:
            if (place := places.find(name)) is None:
                raise SkippedSample("missing image")
            image = decode_image(read_place(place))
        except SkippedSample as error:
            return _skipped(error.cause, name)
        images.append(image if fill is None else Image.new("RGB", image.size, fill))
    return tuple(images)


def _answered(
    assistant: Assistant, questions: Sequence[ImageQuestion], images: Sequence[Loaded], max_new_tokens: int
) -> list[AnswerRow]:
    """A row for each question."""
    pairs = list(zip(questions, images, strict=True))
    asked = [Question.of(question.text, *each) for question, each in pairs if not isinstance(each, dict)]
    answers = iter(_answers(assistant, asked, max_new_tokens))
    return [
        {"question_id": question.id, "prompt": question.text, "image": list(question.images)}
        | (each if isinstance(each, dict) else next(answers))
        for question, each in pairs
    ]


def _answers(assistant: Assistant, questions: Sequence[Question], max_new_tokens: int) -> list[AnswerRow]:
    """What the model says; of a question that it refuses, such as one too long for it, its sentence."""
    if not questions:
        return []
    try:
        answers = assistant.answer(questions, max_new_tokens=max_new_tokens)
    except UserError as error:
        if len(questions) == 1:
            return [_skipped("refused by the model", str(error))]
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


def _skipped(cause: str, detail: str) -> AnswerRow:
    return {"text": "", "skipped": cause, "detail": detail}
