"""One record of an instruction data set, in LLaVA's form or ShareGPT's: turns, and the places of images in them."""

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from dtpvit.datamodules.image_places import Place
from dtpvit.interop.chat import Role

__all__ = ["BadRecord", "Conversation", "Part", "Question", "image_names", "parse_conversation", "record_id"]

Part = str | int
"""Text, or the number of one of the record's images."""

_ROLES: dict[Any, Role] = {
    **{"human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant"},
    "system": "system",
}
_IMAGE = re.compile("(<image>)")


class BadRecord(Exception):
    """This record cannot be used.

    Attributes:
        cause: A few words, to be counted by.
        detail: What was found.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.cause, self.detail = cause, detail


@dataclass(frozen=True)
class Question:
    """A question and its answer."""

    asked: tuple[Part, ...]
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A record that can be used.

    Attributes:
        id: The record's own name, or its number in the file.
        images: Where its images lie.
        system: What the system says before all else, if anything.
        questions: At least one.
    """

    id: str
    images: tuple[Place, ...]
    system: str | None
    questions: tuple[Question, ...]

    def dump(self) -> bytes:
        """Compact, for ``load``."""
        questions = [[list(question.asked), question.answer] for question in self.questions]
        return json.dumps([self.id, self.images, self.system, questions]).encode()

    @staticmethod
    def load(data: bytes) -> "Conversation":
        """What ``dump`` made."""
        name, images, system, questions = json.loads(data)
        places = tuple(Place(*place) for place in images)
        return Conversation(name, places, system, tuple(Question(tuple(asked), answer) for asked, answer in questions))


def record_id(record: Any, number: int) -> str:
    """The record's own name, else its number in the file."""
    name = record.get("id") if isinstance(record, dict) else None
    # Half a surrogate pair, which JSON can hold, is no text that can be hashed.
    return str(number) if name is None else str(name).encode("utf-8", "replace").decode()


def image_names(record: Any) -> list[str]:
    """What a record calls its images, in order: ``image``, one or a list, or ``images``.

    Raises:
        BadRecord: If these are no names.
    """
    if not isinstance(record, dict):
        raise BadRecord("unreadable record", f"a {type(record).__name__} where an object was expected")
    found = record.get("image") or record.get("images") or []
    names = found if isinstance(found, list) else [found]
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("unreadable record", f"images are {reprlib.repr(found)}")
    return names


def parse_conversation(record: Any, name: str, images: Sequence[Place]) -> Conversation:
    """The turns of ``conversations`` (``from``, ``value``) or ``messages`` (``role``, ``content``), in pairs.

    The first ``<image>`` in what the user says, as many as there are images, are the images' places; others are text.
    Images without any place stand in front of the first question.

    Raises:
        BadRecord: If the turns are not questions and answers in turn, or an answer is empty.
    """
    turns = _turns(record)
    system = None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    if not turns:
        raise BadRecord("no answer", "no turns")
    for place, (role, text) in enumerate(turns):
        if role == "system":
            raise BadRecord("turns out of order", "the system speaks between others")
        if role != ("user", "assistant")[place % 2]:
            cause = "answer before question" if place == 0 else "turns out of order"
            raise BadRecord(cause, f"turn {place + 1} is the {role}'s")
        if role == "assistant" and not text.strip():
            raise BadRecord("empty answer", f"turn {place + 1}")
    if len(turns) % 2:
        raise BadRecord("no answer", f"turn {len(turns)} has none")
    asked = _placed([text for role, text in turns if role == "user"], len(images))
    answers = [text for role, text in turns if role == "assistant"]
    return Conversation(name, tuple(images), system, tuple(map(Question, asked, answers)))


def _turns(record: Any) -> list[tuple[Role, str]]:
    found, who, what = record.get("conversations"), "from", "value"
    if found is None:
        found, who, what = record.get("messages"), "role", "content"
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise BadRecord("unreadable record", "no list of conversations or messages")
    turns = []
    for turn in found:
        role, text = turn.get(who), turn.get(what)
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRecord("unknown role", f"{who} is {reprlib.repr(role)}")
        if not isinstance(text, str) and not (text is None and _ROLES[role] == "assistant"):
            raise BadRecord("unreadable record", f"{what} is a {type(text).__name__} where text was expected")
        turns.append((_ROLES[role], text or ""))
    return turns


def _placed(asked: list[str], num_images: int) -> list[tuple[Part, ...]]:
    """Questions cut at the places of the images."""
    placed, used = [], 0
    for text in asked:
        parts: list[Part] = []
        for piece in _IMAGE.split(text):
            if piece == "<image>" and used < num_images:
                parts.append(used)
                used += 1
            elif piece and parts and isinstance(parts[-1], str):
                parts[-1] = cast("str", parts[-1]) + piece
            elif piece:
                parts.append(piece)
        placed.append(tuple(parts))
    if used == 0 and num_images:
        placed[0] = (*range(num_images), f"\n{asked[0]}")
    elif used < num_images:
        raise BadRecord("fewer places than images", f"{used} <image> for {num_images} images")
    return placed
