"""Instruction data sets: which records can be used, why others cannot, and where their images lie."""

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dtpvit.datamodules.conversation_record import (
    BadRecord,
    Conversation,
    Question,
    image_names,
    parse_conversation,
    record_id,
)
from dtpvit.datamodules.image_places import ImagePlaces, Place, image_places, read_place
from dtpvit.datamodules.labelled_shards import IMAGES
from dtpvit.datamodules.samples import SkippedSample, sample_seed
from dtpvit.datamodules.shards import expand_shards
from dtpvit.datamodules.tars import BrokenTar, index_members, key_and_ending
from dtpvit.errors import UserError
from dtpvit.json_input import parse_json

__all__ = ["Conversations", "Skipped", "read_conversations"]

logger = logging.getLogger(__name__)
_Where = ImagePlaces | list[Place]


class Skipped(NamedTuple):
    """A record that cannot be used, and why."""

    record: str
    cause: str
    detail: str


class Conversations:
    """The usable records of a data set, in order.

    They are kept as bytes, for millions of small Python objects would be copied into every worker as they are counted.

    Args:
        data: The file or shards, as the user named them.
        records: Number in the file and content of each.
        skipped: The records that are left out.

    Attributes:
        data, skipped: As given.
        number: Each record's number in the file, from 0, int64, shape (n,).
        has_image: Which have images, bool, shape (n,).
        num_questions: Of each, int64, shape (n,).
        lengths: Characters of each question with its answer, record after record, int64.
    """

    def __init__(self, data: str, records: Iterable[tuple[int, Conversation]], skipped: list[Skipped]) -> None:
        self.data, self.skipped = data, skipped
        content, ends, lengths, figures = bytearray(), array("q"), array("q"), array("q")
        for number, conversation in records:
            content += conversation.dump()
            ends.append(len(content))
            lengths.extend(map(_length, conversation.questions))
            figures.extend((number, len(conversation.images), len(conversation.questions)))
        self.number, images, self.num_questions = np.array(figures, dtype=np.int64).reshape(-1, 3).T.copy()
        self.has_image = images > 0
        self.lengths = np.array(lengths, dtype=np.int64)
        self._content, self._ends = np.frombuffer(bytes(content), dtype=np.uint8), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, index: int) -> Conversation:
        start = self._ends[index - 1] if index else 0
        return Conversation.load(self._content[start : self._ends[index]].tobytes())

    def limited(self, count: int) -> "Conversations":
        """So many of the records; which ones depends on nothing but their names, and a larger count keeps these too."""
        keys = [sample_seed(f"{self[place].id}|{self.number[place]}", 0, 0) for place in range(len(self))]
        kept = sorted(np.argsort(keys, kind="stable")[:count].tolist())
        return Conversations(self.data, ((int(self.number[place]), self[place]) for place in kept), self.skipped)


def read_conversations(data: str, images: str | None = None) -> Conversations:
    """Read a ``.json`` list, a ``.jsonl`` file, or shards of ``key.json`` and ``key.jpg`` members.

    Everything that is cheap to find is found here: roles, turns, whether the images are there. A record that cannot be
    used is left out and counted.

    Args:
        data: A file, or a folder or list of shards, as of ``expand_shards``.
        images: A folder or a tar; None is the folder of the file. Not of shards, which have their images in them.

    Raises:
        UserError: If there is no such data, or no record can be used.
    """
    path = Path(data).expanduser()
    if path.suffix in (".json", ".jsonl"):
        source = _of_file(path, image_places(path.parent if images is None else images))
    elif images is None:
        source = _of_shards(data)
    else:
        raise UserError(f"images is {images}, but {data} is shards, which have their images in them: leave it out.")
    skipped = list[Skipped]()
    found = Conversations(data, _all_usable(source, path.name, skipped), skipped)
    if not len(found):
        such_as = f", such as {' '.join(skipped[0].detail.split())[:200]}" if skipped else ""
        raise UserError(
            f"{data} has no record that can be used ({_causes(skipped) or 'it is empty'}){such_as}: "
            "give conversations as LLaVA's, with their images; shards must be on this machine, and not compressed."
        )
    if skipped:
        logger.warning("%s: %d records cannot be used (%s)", data, len(skipped), _causes(skipped))
    return found


