"""The most memory a process held between two moments."""

import re
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

MIB = 2**20


class PeakMemory:
    """The most memory since the last reset, of this process alone, without the workers of a data loader.

    On a GPU: what torch allocated on it (``torch.cuda.max_memory_allocated``). Otherwise: resident set. On Linux its
    peak can be set back; where the system does not permit that, or elsewhere, it is the peak since the process began.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Begin anew, from what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the resident set of now
        except OSError:
            pass

    def read(self) -> float:
        """MiB; NaN where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        except OSError:
            found = None
        return int(found[1]) / 1024 if found else _peak_since_the_beginning()


def _peak_since_the_beginning() -> float:
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)  # macOS counts bytes, others KiB
