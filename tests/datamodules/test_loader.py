"""The loader: every sample once, equal steps on every rank, and exact resume, with and without Lightning."""

import io
import itertools
import warnings
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from shard_files import numbers, pair, tokenize, write_shards, write_tar
from torch import nn

from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.samples import ImageText
from dtpvit.datamodules.stream import shard_groups
from dtpvit.datamodules.transforms import train_transform
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform

pytestmark = [
    # Said by torch of lightning 2.6, but in the name of typing_extensions.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def make(shards, **options):
    train = options.get("train", True)
    transform = train_transform(8, scale=(0.3, 1.0)) if train else eval_transform(8)
    recipe = ImageText(transform, tokenize, options.get("seed", 0))
    return ResumableLoader(shards, recipe, **({"batch_size": 4, "shuffle_buffer": 8} | options))


def flat(batches):
    return [number for batch in numbers(batches) for number in batch]


def seeds(batches):
    return [batch["seed"].tolist() for batch in batches]


# ------------------------------------------------------------------ who reads what


@pytest.mark.parametrize("consumers", [1, 2, 3, 6, 8, 64])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 9, 64, 1243])
def test_groups_are_balanced_and_none_is_empty(num_shards, consumers):
    groups = shard_groups(num_shards, consumers)
    assert consumers % groups == 0 and groups <= num_shards
    assert -(-num_shards // groups) <= 1.1 * num_shards / groups
    finer = [g for g in range(groups + 1, consumers + 1) if consumers % g == 0]
    assert all(-(-num_shards // g) > 1.1 * num_shards / g for g in finer)


@pytest.mark.parametrize(
    ("counts", "world_size", "num_workers"),
    [
        ([7, 9, 4], 1, 0),
        ([7, 9, 4], 2, 2),
        ([3, 40], 1, 3),
        ([5], 3, 2),
        ([1, 1, 1, 1, 1, 1], 2, 0),
        ([2], 4, 0),
    ],
)
def test_evaluation_gives_every_sample_once(tmp_path, counts, world_size, num_workers):
    shards = write_shards(tmp_path, counts)
    found = []
    for rank in range(world_size):
        loader = make(shards, train=False, num_workers=num_workers, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader) and loader.skipped == {}
        assert seeds(batches) == seeds(loader)  # a second pass is the same: nothing depends on an epoch
        found += flat(batches)
    assert sorted(found) == list(range(sum(counts)))


@pytest.mark.parametrize(
    ("counts", "world_size", "num_workers"),
    [([8, 8, 8, 8], 2, 2), ([16, 16], 2, 2), ([32], 1, 0), ([32], 2, 2)],
)
def test_a_training_epoch_gives_every_sample_once(tmp_path, counts, world_size, num_workers):
    shards = write_shards(tmp_path, counts)
    loaders = [make(shards, num_workers=num_workers, rank=rank, world_size=world_size) for rank in range(world_size)]
    orders = []
    for epoch in range(2):
        found = []
        for loader in loaders:
            loader.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == len(loader) == 8 // world_size
            assert {len(batch["seed"]) for batch in batches} == {4}
            found += flat(batches)
        assert sorted(found) == list(range(32))
        orders.append(found)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_every_rank_makes_as_many_steps_whatever_is_broken(tmp_path):
    shards = write_shards(tmp_path, [3, 17, 8, 4], broken=(0, 1, 2, 20, 21, 22, 23, 24))
    loaders = [make(shards, num_workers=2, rank=rank, world_size=2) for rank in range(2)]
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == 4 and {len(batch["seed"]) for batch in batches} == {4}
        assert not set(flat(batches)) & {0, 1, 2, 20, 21, 22, 23, 24}
    assert any(loader.skipped.get("broken image", 0) for loader in loaders)


def test_without_shuffling_every_epoch_is_the_same_and_in_order(tmp_path):
    loader = make(write_shards(tmp_path, [6, 6]), shuffle_buffer=0)
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    assert flat(first) == list(range(12)) and seeds(first) == seeds(second)


def test_shuffling_mixes_shards_and_neighbours(tmp_path):
    loader = make(write_shards(tmp_path, [32] * 4), shuffle_buffer=64)
    order = flat(loader)
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert sorted(order) == list(range(128)) and steps.count(1) < 12
    assert order != flat(make(write_shards(tmp_path, [32] * 4), shuffle_buffer=64, seed=1))


def test_every_epoch_crops_and_seeds_anew_but_repeatably(tmp_path):
    shards = write_shards(tmp_path, [8])
    by_epoch = []
    for epoch in (0, 1):
        for num_workers in (0, 2):
            loader = make(shards, num_workers=num_workers)
            loader.set_epoch(epoch)
            images = {int(row[0]): image for b in loader for row, image in zip(b["text"], b["image"], strict=True)}
            by_epoch.append(torch.stack([images[number] for number in range(8)]))
    assert torch.equal(by_epoch[0], by_epoch[1]) and torch.equal(by_epoch[2], by_epoch[3])
    assert not torch.equal(by_epoch[0], by_epoch[2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_state_is_not_touched(tmp_path, num_workers):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(make(write_shards(tmp_path, [8]), num_workers=num_workers))
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------ what is broken


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_skipped_samples_are_counted_by_cause_over_workers(tmp_path, num_workers):
    shards = write_shards(tmp_path, [6, 6], broken=(1, 4, 7))
    odd = {"a": {"txt": b"caption 1"}, "b": {"jpg": b"x"}, "c": pair(12), "d": {**pair(13), "txt": b" "}}
    shards.append(write_tar(tmp_path / "00002.tar", odd))
    cut = write_tar(tmp_path / "00003.tar", {"e": pair(14), "f": pair(15)})
    data = (tmp_path / "00003.tar").read_bytes()
    (tmp_path / "00003.tar").write_bytes(data[: data.rindex(b"caption 15") - 512])
    loader = make([*shards, cut], train=False, num_workers=num_workers)
    expected = {"broken image": 3, "no image": 1, "no caption": 2, "unreadable shard": 1}
    for _ in range(2):
        assert sorted(flat(loader)) == [0, 2, 3, 5, 6, 8, 9, 10, 11, 12, 14]
        assert loader.skipped == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_without_a_usable_sample_end_the_run_with_a_sentence(tmp_path, num_workers):
    shards = write_shards(tmp_path, [8], broken=tuple(range(8)))
    with pytest.raises(UserError, match=r"No sample of 1 shards .*\(broken image: \d+\); check") as error:
        list(make(shards, num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_an_unknown_or_too_small_number_of_samples_is_refused(tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"0": pair(0)}, stats=False)
    with pytest.raises(UserError, match=r"not all of the 1 shards have a _stats\.json .*set num_samples"):
        make([shard])
    with pytest.raises(UserError, match="The 3 training samples do not fill one batch of 4 on 2 rank"):
        make([shard], num_samples=3, world_size=2)
    with pytest.raises(TypeError):
        len(make([shard], train=False))
    assert flat(make([shard], train=False)) == [0]


def test_num_samples_decides_the_length_of_an_epoch(tmp_path):
    shards = write_shards(tmp_path, [10])
    assert Counter(flat(make(shards, num_samples=20))) == Counter(list(range(10)) * 2)
    assert len(flat(make(shards, num_samples=5))) == 4


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("position", [1, 4, 9])
def test_resume_continues_with_the_very_next_batch(tmp_path, num_workers, position):
    shards = write_shards(tmp_path, [11, 5, 13, 11], broken=(2, 3, 14, 30, 31))
    options = {"num_workers": num_workers, "rank": 0, "world_size": 1}
    loader = make(shards, **options)
    loader.set_epoch(3)
    whole = list(loader)
    loader.set_epoch(3)
    for _ in itertools.islice(loader, position):
        pass
    stream = io.BytesIO()
    torch.save(loader.state_dict(), stream)
    stream.seek(0)
    resumed = make(shards, **options)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    resumed.set_epoch(3)  # as Lightning does, after iter
    rest = list(resumed)
    assert seeds(rest) == seeds(whole[position:])
    for got, expected in zip(rest, whole[position:], strict=True):
        assert torch.equal(got["image"], expected["image"]) and torch.equal(got["text"], expected["text"])
    resumed.set_epoch(4)
    loader.set_epoch(4)
    assert seeds(resumed) == seeds(loader)


def test_a_finished_epoch_resumes_with_the_next(tmp_path):
    shards = write_shards(tmp_path, [12])
    loader = make(shards)
    list(loader)
    resumed = make(shards)
    resumed.load_state_dict(loader.state_dict())
    loader.set_epoch(1)
    assert seeds(resumed) == seeds(loader)


def test_another_layout_resumes_with_as_many_batches_and_a_warning(tmp_path):
    shards = write_shards(tmp_path, [16, 16])
    loader = make(shards, num_workers=2)
    whole = seeds(loader)
    next(iter(loader))
    resumed = make(shards, num_workers=0)
    with pytest.warns(UserWarning, match="another num_workers than the checkpoint's"):
        resumed.load_state_dict(loader.state_dict())
    rest = seeds(resumed)
    assert len(rest) == len(whole) - 1
    state = resumed.state_dict()
    again = make(shards, num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(state)


def test_other_data_of_as_many_shards_are_told(tmp_path):
    loader = make(write_shards(tmp_path / "a", [16, 16]))
    next(iter(loader))
    with pytest.warns(UserWarning, match="another num_samples than the checkpoint's"):
        make(write_shards(tmp_path / "b", [16, 12])).load_state_dict(loader.state_dict())


class Recorder(L.LightningModule):
    """Trains one number and writes down which samples every step saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append((self.current_epoch, batch_idx, self.global_step, batch["seed"].tolist()))
        return (self.weight - batch["image"].float().mean()) ** 2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Save(Callback):
    """Checkpoints at the places where runs are killed or callbacks save."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"val-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"end-{trainer.global_step}.ckpt")


def fit(folder, shards, num_workers, epochs=3, ckpt=None, **options):
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(
        module,
        make(shards, num_workers=num_workers),
        make(shards, train=False),
        ckpt_path=ckpt,
    )
    assert trainer.global_step == epochs * 5
    return module


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_lightning_resumes_exactly_wherever_it_was_killed(tmp_path, num_workers):
    """Five steps an epoch; killed in mid-epoch, after its last step, in validation, at the epoch's end."""
    shards = write_shards(tmp_path / "data", [9, 5, 6], broken=(4, 11))
    every = ModelCheckpoint(dirpath=tmp_path / "runs", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, shards, num_workers, callbacks=[every, Save(tmp_path / "runs")])
    assert [step[:3] for step in whole.steps] == [(i // 5, i % 5, i) for i in range(15)]
    assert len({tuple(step[3]) for step in whole.steps}) == 15
    for name, position in [("step=3", 3), ("step=5", 5), ("step=8", 8), ("val-10", 10), ("end-5", 5)]:
        resumed = fit(
            tmp_path, shards, num_workers, ckpt=tmp_path / "runs" / f"{name}.ckpt", enable_checkpointing=False
        )
        assert resumed.steps == whole.steps[position:], name
        torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)


def test_lightning_checkpoints_hold_the_loaders_state_as_plain_python(tmp_path):
    shards = write_shards(tmp_path / "data", [20])
    fit(tmp_path, shards, 2, epochs=1, callbacks=[Save(tmp_path / "runs")], enable_checkpointing=False)
    checkpoint = torch.load(tmp_path / "runs" / "val-5.ckpt", weights_only=True)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state["epoch"], state["position"]) == (0, 5) and sum(state["used"][0]) == 20


def test_lightning_shuts_the_workers_down(tmp_path):
    loader = make(write_shards(tmp_path, [20]), num_workers=2)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    processes = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            processes.extend(loader._loader._iterator._workers)

    trainer.callbacks.append(Look())
    module = Recorder()
    trainer.fit(module, loader, make(loader._stream.shards, train=False))
    assert len(processes) == 4 and not any(process.is_alive() for process in processes)


@pytest.mark.slow
def test_workers_may_be_spawned(tmp_path):
    """Python 3.14 no longer forks: all that a worker needs must survive pickling, shared counts included."""
    shards = write_shards(tmp_path, [8, 8], broken=(1, 12))
    forked, spawned = make(shards, num_workers=2), make(shards, num_workers=2)
    spawned._loader.multiprocessing_context = "spawn"
    assert seeds(spawned) == seeds(forked) and spawned.skipped["broken image"] >= 2


def _rank(rank, folder, port):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    shards = [str(folder / f"{i:05d}.tar") for i in range(2)]
    loader = make(shards, rank=rank, world_size=2)
    whole = seeds(loader)
    for _ in itertools.islice(loader, 2):
        pass
    state = loader.state_dict()
    if rank == 0:
        torch.save(state, folder / "rank0.pt")  # Lightning writes the first rank's state for all
    dist.barrier()
    resumed = make(shards, rank=rank, world_size=2)
    resumed.load_state_dict(torch.load(folder / "rank0.pt", weights_only=True))
    assert seeds(resumed) == whole[2:]
    used = state["used"]
    assert used[0] != used[1], "broken samples must make the ranks unequal, or this proves nothing"
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_resume_exactly_although_one_lost_more_samples(tmp_path):
    import socket

    write_shards(tmp_path, [16, 16], broken=tuple(range(6)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(tmp_path, port), nprocs=2)
