"""Refusing a checkpoint that does not belong to a task, before any data are looked for."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule

from dtpvit.errors import UserError
from dtpvit.interop.loading import difference
from dtpvit.interop.weight_files import damage, read_checkpoint
from dtpvit.tasks.checkpoint_file import whole_checkpoints
from dtpvit.tasks.image_task import ImageTask

__all__ = ["check_checkpoint"]


def check_checkpoint(path: str | Path, task: LightningModule) -> None:
    """Compare a checkpoint with the task that is to go on with it or to be evaluated with it.

    Args:
        path: The file, which is read to its end.
        task: With the weights of its construction. Of tasks not of ours the names of tensors are left to Lightning.

    Raises:
        UserError: If the file is damaged, or no checkpoint of a run, of another task, of another number of classes, or
            of another architecture.
    """
    try:
        content = read_checkpoint(path, mmap=True)
        if found := damage(Path(path)):
            raise UserError(f"checkpoint {path} {found}; expected a whole file of weights")
    except UserError as error:
        raise UserError(f"{error}{_instead(Path(path))}") from error
    state = content.get("state_dict")
    if not isinstance(state, dict) or "pytorch-lightning_version" not in content:
        raise UserError(f"{path} is no checkpoint of `dtpvit fit`; to start from the weights in it, give --init {path}")
    if not isinstance(task, ImageTask):
        return
    recorded = content.get("hyper_parameters") or task.hparams
    classes, head = (options.get("num_classes") for options in (recorded, task.hparams))
    if (classes is None) != (head is None):
        kind, other = ("dual encoder", "classifier") if classes is None else ("classifier", "dual encoder")
        raise UserError(
            f"{path} is of a {kind}, the config is of a {other}; give a checkpoint of that task, or start from this "
            f"one's image tower with --init {path}"
        )
    if classes != head:
        raise UserError(
            f"{path} has {classes} classes, the config's model has {head}; give the config that it was trained with"
        )
    if task.strict_loading and (differing := difference(state, task.state_dict())):
        raise UserError(
            f"{path} is of another architecture than the config's model: {differing}; give the config that it was "
            "trained with"
        )


def _instead(path: Path) -> str:
    """Which other checkpoint of the run is whole, for the message."""
    if path.suffix != ".ckpt" or not path.is_file():
        return ""
    other = next((found for found in whole_checkpoints(path.parent) if found.resolve() != path.resolve()), None)
    return "" if other is None else f"; {other} is whole: give --ckpt_path {other}"
