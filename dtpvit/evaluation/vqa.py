"""``dtpvit vqa``: questions about images, from a file to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from dtpvit.datamodules.image_places import image_places
from dtpvit.errors import UserError
from dtpvit.evaluation.answer_file import AnswerFile, fingerprint
from dtpvit.evaluation.answering import answer_questions
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.measuring import machine, versions
from dtpvit.evaluation.score import report, scoring_of
from dtpvit.evaluation.vqa_questions import read_questions
from dtpvit.evaluation.vqa_references import Metric
from dtpvit.interop.assistant import load_assistant
from dtpvit.output_file import output_file

__all__ = ["vqa"]


def vqa(
    checkpoint: str,
    questions: str,
    out: str,
    images: str | None = None,
    answers: str | None = None,
    metric: Metric | None = None,
    strict: bool = False,
    majority: str | None = None,
    blind: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    device: str = "auto",
    json: str | None = None,
) -> None:
    """Answer questions about images, greedily, and say how many answers are right and what they cost.

    The same command goes on where it was stopped. A question whose image is missing or broken is skipped and counted.

    Args:
        checkpoint: Checkpoint of the instruction task, or an exported folder.
        questions: One JSON object a line as LLaVA has them: question_id, text and, where there is one, image; or
            conversations as in its training files, each turn a question of its own.
        out: Answers, one JSON object a line: question_id, text, visual_tokens, prefill_ms and more.
        images: Folder or tar that the questions name images in; the questions' own folder if left out.
        answers: The right answers, to score by --metric; the questions' file where it holds them.
        metric: exact (as VQAv2 compares, without case, punctuation and articles), vqa (VQA accuracy, ten human
            answers), pope (accuracy, precision, recall, F1, yes ratio), scienceqa (letter, by subject, context, grade).
        strict: Exact match of case, punctuation and articles too.
        majority: Training data in LLaVA's form, whose most frequent answer to the same question is scored beside.
        blind: Paint every image in the mean colour, to see what the questions alone tell.
        batch_size: Questions at a time.
        max_new_tokens: Most tokens of an answer.
        device: auto, cpu, cuda, cuda:1, ...
        json: JSON file for the figures.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise UserError(f"batch_size is {batch_size} and max_new_tokens is {max_new_tokens}; both must be at least 1")
    place, target, written = chosen_device(device), output_file(json), output_file(out)
    asked = read_questions(questions)
    places = image_places(Path(questions).parent if images is None else images)
    scoring = scoring_of(answers, metric, majority, strict)
    if scoring is not None:
        for question in asked:
            scoring.references.find(question.id, question.text)
    metadata = {"checkpoint": fingerprint(checkpoint), "blind": blind, "max_new_tokens": max_new_tokens}
    assert written is not None
    file = AnswerFile(written, asked, metadata)
    if rest := asked[len(file.rows) :]:
        assistant = load_assistant(checkpoint, place)
        options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "blind": blind}
        with tqdm(total=len(asked), initial=len(file.rows), unit="question", leave=False, disable=None) as bar:
            for rows in answer_questions(assistant, rest, places, **options, progress=bar.update):
                file.append(rows)
    about = {"checkpoint_path": checkpoint, "questions_path": questions, **metadata}
    report(file.rows, scoring, target, {**about, "machine": machine(place), "versions": versions()})
