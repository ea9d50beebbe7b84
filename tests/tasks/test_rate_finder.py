"""The learning-rate range test: one base rate, the groups' ratios kept, and a task that is as it was."""

import math
import sys
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch

from dtpvit.errors import UserError
from dtpvit.tasks.classification import Classification
from dtpvit.tasks.rate_curve import RateCurve
from dtpvit.tasks.rate_finder import find_learning_rate
from dtpvit.tasks.trials import TRIAL

sys.path.insert(0, str(Path(__file__).parent))
import labelled
import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


class Parabola(L.LightningModule):
    """1/2 ``curvature`` x^2, followed by plain gradient descent at ``ratio`` times the learning rate."""

    def __init__(self, curvature=1.0, ratio=1.0, learning_rate=0.5):
        super().__init__()
        self.save_hyperparameters()
        self.x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.validated = 0

    def training_step(self, batch, batch_idx):
        return 0.5 * self.hparams["curvature"] * self.x.square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        rate = self.hparams["ratio"] * self.hparams["learning_rate"]
        return torch.optim.SGD([{"params": [self.x], "lr": rate}], lr=123.0)


class Nothing(L.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(6, 1))

    val_dataloader = train_dataloader


def sweep(task, data=None, folder=".", trainer=None, **options):
    return find_learning_rate(
        labelled.trainer(**TRIAL, default_root_dir=folder, **(trainer or {})), task, data or Nothing(), **options
    )


class Watched(Classification):
    """Keeps the rates of all groups at every step, of its copies too: its own hook comes before the finder's."""

    seen: ClassVar[list[list[float]]] = []

    def configure_optimizers(self):
        made = super().configure_optimizers()
        made["optimizer"].register_step_post_hook(lambda o, *_: self.seen.append([g["lr"] for g in o.param_groups]))
        return made


def test_every_group_keeps_its_ratio_at_every_step(tmp_path):
    options = {"model": labelled.config(), "num_classes": labelled.CLASSES, "warmup_steps": 1000}
    task = Watched(**options, learning_rate=0.004, layer_decay=0.5, predictor_lr_scale=3.0)
    curve = sweep(task, labelled.Images(), tmp_path, min_lr=1e-6, max_lr=1e-2, num_training=20)
    seen = task.seen.copy()
    labelled.fit(task, max_steps=1, limit_val_batches=0)
    full = [group["initial_lr"] for group in task.trainer.optimizers[0].param_groups]
    assert len({f"{rate:.3g}" for rate in full}) == 6  # embedding, three blocks, head; the reducer in block 1
    assert len(seen) == len(curve.rates) == 20
    for base, rates in zip(curve.rates, seen, strict=True):
        assert rates == pytest.approx([base * rate / 0.004 for rate in full], rel=1e-9)
    steps = [math.log(b / a) for a, b in zip(curve.rates[1:], curve.rates[2:], strict=False)]
    assert curve.rates[0] == pytest.approx(1e-6) and curve.rates[-1] <= 1e-2
    assert steps == pytest.approx([math.log(1e4) / 20] * 18)


@pytest.mark.parametrize(("curvature", "ratio"), [(1.0, 1.0), (1.0, 0.01), (50.0, 0.1)])
def test_the_curve_is_in_units_of_the_base_rate(curvature, ratio, tmp_path):
    """Gradient descent on a parabola has a closed form."""
    range_of = {"min_lr": 1e-3 / (curvature * ratio), "max_lr": 10 / (curvature * ratio)}
    curve = sweep(Parabola(curvature, ratio), folder=tmp_path, num_training=100, **range_of)
    x = 1.0
    for rate, loss in zip(curve.rates, curve.losses, strict=True):
        assert loss == pytest.approx(0.5 * curvature * x**2, rel=1e-5)
        x *= 1 - curvature * ratio * rate
    unit = 1 / (curvature * ratio)
    # Half of the fall of x is over once the rates so far add up to log 2 units, and x^2 falls fastest at log sqrt 2.
    sums = torch.tensor(curve.rates).cumsum(0) / unit
    steepest = curve.rates[int((sums > math.log(2) / 2).nonzero()[0])]
    assert curve.suggestion == pytest.approx(steepest, rel=0.35)


def test_the_sweep_ends_where_the_loss_explodes(tmp_path):
    """On a parabola of curvature 1 at the tenth of the rate: from 20 on each step is larger than the one before."""
    curve = sweep(Parabola(ratio=0.1), folder=tmp_path, min_lr=15.0, max_lr=1e4, num_training=100)
    least = curve.losses.index(min(curve.losses))
    assert curve.rates[least - 1] < 20 <= curve.rates[least]
    assert curve.losses[-5] > curve.losses[0] and curve.rates[-1] < 200


def test_the_loss_of_a_step_is_that_of_all_batches_accumulated(tmp_path):
    whole = sweep(Parabola(), folder=tmp_path, num_training=30)
    pieces = sweep(Parabola(), folder=tmp_path, num_training=30, trainer={"accumulate_grad_batches": 2})
    assert len(pieces.rates) == 30
    assert pieces.losses == pytest.approx(whole.losses)


