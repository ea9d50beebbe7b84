"""Visual instruction tuning: what learns, what a checkpoint holds, and how one stage follows another."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from PIL import Image

from dtpvit._run_folder import StepSeed
from dtpvit.errors import UserError
from dtpvit.evaluation.towers import load_tower
from dtpvit.interop.assistant import Question, load_assistant
from dtpvit.interop.export import export
from dtpvit.interop.instruction_models import load_instruction_model
from dtpvit.tasks.contrastive import Contrastive

sys.path.insert(0, str(Path(__file__).parent))
import conversing
import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return conversing.language_model(tmp_path_factory.mktemp("language_model"))


def changed(before, module):
    after = {name: value for name, value in module.named_parameters()}
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


DENSE = {**conversing.ENCODER, "reducers": {}}

STAGES = {
    "projector": ({}, ("model.projector.",)),
    "reducers too": ({"tune_vision": "reducers"}, ("model.projector.", "model.vision.reducers.")),
    "language model": ({"tune_language_model": "full"}, ("model.projector.", "model.language_model.")),
    "adapters": ({"tune_language_model": "lora", "lora": {"r": 2}}, ("model.projector.", "lora_")),
    "everything": (
        {"tune_language_model": "full", "tune_vision": "full"},
        ("model.projector.", "model.language_model.", "model.vision."),
    ),
    "late blocks": (
        {"tune_projector": False, "tune_vision": "partial", "tune_vision_from": 2},
        ("model.vision.blocks.2.", "model.vision.norm."),
    ),
    "what is read": (
        {"tune_vision": "full", "select_layer": -2},
        ("model.projector.", "model.vision.blocks.0.", "model.vision.blocks.1.", "model.vision.reducers.1.")
        + tuple(f"model.vision.{name}" for name in ("cls_token", "pos_embed", "patch_embed")),
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_exactly_what_is_tuned_learns(name, folder):
    options, learning = STAGES[name]
    module = conversing.task(folder, **options)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    conversing.fit(module, conversing.Conversations(steps=3))
    found = changed(before, module)
    wanted = {name for name in before if any(part in name for part in learning)}
    # An adapter's second matrix starts at zero, so that the first has no gradient in the first step, but has later.
    assert found == wanted


def test_learns_to_name_what_is_seen(folder):
    module = conversing.task(folder, tune_language_model="full", position=True)
    trainer = conversing.fit(module, conversing.Conversations(steps=200))
    trainer.validate(module, conversing.Conversations(), verbose=False)
    figures = trainer.callback_metrics
    assert figures["val/exact"] == 1.0
    assert figures["val/loss"] < 0.1
    assert 1 <= figures["val/visual_tokens_min"] <= figures["val/visual_tokens"] <= figures["val/visual_tokens_max"]
    assert figures["val/cut_tokens"] == 0 and 0 < figures["val/gmacs"] < 0.1


@pytest.mark.parametrize("tuned", ["frozen", "full", "lora"])
def test_recomputing_layers_changes_no_gradient(tuned, folder):
    found = []
    for recompute in (False, True):
        options = {"lora": {"r": 2, "lora_dropout": 0.0}, "tune_vision": "reducers"}
        module = conversing.task(folder, tune_language_model=tuned, grad_checkpointing=recompute, **options)
        module.train()
        read = module._read(conversing.batch(module.chat))
        read.logits.logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_leaves_out_what_is_frozen_of_the_language_model(folder):
    for options, kept in (
        ({}, 0),
        ({"tune_language_model": "lora", "lora": {"r": 2}}, "lora_"),
        ({"tune_language_model": "full"}, ""),
    ):
        names = [n for n in conversing.task(folder, **options).state_dict() if n.startswith("language_model.")]
        assert (not names) if kept == 0 else (names and all(kept in name for name in names))


def test_stage_two_starts_from_stage_one(folder, tmp_path):
    first = conversing.task(folder, template="plain")
    trainer = conversing.fit(first, conversing.Conversations(steps=2))
    trainer.save_checkpoint(tmp_path / "stage1.ckpt")
    second = conversing.task(folder, encoder=None, init=str(tmp_path / "stage1.ckpt"), tune_language_model="lora")
    assert second.hparams["encoder"] == conversing.ENCODER
    conversing.fit(second, conversing.Conversations(), max_steps=0)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_what_the_next_run_would_lose_or_read_otherwise_is_refused(folder, tmp_path):
    trainer = conversing.fit(conversing.task(folder, tune_language_model="full", select_layer=-2))
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    init = {"encoder": None, "init": str(tmp_path / "full.ckpt")}
    with pytest.raises(UserError, match="this run's checkpoints would leave it out"):
        conversing.fit(conversing.task(folder, **init, select_layer=-2), max_steps=0)
    with pytest.raises(UserError, match=r"select_layer is -1 where .* was trained with -2"):
        conversing.fit(conversing.task(folder, **init, tune_language_model="full"), max_steps=0)


@pytest.mark.parametrize("options", [{}, {"tune_language_model": "full"}])
def test_a_batch_of_text_alone_is_a_batch(options, folder):
    module = conversing.task(folder, **options)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    conversing.fit(module, conversing.Conversations(size=2, text_only=2))
    assert bool(changed(before, module)) == bool(options)


def test_an_empty_question_is_refused(folder, tmp_path):
    trainer = conversing.fit(conversing.task(folder, template="plain"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="a question is empty"):
        load_assistant(tmp_path / "last.ckpt").answer([Question.of("what?")])


def test_the_encoder_may_come_from_another_task(folder, tmp_path):
    clip = pairs.task()
    trainer = L.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(clip, pairs.Pairs())
    trainer.save_checkpoint(tmp_path / "clip.ckpt")
    module = conversing.task(folder, encoder=None, init=str(tmp_path / "clip.ckpt"))
    assert module.hparams["encoder"] == pairs.config()["vision"]
    conversing.fit(module, max_steps=0)
    theirs = Contrastive.load_from_checkpoint(tmp_path / "clip.ckpt").model.visual.trunk.state_dict()
    for name, value in module.model.vision.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tuned, folder, tmp_path):
    options = {"tune_language_model": tuned, "tune_vision": "reducers", "lora": {"r": 2}}

    class Halfway(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(resume=None, callbacks=()):
        module = conversing.task(folder, **options)
        data = conversing.Conversations(steps=2)
        conversing.fit(module, data, resume=resume, max_epochs=2, callbacks=[StepSeed(0), *callbacks])
        return module.state_dict()

    whole = run(callbacks=[Halfway()])
    resumed = run(resume=tmp_path / "half.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0, equal_nan=True)


def test_two_processes_equal_one_on_the_joined_batch(folder, tmp_path):
    """Every token weighs the same, though one rank has three answers about images and the other one without any."""
    options = {"tune_language_model": "full", "tune_vision": "full", "optimizer": "sgd", "encoder": DENSE}
    one = conversing.task(folder, **options)
    conversing.fit(one)
    two = conversing.task(folder, **options)
    several = {"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False}
    conversing.fit(two, **several)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuned", ["frozen", "full", "lora"])
def test_checkpoint_and_exported_folder_answer_alike(tuned, folder, tmp_path):
    module = conversing.task(folder, tune_language_model=tuned, lora={"r": 2})
    trainer = conversing.fit(module, conversing.Conversations(steps=30))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), out=str(tmp_path / "folder"))
    red, blue = Image.new("RGB", (40, 30), (250, 30, 30)), Image.new("RGB", (32, 32), (30, 30, 250))
    questions = [
        Question.of("what colour is it?", red),
        Question.of("what colour is it?", blue),
        Question.of("is it red?"),
    ]
    first = load_assistant(tmp_path / "last.ckpt").answer(questions, max_new_tokens=4)
    second = load_assistant(tmp_path / "folder").answer(questions, max_new_tokens=4)
    assert [(a.text, a.visual_tokens, a.prompt_tokens) for a in first] == [
        (a.text, a.visual_tokens, a.prompt_tokens) for a in second
    ]
    assert first[0].visual_tokens > 0 and first[2].visual_tokens == 0
    assert first[0].batch_prefill_s > 0
    alone = [load_assistant(tmp_path / "folder").answer([each], max_new_tokens=4)[0].text for each in questions]
    assert alone == [answer.text for answer in first]


def test_trained_logits_survive_the_folder(folder, tmp_path):
    module = conversing.task(folder, tune_language_model="lora", lora={"r": 2}, tune_vision="reducers")
    trainer = conversing.fit(module, conversing.Conversations(steps=5))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module.eval()
    batch = conversing.batch(module.chat)
    with torch.no_grad():
        wanted = module._read(batch).logits
        found = load_instruction_model(tmp_path / "last.ckpt")
        images = module.normalise(batch["image"])
        torch.testing.assert_close(found.model.read(batch, images, max_length=128).logits, wanted, atol=1e-4, rtol=1e-4)


def test_the_encoder_alone_is_a_tower_to_be_measured(folder, tmp_path):
    module = conversing.task(folder, tune_vision="full")
    trainer = conversing.fit(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    tower = load_tower(str(tmp_path / "last.ckpt"))
    images = torch.randn(2, 3, 32, 32)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(images)[0], module.model.vision(images))
    assert tower.mean == tuple(module.config["mean"])
    config = {"model": {"init_args": {"language_model": folder, "encoder": conversing.ENCODER}}}
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(config))
    assert load_tower(str(tmp_path / "tuning.yaml")).image_size == (32, 32)


def test_what_does_not_fit_is_said(folder, tmp_path):
    with pytest.raises(UserError, match="encoder is missing"):
        conversing.task(folder, encoder=None)
    with pytest.raises(UserError, match="tune_language_model is 'half'"):
        conversing.task(folder, tune_language_model="half")
    with pytest.raises(UserError, match="nothing would learn"):
        conversing.task(folder, tune_projector=False)
    with pytest.raises(UserError, match="this encoder's have nothing to learn"):
        conversing.task(folder, encoder=DENSE, tune_vision="reducers")
    with pytest.raises(UserError, match="expected a block"):
        conversing.task(folder, tune_vision="partial", tune_vision_from=3)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="does not record which encoder"):
        conversing.task(folder, encoder=None, init=str(tmp_path / "other.ckpt"))


def test_a_question_needs_as_many_images_as_places(folder, tmp_path):
    trainer = conversing.fit(conversing.task(folder))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assistant = load_assistant(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="0 images for 1 places"):
        assistant.answer([Question(Question.of("a", Image.new("RGB", (8, 8))).turns)])
