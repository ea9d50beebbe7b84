"""The device that an evaluation command is to use, checked before anything is loaded."""

import torch

from dtpvit.errors import UserError

__all__ = ["chosen_device"]


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
