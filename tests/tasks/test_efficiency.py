"""The efficiency of an epoch, measured in short fits: what counts as training, what as waiting, and which rows come."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dtpvit.tasks.efficiency import COLUMNS, EfficiencyMonitor
from dtpvit.tasks.token_count import TokenCount

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]
TOKENS = ("tokens_mean", "tokens_min", "tokens_max", "compression")


def spend(seconds):
    time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a task and its data say they take, however slow the machine is."""
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr("test_efficiency.spend", spend)
    monkeypatch.setattr("dtpvit.tasks.step_clock.perf_counter", lambda: now[0])


class Slow(L.LightningModule):
    """Returns a bare loss; its times and the memory it takes are given, in seconds and MiB."""

    def __init__(self, step=0.0, validation=0.0, save=0.0, fail_at=None):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.step, self.validation, self.save, self.fail_at = step, validation, save, fail_at
        self.memory = {"step": {}, "validation": 0}

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise ZeroDivisionError
        spend(self.step)
        self.allocate(self.memory["step"].get(self.current_epoch, 0))
        return self.net(batch["name"][1][0]).square().mean()

    def validation_step(self, batch, batch_idx):
        spend(self.validation)
        self.allocate(self.memory["validation"])

    def on_save_checkpoint(self, checkpoint):
        spend(self.save)

    def allocate(self, mib):
        torch.ones(mib, 2**18).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Samples(Dataset):
    """Batches of 5 rows, not at once found in what holds them."""

    def __init__(self, count, seconds=0.0):
        self.count, self.seconds = count, seconds

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError
        spend(self.seconds)
        return {"name": ("text", [torch.ones(5, 3)])}


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, *arguments):
        self.samples = Samples(*arguments)

    def __iter__(self):
        return iter(self.samples)


class SlowlyOpened:
    """A loader that takes its time before it can be asked for a batch, as one that spawns workers does."""

    def __init__(self, samples, seconds):
        self.samples, self.seconds = samples, seconds

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        spend(self.seconds)
        return iter(self.samples)


def loader(samples, **options):
    return DataLoader(samples, batch_size=None, **options)


