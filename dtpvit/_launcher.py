"""What torchrun and SLURM say about the processes that they have started."""

import os
import uuid
from collections.abc import Mapping

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

__all__ = ["job", "started_processes", "was_restarted"]


def started_processes() -> tuple[int, int] | None:
    """Processes on each machine and machines; None where Lightning is to start them itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        mine = int(os.environ["LOCAL_WORLD_SIZE"])
        return mine, int(os.environ["WORLD_SIZE"]) // mine
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None


def job() -> dict[str, str]:
    """The job of SLURM and the start of torchrun that these processes belong to: the same after each restart."""
    found = {"slurm": os.environ.get("SLURM_JOB_ID"), "torchrun": os.environ.get("TORCHELASTIC_RUN_ID")}
    if found["torchrun"] == "none":  # what torchrun calls every start to which --rdzv-id gives no name
        found["torchrun"] = _agents_mark()
    return {by: name for by, name in found.items() if name is not None}


def was_restarted(recorded: Mapping[str, object]) -> bool:
    """Whether the job ``recorded`` was requeued by SLURM, or started anew by torchrun, as these processes.

    Either repeats the command as it was. The processes before may have died before they recorded anything.
    """
    counts = {"slurm": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}
    restarting = [by for by, count in counts.items() if os.environ.get(count, "0") != "0"]
    ours = job() if restarting else {}
    return any(by in ours and ours[by] == recorded.get(by) for by in restarting)


def _agents_mark() -> str | None:
    """What the first process to ask has left with torchrun's agents, whose store outlives the processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set("dtpvit/start", "", uuid.uuid4().hex).decode()
