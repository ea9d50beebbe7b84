"""What torchrun and SLURM say about the processes that they have started."""

import os

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

__all__ = ["started_processes", "was_restarted"]


def started_processes() -> tuple[int, int] | None:
    """Processes on each machine and machines; None where Lightning is to start them itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        mine = int(os.environ["LOCAL_WORLD_SIZE"])
        return mine, int(os.environ["WORLD_SIZE"]) // mine
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None


def was_restarted() -> bool:
    """Whether SLURM has requeued this job, or torchrun has started its processes anew: with the same command."""
    return any(os.environ.get(f"{by}_RESTART_COUNT", "0") != "0" for by in ("SLURM", "TORCHELASTIC"))
