"""What ``dtpvit fit|validate|test|predict`` is: LightningCLI with this project's defaults."""

import logging
import os
import pydoc
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ProgressBar,
    RichProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision, TorchCheckpointIO

from dtpvit import __version__
from dtpvit._launcher import started_processes
from dtpvit._merged_options import parse_merged
from dtpvit._run_folder import LineProgress, RunCheckpoint, RunLogger, SaveRun, StepSeed
from dtpvit._run_start import goes_on_by_itself
from dtpvit._shorthands import naming_file
from dtpvit.errors import UserError, chain, unwritten
from dtpvit.tasks.checkpoint_check import check_checkpoint
from dtpvit.tasks.checkpoint_file import CheckpointFiles, last_good, whole_checkpoints
from dtpvit.tasks.efficiency import EfficiencyMonitor
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.loss_watch import LossWatch
from dtpvit.tasks.preemption import Preemption

__all__ = ["TrainerCLI"]

logger = logging.getLogger(__name__)


class TrainerCLI(LightningCLI):
    """Parses, builds and runs one of the Trainer's methods; all the work happens in the constructor.

    A run lives in ``runs/<name>``: ``config.yaml``, ``metrics.csv``, ``efficiency.csv``, ``checkpoints/last.ckpt``. The
    name is ``--name``, or that of the last config file that sets more than the trainer;
    ``--trainer.default_root_dir`` puts it elsewhere.

    Args:
        command: A method of the trainer: ``fit``, ``validate``, ``test`` or ``predict``.
        args: The arguments after the command.
        trainer_class: Which trainer.
    """

    def __init__(self, command: str, args: list[str], trainer_class: type[Trainer] = Trainer) -> None:
        self._command = command
        self._say_less()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRun if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            trainer_class=trainer_class,
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "prog": "dtpvit", command: {"exit_on_error": False}},
            args=[command, *args],
        )

    @staticmethod
    def _say_less() -> None:
        """Leave Lightning's tips and hardware tables out: one line of ours says where and how."""
        if os.environ.get("DTPVIT_DEBUG", "0") in ("", "0"):
            for library in ("lightning.pytorch", "lightning.fabric"):
                logging.getLogger(library).setLevel(logging.WARNING)
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            warnings.filterwarnings("ignore", message="The dirpath has changed from")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command asked for: building the parsers of all four takes four times as long."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and the checkpoint callback, whose settings are thus open to a YAML."""
        parser.add_argument("--name", type=str | None, default=None, help="The run's folder: runs/NAME.")
        parser.add_argument(
            "--efficiency",
            type=bool,
            default=True,
            help="In fit, measure time, waiting for data, memory and tokens of each epoch (efficiency.csv).",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.filename": "epoch{epoch:03d}-step{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without the warning that sys.argv exists too: that is where ``args`` come from."""
        assert isinstance(args, list)
        self.config = parse_merged(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the command line and the YAML decide, not the checkpoint's hyper-parameters."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; a full disk ends a training in one sentence, whichever file met it."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            what = unwritten(error)
            if what is None or subcommand != "fit" or any(isinstance(link, UserError) for link in chain(error)):
                raise
            folder = Path(self._get(self.config, "checkpoint").dirpath)
            raise UserError(f"{what}; {last_good(folder)}") from error

    def before_instantiate_classes(self) -> None:
        """Settle the run's name, folder and precision, and refuse a checkpoint that is not there."""
        config = self.config[self._command]
        config.name = config.name or naming_file([str(path) for path in config.get("config") or []]).stem
        self.folder = Path(config.trainer.default_root_dir or Path("runs") / config.name)
        if (started := started_processes()) is not None:
            config.trainer.devices = started[0] if config.trainer.devices == "auto" else config.trainer.devices
            config.trainer.num_nodes = started[1] if config.trainer.num_nodes == 1 else config.trainer.num_nodes
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(self.folder / "checkpoints")
        plugin = _precision_plugin(config.trainer.plugins)
        if plugin is None:
            config.trainer.precision = config.trainer.precision or default_precision(config.trainer.accelerator)
        if config.get("weights_only") is None and "weights_only" in config:
            config.weights_only = True
        fresh = self._command == "fit" and config.get("ckpt_path") is None
        if fresh and goes_on_by_itself(self.folder / "versions.json"):
            config.ckpt_path = "last"
        self._checkpoint = self._find_checkpoint(config.get("ckpt_path"), Path(config.checkpoint.dirpath))
        if config.get("ckpt_path") == "last" and self._checkpoint is None:
            logger.info("no last.ckpt in %s yet: the run begins", config.checkpoint.dirpath)
            config.ckpt_path = None
        self._resuming = self._continues(config.get("ckpt_path"))
        if self._resuming and self._checkpoint is not None:
            config.ckpt_path = str(self._checkpoint)
        self._check_init(config)
        if rank_zero_only.rank == 0:
            writes = self._command == "tune" or (self._command == "fit" and not config.trainer.fast_dev_run)
            where = f"-> {self.folder}" if writes else f"of {config.name}"
            where += "" if self._checkpoint is None else f" from {self._checkpoint}"
            print(
                f"dtpvit {__version__}: {self._command} {where} ({plugin or config.trainer.precision})", file=sys.stderr
            )

    def _find_checkpoint(self, path: str | None, folder: Path) -> Path | None:
        """The file behind ``--ckpt_path``, where there is one; raises UserError if it leads nowhere."""
        if path is None or _is_lightnings(path):
            return None
        if path == "last":
            there = [file for file in folder.glob("last*.ckpt") if file.exists()]
            found = max(there, key=lambda file: file.stat().st_mtime, default=None)
            if found is None:  # a kill before the first of that name, or between the removal of what it links to and it
                found = next(whole_checkpoints(folder), None)
            if found is None and self._command != "fit":
                raise UserError(
                    f"--ckpt_path last found no last.ckpt in {folder}; train this run first or give a file."
                )
            return found
        if not Path(path).exists():
            raise UserError(f"--ckpt_path names {path!r}, which does not exist; give a checkpoint or `last`.")
        return Path(path)

    def _continues(self, path: str | None) -> bool:
        """Whether this run continues what its folder holds."""
        if path is None or path == "last" or _is_lightnings(path):
            return path is not None
        return Path(path).resolve().is_relative_to(self.folder.resolve())

    def _check_init(self, config: Any) -> None:
        """A fresh run sets aside what its folder held before; it must not start from a file in there."""
        init = (config.model.get("init_args") or {}).get("init")
        inside = isinstance(init, str) and Path(init).resolve().is_relative_to(self.folder.resolve())
        if self._command == "fit" and not self._resuming and inside:
            raise UserError(
                f"{config.name!r} would start from {init}, in its own folder, which a fresh run sets aside; "
                "give the new run another --name, or continue the old one with --ckpt_path last."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer; where none was given, with our logger, learning-rate record and progress."""
        given = self._get(self.config_init, "trainer")
        callbacks: list[Callback] = given.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        logger = given.logger
        if logger in (None, True):
            logger = self._command == "fit" and RunLogger(self.folder, append=self._resuming)
        if logger and self._command == "fit" and not given.fast_dev_run:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        measured = any(isinstance(callback, EfficiencyMonitor) for callback in callbacks)
        if self._get(self.config, "efficiency") and self._command == "fit" and not (measured or given.fast_dev_run):
            callbacks.append(EfficiencyMonitor())
        if self._command == "fit" and not any(isinstance(callback, LossWatch) for callback in callbacks):
            callbacks.append(LossWatch())
        if isinstance(seed := self._get(self.config, "seed_everything"), int):
            callbacks.append(StepSeed(seed))
        if self._command == "fit" and not given.fast_dev_run:
            callbacks.append(Preemption())
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if not has_bar and given.enable_progress_bar is not False:
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else LineProgress())
        self.save_config_kwargs["fresh"] = not self._resuming
        self.save_config_kwargs["folder"] = self.folder
        if given.fast_dev_run:
            self.save_config_callback = None
        kwargs |= {"logger": logger, "callbacks": callbacks, "default_root_dir": str(self.folder)}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:  # an accelerator or strategy of that name, say, does not exist
            raise UserError(f"the trainer's settings cannot be used: {error}") from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # none was chosen in the config
            trainer.strategy.checkpoint_io = CheckpointFiles()
        return trainer

    def before_fit(self) -> None:
        """Refuse a checkpoint that does not fit, before data are looked for."""
        path = self._checkpoint
        if path is None or self._get(self.config, "weights_only") is False:
            return
        if not any((path / part).exists() for part in ("meta.pt", "checkpoint")):  # FSDP's and DeepSpeed's folders
            check_checkpoint(path, self.model)

    def before_validate(self) -> None:
        """The same; without a checkpoint, evaluate the weights that a training would start from, and say so."""
        self.before_fit()
        if isinstance(self.model, ImageTask) and self._get(self.config, "ckpt_path") is None:
            init = self.model.hparams["init"]
            what = "the model has random weights" if init is None else f"the model starts from {init}"
            logger.warning("no --ckpt_path was given: %s", what)
            self.model.start_from_init()

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Say where the weights are."""
        callback = self.trainer.checkpoint_callback
        path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        if path and Path(path).exists() and rank_zero_only.rank == 0:
            print(f"dtpvit: wrote {os.path.relpath(path)}", file=sys.stderr)


def _is_lightnings(path: str) -> bool:
    """Whether a checkpoint is one that only Lightning can find, or that lies on another machine."""
    return path in ("best", "hpc") or "://" in path or path.startswith("registry")


def _precision_plugin(plugins: Any) -> str | None:
    """Name of the class among the config's plugins that decides the precision, which may then not be given too."""
    entries = plugins if isinstance(plugins, list) else [plugins]
    paths = [entry if isinstance(entry, str) else entry.get("class_path") for entry in entries if entry is not None]
    found = [pydoc.locate(path) for path in paths if isinstance(path, str)]
    named = [kind.__name__ for kind in found if isinstance(kind, type) and issubclass(kind, Precision)]
    return named[0] if named else None


def default_precision(accelerator: object) -> str:
    """The precision if nobody says: bf16-mixed on a GPU that has it, 16-mixed on an older one, else fp32."""
    wants_gpu = accelerator in ("auto", "gpu", "cuda", None)
    if not (wants_gpu and torch.cuda.is_available()):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