class Save(L.Callback):
    """Checkpoints at the places where runs are killed or callbacks save; ModelCheckpoint may be behind any of them."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, place):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{place}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *unused):
        self.save(trainer, "step")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, "end")


def fit(folder, module, train, validation=None, callbacks=(), ckpt_path=None, **options):
    """Train with the monitor."""
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults = {"logger": False, "enable_checkpointing": checkpointing, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder, "max_epochs": 1}
    trainer = L.Trainer(**(defaults | options), callbacks=[EfficiencyMonitor(), *callbacks])
    trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    return trainer


def rows(folder):
    with (Path(folder) / "efficiency.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(row):
    return {name: float(value) for name, value in row.items() if value}


def samples(row):
    return row["samples_per_second"] * row["step_seconds"] * row["steps"]


# Tokens


class Watch(L.Callback):
    """What the encoder itself reports, and whether what the step returns keeps a graph alive."""

    def __init__(self):
        self.encodings, self.graphs = [], []

    def on_train_start(self, trainer, pl_module):
        trunk = pl_module.model.visual.trunk
        trunk.register_forward_hook(lambda module, inputs, output: self.encodings.append(output))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.graphs += [outputs["loss"].requires_grad, outputs["token_count"].shortest.requires_grad]


@pytest.mark.parametrize("pieces", [1, 4])
def test_tokens_are_those_of_the_encoder_and_metrics_those_of_the_file(pieces, tmp_path):
    import pairs  # here, so that the processes of another test need not load the task as well

    watch, logger = Watch(), CSVLogger(tmp_path, name="", version="")
    callbacks = [watch, EfficiencyMonitor()]
    model = pairs.task(accum_freq=pieces)
    pairs.fit(model, tmp_path, max_steps=2, callbacks=callbacks, default_root_dir=tmp_path, logger=logger)
    (row,) = rows(tmp_path)
    assert tuple(row) == COLUMNS and (row["epoch"], row["steps"]) == ("0", "2")
    row = numbers(row)
    # With pieces, the encoder saw every image twice: the same means and extremes.
    lengths = torch.cat([encoding.tokens.lengths for encoding in watch.encodings]).double()
    assert lengths.min() < lengths.max()
    assert row["tokens_mean"] == pytest.approx(lengths.mean().item(), rel=1e-4)
    assert (row["tokens_min"], row["tokens_max"]) == (lengths.min(), lengths.max())
    assert row["compression"] == pytest.approx(64 / (lengths.mean().item() - 1), rel=1e-4)  # 8 x 8 patches
    assert samples(row) == pytest.approx(24, rel=1e-3)  # two steps of 12 pairs
    assert not any(watch.graphs)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        (logged,) = [line for line in csv.DictReader(file) if line["efficiency/step_seconds"]]
    assert (logged["epoch"], logged["step"]) == ("0", "1")
    for name in COLUMNS[2:]:
        assert float(logged[f"efficiency/{name}"]) == pytest.approx(row[name], rel=1e-4), name


class Counted(Slow):
    """Names tokens of two images a step, which differ between the ranks and from step to step."""

    def training_step(self, batch, batch_idx):
        shortest, longest = 5 - self.global_rank, 11 - batch_idx
        tokens = shortest + longest
        count = TokenCount(2, 32, tokens, tokens - 2, longest, torch.tensor(shortest))
        return {"loss": super().training_step(batch, batch_idx), "token_count": count}


def test_two_processes_are_counted_together(tmp_path):
    several = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    fit(tmp_path, Counted(step=0.01), loader(Samples(3)), **several)
    (row,) = rows(tmp_path)
    assert (row["steps"], row["tokens_min"], row["tokens_max"]) == ("3", "4", "11")
    row = numbers(row)
    assert samples(row) == pytest.approx(2 * 3 * 2, rel=1e-3)  # ranks, steps, images
    tokens = 3 * (5 + 4) + 2 * (11 + 10 + 9)
    assert row["tokens_mean"] == pytest.approx(tokens / 12, rel=1e-4)
    assert row["compression"] == pytest.approx(12 * 16 / (tokens - 12), rel=1e-4)


# Time


@pytest.mark.parametrize(("kind", "fetched"), [(Samples, 8), (Stream, 7)])
def test_waiting_is_for_data_and_validation_and_checkpoints_do_not_count(kind, fetched, clock, tmp_path):
    """20 ms a step beside 50 for its data, of which Lightning fetches the first of a stream before training starts."""
    module = Slow(step=0.02, validation=0.5, save=0.5)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    validation = SlowlyOpened(Samples(1), 0.5)
    options = {"val_check_interval": 4, "num_sanity_val_steps": 0, "callbacks": [every]}
    fit(tmp_path, module, loader(kind(8, 0.05)), validation, **options)
    row = numbers(rows(tmp_path)[0])
    assert row["steps"] == 8 and samples(row) == pytest.approx(8 * 5, rel=1e-3)
    whole = fetched * 0.05 + 8 * 0.02
    assert row["step_seconds"] == pytest.approx(whole / 8, rel=1e-5)
    assert row["data_wait"] == pytest.approx(fetched * 0.05 / whole, rel=1e-5)
    assert not set(row) & set(TOKENS) and rows(tmp_path)[0]["tokens_mean"] == ""


def test_a_busy_step_is_no_waiting(clock, tmp_path):
    fit(tmp_path, Slow(step=0.1), loader(Samples(5)))
    row = numbers(rows(tmp_path)[0])
    assert row["step_seconds"] == pytest.approx(0.1) and row["data_wait"] == 0


def start_slowly(worker):
    time.sleep(1.0)


def test_the_start_of_workers_is_waiting_in_every_epoch(tmp_path):
    train = loader(Samples(2), num_workers=1, worker_init_fn=start_slowly)
    fit(tmp_path, Slow(), train, max_epochs=2)
    first, second = map(numbers, rows(tmp_path))
    for row in (first, second):
        assert row["data_wait"] > 0.7 and row["step_seconds"] > 0.35


def test_so_is_all_else_before_the_first_batch(clock, tmp_path):
    """Not in the first epoch, for which Lightning opens the loader before training starts."""
    fit(tmp_path, Slow(step=0.05), SlowlyOpened(Samples(2), 0.6), max_epochs=2)
    first, second = map(numbers, rows(tmp_path))
    assert (first["data_wait"], first["step_seconds"]) == pytest.approx((0, 0.05))
    assert (second["data_wait"], second["step_seconds"]) == pytest.approx((0.6 / 0.7, 0.35), rel=1e-5)


def fit_with_memory(folder):
    module = Slow()
    module.memory = {"step": {1: 200}, "validation": 500}
    fit(folder, module, loader(Samples(2)), loader(Samples(1)), max_epochs=3, num_sanity_val_steps=0)


def test_peak_memory_is_of_the_epoch_s_training(tmp_path):
    """In MiB: 200 more in the second epoch's steps, and 500 in each validation, which does not count."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process set its peak memory back")
    # In a process of its own: in this one, memory that earlier tests have freed might be used again.
    call = f"import test_efficiency, pathlib; test_efficiency.fit_with_memory(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, check=True, timeout=500)
    first, second, third = (numbers(row)["peak_memory_mib"] for row in rows(tmp_path))
    assert 150 < second - first < 300 and second - third > 100


# Rows


def test_a_run_killed_within_an_epoch_writes_one_row_for_it_when_resumed(tmp_path):
    train, profiler = loader(Samples(4)), SimpleProfiler()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Slow(fail_at=5), train, callbacks=[Save(tmp_path)], max_epochs=3, profiler=profiler)
    assert not {"start", "stop"} & set(vars(profiler))  # heard, and left as it was
    before = rows(tmp_path)
    assert [row["epoch"] for row in before] == ["0"]
    for _ in range(2):  # the second time rows of the same and of later epochs are there already
        trainer = fit(tmp_path, Slow(), train, max_epochs=3, ckpt_path=tmp_path / "step-5.ckpt")
        assert not {"start", "stop"} & set(vars(trainer.profiler))
        after = rows(tmp_path)
        assert [(row["epoch"], row["steps"]) for row in after] == [("0", "4"), ("1", "3"), ("2", "4")]
        assert after[0] == before[0]


@pytest.mark.parametrize("place", ["step", "validation", "epoch", "end"])
def test_a_run_resumed_at_the_end_of_an_epoch_keeps_its_row(place, tmp_path):
    train = loader(Samples(4))
    fit(tmp_path, Slow(), train, loader(Samples(1)), callbacks=[Save(tmp_path)])
    before = rows(tmp_path)
    fit(tmp_path, Slow(), train, loader(Samples(1)), max_epochs=2, ckpt_path=tmp_path / f"{place}-4.ckpt")
    after = rows(tmp_path)
    assert [(row["epoch"], row["steps"]) for row in after] == [("0", "4"), ("1", "4")]
    assert after[0] == before[0]
