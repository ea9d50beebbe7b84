"""What answers to questions about images are worth, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

from dtpvit.errors import UserError
from dtpvit.evaluation.vqa_questions import Majority
from dtpvit.evaluation.vqa_references import Metric, Reference, References
from dtpvit.evaluation.vqa_scores import Score, exact_match, pope, science_qa, vqa_accuracy

__all__ = ["Scoring", "Summary", "shown", "summarise"]

_SCORERS: dict[Metric, Callable[..., Score]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "pope": pope,
    "scienceqa": science_qa,
}


@dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    Attributes:
        metric: The scorer's name.
        references: What is right.
        majority: Somebody to compare with.
        strict: See :func:`.exact_match`.
    """

    metric: Metric
    references: References
    majority: Majority | None = None
    strict: bool = False


@dataclass(frozen=True)
class Summary:
    """Figures of a file of answers.

    Attributes:
        questions: Answered ones and skipped ones.
        skipped: Causes, and how many of each.
        score: By the metric; over what was answered. Empty without references.
        majority: The same of somebody who answers as the training data mostly do, without looking.
        groups: Questions of each kind, and the first figure of ``score`` for them.
        unanswered: References without an answer.
        visual_tokens: Mean, minimum and maximum, of an image; empty without images.
        prefill_ms: Of a question, mean; None if unknown, as are all below.
        questions_per_second: Everything included, reading too.
    """

    questions: int
    skipped: dict[str, int]
    score: Score = field(default_factory=dict)
    majority: Score = field(default_factory=dict)
    groups: dict[str, tuple[int, float]] = field(default_factory=dict)
    unanswered: int = 0
    visual_tokens: dict[str, float] = field(default_factory=dict)
    prefill_ms: float | None = None
    questions_per_second: float | None = None


def summarise(rows: Sequence[dict[str, Any]], scoring: Scoring | None = None) -> Summary:
    """Figures of answers.

    Args:
        rows: As :func:`.answer_questions` yields them; of other files ``question_id`` and ``text`` will do.
        scoring: What is right; None for the cost alone.

    Raises:
        UserError: If there is no answer, or one to a question without a reference.
    """
    answered = [row for row in rows if "skipped" not in row]
    if not answered:
        causes = "; ".join(f"{row['skipped']}: {row.get('detail')}" for row in rows[:3])
        raise UserError(f"none of the {len(rows)} questions has an answer ({causes}); put that right first")
    skipped = Counter(str(row["skipped"]) for row in rows if "skipped" in row)
    figures: dict[str, Any] = {"questions": len(rows), "skipped": dict(skipped), **_cost(answered)}
    if scoring is not None:
        figures |= _scored(rows, scoring)
    return Summary(**figures)


def _scored(rows: Sequence[dict[str, Any]], scoring: Scoring) -> dict[str, Any]:
    said, asked, right, seen = list[str](), list[str](), list[Reference](), set[int]()
    for row in rows:
        question = str(row.get("prompt", ""))
        reference = scoring.references.find(row["question_id"], question)
        seen.add(id(reference))
        if "skipped" not in row:
            said.append(row["text"])
            asked.append(question or reference.question)
            right.append(reference)
    answers = [reference.answer for reference in right]
    score = partial(exact_match, strict=True) if scoring.strict else _SCORERS[scoring.metric]
    majority = scoring.majority
    return {
        "score": score(said, answers),
        "majority": score([majority.answer(question) for question in asked], answers) if majority else {},
        "groups": _by_group(score, said, right),
        "unanswered": len(scoring.references) - len(seen),
    }


def _by_group(score: Callable[..., Score], said: list[str], right: list[Reference]) -> dict[str, tuple[int, float]]:
    groups = dict[str, list[int]]()
    for place, reference in enumerate(right):
        for group in reference.groups:
            groups.setdefault(group, []).append(place)
    found = dict[str, tuple[int, float]]()
    for group, places in sorted(groups.items()):
        figures = score([said[place] for place in places], [right[place].answer for place in places])
        found[group] = (len(places), next(iter(figures.values())))
    return found


def _cost(answered: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows know of tokens and time."""
    found = dict[str, Any]()
    seen = [
        (row["visual_tokens"], len(row["image"])) for row in answered if row.get("image") and "visual_tokens" in row
    ]
    if seen:
        each = [tokens / images for tokens, images in seen]
        mean = sum(tokens for tokens, _ in seen) / sum(images for _, images in seen)
        found["visual_tokens"] = {"mean": mean, "min": min(each), "max": max(each)}
    if prefill := [row["prefill_ms"] for row in answered if "prefill_ms" in row]:
        found["prefill_ms"] = fmean(prefill)
    if seconds := [row["seconds"] for row in answered if "seconds" in row]:
        found["questions_per_second"] = 1 / fmean(seconds)
    return found


def shown(summary: Summary) -> str:
    """A table of it, one figure a line."""
    lines = [("questions", f"{summary.questions:6d}")]
    if summary.skipped:
        causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(summary.skipped.items()))
        lines.append(("skipped", f"{sum(summary.skipped.values()):6d}   ({causes}; left out of every figure)"))
    if summary.unanswered:
        lines.append(("unanswered", f"{summary.unanswered:6d}   (in the file of right answers, and not here)"))
    for name, value in summary.score.items():
        beside = f"   (majority of the training answers {summary.majority[name]:.2%})" if summary.majority else ""
        lines.append((name, f"{value:6.2%}{beside}"))
    lines += [(f"  {group}", f"{value:6.2%}   (of {count})") for group, (count, value) in summary.groups.items()]
    if summary.visual_tokens:
        tokens = summary.visual_tokens
        lines.append(("visual tokens", f"{tokens['mean']:6.1f}   an image ({tokens['min']:g} to {tokens['max']:g})"))
    if summary.prefill_ms is not None:
        lines.append(("prefill", f"{summary.prefill_ms:6.1f}   ms a question"))
    if summary.questions_per_second is not None:
        lines.append(("questions/s", f"{summary.questions_per_second:6.1f}"))
    width = max(16, *(len(title) + 2 for title, _ in lines))
    return "\n".join(f"{title:<{width}}{text}" for title, text in lines)
