"""The workers' half of the loader: a stream of batches in which every choice is reproducible.

Every random choice is a function of (seed, epoch, rank, logical worker) or of a sample's key, never of global
state. Batch ``b`` of a rank is always made by logical worker ``b % workers``. A resumed run drops from each
logical worker's stream what it had used, before decoding, and physical worker ``i`` plays logical worker
``(i + position) % workers``, for a DataLoader always asks its worker 0 first.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import count, islice
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dtpvit.datamodules.bad_share import Examples, Seen
from dtpvit.datamodules.samples import CAUSES, Skip, SkippedSample
from dtpvit.errors import UserError

__all__ = ["Recipe", "ShardStream", "shard_groups"]

Raw = TypeVar("Raw")
Sample = TypeVar("Sample")
_FOUND, _LOST, _TRIED, _USABLE = range(len(Seen._fields))
_logger = logging.getLogger(__name__)


class Recipe(Protocol[Raw, Sample]):
    """How a kind of sample is read, decoded and collated, as ``samples.ImageText`` does."""

    def read(self, shard: str, skip: Skip, /) -> Iterator[Raw]:
        """Undecoded samples of a shard; calls ``skip`` for what it leaves out."""
        ...

    def decode(self, raw: Raw, epoch: int, /) -> Sample:
        """A sample, or ``SkippedSample``."""
        ...

    def collate(self, samples: list[Sample], /) -> dict[str, Any]:
        """A batch."""
        ...


class ShardStream(IterableDataset[tuple[int, int, Any, list[tuple[str, str]]]], Generic[Raw, Sample]):
    """The part of the loader that lives in the workers: (logical worker, raw samples it has used, batch, bad samples).

    A batch that is a string is an error's sentence: raised here, a worker's traceback would bury it.
    ``steps`` batches of each rank make a training epoch; None is one pass over all samples, for evaluation. Of bad
    samples, causes and places, a few examples come along with the next batch. ``sizes`` are the samples that shards
    should have, where that is known: a damaged one has lost what it does not give.
    """

    control: Tensor  # int64, shared: epoch, position, salt, raw samples used by each logical worker
    skips: Tensor  # int64, shared: (workers, causes)
    seen: Tensor  # int64, shared: (workers, fields of bad_share.Seen)

    def __init__(
        self,
        shards: list[str],
        recipe: Recipe[Raw, Sample],
        batch_size: int,
        steps: int | None,
        shuffle_buffer: int,
        seed: int,
        rank: int,
        world_size: int,
        sizes: Mapping[str, int],
    ) -> None:
        self.shards = shards
        self.recipe = recipe
        self.batch_size = batch_size
        self.steps = steps
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.sizes = sizes

    def __iter__(self) -> Iterator[tuple[int, int, Any, list[tuple[str, str]]]]:
        info = get_worker_info()
        physical, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        self._skipped, self._seen = self.skips[physical].zero_(), self.seen[physical].zero_()
        self._examples = Examples()
        self._tried = self._usable = 0
        epoch, position, salt, *used = self.control.tolist()
        logical = (physical + position) % workers
        if self.steps is None:
            yield from self._batches(self._one_pass(logical, workers, 0, "eval"), 0, logical, 0)
            return
        # A fixed order is the same in every epoch.
        epoch = epoch if self.shuffle_buffer else 0
        raws = islice(self._endless(logical, workers, f"{epoch}-{salt}"), used[logical], None)
        mine = len(range(position + physical, self.steps, workers))
        try:
            yield from islice(self._batches(raws, epoch, logical, used[logical]), mine)
        except UserError as error:
            yield logical, 0, str(error), []

    def expected_batches(self, counts: list[int], workers: int) -> int:
        """Batches of this rank in evaluation if shard ``i`` holds ``counts[i]`` usable samples."""
        total = 0
        for worker in range(workers):
            group, groups, member, members = self._place(worker, workers)
            samples = len(range(member, sum(counts[group::groups]), members))
            total += -(-samples // self.batch_size)
        return total

    def _batches(
        self, raws: Iterator[Raw], epoch: int, logical: int, used: int
    ) -> Iterator[tuple[int, int, dict[str, Any], list[tuple[str, str]]]]:
        samples: list[Sample] = []
        for raw in raws:
            used += 1
            self._tried += 1
            self._seen[_TRIED] += 1
            try:
                samples.append(self.recipe.decode(raw, epoch))
                self._usable += 1
                self._seen[_USABLE] += 1
            except SkippedSample as skipped:
                self._skip(skipped.cause, getattr(raw, "key", ""))
                continue
            if len(samples) == self.batch_size:
                yield logical, used, self.recipe.collate(samples), self._examples.new()
                samples = []
        if samples:
            yield logical, used, self.recipe.collate(samples), self._examples.new()

    def _endless(self, worker: int, workers: int, salt: str) -> Iterator[Raw]:
        """Passes over this worker's samples, and then over those of the other groups, each shuffled anew.

        Raises:
            UserError: After passes over all groups of which no sample could be used.
        """
        useless, (_, groups, _, _) = 0, self._place(worker, workers)
        for number in count():
            self._tried = self._usable = found = 0
            for raw in self._one_pass(worker, workers, self.shuffle_buffer, f"{salt}-{number}", number):
                found += 1
                yield raw
            # A pass of which a resumed run dropped a part was not tried as a whole, and says nothing.
            useless = useless + 1 if not self._usable and self._tried == found else 0
            if useless == groups:
                raise UserError(self._nothing_usable())

    def _one_pass(self, worker: int, workers: int, buffer: int, salt: str, turn: int = 0) -> Iterator[Raw]:
        """This worker's share of its own group's samples, or of those of the group ``turn`` places on."""
        group, groups, member, members = self._place(worker, workers)
        shards = list(self.shards)
        if buffer:
            Random(f"{self.seed}-{salt}").shuffle(shards)
        mine = shards[(group + turn) % groups :: groups]
        # The members of a group all see what is wrong with a shard; one of them counts it.
        found = (raw for shard in mine for raw in self._read(shard, counts=member == 0))
        share = self._found(islice(found, member, None, members))
        if not buffer:
            return share
        return _shuffle(share, buffer, Random(f"{self.seed}-{salt}-{self.rank}-{worker}"))

    def _place(self, worker: int, workers: int) -> tuple[int, int, int, int]:
        """(group, number of groups, member, members) of a worker of this rank."""
        consumers = self.world_size * workers
        groups = shard_groups(len(self.shards), consumers)
        member, group = divmod(worker * self.world_size + self.rank, groups)
        return group, groups, member, consumers // groups

    def _read(self, shard: str, counts: bool) -> Iterator[Raw]:
        passed, whole = 0, True

        def skip(cause: str, where: str) -> None:
            nonlocal passed, whole
            whole = whole and cause != "unreadable shard"
            if counts:
                self._skip(cause, where)
                missing = self.sizes.get(shard, 0) - passed if cause == "unreadable shard" else 1
                self._seen[_LOST] += max(1, missing)
            passed += 1

        for raw in self.recipe.read(shard, skip):
            passed += 1
            yield raw
        if whole and passed < (promised := self.sizes.get(shard, 0)):
            where = f"{shard}: {passed:,} samples, {promised:,} by its _stats.json or sizes.json"
            _logger.warning("A shard is short: %s", where)
            skip("unreadable shard", where)

    def _found(self, raws: Iterator[Raw]) -> Iterator[Raw]:
        for raw in raws:
            self._seen[_FOUND] += 1
            yield raw

    def _skip(self, cause: str, where: str) -> None:
        self._skipped[CAUSES.index(cause)] += 1
        self._examples.add(cause, where)

    def _nothing_usable(self) -> str:
        counts = ", ".join(f"{cause}: {n}" for cause, n in zip(CAUSES, self._skipped.tolist(), strict=True) if n)
        return (
            f"No sample of {len(self.shards)} shards beginning with {self.shards[0]!r} could be used "
            f"({counts or 'none is complete'}); check how the shards were written."
        )


def shard_groups(num_shards: int, consumers: int) -> int:
    """Into how many groups the consumers (ranks x workers) are put.

    Groups share no shard; the members of a group read the same shards and take every n-th sample. There are
    as many groups as there can be while each has its share of the shards to within a tenth.

    >>> shard_groups(1000, 8), shard_groups(2, 8), shard_groups(9, 8)
    (8, 2, 1)
    """
    for members in range(1, consumers + 1):
        groups, rest = divmod(consumers, members)
        if rest == 0 and groups * -(-num_shards // groups) <= 1.1 * num_shards:
            return groups
    return 1


def _shuffle(items: Iterator[Raw], size: int, draw: Random) -> Iterator[Raw]:
    """A random order, but for items more than ``size`` apart; ``draw`` decides."""
    held: list[Raw] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = draw.randrange(size)
        yield held[place]
        held[place] = item
    draw.shuffle(held)
    yield from held
