"""What test_sharded_instruction.py has one process do, and each of two with a language model cut between them."""

import sys
from pathlib import Path

import lightning as L
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import conversing
from labelled import Saved
from rank_checks import quiet, rank, save, world
from sharded_checks import cut, whole_state

from dtpvit._run_folder import StepSeed
from dtpvit.interop.tiny_language_model import make_tiny_language_model
from dtpvit.tasks.segment_monitor import SegmentMonitor
from dtpvit.tasks.weight_average import WeightAverage

DENSE = {**conversing.ENCODER, "reducers": {}}
ADAPTERS = {"tune_language_model": "lora", "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}}
FULL = {"tune_language_model": "full", "tune_vision": "full", "vision_lr": 0.03, "projector_lr": 0.3}
EXACT = {"optimizer": "adamw", "eps": 1e-2}  # which does not make much of what is rounding alone
CASES = {  # options of the task, of the trainer, and whether each rank has an image in its batches
    "projector": ({}, {}, False),
    "full": (FULL, {"gradient_clip_val": 0.5}, False),
    "adamw": (FULL | EXACT, {}, False),
    "reducers": ({"tune_vision": "reducers", "encoder": conversing.ENCODER}, {}, True),
    "adapters": (ADAPTERS | {"tune_vision": "partial", "tune_vision_from": 1}, {}, False),
    "recomputed": (FULL | {"grad_checkpointing": True, "select_layer": -2}, {}, False),
    "recomputed_frozen": ({"grad_checkpointing": True}, {}, False),
    "gathered": (FULL, {"accumulate_grad_batches": 2, "val_check_interval": 1}, False),
    "untied": (FULL, {}, False),
    "half_frozen": ({"language_dtype": "bfloat16"}, {}, False),
    "half_adapters": (ADAPTERS | {"language_dtype": "bfloat16"}, {"gradient_clip_val": 0.5}, False),
    "half": (FULL | {"language_dtype": "bfloat16", "learning_rate": 0.03}, {"gradient_clip_val": 0.5}, False),
}


class Talks(conversing.Conversations):
    """Four steps of four conversations; then four to validate on one by one, of which the second rank has one."""

    def __init__(self, with_images):
        super().__init__()
        self.with_images = with_images

    def _mine(self):
        return self._rows(0, 2) if self.with_images else self._rows(1, 3)

    def _rows(self, text_only, first, row=None):
        """Those of this rank, of which the second begins after the ``first``; or one row alone."""
        whole, images = conversing.batch(self.trainer.lightning_module.chat, 4, text_only), 4 - text_only
        rows = [row] if row is not None else [*range(4)] if world() == 1 else [*range(4)][_share(first)]
        seen = [row for row in rows if row < images]
        return {name: value[seen if name.startswith("image") else rows] for name, value in whole.items()}

    def train_dataloader(self):
        return DataLoader([self._mine()] * 4, batch_size=None)

    def val_dataloader(self):
        rows = range(4) if world() == 1 else range(4)[_share(3)]
        return DataLoader([self._rows(1, 3, row) for row in rows], batch_size=None)


def _share(first):
    return [slice(0, first), slice(first, None)][rank()]


def words(folder, tied):
    """The first rank writes it, as transformers has it."""
    place = folder / f"words{world()}-{'tied' if tied else 'untied'}"
    if rank() == 0 and not place.exists():
        make_tiny_language_model(conversing.TEXTS, place, dim=32, depth=2, num_heads=2, max_length=256, tied=tied)
    if world() > 1:
        distributed.barrier()
    return place


def trained(name, folder, options, of_trainer, *callbacks, with_images=False, **more):
    """One epoch, validated halfway and at its end; writes weights, figures and what is cut."""
    source = words(folder, tied=name != "untied")
    module = conversing.task(source, **{"encoder": DENSE, "optimizer": "sgd", "learning_rate": 0.1, **options})
    callbacks = [
        StepSeed(0),
        SegmentMonitor(images=2),
        *callbacks,
    ]  # the monitor runs the encoder on the first rank alone
    options = quiet() | {"val_check_interval": 2, "default_root_dir": folder} | of_trainer
    trainer = L.Trainer(**options, **cut(), max_epochs=1, callbacks=callbacks)
    trainer.fit(module, Talks(with_images), **more, weights_only=True)
    figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    apart = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
    save(folder, name, [whole_state(module), figures, apart])
    return trainer


def tuned(folder):
    for name, (options, of_trainer, with_images) in CASES.items():
        trainer = trained(name, folder, options, of_trainer, with_images=with_images)
        if name == "adamw":
            trainer.save_checkpoint(folder / f"adamw-{world()}.ckpt")


def spoilt(folder):
    """A loss that is no number on one rank, with gradients to be clipped: nothing moves."""

    class Spoil(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            loss.data.mul_(float("nan") if rank() == world() - 1 else 1.0)

    module = conversing.task(words(folder, tied=True), encoder=DENSE, **FULL)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = L.Trainer(**quiet(), **cut(), max_steps=2, gradient_clip_val=0.5, callbacks=[Spoil()])
    trainer.fit(module, Talks(False))
    moved = [name for name, value in whole_state(module).items() if not torch.equal(value, before[name])]
    save(folder, "spoilt", [module.guard.skipped, moved])


RESUMED = {"full": FULL, "adapters": ADAPTERS}


def averaged(folder):
    for name, options in RESUMED.items():
        saved = Saved(folder / f"{name}-{world()}.ckpt", 2)
        trained(f"averaged_{name}", folder, options | EXACT, {}, WeightAverage(0.7), saved)


def averaged_again(folder):
    """From the checkpoint that one process wrote, and from that of two."""
    for name, options in RESUMED.items():
        for source in (1, 2):
            place = folder / f"{name}-{source}.ckpt"
            trained(f"{name}_from_{source}", folder, options | EXACT, {}, WeightAverage(0.7), ckpt_path=place)


CHECKS = [tuned, spoilt, averaged]
AFTERWARDS = [averaged_again]
