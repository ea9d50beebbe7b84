"""How good answers to questions about images are: pure functions from predictions and references to numbers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from dtpvit.evaluation.answer_text import normalise

__all__ = [
    "OPTIONS",
    "Choice",
    "Score",
    "chosen_letter",
    "exact_match",
    "pope",
    "says_yes",
    "science_qa",
    "vqa_accuracy",
]

OPTIONS = "ABCDE"

Score = dict[str, float]
"""Figures by name, of which the first is the one to quote."""


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]], *, strict: bool = False) -> Score:
    """Share of predictions that equal one of the right answers.

    Args:
        predictions: N answers.
        references: The right answers of each.
        strict: Compare as it stands but for space around it; otherwise by :func:`normalise`, or in small letters where
            that leaves nothing, as of the option ``A``.
    """
    form = str.strip if strict else _comparable
    hits = [
        form(said) in {form(answer) for answer in right} for said, right in zip(predictions, references, strict=True)
    ]
    return {"accuracy": _mean(hits)}


def _comparable(answer: str) -> str:
    return normalise(answer) or answer.strip().lower()


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """VQA accuracy (Antol et al., ICCV 2015): an answer that three other humans gave is right.

    min(1, equal answers / 3), averaged over all subsets that leave one human out; with ten humans 0, 0.3, 0.6, 0.9 and
    1 for none to four and more that agree. Both sides are compared by :func:`normalise`.

    Args:
        predictions: N answers.
        references: The humans' answers to each, ten in VQAv2, TextVQA and VizWiz.
    """
    return {"vqa accuracy": _mean([_agreement(*pair) for pair in zip(predictions, references, strict=True)])}


def _agreement(prediction: str, humans: Sequence[str]) -> float:
    said = normalise(prediction)
    equal = sum(normalise(human) == said for human in humans)
    without_an_equal, without_another = min(1.0, max(0, equal - 1) / 3), min(1.0, equal / 3)
    return (equal * without_an_equal + (len(humans) - equal) * without_another) / len(humans)


def pope(predictions: Sequence[str], references: Sequence[bool]) -> Score:
    """POPE (Li et al., EMNLP 2023), whether a model sees objects that are not there; "yes" is the positive class.

    A share of nothing (precision without a yes, recall without an object) is 0.

    Args:
        predictions: N answers, read by :func:`says_yes`.
        references: Whether yes is right.
    """
    said = [says_yes(prediction) for prediction in predictions]
    pairs = list(zip(said, references, strict=True))
    hits = pairs.count((True, True))
    precision, recall = _share(hits, sum(said)), _share(hits, sum(references))
    return {
        "accuracy": _mean([yes == right for yes, right in pairs]),
        "precision": precision,
        "recall": recall,
        "F1": _share(2 * precision * recall, precision + recall),
        "yes ratio": _mean(said),
    }


def says_yes(answer: str) -> bool:
    """How POPE's evaluate.py reads an answer: without ``No``, ``no`` or ``not`` in its first sentence, it is a yes."""
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


class Choice(NamedTuple):
    """The right one of several options: its letter, and how many there are."""

    letter: str
    options: int


def science_qa(predictions: Sequence[str], references: Sequence[Choice]) -> Score:
    """ScienceQA (Lu et al., NeurIPS 2022) as LLaVA scores it: an answer without an option that exists is wrong.

    ``unread`` is the share of such answers.

    Args:
        predictions: N answers, read by :func:`chosen_letter`.
        references: The right options.
    """
    letters = [chosen_letter(said, right.options) for said, right in zip(predictions, references, strict=True)]
    hits = [letter == right.letter for letter, right in zip(letters, references, strict=True)]
    return {"accuracy": _mean(hits), "unread": _mean([letter is None for letter in letters])}


def chosen_letter(answer: str, options: int = len(OPTIONS)) -> str | None:
    """The option that an answer names by the rules of LLaVA's eval_science_qa.py; None where it names none.

    The letter alone; or the letter, a period and a space (or new line) at the start; or after ``The answer is``, where
    the first letter with a period behind it goes before one without.
    """
    text = answer.replace("\n", ". ")
    if text.strip() in tuple(OPTIONS):
        letter = text.strip()
    elif begins := re.match(r"([A-E])\. ", text):
        letter = begins[1]
    elif says := re.search(r"The answer is ([A-E])\.", text) or re.search(r"The answer is ([A-E])", text):
        letter = says[1]
    else:
        return None
    return letter if letter in OPTIONS[:options] else None


def _mean(values: Sequence[float]) -> float:
    return _share(sum(values), len(values))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