def _all_usable(
    source: Iterable[tuple[Any, _Where]], name: str, skipped: list[Skipped]
) -> Iterator[tuple[int, Conversation]]:
    for number, (record, places) in enumerate(tqdm(source, desc=name, delay=5, disable=None, leave=False)):
        called = record_id(record, number)
        try:
            yield number, _usable(record, called, places)
        except BadRecord as bad:
            skipped.append(Skipped(called, bad.cause, bad.detail))


def _usable(record: Any, name: str, places: _Where) -> Conversation:
    if isinstance(record, BadRecord):
        raise record
    names = image_names(record)
    # In shards an image belongs to the record that it lies beside, whatever that calls it.
    if isinstance(places, list):
        if len(places) < len(names):
            raise BadRecord("missing image", names[len(places)])
        return _whole(parse_conversation(record, name, places))
    found = list[Place]()
    for image in names:
        if (place := places.find(image)) is None:
            raise BadRecord("missing image", image)
        found.append(place)
    return _whole(parse_conversation(record, name, found))


def _whole(conversation: Conversation) -> Conversation:
    """The conversation, unless it asks about an image that the record has lost."""
    texts = [str(part).strip() for question in conversation.questions for part in question.asked]
    if not conversation.images and any(text.startswith("<image>") or text.endswith("<image>") for text in texts):
        raise BadRecord("missing image", "a place for an image, and no image")
    return conversation


def _of_file(path: Path, places: ImagePlaces) -> Iterator[tuple[Any, _Where]]:
    for record in _json_lines(path) if path.suffix == ".jsonl" else _json_list(path):
        yield record, places


def _json_list(path: Path) -> list[Any]:
    try:
        records = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a .json or .jsonl of conversations.") from None
    except ValueError as error:
        raise UserError(
            f"{path} is no JSON ({error}): end its name in .jsonl if it has a record on each line."
        ) from None
    if not isinstance(records, list):
        raise UserError(f"{path} holds a {type(records).__name__} where a list of conversations was expected.")
    return records


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield _json(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a .json or .jsonl of conversations.") from None


def _of_shards(data: str) -> Iterator[tuple[Any, _Where]]:
    for shard in expand_shards(data):
        try:
            yield from _of_shard(shard)
        except (BrokenTar, SkippedSample) as error:
            yield BadRecord("unreadable shard", str(error)), list[Place]()


def _of_shard(shard: str) -> Iterator[tuple[Any, list[Place]]]:
    """The records before the place where a damaged shard breaks, but for the last, which may be incomplete."""
    samples: dict[str, dict[str, Place]] = {}
    damage = None
    try:
        for name, offset, size in index_members(shard):
            key, ending = key_and_ending(name)
            samples.setdefault(key, {})[ending] = Place(shard, offset, size)
    except BrokenTar as error:
        damage = error
        if samples and key_and_ending(error.within)[0] in ("", next(reversed(samples))):
            samples.popitem()
    for parts in samples.values():
        if (record := parts.get("json")) is not None:
            images = sorted(ending for ending in parts if f".{ending}".endswith(IMAGES))
            yield _json(read_place(record)), [parts[ending] for ending in images]
    if damage is not None:
        raise damage


def _json(text: bytes) -> Any:
    """The record, or what is wrong with it."""
    try:
        return parse_json(text)
    except ValueError as error:
        return BadRecord("unreadable record", str(error))


def _causes(skipped: Sequence[Skipped]) -> str:
    return ", ".join(f"{cause}: {count}" for cause, count in Counter(one.cause for one in skipped).most_common())


def _length(question: Question) -> int:
    return len(question.answer) + sum(len(part) for part in question.asked if isinstance(part, str))
