"""Questions about images, and what training data answer to the same questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dtpvit.datamodules.conversation_record import BadRecord, parse_conversation
from dtpvit.errors import UserError
from dtpvit.evaluation.json_rows import Row, read_rows

__all__ = ["ImageQuestion", "Majority", "folded", "is_conversation", "question_id", "read_questions", "turns_of"]

QuestionId = str | int


@dataclass(frozen=True)
class ImageQuestion:
    """A question and the files of its images, none for one that is about text alone."""

    id: QuestionId
    text: str
    images: tuple[str, ...] = ()


def read_questions(path: str) -> list[ImageQuestion]:
    """Questions in LLaVA's form: ``question_id``, ``text`` and, where there is one, ``image``.

    Rows with ``conversations``, as in LLaVA's training files, are as many questions as they have turns.

    Args:
        path: See :func:`.read_rows`.

    Raises:
        UserError: If a row lacks its id or text, or two are the same question.
    """
    found, seen = list[ImageQuestion](), dict[tuple[str, str], str]()
    for row in read_rows(path):
        images = row.fields.get("image") or row.fields.get("images") or ()
        images = (images,) if isinstance(images, str) else images
        if not isinstance(images, list | tuple) or not all(isinstance(image, str) for image in images):
            raise UserError(f'{row.place}: "image" is {images!r}; expected the name of a file, or a list of them')
        for number, text in _asked(row):
            # TextVQA as LLaVA asks it names the image as question_id: several questions have the same.
            if (number_and_text := (str(number), text)) in seen:
                raise UserError(
                    f"{row.place}: asks question_id {number!r} again, after {seen[number_and_text]}; remove one of them"
                )
            seen[number_and_text] = row.place
            found.append(ImageQuestion(number, text, tuple(images)))
    return found


def _asked(row: Row) -> list[tuple[QuestionId, str]]:
    """Id and text of the questions of a row."""
    if is_conversation(row):
        return [(number, question) for number, question, _ in turns_of(row)]
    text = row.fields.get("text", row.fields.get("question"))
    if not isinstance(text, str) or not _unmarked(text):
        raise UserError(f'{row.place}: "text" is {text!r}; expected {{"question_id", "image", "text"}}')
    return [(question_id(row), _unmarked(text))]


def is_conversation(row: Row) -> bool:
    """Whether a row is in LLaVA's form for training."""
    return bool({"conversations", "messages"} & row.fields.keys())


def turns_of(row: Row) -> list[tuple[QuestionId, str, str]]:
    """Id, question and answer of each turn of a conversation; the ids of several turns are told apart by a number.

    Raises:
        UserError: If it is no conversation.
    """
    number = question_id(row)
    try:
        pairs = _question_answers(row)
    except BadRecord as error:
        raise UserError(f"{row.place}: {error.cause} ({error.detail}); expected a conversation as LLaVA's") from error
    if len(pairs) == 1:
        return [(number, *pairs[0])]
    return [(f"{number}/{turn}", *pair) for turn, pair in enumerate(pairs)]


def _question_answers(row: Row) -> list[tuple[str, str]]:
    # Without images to place, their marks stay in the text.
    found = parse_conversation(row.fields, "", ()).questions
    return [(_unmarked("".join(map(str, each.asked))), each.answer.strip()) for each in found]


def _unmarked(question: str) -> str:
    return question.replace("<image>", "").strip()


def question_id(row: Row) -> QuestionId:
    """What a row calls its question.

    Raises:
        UserError: If it does not.
    """
    number = row.fields.get("question_id", row.fields.get("id"))
    if isinstance(number, bool) or not isinstance(number, str | int):
        raise UserError(f'{row.place}: "question_id" is {number!r}; give each question a number or name of its own')
    return number


class Majority:
    """Who answers without looking: the most frequent answer of the training data to the same question.

    To questions that were never asked there, the most frequent of all; of equally frequent ones the first. Questions
    are the same whatever their case and spaces. Records that cannot be trained on are left out.

    Args:
        path: Training data in LLaVA's form, see :func:`.parse_conversation`.

    Raises:
        UserError: If it has no answers.
    """

    def __init__(self, path: str) -> None:
        pairs = [pair for row in read_rows(path) for pair in _trainable(row)]
        if not pairs:
            raise UserError(f"{path} has no question with an answer; give training data in LLaVA's form")
        self._of_question = dict[str, Counter[str]]()
        for question, answer in pairs:
            self._of_question.setdefault(folded(question), Counter())[answer] += 1
        self._of_all = Counter(answer for _, answer in pairs)

    def answer(self, question: str) -> str:
        """The most frequent answer to a question."""
        return self._of_question.get(folded(question), self._of_all).most_common(1)[0][0]


def _trainable(row: Row) -> list[tuple[str, str]]:
    try:
        return _question_answers(row)
    except BadRecord:
        return []


def folded(question: str) -> str:
    """A question whatever its case and spaces."""
    return " ".join(question.lower().split())
