"""What ``dtpvit tune`` is: the command line of ``fit``, with Lightning's tuner in place of the training."""

import logging
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from dtpvit._trainer_cli import TrainerCLI
from dtpvit.errors import UserError
from dtpvit.tasks.batch_finder import BatchSizes, Tried, find_batch_size
from dtpvit.tasks.rate_curve import RateCurve
from dtpvit.tasks.rate_finder import check_sweep, find_learning_rate, rate_name
from dtpvit.tasks.trials import TRIAL

__all__ = ["TuneCLI", "TuningTrainer"]


class TuningTrainer(Trainer):
    """A trainer that looks for the settings of a training in place of training."""

    def tune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        find: Literal["lr", "batch_size", "both"] = "lr",
        min_lr: float = 1e-7,
        max_lr: float = 1.0,
        num_training: int = 100,
        max_batch_size: int = 1024,
        steps_per_trial: int = 10,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Find a learning rate by a range test, or a batch size by trying powers of two; nothing is trained.

        Writes ``learning_rate.csv`` and ``.png``, or ``batch_size.csv``, to the folder ``tune`` of the run.

        Args:
            model: The task; it stays as it is.
            datamodule: Its data.
            find: What to find; "both" looks for the learning rate at the batch size that it found.
            min_lr: Learning rate that the range test begins with; it rises exponentially.
            max_lr: Learning rate that it ends with, unless the loss explodes before.
            num_training: Optimizer steps of the range test.
            max_batch_size: The largest to try. On a CPU, where nothing says when memory runs out, the search also ends
                when two doublings brought less than 5 % each.
            steps_per_trial: Batches to time of each size.
            ckpt_path: None; the config that a run of ``fit`` has saved says so.
            weights_only: Not used; likewise.
        """
        if ckpt_path is not None:
            raise UserError(f"tune begins where a run does, and ckpt_path is {ckpt_path!r}; give weights with --init.")
        folder = Path(self.default_root_dir) / "tune"
        if find != "batch_size":
            check_sweep(model, min_lr, max_lr, num_training)
        if find != "lr":
            if datamodule is None:
                raise UserError("a batch size is found for a data module; give the config one under data.")
            sizes = find_batch_size(
                self,
                model,
                datamodule,
                max_batch_size=max_batch_size,
                steps_per_trial=steps_per_trial,
                report=_say_tried,
            )
            _say_batch_size(sizes, getattr(model, "learns_from_batch", False), folder)
            if find == "both":
                datamodule.batch_size = sizes.suggestion  # pyright: ignore[reportAttributeAccessIssue]
        if find != "batch_size":
            curve = find_learning_rate(self, model, datamodule, min_lr=min_lr, max_lr=max_lr, num_training=num_training)
            _say_learning_rate(curve, rate_name(model), folder)


class TuneCLI(TrainerCLI):
    """Parses and builds what ``fit`` would, and tunes it; all the work happens in the constructor.

    Args:
        args: The arguments after the command.
    """

    def __init__(self, args: list[str]) -> None:
        handlers, once = logging.getLogger("dtpvit").handlers, _Once()
        for handler in handlers:
            handler.addFilter(once)
        try:
            super().__init__("tune", args, trainer_class=TuningTrainer)
        finally:
            for handler in handlers:
                handler.removeFilter(once)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The method of our trainer."""
        return {"tune": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a trainer that validates nothing and ends when the tuner says so."""
        return super().instantiate_trainer(**{**kwargs, **TRIAL})


class _Once(logging.Filter):
    """Lets every message pass once: each trial sets task and data up anew, and would say the same again."""

    def __init__(self) -> None:
        super().__init__()
        self._said = set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new


@rank_zero_only
def _say_tried(tried: Tried) -> None:
    speed = "out of memory" if tried.speed is None else f"{tried.speed:.1f} images/s"
    print(f"batch size {tried.batch_size:>4}: {speed:>15}, peak memory {tried.memory:.0f} MiB", flush=True)


@rank_zero_only
def _say_batch_size(sizes: BatchSizes, learns_from_batch: bool, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes.write(folder / "batch_size.csv")
    print(f"No larger size was tried: {sizes.ended_by}")
    print(
        f"Suggested: --data.init_args.batch_size {sizes.suggestion}, the smallest within 5 % of the most images/s; "
        f"the largest that fitted is {sizes.largest}.\n"
        "A learning rate belongs to a batch size. With another, find it anew (--find both does), or scale it: in "
        "proportion for SGD, by the square root for Adam."
    )
    if learns_from_batch:
        print(
            "The other pairs of a batch are what this loss learns from: its value and the model change with the size, "
            "and a larger one is usually better. Beyond memory there is --model.init_args.accum_freq."
        )
    print(f"Wrote {folder / 'batch_size.csv'}")


@rank_zero_only
def _say_learning_rate(curve: RateCurve, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "learning_rate.csv", folder / "learning_rate.png"
    curve.write(table)
    if curve.suggestion is None:
        print(
            f"No suggestion: between {curve.rates[0]:.1e} and {curve.rates[-1]:.1e} the loss falls by no more than "
            "batches differ; give more steps (--num_training), a larger batch or another range (--min_lr, --max_lr)."
        )
    else:
        print(
            f"Suggested: --model.init_args.{name} {curve.suggestion:.1e}, where the loss falls most steeply; it is "
            f"lowest at {curve.lowest:.1e}."
        )
    try:
        curve.draw(picture)
        print(f"Wrote {table} and {picture.name}")
    except ImportError:
        print(f"Wrote {table}; for the picture too, pip install dtpvit[plot].")
