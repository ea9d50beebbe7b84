"""Reading weight files safely: tensors and plain values, never pickled code."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpvit.errors import UserError
from dtpvit.interop.checkpoint_format import FORMAT, FORMAT_KEY, migrate
from dtpvit.interop.foreign_classes import check_classes
from dtpvit.output_file import written_beside

__all__ = ["damage", "read_checkpoint", "state_of", "up_to_date", "write_safetensors"]

_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """The content of a ``.safetensors`` file or of a torch file, on the CPU, loaded without running code.

    Args:
        path: The file.
        mmap: Leave the tensors' values in the file, to look at names and shapes at once however large it is. Such
            tensors are not to be kept, for they change, or end the process, if the file is written to.

    Raises:
        UserError: If the file is absent, truncated, holds more than tensors and plain values, is of a newer format, or
            names a class that came in the same folder.
    """
    content = _read(Path(path), mmap)
    check_classes(content.get("hyper_parameters"), Path(path))
    migrate(content, f"checkpoint {path}")
    return content


def _read(path: Path, mmap: bool) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; expected a .ckpt, .pt, .pth, .bin or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_stored(path)
        mmap = mmap and zipped  # files in the format before torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); correct its permissions") from error
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


def up_to_date(path: str | Path) -> str | Path | io.BytesIO:
    """The file, or where it is of an older format its content in the present one, for readers that are not ours.

    Raises:
        UserError: As :func:`read_checkpoint`.
    """
    content = _read(Path(path), mmap=True)
    if not migrate(content, f"checkpoint {path}"):
        return path
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    return stream


def damage(path: Path) -> str | None:
    """What is wrong with a torch file, every byte of which is read and compared with its checksum; None if nothing.

    torch itself looks at the end of the file and at no checksum: a file with a hole in its middle loads.
    """
    try:
        if not zipfile.is_zipfile(path):  # the format before torch 1.6 has no checksums
            read_checkpoint(path)
            return None
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception:  # zipfile raises nearly anything on a zip that was tampered with: it may seem encrypted, say
        return "cannot be read to its end"
    return None if broken is None else f"has a wrong checksum in {broken}"


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get(FORMAT_KEY)
        state = {name: file.get_tensor(name) for name in file.keys()}
    if recorded is None:
        return state
    content = {"state_dict": state, FORMAT_KEY: int(recorded) if recorded.isdecimal() else recorded}
    migrate(content, f"checkpoint {path}")
    return content["state_dict"]


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors, with the number of the format in the file's metadata."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in state.items()}
    with written_beside(path) as partial:
        save_file(state, partial, metadata={"format": "pt", FORMAT_KEY: str(FORMAT)})


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
