"""The right answers to questions about images, out of the files that the benchmarks come with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dtpvit.errors import UserError
from dtpvit.evaluation.json_rows import Row, read_rows
from dtpvit.evaluation.vqa_questions import QuestionId, folded, is_conversation, question_id, turns_of
from dtpvit.evaluation.vqa_scores import OPTIONS, Choice

__all__ = ["Metric", "Reference", "References"]

Metric = Literal["exact", "vqa", "pope", "scienceqa"]

_LEAST_HUMANS = 4  # with fewer, the mean that leaves one out cannot reach 1
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


@dataclass(frozen=True)
class Reference:
    """What is right.

    Attributes:
        place: Row of the file.
        answer: As the metric's scorer takes it.
        groups: Kinds of questions that this is one of.
        question: Its text, where the file has it.
    """

    place: str
    answer: Any
    groups: tuple[str, ...] = ()
    question: str = ""


class References:
    """The right answers of a file, found by what was asked.

    By ``question_id``; or by ``image_id`` and question, as in TextVQA's own file, LLaVA's questions having the id of
    the image.

    Args:
        path: See :func:`.read_rows`.
        metric: Says what is looked for: ``answer``, ``answers``, ``label`` or LLaVA's ``conversations`` (exact);
            ``answers`` of at least four humans (vqa); ``label`` or ``answer``, yes or no (pope); ``answer``, a letter
            or the option's number from 0, and ``choices`` (scienceqa).

    Raises:
        UserError: If the file cannot be read, a row lacks its answer, or two differ about one question.
    """

    def __init__(self, path: str, metric: Metric) -> None:
        self.path = path
        self._by_id = dict[str, Reference]()
        self._by_image = dict[tuple[str, str], Reference]()
        for row in read_rows(path):
            for number, reference in _references(row, metric):
                first = self._by_id.setdefault(str(number), reference)
                if first.answer != reference.answer:
                    raise UserError(
                        f"{reference.place}: question_id {number!r} has another answer than in {first.place}; give "
                        "each question an id of its own"
                    )
                if "image_id" in row.fields and reference.question:
                    self._by_image[str(row.fields["image_id"]), folded(reference.question)] = reference

    def __len__(self) -> int:
        """Questions that have an answer."""
        return len(self._by_id)

    def find(self, number: QuestionId, asked: str) -> Reference:
        """The right answer to a question.

        Args:
            number: The question's id.
            asked: Its text, among which the file's own may stand; empty if unknown.

        Raises:
            UserError: If there is none, or the file has another question of that id.
        """
        begins = asked.strip().split("\n")[0]
        found = self._by_image.get((str(number), folded(begins))) or self._by_id.get(str(number))
        if found is None:
            raise UserError(f"{self.path} has no answer to question {number!r}; give the answers to these questions")
        if asked and folded(found.question) not in folded(asked):
            raise UserError(
                f"question {number!r} is {begins[:60]!r}, but in {found.place}, it is {found.question[:60]!r}; give "
                "the answers to these questions"
            )
        return found


def _references(row: Row, metric: Metric) -> list[tuple[QuestionId, Reference]]:
    read = _READ[metric]
    if is_conversation(row):
        return [
            (number, Reference(row.place, read(row, {"answer": answer}), (), question))
            for number, question, answer in turns_of(row)
        ]
    question = row.fields.get("question", row.fields.get("text", ""))
    question = question.replace("<image>", "").strip() if isinstance(question, str) else ""
    return [(question_id(row), Reference(row.place, read(row, row.fields), _groups(row.fields), question))]


def _groups(fields: dict[str, Any]) -> tuple[str, ...]:
    """ScienceQA's subject, context and grade, as its authors report them; else POPE's category, VQAv2's answer type."""
    if "choices" not in fields:
        names = [fields.get("category"), fields.get("answer_type")]
        return tuple(str(name) for name in names if name and name != "default")
    names = [_SUBJECTS.get(str(fields.get("subject")))]
    if {"hint", "image"} & fields.keys():
        names += [name for name, key in (("TXT", "hint"), ("IMG", "image")) if fields.get(key)] or ["NO"]
    grade = str(fields.get("grade")).removeprefix("grade")
    if grade.isdecimal():
        names.append("G1-6" if int(grade) <= 6 else "G7-12")
    return tuple(name for name in names if name)


def _exact(row: Row, fields: dict[str, Any]) -> tuple[str, ...]:
    found = next((fields[name] for name in ("answers", "answer", "label") if fields.get(name) is not None), None)
    several = found if isinstance(found, list) else [found]
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in several]
    if not texts or not all(isinstance(text, str | int | float) for text in texts):
        raise UserError(f'{row.place}: "answer" is {found!r}; expected a text, or a list of them')
    return tuple(str(text) for text in texts)


def _humans(row: Row, fields: dict[str, Any]) -> tuple[str, ...]:
    found = _exact(row, fields)
    if len(found) < _LEAST_HUMANS:
        raise UserError(
            f"{row.place}: has {len(found)} of the ten humans' answers that metric vqa compares with, and "
            f"{_LEAST_HUMANS} are the least; use metric exact"
        )
    return found


def _yes(row: Row, fields: dict[str, Any]) -> bool:
    label = fields.get("label", fields.get("answer"))
    if not isinstance(label, str) or label.strip().lower() not in ("yes", "no"):
        raise UserError(f'{row.place}: "label" is {label!r}; metric pope expects yes or no')
    return label.strip().lower() == "yes"


def _choice(row: Row, fields: dict[str, Any]) -> Choice:
    answer, choices = fields.get("answer"), fields.get("choices", OPTIONS)
    options = len(choices) if isinstance(choices, list | str) else 0
    letter = OPTIONS[answer] if isinstance(answer, int) and 0 <= answer < len(OPTIONS) else answer
    if not isinstance(letter, str) or letter not in tuple(OPTIONS[:options]):
        raise UserError(
            f'{row.place}: "answer" is {answer!r} of {options} choices; metric scienceqa expects a letter, or the '
            "option's number from 0"
        )
    return Choice(letter, options)


_READ: dict[Metric, Callable[[Row, dict[str, Any]], Any]] = {
    "exact": _exact,
    "vqa": _humans,
    "pope": _yes,
    "scienceqa": _choice,
}
