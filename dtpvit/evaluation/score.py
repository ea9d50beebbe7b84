"""``dtpvit score``: how many answers of a file are right, without a model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from dtpvit.errors import UserError
from dtpvit.evaluation.json_rows import read_rows
from dtpvit.evaluation.vqa_questions import Majority, question_id
from dtpvit.evaluation.vqa_references import Metric, References
from dtpvit.evaluation.vqa_summary import Scoring, shown, summarise
from dtpvit.output_file import output_file, write_json

__all__ = ["report", "score", "scoring_of"]


def score(
    predictions: str,
    answers: str,
    metric: Metric,
    strict: bool = False,
    majority: str | None = None,
    json: str | None = None,
) -> None:
    """Say how many answers of a file are right: what `dtpvit vqa` prints, without a model.

    Args:
        predictions: Answers, one JSON object a line: question_id, text and, to be compared with what was asked, prompt.
        answers: The right answers, see `dtpvit vqa --help`.
        metric: exact, vqa, pope, scienceqa.
        strict: Exact match of case, punctuation and articles too.
        majority: Training data in LLaVA's form, whose most frequent answer to the same question is scored beside.
        json: JSON file for the figures.
    """
    target, scoring = output_file(json), scoring_of(answers, metric, majority, strict)
    report(_predictions(predictions), scoring, target, {"predictions": predictions})


def _predictions(path: str) -> list[dict[str, Any]]:
    """Answers, of which the VQA challenge calls the text ``answer``, LLaVA and we ``text``."""
    found = dict[tuple[str, str], dict[str, Any]]()
    for row in read_rows(path):
        number, text = question_id(row), row.fields.get("text", row.fields.get("answer"))
        if not isinstance(text, str):
            raise UserError(f'{row.place}: "text" is {text!r}; expected the answer')
        key = str(number), str(row.fields.get("prompt", ""))
        if key in found:
            raise UserError(f"{row.place}: answers question_id {number!r} again; remove one of the answers")
        found[key] = {**row.fields, "question_id": number, "text": text}
    return list(found.values())


def scoring_of(answers: str | None, metric: Metric | None, majority: str | None, strict: bool) -> Scoring | None:
    """What the options about scoring mean; None without any.

    Raises:
        UserError: If they do not belong together, or a file is not as :class:`.References` or :class:`.Majority` want.
    """
    if strict and metric != "exact":
        raise UserError(f"--strict is for --metric exact, and the metric is {metric}; leave one of them out")
    if answers is not None and metric is not None:
        usual = None if majority is None else Majority(majority)
        return Scoring(metric, References(answers, metric), usual, strict)
    if not answers == metric == majority:
        raise UserError(
            "to score, give both --answers FILE and --metric exact|vqa|pope|scienceqa; --majority needs them"
        )
    return None


def report(rows: list[dict[str, Any]], scoring: Scoring | None, target: Path | None, about: dict[str, Any]) -> None:
    """Print the figures of answers, and write them with what else there is to say into a JSON file.

    Raises:
        UserError: See :func:`.summarise`.
    """
    summary = summarise(rows, scoring)
    print(shown(summary))
    if target is not None:
        how = {} if scoring is None else {"metric": scoring.metric, "strict": scoring.strict}
        command = shlex.join(["dtpvit", *sys.argv[1:]])
        record = {"command": command, "date": date.today().isoformat(), **about, **how, **asdict(summary)}
        write_json(target, record)
