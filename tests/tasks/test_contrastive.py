"""The contrastive task: gradients, accumulation, several processes, loss that is no number, checkpoints."""

import copy
import json
import math
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from dtpvit.errors import UserError
from dtpvit.tasks.contrastive import Contrastive
from dtpvit.tasks.optimization import decay_groups

sys.path.insert(0, str(Path(__file__).parent))
import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


def load(folder, rank=0, step=0):
    return torch.load(Path(folder) / f"rank{rank}-step{step}.pt", weights_only=True)


def steps(folder, rank=0):
    return [load(folder, rank, step) for step in range(3)]


@pytest.fixture(scope="module", params=["regression", "symmetric"])
def estimator(request):
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory, estimator):
    """Three steps of one process on the whole batch; the later ones know the baseline of the one before."""
    folder = tmp_path_factory.mktemp("whole")
    pairs.fit(pairs.task(model=pairs.config(estimator=estimator)), folder, max_steps=3)
    return steps(folder)


def test_the_contrastive_loss_alone_teaches_every_boundary_parameter(whole):
    grads = whole[0]["grads"]
    assert len([name for name in grads if "boundary" in name]) == 5  # norm and fc1 with biases, the last layer without
    assert set(grads) == {name for name, _ in pairs.task().named_parameters()}
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


@pytest.mark.parametrize("pieces", [2, 3])
def test_accumulation_keeps_negatives_boundaries_loss_and_gradients(pieces, estimator, whole, tmp_path):
    pairs.fit(pairs.task(model=pairs.config(estimator=estimator), accum_freq=pieces), tmp_path, max_steps=3)
    check_same([steps(tmp_path)], whole, first_pass=pieces)


def test_accumulation_replays_stochastic_depth(tmp_path):
    """With random branches both passes must drop the same ones: else the gradient is of another loss."""
    config = pairs.config()
    config["vision"]["drop_path"] = 0.5
    model = pairs.task(model=config, accum_freq=3)
    batch = pairs.batch()
    model.loss = open_clip.ClipLoss()
    model.train()
    torch.manual_seed(5)
    features = model._cached_features(batch, 3)
    cached = model._cached
    for micro, state, expected in zip(cached.micro_batches, cached.states, cached.image.split(4), strict=True):
        state.restore()
        again = cached.forward(micro, cached.thresholds)
        torch.testing.assert_close(again.image, expected)
    assert features.image is cached.image


@pytest.mark.parametrize("pieces", [1, 2])
def test_two_processes_equal_one_on_the_joined_batch(pieces, estimator, whole, tmp_path):
    several = {"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False}
    model = pairs.task(model=pairs.config(estimator=estimator), accum_freq=pieces)
    pairs.fit(model, tmp_path, max_steps=3, **several)
    check_same([steps(tmp_path, rank) for rank in range(2)], whole, first_pass=pieces if pieces > 1 else 0)


def check_same(ranks, whole, first_pass):
    """Boundaries of all images, the mean loss and the averaged gradients equal those of one process.

    Exactly but for rounding in the first step; by the third, weights have drifted apart by that rounding, and the
    logarithm of small votes magnifies it.
    """
    for step, tolerance in ((0, 1e-5), (2, 1e-3)):
        expected, found = whole[step], [rank[step] for rank in ranks]
        sources = []
        for rank in found:  # with accumulation: scores, cached features, then features with a graph
            sources += rank["sources"][first_pass : 2 * first_pass] if first_pass else rank["sources"]
            torch.testing.assert_close(rank["threshold"], expected["threshold"], rtol=0, atol=2 * tolerance)
            assert set(rank["grads"]) == set(expected["grads"])
            for name, grad in rank["grads"].items():
                wanted = expected["grads"][name]
                atol = tolerance * float(wanted.abs().max())
                torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=atol, msg=f"{name} at step {step}")
        assert torch.equal(torch.cat(sources), torch.cat(expected["sources"]))
        loss = torch.stack([rank["loss"] for rank in found]).mean()
        torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spoil", ["nan", "inf"])
def test_a_step_without_a_finite_loss_changes_nothing_and_stops_after_some(spoil, tmp_path):
    model = pairs.task(max_nonfinite=3, optimizer="adamw")
    before = copy.deepcopy(model.state_dict())
    model.guard.patience = 99
    real = model._contrastive_loss
    model._contrastive_loss = lambda image, text: real(image, text) * float(spoil)
    pairs.fit(model, tmp_path, max_steps=2)
    after = model.state_dict()
    assert model.guard.skipped == 2
    assert all(torch.equal(after[n], before[n]) for n in after if "calibration" not in n)
    model.guard.patience = 3
    listed = tmp_path / "run" / "nonfinite-rank0.jsonl"
    with pytest.raises(UserError, match=f"3 steps in a row; lower the learning rate.+ are listed in {listed}"):
        pairs.fit(model, tmp_path, max_steps=5, default_root_dir=tmp_path / "run")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(rows) == 3 and {row["loss"] for row in rows} == {spoil}
    assert all(row["keys"] == [f"pairs/{number}" for number in range(12)] for row in rows)


