"""A language model that reads an image's tokens, assembled from tiny parts."""

import json
import shutil

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from dtpvit.errors import UserError
from dtpvit.interop.chat import IMAGE_ID, Turn
from dtpvit.interop.instruction_models import (
    create_instruction_model,
    load_instruction_model,
    save_instruction_model,
)
from dtpvit.interop.language_model import added_adapters, answer_logits
from dtpvit.interop.tiny_language_model import make_tiny_language_model

TEXTS = ["what colour is the shape?", "is there a circle?", "yes", "no", "red", "blue"]
POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 3}}
ENCODER = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "num_heads": 2, "reducers": {1: POOLING}}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    return str(make_tiny_language_model(TEXTS, folder, dim=32, depth=2, num_heads=2, max_length=256))


def built(language_model, **options):
    torch.manual_seed(0)
    made = create_instruction_model(ENCODER, language_model, max_length=128, **options)
    made.model.eval()
    return made


def image(number):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batch_of(chat, *conversations):
    encoded = [chat.encode(turns) for turns in conversations]
    longest = max(len(found.ids) for found in encoded)
    ids = torch.full((len(encoded), longest), chat.pad_id)
    supervised = torch.zeros(len(encoded), longest, dtype=torch.bool)
    for row, found in enumerate(encoded):
        ids[row, : len(found.ids)] = torch.tensor(found.ids)
        supervised[row, : len(found.ids)] = torch.tensor(found.supervised)
    return {"ids": ids, "supervised": supervised, "length": torch.tensor([len(found.ids) for found in encoded])}


def asked(*parts, answer="yes"):
    return [Turn("user", parts), Turn("assistant", (answer,))]


def test_reads_what_the_parts_alone_would(language_model):
    made = built(language_model)
    model, images = made.model, image(1)
    batch = batch_of(made.chat, asked(None, "is there a circle?"))
    read = model.read(batch, images, max_length=128)
    words, (visual, counts, _) = model.language_model, model.see(images)
    ids = batch["ids"][0]
    place = ids.tolist().index(IMAGE_ID)
    embeds = model.embedding(torch.cat((ids[:place], ids[place + 1 :])))
    embeds = torch.cat((embeds[:place], visual, embeds[place:]))
    logits = words(inputs_embeds=embeds[None]).logits[0]
    answer = [i + int(counts) - 1 for i, learned in enumerate(batch["supervised"][0].tolist()) if learned]
    torch.testing.assert_close(read.logits, logits[[i - 1 for i in answer]])
    assert made.chat.text(read.targets.tolist()) == "yes"


def test_a_text_without_image_is_the_language_models_own(language_model):
    made = built(language_model)
    batch = batch_of(made.chat, asked("is there a circle?"))
    read = made.model.read(batch, image(0), max_length=128)
    labels = batch["ids"].masked_fill(~batch["supervised"], -100)
    torch.testing.assert_close(
        cross_entropy(read.logits, read.targets), made.model.language_model(batch["ids"], labels=labels).loss
    )
    assert read.encoding is None


def test_a_conversation_does_not_depend_on_its_batch(language_model):
    made = built(language_model)
    conversations = [
        asked(None, "is there a circle?"),
        asked("is there", answer="no"),
        asked(None, "and", None, answer="red"),
    ]
    images = image(3)
    together = made.model.read(batch_of(made.chat, *conversations), images, max_length=128)
    start = 0
    for turns, own in zip(conversations, (images[:1], images[:0], images[1:]), strict=True):
        alone = made.model.read(batch_of(made.chat, turns), own, max_length=128)
        torch.testing.assert_close(
            together.logits[start : start + len(alone.logits)], alone.logits, atol=1e-5, rtol=1e-4
        )
        start += len(alone.logits)
    assert start == len(together.logits)


def test_turns_are_told_apart(language_model):
    made = built(language_model)
    two = [*asked(None, "a", answer="yes"), *asked("b", answer="no")]
    read = made.model.read(batch_of(made.chat, two, asked("c", answer="red")), image(1), max_length=128)
    said = [made.chat.text(read.targets[read.turn == turn].tolist()) for turn in range(3)]
    assert said == ["yes", "no", "red"]
    assert int(read.turn.max()) == 2


def test_independent_questions_are_read_as_if_each_stood_alone(language_model):
    made = built(language_model)
    questions = [("is there a circle?", "yes"), ("what colour?", "red"), ("no?", "no")]
    alone = [batch_of(made.chat, asked(None, text, answer=answer)) for text, answer in questions]
    shared = alone[0]["ids"][0].tolist().index(IMAGE_ID) + 1
    rows = [each["ids"][0] for each in alone]
    together = {
        "ids": torch.cat([rows[0][:shared], *(row[shared:] for row in rows)])[None],
        "supervised": torch.cat([torch.zeros(shared), *(e["supervised"][0, shared:] for e in alone)])[None].bool(),
        "part": torch.cat(
            [torch.zeros(shared), *(torch.full((len(r) - shared,), i + 1.0) for i, r in enumerate(rows))]
        ).long()[None],
    }
    together["length"] = torch.tensor([together["ids"].shape[1]])
    read = made.model.read(together, image(1), max_length=128)
    wanted = [made.model.read(each, image(1), max_length=128) for each in alone]
    torch.testing.assert_close(read.logits, torch.cat([each.logits for each in wanted]))
    assert read.targets.tolist() == torch.cat([each.targets for each in wanted]).tolist()


