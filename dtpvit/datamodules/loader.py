"""A loader of tar shards that resumes exactly, in the middle of an epoch, with any number of workers."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from dtpvit.datamodules.bad_share import Seen
from dtpvit.datamodules.resumable import Resumable, steps_per_epoch
from dtpvit.datamodules.samples import CAUSES
from dtpvit.datamodules.shards import shard_counts, sum_counts
from dtpvit.datamodules.stream import Recipe, ShardStream
from dtpvit.datamodules.worker_signals import obey_parent_alone, started
from dtpvit.errors import UserError

__all__ = ["ResumableLoader"]

Raw = TypeVar("Raw")
Sample = TypeVar("Sample")
_FIELDS = 3  # of the stream's control tensor before the counts of the workers


class ResumableLoader(Resumable, Generic[Raw, Sample]):
    """Batches from tar shards, in a fixed number per epoch for training, or all samples once for evaluation.

    A resume is exact if batch size, ranks, workers, shuffle buffer, seed and number of shards and samples are the same.

    Args:
        shards: Paths or addresses, as ``expand_shards`` gives them.
        recipe: Reads, decodes and collates.
        batch_size: Per rank.
        num_workers: Worker processes; 0 loads in this process.
        train: Training gives every rank the same number of full batches, starting a worker's shards anew if
            broken samples leave too few; evaluation gives every sample once over all ranks and workers, the
            last batches being short, in a fixed order, always as epoch 0.
        num_samples: Samples per epoch over all ranks; None takes the sum of img2dataset's ``_stats.json``.
        shuffle_buffer: Undecoded samples held back for shuffling, per worker, in training; 0 makes every
            epoch the same, in the order of the shards.
        seed: Of shard order, shuffling and (through the recipe) augmentation.
        max_skipped: Share of bad samples above which whoever trains should stop; see ``bad_share``.
        rank, world_size: Of this process; never read from the environment.

    Attributes:
        examples: Some of the samples left out since the present epoch's iteration began: cause and place.

    Raises:
        UserError: If training cannot know the number of samples, or they do not fill one batch on every rank.
    """

    def __init__(
        self,
        shards: Sequence[str],
        recipe: Recipe[Raw, Sample],
        *,
        batch_size: int,
        num_workers: int = 0,
        train: bool = True,
        num_samples: int | None = None,
        shuffle_buffer: int = 2000,
        seed: int = 0,
        max_skipped: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size, self.max_skipped = batch_size, max_skipped
        self.examples: list[tuple[str, str]] = []
        counts = shard_counts(shards)
        self.num_samples = sum_counts(counts) if num_samples is None else num_samples
        self.steps = _steps(self.num_samples, len(shards), batch_size, world_size) if train else None
        self._consumers = max(1, num_workers)
        self._stream = ShardStream(
            list(shards),
            recipe,
            batch_size,
            self.steps,
            shuffle_buffer if train else 0,
            seed,
            rank,
            world_size,
            {shard: count for shard, count in zip(shards, counts, strict=True) if count is not None},
        )
        self._stream.control = torch.zeros(_FIELDS + self._consumers, dtype=torch.int64).share_memory_()
        self._stream.skips = torch.zeros(self._consumers, len(CAUSES), dtype=torch.int64).share_memory_()
        self._stream.seen = torch.zeros(self._consumers, len(Seen._fields), dtype=torch.int64).share_memory_()
        self._loader = DataLoader(
            self._stream,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=obey_parent_alone,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: worker seeds drawn from the global one would change the model's randomness.
            generator=torch.Generator().manual_seed(seed),
        )
        self._length = self._count_batches()
        self._start_epoch(0)

    def __len__(self) -> int:
        """Batches of this rank per epoch; in evaluation broken samples may leave fewer.

        Raises:
            TypeError: In evaluation, if a shard's number of samples is not known.
        """
        if self._length is None:
            raise TypeError("the number of samples is not known: a shard has no _stats.json")
        return self._length

    @property
    def skipped(self) -> dict[str, int]:
        """Samples left out since the present epoch's iteration began, by cause, over this rank's workers."""
        totals = self._stream.skips.sum(0).tolist()
        return {cause: number for cause, number in zip(CAUSES, totals, strict=True) if number}

    @property
    def seen(self) -> Seen:
        """How many samples were read since the present epoch's iteration began, over this rank's workers."""
        return Seen(*self._stream.seen.sum(0).tolist())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's batches, or after ``load_state_dict`` the rest of them.

        Nothing happens before the first batch is asked for: Lightning calls ``iter`` ahead of ``set_epoch``.
        """
        if not self._resuming:
            self._start_epoch(self._epoch)
        self._resuming = False
        control = [self._epoch, self._position, self._salt, *self._used]
        self._stream.control.copy_(torch.tensor(control, dtype=torch.int64))
        self.examples = []
        for logical, used, batch, bad in started(self._loader):
            self.examples += [(cause, where) for cause, where in bad]  # which a DataLoader hands over as lists
            if isinstance(batch, str):
                # Now, for the garbage collector may close their queues first and then wait for them in vain.
                self._stop_workers()
                raise UserError(batch)
            self._used[logical] = used
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position in plain Python.

        Distributed, all ranks must call this together, as Lightning does: each rank has its own count of
        samples used, which broken samples make unequal.
        """
        used = [list(self._used)]
        if self._stream.world_size > 1 and dist.is_available() and dist.is_initialized():
            used = [[0] * self._consumers for _ in range(dist.get_world_size())]
            dist.all_gather_object(used, list(self._used))
        return {
            "epoch": self._epoch,
            "position": self._position,
            "salt": self._salt,
            "used": used,
            "layout": self._layout(),
        }

    def _continues(self, state: dict[str, Any]) -> bool:
        used = state["used"]
        if super()._continues(state) and len(used) in (1, self._stream.world_size):
            self._used = list(used[self._stream.rank if len(used) > 1 else 0])
            return True
        return False

    def _count_batches(self) -> int | None:
        if self.steps is not None:
            return self.steps
        sizes, shards = self._stream.sizes, self._stream.shards
        if len(sizes) < len(shards):
            return None
        return self._stream.expected_batches([sizes[shard] for shard in shards], self._consumers)

    def _start_epoch(self, epoch: int) -> None:
        super()._start_epoch(epoch)
        self._used = [0] * self._consumers

    def _layout(self) -> dict[str, int | None]:
        stream = self._stream
        return {
            "num_samples": self.num_samples,  # by which other data of as many shards are known
            "batch_size": self.batch_size,
            "world_size": stream.world_size,
            "num_workers": self._loader.num_workers,
            "num_shards": len(stream.shards),
            "shuffle_buffer": stream.shuffle_buffer,
            "seed": stream.seed,
        }


def _steps(num_samples: int | None, num_shards: int, batch_size: int, world_size: int) -> int:
    """Batches per epoch on every rank."""
    if num_samples is None:
        raise UserError(
            f"The number of training samples is not known: not all of the {num_shards} shards have a "
            "_stats.json (an unfinished download has none); finish it or set num_samples."
        )
    return steps_per_epoch(num_samples, batch_size, world_size)
