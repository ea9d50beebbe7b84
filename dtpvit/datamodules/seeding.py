"""Repeating what timm draws from the global random generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """All generators that timm and torchvision draw from, seeded inside and as they were afterwards.

    Args:
        seed: Not negative.
        device: The accelerator that is drawn on, if any; others are not touched, which ``torch.manual_seed`` would do.
    """
    python, numpy = random.getstate(), np.random.get_state()
    on_gpu = device is not None and device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
