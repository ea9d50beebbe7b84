"""Batches of conversations: tokens, images, and which loader deals them out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from dtpvit.datamodules.conversation_parts import Pieces, encode_apart, piece_of
from dtpvit.datamodules.conversations import Conversations, Skipped
from dtpvit.datamodules.image_places import read_place
from dtpvit.datamodules.labelled import check_batching
from dtpvit.datamodules.samples import SkippedSample, decode_image, sample_seed
from dtpvit.datamodules.scheduled import Schedule, Substituting
from dtpvit.datamodules.worker_signals import obey_parent_alone, started
from dtpvit.interop.chat import Chat
from dtpvit.interop.preprocessing import EvalTransform

__all__ = ["ConversationLoader", "ConversationSamples", "GroupedSchedule", "Tokenized"]

_MEGABATCH = 50  # batches that are sorted together, as in transformers


class Tokenized(NamedTuple):
    """One piece of a conversation, ready for its batch.

    Attributes:
        ids: Token ids, int64, shape (L,).
        supervised: bool, shape (L,).
        part: As of ``encode_apart``, int64, shape (L,); None where questions see those before them.
        images: uint8, shape (3, H, W) each.
        seeds: Of each image.
        record: Number in the data file.
    """

    ids: Tensor
    supervised: Tensor
    part: Tensor | None
    images: list[Tensor]
    seeds: list[int]
    record: int


class ConversationSamples(Substituting[Tokenized]):
    """Pieces of conversations, tokenized and with their images; picklable, one per worker.

    Args:
        conversations: What is read.
        chat: Turns to token ids.
        transform: Of the images.
        max_turns: Most questions of a piece; None leaves conversations whole.
        shuffle: Whether a conversation's questions are in another order in each epoch.
        apart: Whether each question is read as if it were the only one.
        seed: Of that order, and of the images' own seeds.
    """

    def __init__(
        self,
        conversations: Conversations,
        chat: Chat,
        transform: EvalTransform,
        *,
        max_turns: int | None = None,
        shuffle: bool = False,
        apart: bool = False,
        seed: int = 0,
    ) -> None:
        self.pieces = Pieces.of(conversations, max_turns)
        self.seed = seed
        self._conversations, self._chat, self._transform = conversations, chat, transform
        self._max_turns, self._shuffle, self._apart = max_turns, shuffle, apart

    def __len__(self) -> int:
        return len(self.pieces.record)

    def name(self, record: int) -> str:
        return f"record {self._conversations[self.pieces.record[record]].id} of {self._conversations.data}"

    def skipped(self, record: int, cause: str) -> Skipped:
        """For the report: the record that a piece is of, and its images."""
        conversation = self._conversations[self.pieces.record[record]]
        return Skipped(conversation.id, cause, ", ".join(dict.fromkeys(place.path for place in conversation.images)))

    def load(self, record: int, epoch: int, repeat: int = 0) -> Tokenized:
        index = int(self.pieces.record[record])
        conversation, number = self._conversations[index], int(self._conversations.number[index])
        shuffle = f"{self.seed}-{epoch}-{number}" if self._shuffle else None
        piece = piece_of(conversation, int(self.pieces.first[record]), self._max_turns, shuffle)
        part = None
        if self._apart:
            piece = piece.apart()
            ids, supervised, parts = encode_apart(self._chat, piece)
            part = torch.tensor(parts)
        else:
            ids, supervised = self._chat.encode(piece.turns)
        images = [self._transform(decode_image(read_place(conversation.images[image]))) for image in piece.images]
        key = f"{conversation.id}|{number}|{record}"
        seeds = [sample_seed(f"{key}|{image}", epoch, self.seed) for image in piece.images]
        return Tokenized(torch.tensor(ids), torch.tensor(supervised), part, images, seeds, number)

    def collate(self, items: Sequence[Tokenized]) -> dict[str, Tensor]:
        """{"image": uint8 (M, 3, H, W), "image_seed": int64 (M,), "ids": int64 (B, L), "supervised": bool (B, L),
        "length": int64 (B,), "record": int64 (B,)}, and with ``apart`` "part": int64 (B, L); M images in all, in order.
        """
        images = [image for item in items for image in item.images]
        height, width = self._transform.image_size
        batch = {
            "image": torch.stack(images) if images else torch.zeros(0, 3, height, width, dtype=torch.uint8),
            "image_seed": torch.tensor([seed for item in items for seed in item.seeds], dtype=torch.int64),
            "ids": pad_sequence([item.ids for item in items], True, self._chat.pad_id),
            "supervised": pad_sequence([item.supervised for item in items], True, False),
            "length": torch.tensor([len(item.ids) for item in items]),
            "record": torch.tensor([item.record for item in items]),
        }
        parts = [item.part for item in items if item.part is not None]
        return batch | ({"part": pad_sequence(parts, True, 0)} if parts else {})


@dataclass
class GroupedSchedule(Schedule):
    """Batches of like length, those of records with images and those of text apart.

    LLaVA-1.5's ``group_by_modality_length``, and as in transformers some batches are sorted together: the records are
    shuffled and cut into runs of 50 batches, each run is sorted from long to short, then the batches are shuffled. At
    most one batch has both kinds.
    """

    lengths: np.ndarray | None = None
    has_image: np.ndarray | None = None

    def order(self, shuffle: torch.Generator) -> np.ndarray:
        """The records in the order of an epoch; what fills no whole batch is at the end."""
        assert self.lengths is not None and self.has_image is not None
        whole = self.batch_size * self.world_size
        shuffled = torch.randperm(self.num_records, generator=shuffle).numpy()
        batches, rest = list[np.ndarray](), list[np.ndarray]()
        for kind in (True, False):
            records = shuffled[self.has_image[shuffled] == kind]
            used = len(records) // whole * whole
            rest.append(records[used:])
            for start in range(0, used, _MEGABATCH * whole):
                run = records[start : min(start + _MEGABATCH * whole, used)]
                run = run[np.argsort(-self.lengths[run], kind="stable")]
                batches += np.split(run, len(run) // whole)
        mixed = np.concatenate(rest)
        if len(mixed) >= whole:
            batches.append(mixed[:whole])
        order = torch.randperm(len(batches), generator=shuffle).tolist()
        return np.concatenate([batches[place] for place in order])


class ConversationLoader:
    """Every conversation once over all ranks, in order; broken ones are left out and counted.

    Not a DataLoader, on purpose: under a distributed strategy Lightning would put its own sampler into one,
    which splits the data a second time and pads it with repeats.

    Args:
        samples: What is read.
        batch_size: The last batch may be short.
        num_workers: Worker processes; 0 loads in this process.
        rank: This process among ``world_size``; it loads records ``rank, rank + world_size, ...``
        on_broken: Told of each record that cannot be used, and why, in this process.

    Attributes:
        skipped: Records that could not be read, counted since the current or last iteration began.
        broken: Which these were, the first hundred of them.
    """

    def __init__(
        self,
        samples: ConversationSamples,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        on_broken: Callable[[int, str], None] | None = None,
    ) -> None:
        check_batching(batch_size, num_workers)
        self.skipped = 0
        self.broken: list[str] = []
        self._samples, self._on_broken = samples, on_broken
        self._loader = DataLoader(
            _EachOnce(samples),
            batch_size=batch_size,
            sampler=range(rank, len(samples), world_size),
            num_workers=num_workers,
            worker_init_fn=obey_parent_alone,
            collate_fn=_Whole(samples),
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        """Batches of this rank; fewer come out only where every record of a batch is broken."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.skipped, self.broken = 0, []
        for batch, broken in started(self._loader):
            for record, cause in broken:
                self.skipped += 1
                self.broken = (self.broken + [self._samples.name(record)])[:100]
                if self._on_broken is not None:
                    self._on_broken(record, cause)
            if batch is not None:
                yield batch


class _EachOnce(Dataset[Any]):
    def __init__(self, samples: ConversationSamples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, record: int) -> Tokenized | tuple[int, str]:
        try:
            return self._samples.load(record, 0)
        except SkippedSample as skipped:
            return record, skipped.cause


class _Whole:
    def __init__(self, samples: ConversationSamples) -> None:
        self._samples = samples

    def __call__(
        self, items: list[Tokenized | tuple[int, str]]
    ) -> tuple[dict[str, Tensor] | None, list[tuple[int, str]]]:
        whole = [item for item in items if isinstance(item, Tokenized)]
        broken = [item for item in items if not isinstance(item, Tokenized)]
        return self._samples.collate(whole) if whole else None, broken
