"""Checkpoints of a run as files: written so that a kill or a full disk leaves the last good one, read with care."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dtpvit.errors import UserError, chain
from dtpvit.interop.weight_files import damage, read_checkpoint
from dtpvit.output_file import PARTIAL, written_beside

__all__ = ["CheckpointFiles", "last_good", "remove_partial", "whole_checkpoints"]


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin, with each local file written beside its place, flushed to the disk, and renamed.

    Lightning's own writes into the machine's folder of temporary files and moves from there, which across file systems
    is a copy that a kill cuts short; it flushes nothing, and holds the whole file in memory once more. Addresses of
    object stores are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UserError: If the disk is full, or the file cannot be written for another reason of its kind.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(target) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises its own error on top of the file's
            cause = next((link for link in chain(error) if isinstance(link, OSError)), None)
            if cause is None:
                raise
            raise UserError(
                f"the checkpoint {target} could not be written ({cause.strerror or cause}); {last_good(target.parent)}"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, on the CPU; a file that may hold code is left to Lightning.

        Raises:
            UserError: If it is damaged, no checkpoint, or of a newer format.
        """
        if weights_only is False or "://" in str(path):
            return super().load_checkpoint(path, weights_only=weights_only)
        return read_checkpoint(path)


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left in a folder."""
    for path in folder.glob(f"*.ckpt{PARTIAL}"):
        path.unlink(missing_ok=True)


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """The undamaged checkpoint files of a folder, newest first."""
    files = [path for path in folder.glob("*.ckpt") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if damage(path) is None:
            yield path


def last_good(folder: Path) -> str:
    """Which checkpoint in a folder a run whose disk is full can go on with, and how, for its message."""
    for good in whole_checkpoints(folder):
        try:
            step = read_checkpoint(good, mmap=True).get("global_step")
        except UserError:  # whole, but none of ours
            continue
        at = "" if step is None else f" (step {step})"
        return f"the last good checkpoint is {good}{at}; make room and go on with --ckpt_path last"
    return "there is no earlier checkpoint; make room and start again"
