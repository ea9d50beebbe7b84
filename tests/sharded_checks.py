"""What test_sharded.py has one process do, and each of two with the model cut between them by FSDP2."""

import sys
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import labelled
from rank_checks import SIGMOID, options, pairs, quiet, rank, save, world

from dtpvit._run_folder import StepSeed
from dtpvit.errors import UserError
from dtpvit.tasks.segment_monitor import SegmentMonitor
from dtpvit.tasks.sharding import FullySharded
from dtpvit.tasks.weight_average import WeightAverage


def cut():
    """A trainer's options: one process stands for what is to come out."""
    return options(FullySharded())


def whole_state(module):
    """Both ranks call this; of a checkpoint the first alone has it all."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }


def sharded(folder):
    """What FSDP2 makes of the same trainings; one process stands for what is to come out."""
    reducer = {"class_path": "DynamicPooling", "init_args": {"compression": 4, "estimator": "symmetric"}}
    cases = {
        "clipped": ({}, {"gradient_clip_val": 0.05}),
        "by_value": ({}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
        "pieces": ({"accum_freq": 2}, {}),
        "symmetric": ({"model": pairs.config({1: reducer})}, {}),
        "sigmoid": ({"model": pairs.config(**SIGMOID)}, {}),
        "checkpointed": ({"grad_checkpointing": True}, {}),
    }
    for name, (more, of_trainer) in cases.items():
        module = pairs.task(**more)
        trainer = L.Trainer(**quiet(), **cut(), max_steps=3, **of_trainer)
        trainer.fit(module, pairs.Pairs(3))
        save(folder, f"sharded_{name}", whole_state(trainer.lightning_module))
        if name == "clipped":
            trainer.save_checkpoint(folder / f"sharded-{world()}.ckpt")


def sharded_again(folder):
    """Two more steps, from the checkpoint that the two ranks wrote."""
    module = pairs.task()
    trainer = L.Trainer(**quiet(), **cut(), max_steps=5, gradient_clip_val=0.05)
    trainer.fit(module, pairs.Pairs(5), ckpt_path=folder / "sharded-2.ckpt", weights_only=True)
    save(folder, "sharded_again", whole_state(trainer.lightning_module))


def sharded_classifier(folder):
    for mode in ("finetune", "frozen"):
        module = labelled.task(mode=mode, optimizer="sgd", layer_decay=0.7)
        trainer = labelled.trainer(**cut())
        trainer.fit(module, datamodule=labelled.Images())
        figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        save(folder, f"sharded_{mode}", [whole_state(trainer.lightning_module), figures])


def sharded_guard(folder):
    """A loss that is no number on one rank: nothing moves; and bfloat16 leaves the boundary predictor alone."""
    module = pairs.task(optimizer="adamw")
    real = module._contrastive_loss
    module._contrastive_loss = lambda *both: real(*both) * (float("nan") if rank() == world() - 1 else 1.0)
    trainer = L.Trainer(**quiet(), **cut(), max_steps=2)
    trainer.fit(module, pairs.Pairs(2))
    half = pairs.task()
    precise = L.Trainer(**quiet(), **cut(), max_steps=1, precision="bf16-true")
    precise.fit(half, pairs.Pairs(1))
    types = {name: str(value.dtype) for name, value in whole_state(precise.lightning_module).items()}
    save(folder, "sharded_guard", [module.guard.skipped, whole_state(trainer.lightning_module), types])


def refused(folder):
    said = ""
    if world() > 1:
        with pytest.raises(UserError) as error:
            L.Trainer(**quiet(), **cut(), max_steps=1).fit(BoringModel())
        said = str(error.value)
    save(folder, "refused", said)


class SavedWithin(labelled.Saved):
    """Saves while the model has the average, as a run that is told to end in a validation does."""

    def on_train_batch_end(self, *unused):
        pass

    def on_validation_epoch_end(self, trainer, *unused):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def averaged(name, folder, *callbacks, **more):
    """Two epochs of three steps with an average of the weights, which is validated."""
    callback = WeightAverage(0.7, start_step=1)
    module = labelled.task(optimizer="sgd")
    callbacks = [StepSeed(0), callback, SegmentMonitor(images=2), *callbacks]
    trainer = labelled.trainer(**cut(), max_epochs=2, default_root_dir=folder, callbacks=callbacks)
    places = []
    callback.on_train_end = lambda *unused: places.extend(
        (average.shape, parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape)
        for (name, parameter) in module.named_parameters()
        for average in [callback._average[name]]
    )
    trainer.fit(module, datamodule=labelled.Images(), **more, weights_only=True)
    figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    save(folder, name, [whole_state(trainer.lightning_module), figures, places])


def sharded_average(folder):
    within = SavedWithin(folder / f"within-{world()}.ckpt", 3)
    averaged("average", folder, labelled.Saved(folder / f"average-{world()}.ckpt", 4), within)


def sharded_average_again(folder):
    """From the checkpoint that one process wrote, and from that of two ranks."""
    for source in (1, 2):
        averaged(f"average_from_{source}", folder, ckpt_path=folder / f"average-{source}.ckpt")


CHECKS = [sharded, sharded_again, sharded_classifier, sharded_guard, refused, sharded_average]
AFTERWARDS = [sharded_average_again]