def test_generation_agrees_with_reading(language_model):
    made = built(language_model)
    turns = [[Turn("user", (None, "is there a circle?"))], [Turn("user", (None, "what"))]]
    prompts = [made.chat.prompt(each) for each in turns]
    ids = torch.full((2, max(map(len, prompts))), made.chat.pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    length, images = torch.tensor([len(prompt) for prompt in prompts]), image(2)
    said = made.model.generate(ids, length, images, max_length=128, max_new_tokens=3, min_new_tokens=3)
    for row in range(2):
        full = torch.cat((ids[row, : length[row]], said.ids[row]))[None]
        supervised = torch.zeros_like(full, dtype=torch.bool)
        supervised[:, -3:] = True
        batch = {"ids": full, "length": torch.tensor([full.shape[1]]), "supervised": supervised}
        read = made.model.read(batch, images[row : row + 1], max_length=128)
        logits = read.logits.clone()
        logits[:, made.chat.end_ids] = -torch.inf  # as min_new_tokens has it
        assert logits.argmax(-1).tolist() == said.ids[row].tolist()
    assert said.prompt.tolist() == (length - 1 + said.counts).tolist()


def test_a_prompt_is_not_cut_in_silence(language_model):
    made = built(language_model)
    prompt = torch.tensor([made.chat.prompt([Turn("user", ("is there a circle? " * 20,))])])
    with pytest.raises(UserError, match="tokens longer than max_length, 40"):
        made.model.generate(prompt, torch.tensor([prompt.shape[1]]), image(0), max_length=40)


@pytest.mark.parametrize(
    ("options", "depth", "count"),
    [({"select": "pre_pool"}, 1, 16), ({"select_layer": -2}, 2, None), ({"select_layer": -3}, 1, 16)],
)
def test_what_is_selected(language_model, options, depth, count):
    made = built(language_model, **options)
    visual, counts, _ = made.model.see(image(2))
    tokens = made.model.vision.encode_until(depth, image(2)).tokens
    torch.testing.assert_close(visual, made.model.projector(tokens, (4, 4)))
    assert count is None or counts.tolist() == [count, count]


def test_only_some_encoders_have_patches_before_pooling(language_model):
    with pytest.raises(UserError, match="no reducers"):
        create_instruction_model({**ENCODER, "reducers": {}}, language_model, max_length=128, select="pre_pool")
    with pytest.raises(UserError, match="expected -1 to -3"):
        create_instruction_model(ENCODER, language_model, max_length=128, select_layer=-4)
    senatra = {"encoder": {"class_path": "NativeSegmentationEncoder", "init_args": {"image_size": 64}}}
    with pytest.raises(UserError, match="its last tokens only"):
        create_instruction_model(senatra, language_model, max_length=128, select="pre_pool")


def test_plain_heads_give_what_the_whole_model_gives(language_model):
    made = built(language_model)
    words = made.model.language_model
    embeds, chosen = torch.randn(2, 5, 32), torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    whole = words(inputs_embeds=embeds, attention_mask=mask).logits[chosen]
    torch.testing.assert_close(answer_logits(words, embeds, mask, chosen), whole)
    adapted = added_adapters(words, {"r": 2})
    torch.testing.assert_close(answer_logits(adapted, embeds, mask, chosen), whole)


def test_a_folder_loads_back_as_it_was(language_model, tmp_path):
    made = built(language_model, position=True, select_layer=-2, template="chatml")
    batch = batch_of(made.chat, asked(None, "is there a circle?"))
    wanted = made.model.read(batch, image(1), max_length=128).logits
    save_instruction_model(made, tmp_path / "exported")
    found = load_instruction_model(tmp_path / "exported")
    torch.testing.assert_close(found.model.read(batch, image(1), max_length=128).logits, wanted)
    assert found.image_fill == made.image_fill
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_what_a_model_says_of_generation_does_not_bend_greedy_answers(language_model, tmp_path):
    shutil.copytree(language_model, tmp_path / "bent")
    said = json.loads((tmp_path / "bent" / "generation_config.json").read_text())
    (tmp_path / "bent" / "generation_config.json").write_text(json.dumps(said | {"repetition_penalty": 50.0}))
    found = []
    for folder in (language_model, str(tmp_path / "bent")):
        made = built(folder)
        prompt = torch.tensor([made.chat.prompt([Turn("user", (None, "is there a circle? yes no red"))])])
        length = torch.tensor([prompt.shape[1]])
        found.append(made.model.generate(prompt, length, image(1), max_length=128, max_new_tokens=8).ids.tolist())
    assert found[0] == found[1]


def test_a_folder_with_a_foreign_tower_stands_alone(language_model, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "tower.pth")
    given = {"name": "test_vit", "pretrained": str(tmp_path / "tower.pth"), "image_size": 32}
    encoder = {"encoder": {"class_path": "dtpvit.interop.foreign_encoder.ForeignEncoder", "init_args": given}}
    made = create_instruction_model(encoder, language_model, max_length=128)
    save_instruction_model(made, tmp_path / "exported")
    (tmp_path / "tower.pth").unlink()
    made.model.eval()
    found = load_instruction_model(tmp_path / "exported").model.see(image(1))[0]
    torch.testing.assert_close(found, made.model.see(image(1))[0])


def test_what_is_wrong_is_said(language_model, tmp_path):
    with pytest.raises(UserError, match="no language model in"):
        create_instruction_model(ENCODER, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="knows 256 positions"):
        create_instruction_model(ENCODER, language_model)
    with pytest.raises(UserError, match="expected linear or mlp2x_gelu"):
        create_instruction_model(ENCODER, language_model, max_length=128, projector="qformer")
    with pytest.raises(UserError, match=r"holds no dtpvit_config\.json"):
        load_instruction_model(tmp_path)
    (tmp_path / "dtpvit_config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_instruction_model(tmp_path)
