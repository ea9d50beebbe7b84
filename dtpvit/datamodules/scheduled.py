"""A training loader of records that can be read one by one: in an order by seed and epoch, others for broken ones."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtpvit.datamodules.bad_share import Examples, Seen
from dtpvit.datamodules.resumable import Resumable
from dtpvit.datamodules.samples import SkippedSample, sample_seed
from dtpvit.datamodules.worker_signals import obey_parent_alone, started
from dtpvit.errors import UserError

__all__ = ["Draws", "Schedule", "ScheduledLoader", "Substituting"]

Item = TypeVar("Item")

_TRIES = 100


class Draws(NamedTuple):
    """A batch to be made: which records, and for the how manieth time each."""

    epoch: int
    records: list[int]
    repeats: list[int]


@dataclass
class Schedule(Sampler[Draws]):
    """What is to be in each batch of this rank, from a position on; the ranks take turns at an epoch's order."""

    num_records: int
    steps: int
    batch_size: int
    repeats: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    position: int = 0
    salt: int = 0

    def __iter__(self) -> Iterator[Draws]:
        shuffle = torch.Generator().manual_seed(sample_seed(f"order {self.salt}", self.epoch, self.seed))
        order = self.order(shuffle)
        whole = self.batch_size * self.world_size
        for step in range(self.position, self.steps):
            places = np.arange(step * whole + self.rank, (step + 1) * whole, self.world_size)
            yield Draws(self.epoch, order[places // self.repeats].tolist(), (places % self.repeats).tolist())

    def order(self, shuffle: torch.Generator) -> np.ndarray:
        """The records in the order of an epoch; what is beyond its last whole batch is left out."""
        return torch.randperm(self.num_records, generator=shuffle).numpy()


class Substituting(Dataset[tuple[Any, list[tuple[int, str]]]], ABC, Generic[Item]):
    """The part of the loader that lives in the workers: whole batches, and which records were broken on the way.

    A batch that is a string is an error's sentence: raised here, a worker's traceback would bury it.
    """

    unit = "records"
    seed: int

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abstractmethod
    def name(self, record: int) -> str:
        """The record, for the user."""

    @abstractmethod
    def load(self, record: int, epoch: int, repeat: int) -> Item:
        """The record, ready for its batch.

        Raises:
            SkippedSample: If it is broken.
        """

    @abstractmethod
    def collate(self, items: list[Item]) -> dict[str, Any]:
        """A batch."""

    def __getitem__(self, draws: Draws) -> tuple[Any, list[tuple[int, str]]]:
        broken: list[tuple[int, str]] = []
        try:
            items = [
                self._first_whole(record, repeat, draws.epoch, broken)
                for record, repeat in zip(draws.records, draws.repeats, strict=True)
            ]
        except UserError as error:
            return str(error), broken
        return self.collate(items), broken

    def _first_whole(self, record: int, repeat: int, epoch: int, broken: list[tuple[int, str]]) -> Item:
        """The record, or the first readable one of those that take its place."""
        others, wanted = Random(f"{self.seed}-{epoch}-{record}"), record
        for _ in range(_TRIES):
            try:
                return self.load(record, epoch, repeat)
            except SkippedSample as skipped:
                broken.append((record, skipped.cause))
            record = others.randrange(len(self))
        causes = ", ".join(f"{cause}: {count}" for cause, count in Counter(cause for _, cause in broken).items())
        raise UserError(
            f"Neither {self.name(wanted)} nor any of {_TRIES - 1} {self.unit} tried in its place could be used "
            f"({causes} in this batch); check that the images are whole and readable."
        )


class ScheduledLoader(Resumable):
    """Full batches, equally many on every rank, in an order that is a function of seed and epoch.

    In place of a record that cannot be read comes another of the data set, which one being a function of seed, epoch
    and the broken one. A resume is exact with any number of workers, if the layout is the same.

    Args:
        records: Reads and collates.
        schedule: Of this rank.
        num_workers: Worker processes; 0 loads in this process.
        fixed: Every epoch is as the first.
        layout: What must be the same for an exact continuation.
        max_skipped: Share of bad records above which whoever trains should stop; see ``bad_share``.
        on_broken: Told of each record that cannot be used, and why, in this process.

    Attributes:
        examples: Some of them: cause and place.
        skipped: Reads that failed since the present epoch's iteration began, by cause, on this rank.

    Raises:
        UserError: While iterating, if nothing can be read.
    """

    def __init__(
        self,
        records: Substituting[Any],
        schedule: Schedule,
        *,
        num_workers: int = 0,
        fixed: bool = False,
        layout: Mapping[str, int],
        max_skipped: float = 1.0,
        on_broken: Callable[[int, str], None] | None = None,
    ) -> None:
        self.batch_size, self.max_skipped = schedule.batch_size, max_skipped
        self.examples: list[tuple[str, str]] = []
        self.steps: int = schedule.steps
        self.skipped: dict[str, int] = {}
        self._delivered = 0
        self._fixed, self._name = fixed, records.name
        self._schedule = schedule
        self._known_layout = dict(layout)
        self._on_broken = on_broken
        self._start_epoch(0)
        self._loader = DataLoader(
            records,
            batch_size=None,
            sampler=schedule,
            num_workers=num_workers,
            worker_init_fn=obey_parent_alone,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: worker seeds drawn from the global one would change the model's randomness.
            generator=torch.Generator().manual_seed(schedule.seed),
        )

    def __len__(self) -> int:
        """Batches of this rank per epoch."""
        return self.steps

    @property
    def seen(self) -> Seen:
        """How many reads there were since the present epoch's iteration began, on this rank."""
        tried = self._delivered + sum(self.skipped.values())
        return Seen(found=tried, tried=tried, usable=self._delivered)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's batches, or after ``load_state_dict`` the rest of them.

        Nothing happens before the first batch is asked for: Lightning calls ``iter`` ahead of ``set_epoch``.
        """
        if not self._resuming:
            self._start_epoch(self._epoch)
        self._resuming = False
        skipped: Counter[str] = Counter()
        self.skipped, self._delivered = skipped, 0
        examples, self.examples = Examples(), []
        schedule = self._schedule
        schedule.epoch, schedule.position, schedule.salt = 0 if self._fixed else self._epoch, self._position, self._salt
        for batch, broken in started(self._loader):
            for record, cause in broken:
                skipped[cause] += 1
                examples.add(cause, self._name(record))
                if self._on_broken is not None:
                    self._on_broken(record, cause)
            self.examples += examples.new()
            if isinstance(batch, str):
                # Now, for the garbage collector may close their queues first and then wait for them in vain.
                self._stop_workers()
                raise UserError(batch)
            self._position += 1
            self._delivered += self.batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position in plain Python, the same on every rank."""
        return {"epoch": self._epoch, "position": self._position, "salt": self._salt, "layout": self._layout()}

    def _layout(self) -> dict[str, int]:
        return self._known_layout
