"""Training with the large parameters, their gradients and optimizer states cut between the ranks: PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtpvit.encoder import VisionEncoder
from dtpvit.errors import UserError
from dtpvit.interop.language_model import large_parts
from dtpvit.tasks.classification import Classification
from dtpvit.tasks.contrastive import Contrastive
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.instruction import Instruction
from dtpvit.tasks.shards import cut_like, whole

__all__ = ["FullySharded"]

_PARTS = ("attn", "mlp", "token_embedding")
_WHO_COMES_FIRST = ("on_fit_start", "on_validation_start", "on_test_start", "on_predict_start", "training_step")


class FullySharded(ModelParallelStrategy):
    """Each rank keeps its share of what is large, and gathers a part to run it.

    Of both towers, or the image encoder, that is attention, MLPs and token embedding; of a language model the decoder
    layers, embedding and head. The rest stays whole on every rank: reducers, whose boundary head must keep its
    precision, a projector, positions, norms, head, and scalars such as the logit scale, which cannot be cut. Its
    gradients are averaged before the optimizer's step. An average of the weights
    (:class:`dtpvit.tasks.weight_average.WeightAverage`) is cut as they are. Checkpoints are single files with whole
    tensors, those of any other strategy, and continue under any other.

    Args:
        process_group_backend: As of Lightning's strategies; None takes that of the device.
        timeout: Of collectives.

    Raises:
        UserError: When the run starts, if the task or this torch does not work with it.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(seconds=1800)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """As Lightning's, which would have the task shard itself."""
        assert self.accelerator is not None and isinstance(self.model, LightningModule)
        self.accelerator.setup(trainer)
        task = _checked(self.model)
        self.precision_plugin.convert_module(task)
        _shard(task, self.device_mesh["data_parallel"])
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                _step_apart(optimizer)
        self.setup_precision_plugin()

    def on_validation_start(self) -> None:
        """Gather the whole model: ranks have unequally many batches, and cannot wait for each other in each."""
        for module in self._cut_modules():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Cut it again, and forget which parts ran: the next backward pass would gather in that order, each its own."""
        for module in self._cut_modules():
            module.set_reshard_after_forward(True, recurse=False)
        root = self.model
        assert isinstance(root, FSDPModule)
        root.reset_iter_state()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _cut_modules(self) -> Iterator[FSDPModule]:
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule) and module is not self.model:
                yield module

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: whole(value) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        found: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        moments = {
            number: {name: whole(value) for name, value in state.items()} for number, state in found["state"].items()
        }
        return {**found, "state": moments}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        mine = self.lightning_module.state_dict()
        state = {name: cut_like(mine.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, found in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {name: cut_like(parameters[number], value) for name, value in state.items()}
                for number, state in found["state"].items()
            }
            optimizer.load_state_dict({**found, "state": moments})


def _checked(task: LightningModule) -> ImageTask:
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(
            f"sharding needs a newer torch than {torch.__version__}, such as 2.14; install one, or take "
            "configs/launch/ddp.yaml"
        )
    if isinstance(task, Instruction):
        return task
    if not isinstance(task, Contrastive | Classification) or not isinstance(task.trunk, VisionEncoder):
        raise UserError(
            f"only Instruction, and Contrastive and Classification with a Vision Transformer, can be sharded, and this "
            f"is {type(task).__name__}; leave configs/launch/fsdp.yaml out, or take configs/launch/ddp.yaml"
        )
    return task


def _shard(task: ImageTask, mesh: DeviceMesh) -> None:
    groups = _parts_of_towers(task)
    if isinstance(task, Instruction):
        groups += large_parts(task.model.language_model)
    for group in groups:
        fully_shard(group, mesh=mesh)
        for part in group:
            if hasattr(part, "towards"):
                register_fsdp_forward_method(part, "towards")
    inside = {parameter for group in groups for part in group for parameter in part.parameters()}
    fully_shard(task, mesh=mesh, ignored_params=set(task.parameters()) - inside)
    for name in _WHO_COMES_FIRST:  # else a part would, and take itself for the root
        register_fsdp_forward_method(task, name)


def _parts_of_towers(task: ImageTask) -> list[list[nn.Module]]:
    """What is cut of both towers, or of the image encoder alone where a language model has layers of its own."""
    towers = task.trunk if isinstance(task, Instruction) else task
    if not isinstance(task.trunk, VisionEncoder):
        return []
    reducing = {id(module) for module in task.trunk.reducers.modules()}
    return [
        [module]
        for name, module in towers.named_modules()
        if name.rsplit(".", 1)[-1] in _PARTS and id(module) not in reducing
    ]


def _step_apart(optimizer: Optimizer) -> None:
    """Let the optimizer step on sharded and on whole parameters one after the other: no kernel takes both at once.

    Its groups, and so schedules and checkpoints, stay those of any other strategy.
    """
    wholes: list[dict[str, Any]] = []
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        wholes[:], parts[:] = optimizer.param_groups, []
        for group in wholes:
            for sharded in (True, False):
                chosen = [parameter for parameter in group["params"] if isinstance(parameter, DTensor) is sharded]
                if chosen:
                    parts.append((group, {**group, "params": chosen}))
        optimizer.param_groups = [part for _, part in parts]

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, part in parts:
            group |= {name: value for name, value in part.items() if name != "params"}
        optimizer.param_groups = list(wholes)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