def test_nothing_is_validated_and_nothing_left_in_the_folder(tmp_path):
    task = Parabola()
    seen = []
    task.on_validation_start = lambda: seen.append("validation")
    assert len(sweep(task, folder=tmp_path, num_training=20).rates) == 20
    assert not seen and not list(tmp_path.iterdir())


def test_a_sweep_ends_when_the_loss_is_no_number(tmp_path):
    task = labelled.task(learning_rate=1e-3, optimizer="sgd", max_nonfinite=3)
    curve = sweep(task, labelled.Images(), tmp_path, min_lr=1e-3, max_lr=1e30, num_training=40)
    assert len(curve.losses) < 35 and curve.rates[-1] < 1e25


CASES = {
    "classification": (lambda: labelled.task(layer_decay=0.7, model=labelled.config(drop_path=0.3)), labelled.Images),
    "contrastive": (pairs.task, lambda: pairs.Pairs(4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_afterwards_is_one_without(case, tmp_path):
    make, data = CASES[case]
    weights = []
    for tunes in (False, True):
        task, module = make(), data()
        torch.manual_seed(5)
        before = labelled.weights(task)
        if tunes:
            curve = sweep(task, module, tmp_path, num_training=20)
            assert len(curve.losses) == 20
        labelled.check_same(labelled.weights(task), before)
        assert task.training and task._trainer is None
        labelled.fit(task, module, limit_val_batches=0)
        weights.append(labelled.weights(task))
    labelled.check_same(*weights)


def test_a_teacher_teaches_in_the_sweep(taught_by, tmp_path):
    """Lightning's tuner trains before it tells the task that the fit has started."""
    task = labelled.task(teacher={**taught_by, "tokens": "cosine"}, mode="frozen")
    curve = sweep(task, labelled.Images(), tmp_path, num_training=20)
    assert all(map(math.isfinite, curve.losses))


# The curve


def rates(count):
    return tuple(10 ** (-6 + 6 * index / count) for index in range(count))


def fall(count, noise=0.0, where=-3.0, depth=1.0):
    """A step down around 10^where, an explosion at the end."""
    exponents = torch.tensor(rates(count), dtype=torch.float64).log10()
    losses = 2 - depth * torch.sigmoid(4 * (exponents - where)) + 1e4 * (exponents > -1) + noise * torch.randn(count)
    return RateCurve(rates(count), tuple(losses.tolist()))


@pytest.mark.parametrize("where", [-4.0, -3.0, -2.5])
@pytest.mark.parametrize(("count", "noise"), [(40, 0.0), (100, 0.1), (300, 0.2)])
def test_the_suggestion_is_where_the_loss_falls_most_steeply(where, count, noise):
    curve = fall(count, noise, where)
    assert abs(math.log10(curve.suggestion) - where) < 0.4
    assert curve.suggestion < curve.lowest < 0.12


def test_noise_is_no_suggestion():
    found = [fall(60, 0.1, depth=0.0).suggestion for _ in range(100)]
    assert sum(rate is not None for rate in found) <= 5
    assert RateCurve(rates(40), (1.0,) * 40).suggestion is None
    assert RateCurve(rates(40), rates(40)).suggestion is None  # it only rises
    assert RateCurve(rates(1), (math.nan,)).suggestion is None
    assert RateCurve(rates(30), (1.0,) * 29 + (math.inf,)).lowest is None


def test_the_curve_is_written_and_drawn(tmp_path):
    curve = fall(50, 0.05)
    curve.write(tmp_path / "curve.csv")
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0] == "learning_rate,loss,smoothed_loss" and len(lines) == 51
    assert [float(value) for value in lines[1].split(",")[:2]] == pytest.approx(
        [curve.rates[0], curve.losses[0]], rel=1e-5
    )
    for number, drawn in enumerate([curve, fall(50, depth=0.0), RateCurve(rates(1), (math.nan,))]):
        drawn.draw(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


# Mistakes


def frozen():
    task = labelled.task()
    task.requires_grad_(False)
    return task


class TwoOptimizers(Parabola):
    def configure_optimizers(self):
        return [torch.optim.SGD([self.x], lr=1.0), torch.optim.SGD([self.x], lr=1.0)]


class NoRate(Parabola):
    def __init__(self):
        super().__init__()
        del self.hparams["learning_rate"]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Parabola, {"num_training": 19}, "num_training is 19; a curve needs at least 20 steps"),
        (Parabola, {"min_lr": 1.0, "max_lr": 0.1}, "from 1 to 0.1; give 0 < min_lr < max_lr"),
        (Parabola, {"min_lr": 0.0}, "from 0 to 1; give"),
        (frozen, {}, "nothing of this Classification learns"),
        (lambda: Parabola(learning_rate=0.0), {}, "learning_rate is 0, of which no group has a multiple"),
        (NoRate, {}, "NoRate has no hyper-parameter learning_rate or lr"),
        (TwoOptimizers, {}, "a task with one optimizer"),
    ],
)
def test_what_cannot_be_swept_is_refused(task, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sweep(task(), folder=tmp_path, **options)
