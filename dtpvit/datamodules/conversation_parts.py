"""Long conversations in pieces, their questions in another order, and the turns that come of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from dtpvit.datamodules.conversation_record import Conversation, Part, Question
from dtpvit.datamodules.conversations import Conversations
from dtpvit.interop.chat import IMAGE_ID, Chat, Turn

__all__ = ["Piece", "Pieces", "encode_apart", "piece_of"]


@dataclass(frozen=True)
class Piece:
    """Some questions of a conversation.

    Attributes:
        system: What the system says.
        lead: Images in front of the first question: those of questions that come before the piece, and with
            shuffled questions those of the first.
        questions: At least one.
    """

    system: str | None
    lead: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def images(self) -> list[int]:
        """Numbers of the images in the order in which they are seen."""
        return [*self.lead, *(part for one in self.questions for part in one.asked if isinstance(part, int))]

    @property
    def turns(self) -> list[Turn]:
        """What is said, in order."""
        first, *rest = self.questions
        lead = Question((*self.lead, *_on_a_new_line(first.asked)), first.answer) if self.lead else first
        return [*_system(self.system), *(turn for one in (lead, *rest) for turn in _turns(one))]

    def apart(self) -> "Piece":
        """The same with the first question's images in front of all questions."""
        images, first = _without_images(self.questions[0])
        return Piece(self.system, (*self.lead, *images), (first, *self.questions[1:]))


class Pieces(NamedTuple):
    """Every piece of every conversation of a data set.

    Attributes:
        record: Which conversation, int64, shape (n,).
        first: Its first question there, int64, shape (n,).
        lengths: Characters of its text, int64, shape (n,).
        has_image: bool, shape (n,).
    """

    record: np.ndarray
    first: np.ndarray
    lengths: np.ndarray
    has_image: np.ndarray

    @staticmethod
    def of(conversations: Conversations, max_turns: int | None) -> "Pieces":
        """Pieces of at most so many questions; None leaves the conversations whole."""
        counts = conversations.num_questions
        parts = np.ones_like(counts) if max_turns is None else -(-counts // max_turns)
        record = np.repeat(np.arange(len(counts)), parts)
        within = np.arange(len(record)) - np.repeat(np.cumsum(parts) - parts, parts)
        first = within * (max_turns or 0)
        starts = (np.cumsum(counts) - counts)[record] + first
        lengths = np.add.reduceat(conversations.lengths, starts)
        return Pieces(record, first, lengths, conversations.has_image[record])


def piece_of(conversation: Conversation, first: int = 0, count: int | None = None, shuffle: str | None = None) -> Piece:
    """Question ``first`` and the next, ``count`` in all.

    Args:
        conversation: Whole.
        first: From 0.
        count: None is all that follow.
        shuffle: Draws the order of the questions, before the piece is cut out.
    """
    questions, lead = list(conversation.questions), list[int]()
    if shuffle is not None:
        lead, questions[0] = _without_images(questions[0])
        Random(shuffle).shuffle(questions)
    lead += [part for question in questions[:first] for part in question.asked if isinstance(part, int)]
    chosen = questions[first:] if count is None else questions[first : first + count]
    return Piece(conversation.system, tuple(lead), tuple(chosen))


def encode_apart(chat: Chat, piece: Piece) -> tuple[list[int], list[bool], list[int]]:
    """Each question as if it were the only one, behind images that all share.

    Returns:
        Token ids, which are supervised, and the part of each token: 0 for what is shared (up to the last of the images
        in front), then 1 for the first question, 2 for the second, ...
    """
    ids, supervised, part = list[int](), list[bool](), list[int]()
    for number, question in enumerate(piece.questions, 1):
        alone = chat.encode(Piece(piece.system, piece.lead, (question,)).turns)
        images = [place for place, token in enumerate(alone.ids) if token == IMAGE_ID]
        shared = images[len(piece.lead) - 1] + 1 if piece.lead else 0
        start = 0 if number == 1 else shared
        ids += alone.ids[start:]
        supervised += alone.supervised[start:]
        part += [0] * (shared - start) + [number] * (len(alone.ids) - shared)
    return ids, supervised, part


def _turns(question: Question) -> list[Turn]:
    asked = tuple(None if isinstance(part, int) else part for part in question.asked)
    return [Turn("user", asked), Turn("assistant", (question.answer,))]


def _system(text: str | None) -> list[Turn]:
    return [] if text is None else [Turn("system", (text,))]


def _without_images(question: Question) -> tuple[list[int], Question]:
    images = [part for part in question.asked if isinstance(part, int)]
    text = "".join(part for part in question.asked if isinstance(part, str))
    return images, Question((text.strip("\n"),) if images else question.asked, question.answer)


def _on_a_new_line(asked: Sequence[Part]) -> Iterable[Part]:
    """As LLaVA has it, the text stands on the line below the images."""
    begins_so = bool(asked) and isinstance(asked[0], str) and asked[0].startswith("\n")
    return asked if begins_so else ("\n", *asked)
