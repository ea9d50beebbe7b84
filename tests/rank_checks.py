"""What test_ranks.py has one process do, and each of two together: every function writes what it found to a folder."""

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import distributed
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
sys.path.insert(0, str(Path(__file__).parent / "datamodules"))
import pairs
from shard_files import jpeg, write_tar

from dtpvit.datamodules.image_text import ImageTextShards
from dtpvit.encoder.ops.collectives import add_up, gather_columns
from dtpvit.errors import UserError
from dtpvit.tasks.classification import Classification
from dtpvit.tasks.loss_watch import LossWatch
from dtpvit.tasks.optimization import NonFiniteGuard
from dtpvit.tasks.weight_average import WeightAverage

FRAGMENTS = sorted((Path(__file__).parents[1] / "configs" / "reducers").glob("*.yaml"))
SIGMOID = {"init_logit_bias": -10.0, "init_logit_scale": 2.3}


def world():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def options(strategy="ddp"):
    if world() == 1:
        return {"devices": 1}
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}


def save(folder, name, found):
    torch.save(found, folder / f"{name}-{world()}-{rank()}.pt")


def losses(folder):
    """Loss and gradients of a step with each loss, and of two batches that make one step."""
    cases = {
        "softmax": {},
        "gathered": {"local_loss": False},
        "sigmoid": {"model": pairs.config(**SIGMOID)},
        "sigmoid_pieces": {"model": pairs.config(**SIGMOID), "accum_freq": 2},
        "two_batches": {},
    }
    for name, more in cases.items():
        record = pairs.Record(folder)
        batches = {"accumulate_grad_batches": 2, "limit_train_batches": 2} if name == "two_batches" else {}
        model = pairs.task(**more)
        trainer = L.Trainer(**quiet(), **options(), max_steps=1, callbacks=[record], **batches)
        trainer.fit(model, pairs.Pairs(2 if batches else 1))
        save(folder, name, torch.load(folder / f"rank{rank()}-step0.pt", weights_only=True))


def reducers(folder):
    """Tokens and what is learned for evaluation, of six images of which the first rank has four."""
    g = torch.Generator().manual_seed(0)
    images, seeds = torch.randn(6, 3, 96, 96, generator=g), torch.arange(6) + 7
    share = slice(None) if world() == 1 else [slice(0, 4), slice(4, None)][rank()]
    found = {}
    for path in FRAGMENTS:
        torch.manual_seed(0)
        vision = {"preset": "vit_tiny_patch16_224", "image_size": 96, "dim": 24, "num_heads": 3}
        reducers = yaml.safe_load(path.read_text())
        encoder = Classification(model=vision, num_classes=3, vision={"reducers": reducers}).model.train()
        for _ in range(2):
            encoding = encoder.encode(images[share], seeds=seeds[share])
            torch.stack([encoding.pooled.square().sum(), *encoding.losses.values()]).sum().backward()
            encoder.after_backward()
        state = {name: value.clone() for name, value in encoder.reducers.named_buffers() if "baseline" not in name}
        found[path.stem] = {"state": state, "lengths": encoding.tokens.lengths}
    save(folder, "reducers", found)