def test_the_samples_of_all_batches_of_a_bad_step_are_listed_and_of_no_sound_one(tmp_path):
    model, real, steps = pairs.task(max_nonfinite=2), pairs.Contrastive._contrastive_loss, []

    def bad_but_once(image, text):
        steps.append(len(steps))
        return real(model, image, text) * (1.0 if steps[-1] in (2, 3) else float("nan"))

    model._contrastive_loss = bad_but_once
    with pytest.raises(UserError, match="2 steps in a row"):
        pairs.fit(model, tmp_path, max_steps=9, accumulate_grad_batches=2, default_root_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "nonfinite-rank0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3] and all(len(row["keys"]) == 24 for row in rows)


def test_siglip_trains_its_bias(tmp_path):
    model = pairs.task(model=pairs.config(init_logit_bias=-10.0, init_logit_scale=math.log(10)))
    pairs.fit(model, tmp_path)
    assert isinstance(model.loss, open_clip.loss.SigLipLoss)
    assert load(tmp_path)["grads"]["model.logit_bias"].any()


def test_logit_scale_is_clamped(tmp_path):
    model = pairs.task(learning_rate=1e-9)
    with torch.no_grad():
        model.model.logit_scale.fill_(7.0)
    saved = []

    class Save(pairs.L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            saved.append(module.model.logit_scale.item())

    pairs.fit(model, tmp_path, callbacks=[Save()])
    assert saved == [pytest.approx(math.log(100))]  # in checkpoints too, which are written then


def test_clipping_works_with_accumulation(tmp_path):
    """The first step of timm's sgd (rate 1, Nesterov momentum 0.9) is 1.9 clipped gradients long."""
    model = pairs.task(accum_freq=2, learning_rate=1.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    pairs.fit(model, tmp_path, gradient_clip_val=1e-3)
    moved = [(new.detach() - old).flatten() for new, old in zip(model.parameters(), before, strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(1.9e-3, rel=2e-2)


def test_only_matrices_decay():
    model = pairs.task()
    decay, rest = decay_groups(model.named_parameters(), 0.2)
    shapes = {id(p): n for n, p in model.named_parameters()}
    names = [[shapes[id(p)] for p in group["params"]] for group in (decay, rest)]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    assert "model.token_embedding.weight" in names[0] and "model.visual.trunk.blocks.0.mlp.fc1.weight" in names[0]
    for name in ("logit_scale", "positional_embedding", "visual.trunk.pos_embed", "visual.trunk.cls_token"):
        assert f"model.{name}" in names[1]
    assert sum(map(len, names)) == len(shapes)


def test_a_checkpoint_is_open_clip_s(tmp_path):
    """Lightning's own file, unchanged, by a published name; with the same features in open_clip's towers."""
    model = Contrastive(model="DTP-ViT-B-32-10x", warmup_steps=1)
    text = model.tokenize(["a photo of a dog", "snow"])
    images = torch.rand(2, 3, 224, 224)
    trainer = pairs.L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    theirs, _, _ = open_clip.create_model_and_transforms("DTP-ViT-B-32-10x", pretrained=str(tmp_path / "last.ckpt"))
    assert set(names) == set(theirs.state_dict())
    model.eval(), theirs.eval()
    with torch.no_grad():
        for ours, other in zip(model(images, text), theirs(images, text), strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
    again = Contrastive.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, equal_nan=True)


class Positions:
    """Three batches an epoch, from a loader that knows where it is."""

    def __init__(self):
        self.position, self.seen = 0, []

    def __len__(self):
        return 3

    def __iter__(self):
        while self.position < 3:
            self.position += 1
            self.seen.append(self.position)
            batch = pairs.batch(4)
            yield {**batch, "seed": batch["seed"] + self.position}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Killed(Exception):
    pass


class Kill(pairs.L.Callback):
    def on_train_batch_end(self, trainer, *unused):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/killed.ckpt")
        raise Killed


def test_a_run_killed_within_an_epoch_goes_on_with_the_next_batch(tmp_path):
    """Lightning makes the loader for the schedule's length, before it reads where the loader was."""
    options = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    whole, before, after = Positions(), Positions(), Positions()
    expected = pairs.task()
    pairs.L.Trainer(**options).fit(expected, whole)
    with pytest.raises(Killed):
        pairs.L.Trainer(**options, callbacks=[Kill()]).fit(pairs.task(), before)
    resumed = pairs.task()
    pairs.L.Trainer(**options).fit(resumed, after, ckpt_path=tmp_path / "killed.ckpt", weights_only=True)
    assert (whole.seen, before.seen, after.seen) == ([1, 2, 3], [1], [2, 3])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_loss": True, "gather_with_grad": False}, "wrong gradients"),
        ({"accum_freq": 0}, "at least 1"),
        ({"model": "ViT-B-32"}, "no model is called 'ViT-B-32'; expected DTP-ViT-B-"),
        ({"model": {"embed_dim": 4}}, r"lacks \['text', 'vision'\]"),
        ({"model": {"name": "DTP-ViT-B-32-10x", "sight": {}}}, r"unknown entries \['sight'\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        pairs.task(**options)


def rated(rate):
    init = {"compression": 4, "rate": rate, "estimator": "dtp"}
    return pairs.task(model=pairs.config({1: {"class_path": "DynamicPooling", "init_args": init}}), accum_freq=4)


def test_a_rate_loss_of_the_whole_batch_cannot_be_cut(tmp_path):
    with pytest.raises(UserError, match="'ratio' is of a whole batch"):
        pairs.fit(rated("ratio"), tmp_path)


def test_rate_losses_of_unequal_pieces_are_those_of_the_whole_batch():
    model, batch = rated("binomial").train(), pairs.batch(10)  # in pieces of 3, 3, 3 and 1
    torch.testing.assert_close(model._cached_features(batch, 4).penalty, model._features(batch, {}).penalty)
