"""Reading weight files safely: tensors and plain values, never pickled code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpvit.errors import UserError

__all__ = ["read_checkpoint", "state_of"]

_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """The content of a ``.safetensors`` file or of a torch file, on the CPU, loaded without running code.

    Args:
        path: The file.
        mmap: Leave the tensors' values in the file, to look at names and shapes at once however large it is. Such
            tensors are not to be kept, for they change, or end the process, if the file is written to.

    Raises:
        UserError: If the file is absent, truncated, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; expected a .ckpt, .pt, .pth, .bin or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_stored(path)
        mmap = mmap and zipped  # files in the format before torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's reader raises nearly anything on a file that is not its own
        # torch's own message advises to switch the safety off.
        what = (
            "holds more than tensors and plain values"
            if "weights_only" in str(error)
            else "is damaged or no checkpoint"
        )
        raise UserError(f"checkpoint {path} {what}; expected a whole file of weights") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}; expected a mapping of names to tensors")
    return content


def _check_stored(path: Path) -> None:
    """torch compresses nothing; what is compressed may be a thousand times as large in memory as it is here."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed")


def state_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by parameter name, wrappers' prefixes removed.

    Raises:
        UserError: If there are none.
    """
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    state = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"the checkpoint holds no tensors; its entries are {sorted(checkpoint)[:8]}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