def guard(folder):
    """A gradient that is no number on the last rank alone."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    watch, found = NonFiniteGuard(3), []
    for bad in (True, False, True):
        parameter.grad = torch.full((3,), float("nan") if bad and rank() == world() - 1 else 1.0)
        watch.after_backward(torch.ones(()), [parameter])
        found.append((parameter.grad is None, watch.skipped, watch.in_a_row))
    save(folder, "guard", found)


def collectives(folder):
    """Unequally many columns, and none on one rank."""
    whole = torch.arange(10.0).view(2, 5)
    mine = whole if world() == 1 else whole[:, [slice(0, 5), slice(5, None)][rank()]]
    counts = [3, 4] if world() == 1 else [[3, 0], [0, 4]][rank()]
    save(folder, "collectives", [gather_columns(mine), add_up(*counts, device=torch.device("cpu"))])


class Judged(L.LightningDataModule):
    """Eleven pairs, then nine labelled images, in batches of 3, of which the first rank has all but one."""

    zeroshot_prompts = (["red", "green", "blue"], [lambda name: f"a {name} ball", lambda name: name])
    zeroshot_class_indices = None

    def val_dataloader(self):
        whole = pairs.batch(11)
        g = torch.Generator().manual_seed(3)
        images = {"image": torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=g)}
        images["label"] = torch.arange(9) % 3
        return [self._mine({"image": whole["image"], "text": whole["text"]}, 10), self._mine(images, 8)]

    def _mine(self, batch, first):
        share = slice(None) if world() == 1 else [slice(0, first), slice(first, None)][rank()]
        parts = {name: value[share].split(3) for name, value in batch.items()}
        batches = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        return DataLoader(batches, batch_size=None)


def validation(folder):
    """Retrieval and zero-shot; every sample counts once, though one rank has four times the batches."""
    trainer = L.Trainer(**quiet(), **options())
    (first, *_) = trainer.validate(pairs.task(), Judged(), verbose=False)
    save(folder, "validation", {name: float(value) for name, value in trainer.callback_metrics.items()})
    assert first


def average(folder):
    callback = WeightAverage(decay=0.5)
    module = pairs.task()
    trainer = L.Trainer(**quiet(), **options(), max_steps=3, callbacks=[callback])
    trainer.fit(module, pairs.Pairs(3))
    save(folder, "average", module.state_dict())


def broken(folder):
    """Shards of 12 and 6 pairs, of which the second has three broken images and one without a caption."""
    shards = folder / f"shards{world()}-{rank()}"  # each its own: they write at the same time
    for number, size in enumerate((12, 6)):
        samples = {f"{number}{i}": {"jpg": jpeg(i), "txt": f"caption {i}".encode()} for i in range(size)}
        if number == 1:
            for i in range(3):
                samples[f"1{i}"]["jpg"] = samples[f"1{i}"]["jpg"][:100]
            del samples["15"]["txt"]
        write_tar(shards / f"{number:05d}.tar", samples)
    data = ImageTextShards(train=str(shards), batch_size=2, num_workers=0, shuffle_buffer=4)
    trainer = L.Trainer(**quiet(), **options(), max_epochs=1)
    module = pairs.task()
    trainer.fit(module, data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("data/")}
    save(folder, "broken", [trainer.global_step, figures, module.state_dict()])


def watched(folder):
    """The last rank's loss says that its learning rate is too high, and ends the training of both."""

    class Watch(LossWatch):
        def _judgement(self, task, horizon):
            return "too high" if rank() == world() - 1 else ""

    trainer = L.Trainer(**quiet(), **options(), max_steps=30, callbacks=[Watch(stop=True)])
    with pytest.raises(UserError) as ended:
        trainer.fit(pairs.task(), pairs.Pairs(30))
    save(folder, "watched", [trainer.global_step, str(ended.value)])


CHECKS = [losses, reducers, guard, collectives, validation, average, broken, watched]


def run(rank, checks, folder):
    """To be called in each of two new processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in place.items()} | {"TORCHELASTIC_RUN_ID": "test"}
    # A file, for two runs of the tests on one machine must not take the same port; Lightning takes the group as it is.
    # Ranks that do not agree what to do next are an error with a stack, before the tests' own guard ends all.
    store, patience = f"file://{folder}/store", timedelta(seconds=300)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    for check in checks:
        check(folder)
    distributed.destroy_process_group()


def ran(checks, folder):
    (folder / "store").unlink(missing_ok=True)  # the addresses of processes that have ended
    torch.multiprocessing.spawn(run, args=(checks, folder), nprocs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of loaders as small as these
        for check in checks:
            check(folder)
    return folder


def found(folder, name):
    """Of one process, and of both ranks."""
    places = [(1, 0), (2, 0), (2, 1)]
    one, *two = (torch.load(folder / f"{name}-{world}-{rank}.pt", weights_only=True) for world, rank in places)
    return one, two


def close(mine, expected, tolerance=1e-5):
    atol = tolerance * max(float(value.abs().nan_to_num().max()) for value in expected.values())
    torch.testing.assert_close(mine, expected, rtol=10 * tolerance, atol=atol, equal_nan=True)


def quiet():
    found = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return found | {"enable_model_summary": False, "num_sanity_val_steps": 0}
