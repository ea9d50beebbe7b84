"""What the options of an evaluation command name, checked before anything is loaded."""

import os
from pathlib import Path

import torch

from dtpvit.errors import UserError

__all__ = ["chosen_device", "output_file"]


def output_file(output: str | None) -> Path | None:
    """The file to write, or None.

    Raises:
        UserError: If it cannot be written.
    """
    if output is None:
        return None
    path = Path(output).expanduser()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"The result cannot be written to {output}: give a file in a folder that exists and can be written to."
        )
    return path


def chosen_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        UserError: If it cannot be used here.
    """
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()  # fails, too, for a device that holds no numbers
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # AssertionError: this torch was built without CUDA
        raise UserError(f"The device {name!r} cannot be used here: pass auto, cpu, or one that is.") from error
    return device
