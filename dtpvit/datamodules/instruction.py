"""Conversations about images, to tune a visual language model on."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from dtpvit.datamodules.bad_share import Examples, Seen, check_max_skipped, too_many_bad
from dtpvit.datamodules.conversation_loader import ConversationLoader, ConversationSamples, GroupedSchedule
from dtpvit.datamodules.conversations import Conversations, read_conversations
from dtpvit.datamodules.labelled import check_batching
from dtpvit.datamodules.resumable import steps_per_epoch
from dtpvit.datamodules.scheduled import Schedule, ScheduledLoader
from dtpvit.datamodules.skipped_report import SkippedReport
from dtpvit.datamodules.trained_data import TrainedData
from dtpvit.errors import UserError
from dtpvit.interop.chat import Chat
from dtpvit.interop.preprocessing import EvalTransform, aspect_transform

__all__ = ["InstructionData"]

logger = logging.getLogger(__name__)


class InstructionData(TrainedData):
    """Trains on LLaVA's conversations, or ShareGPT's, in batches of B pieces of these with M images in all.

    {"image": uint8 (M, 3, H, W), in order of appearance; "image_seed": int64 (M,); "ids": int64 (B, L), padded on the
    right, ``IMAGE_ID`` at each image; "supervised": bool (B, L), what the assistant says; "length": int64 (B,);
    "record": int64 (B,), the record's number in its file; "part": int64 (B, L), only with ``independent_turns``}.

    Validation gives every conversation once, whole and in order. A record with a missing image, an unknown role or an
    empty answer is left out, and one whose image turns out to be broken is replaced by another; they are counted, and
    listed in ``report``.

    Args:
        train: A ``.json`` list or ``.jsonl`` file of records, or shards of ``key.json`` and ``key.jpg`` members.
        val: Records to validate on, likewise; None validates on nothing.
        images: A folder or an uncompressed tar that the images' names are of; None is the folder of the records' file.
        val_images: Likewise of ``val``; None is ``images``.
        batch_size: Per process.
        val_batch_size: Per process; None is ``batch_size``.
        num_workers: Loader processes per training process.
        chat: Turns to token ids; None asks the model (``chat``).
        image_size: Pixels, or (height, width); None asks the model (``image_size``).
        image_aspect: How images get their shape: ``pad`` (LLaVA-1.5's), ``crop`` or ``squash``; None asks the model.
        image_fill: Colour of the borders that ``pad`` makes; None asks the model (``image_fill``).
        group_by_length: Batches of like length, those with images and those without apart, as LLaVA-1.5's second stage.
        max_turns: Cut conversations into pieces of at most so many questions, each with its images; None leaves them
            whole.
        shuffle_turns: Draw the order of a conversation's questions anew in each epoch; for questions that do not refer
            to each other. The images stay with whichever comes first.
        independent_turns: Read each question as if it were the only one, behind images that all questions of a piece
            share; for questions that do not refer to each other.
        limit_train: Keep this many training records, always the same ones.
        seed: Of the order, and of the images' own seeds.
        report: File that lists the records that cannot be used; None is ``skipped.jsonl`` in the run's folder.
        max_skipped: Share of bad records above which the run stops: of the file, where it has 500, before any work
            starts, and of those with broken images, over all processes and as soon as 500 of an epoch's were read; 1
            never stops.
        get_data: Where the missing data is explained, for the error message ("see data/llava/README.md").
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        images: str | None = None,
        val_images: str | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        chat: Chat | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_aspect: str | None = None,
        image_fill: tuple[int, int, int] | None = None,
        group_by_length: bool = False,
        max_turns: int | None = None,
        shuffle_turns: bool = False,
        independent_turns: bool = False,
        limit_train: int | None = None,
        seed: int = 0,
        report: str | None = None,
        max_skipped: float = 0.1,
        get_data: str | None = None,
    ) -> None:
        super().__init__()
        check_batching(batch_size, num_workers)
        check_batching(batch_size if val_batch_size is None else val_batch_size, num_workers)
        for name, value in (("max_turns", max_turns), ("limit_train", limit_train)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give at least 1, or leave it out.")
        aspect_transform(32, image_aspect or "pad")
        self.train, self.val, self.images, self.val_images = train, val, images, val_images or images
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.chat, self.image_size = num_workers, chat, image_size
        self.image_aspect, self.image_fill = image_aspect, image_fill
        self.group_by_length, self.max_turns, self.shuffle_turns = group_by_length, max_turns, shuffle_turns
        self.independent_turns, self.limit_train = independent_turns, limit_train
        self.seed, self.report, self.get_data = seed, report, get_data
        self.max_skipped = check_max_skipped(max_skipped)
        self._train: Conversations | None = None
        self._val: Conversations | None = None
        self._skipped_report: SkippedReport | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the records and look for their images.

        Raises:
            UserError: If data is missing, or there is none for this stage, or no record can be used.
        """
        if stage == "fit" and self.train is None:
            raise UserError("There are no training records; set train to a .json or .jsonl of conversations.")
        if self.val is None and (stage in ("validate", "test", "predict") or self.train is None):
            raise UserError("There is nothing to evaluate on; set val to a .json or .jsonl of conversations.")
        with self._saying_where():
            if stage in ("fit", None) and self.train is not None:
                found = read_conversations(self.train, self.images)
                self._check_records(found)
                self._train = found if self.limit_train is None else found.limited(self.limit_train)
            if self.val is not None:
                self._val = read_conversations(self.val, self.val_images)
        self.chat = self._from_model("chat", self.chat)
        self.image_size = self._from_model("image_size", self.image_size)
        of_model = self._of_model("image_aspect")
        if self.image_aspect is not None and of_model not in (None, self.image_aspect):
            raise UserError(
                f"image_aspect of the data is {self.image_aspect} where the model's is {of_model}: leave it out of the "
                "data, for the model is asked."
            )
        self.image_aspect = self.image_aspect or of_model or "pad"
        self.image_fill = self._from_model("image_fill", self.image_fill)
        if self.val is None:
            logger.warning("no validation: val is not set")

    def train_dataloader(self) -> ScheduledLoader:
        """A loader that shuffles, resumes in mid-epoch, and gives all ranks equally many full batches."""
        assert self._train is not None
        options: dict[str, Any] = {"max_turns": self.max_turns, "shuffle": self.shuffle_turns}
        samples = self._samples(self._train, **options)
        count, world_size = len(samples), self._world_size
        steps = steps_per_epoch(count, self.batch_size, world_size)
        shared: dict[str, Any] = {"seed": self.seed, "rank": self._rank, "world_size": world_size}
        if self.group_by_length:
            pieces = samples.pieces
            shared |= {"lengths": pieces.lengths, "has_image": pieces.has_image}
        kind = GroupedSchedule if self.group_by_length else Schedule
        layout = {"batch_size": self.batch_size, "world_size": world_size, "num_records": count, "seed": self.seed}
        return ScheduledLoader(
            samples,
            kind(count, steps, self.batch_size, **shared),
            num_workers=self.num_workers,
            fixed=self._overfits,
            layout=layout
            | {name: int(getattr(self, name) or 0) for name in ("group_by_length", "shuffle_turns", "max_turns")},
            max_skipped=self.max_skipped,
            on_broken=self._listing(self._train, samples),
        )

    def val_dataloader(self) -> ConversationLoader | list[Any]:
        """Every conversation of ``val`` once over all ranks; no loader without ``val``."""
        if self._val is None:
            return []
        samples = self._samples(self._val)
        return ConversationLoader(
            samples,
            batch_size=self.val_batch_size,
            num_workers=self.num_workers,
            rank=self._rank,
            world_size=self._world_size,
            on_broken=self._listing(self._val, samples),
        )

    def test_dataloader(self) -> ConversationLoader | list[Any]:
        """The validation loader."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ConversationLoader | list[Any]:
        """The validation loader."""
        return self.val_dataloader()

    def _check_records(self, found: Conversations) -> None:
        """Every rank reads the same file, and comes to the same end."""
        causes = Counter(one.cause for one in found.skipped)
        examples = Examples()
        for one in found.skipped:
            examples.add(one.cause, f"record {one.record}, {one.detail}")
        seen = Seen(found=len(found), lost=len(found.skipped), tried=len(found), usable=len(found))
        if error := too_many_bad(seen, self.max_skipped, causes, examples.new()):
            raise error

    @property
    def _transform(self) -> EvalTransform:
        assert self.image_size is not None and self.image_aspect is not None and self.image_fill is not None
        return aspect_transform(self.image_size, self.image_aspect, self.image_fill)

    def _samples(self, conversations: Conversations, **options: Any) -> ConversationSamples:
        assert self.chat is not None
        return ConversationSamples(
            conversations, self.chat, self._transform, apart=self.independent_turns, seed=self.seed, **options
        )

    def _listing(self, conversations: Conversations, samples: ConversationSamples) -> Any:
        """Lists what was found to be unusable, and returns what lists the rest; nothing where there is no file for it.

        Not before there are loaders: a new run in an old run's folder first moves that one's files aside.
        """
        if self._skipped_report is None:
            fits = self.trainer is not None and self.trainer.state.fn == "fit"
            path = self.report or (f"{self.trainer.default_root_dir}/skipped.jsonl" if self.trainer and fits else None)
            if path is None:
                return None
            self._skipped_report = SkippedReport(Path(path).expanduser())
        report = self._skipped_report
        if self._rank == 0:
            report.add(conversations.data, conversations.skipped)
        return lambda record, cause: report.add(conversations.data, [samples.skipped(record, cause)])
