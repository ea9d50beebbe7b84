import hashlib
import json
import math
import re
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dtpvit.cli import main
from dtpvit.datamodules.labelled import labelled_loader
from dtpvit.datamodules.prompts import load_templates
from dtpvit.errors import UserError
from dtpvit.evaluation.classifier import label_ranks
from dtpvit.evaluation.cost import dense_macs, image_macs
from dtpvit.evaluation.zeroshot import build_classifier, evaluate, zeroshot
from dtpvit.interop.create import build_clip
from dtpvit.interop.export import export
from dtpvit.interop.loading import load_clip
from dtpvit.interop.model_config import model_config

NAMES = ["goldfish", "great white shark", "missile", "toy poodle", "red wine", "missile"]
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small open_clip model with random weights, and its tokenizer."""
    file = tmp_path_factory.mktemp("configs") / "zeroshot-test-vit.json"
    file.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model("zeroshot-test-vit").eval()
    with torch.no_grad():
        model.visual.proj.mul_(30)  # fresh weights give nearly the same features for every image
    return model, open_clip.get_tokenizer("zeroshot-test-vit")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Sixty images in six class folders, of shapes that need resizing and cropping."""
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(1)
    for label in range(6):
        (root / f"class_{label}").mkdir()
        for i in range(5 + 2 * label):
            coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            image = Image.fromarray(coarse.numpy()).resize((40 + 3 * i, 50 - 2 * label))
            image.save(root / f"class_{label}" / f"{i:02d}.png")
    return root


def loader_of(root: Path, batch_size: int = 16):
    return labelled_loader(str(root), image_size=(32, 32), batch_size=batch_size, num_workers=0)


def classifier_of(clip) -> torch.Tensor:
    names = [f"kind {i}" for i in range(6)]
    return build_classifier(*clip, names, load_templates("simple"))


# The text side


@pytest.mark.parametrize(("templates", "batch_size"), [("simple", 7), ("openai", 512)])
def test_the_classifier_is_open_clips(clip, templates, batch_size):
    model, tokenizer = clip
    prompts = load_templates(templates)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, prompts)
    ours = build_classifier(model, tokenizer, NAMES, prompts, batch_size=batch_size)
    assert ours.shape == (32, 6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours[:, 2], ours[:, 5])  # the same name twice


def test_every_different_prompt_is_encoded_once_and_like_lengths_together(clip):
    model, tokenizer = clip
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def encode_text(self, ids):
            seen.append(ids)
            return self.inner.encode_text(ids)

    templates = load_templates("openai")
    build_classifier(Watched(), tokenizer, NAMES, templates, batch_size=32)
    prompts = {template(name) for name in NAMES for template in templates}
    rows = torch.cat(seen)
    assert len(rows) == len(prompts) < len(NAMES) * len(templates)
    assert len(rows.unique(dim=0)) == len(rows)
    lengths = (rows != 0).sum(1)
    assert torch.equal(lengths, lengths.sort().values)


def test_a_model_in_training_is_left_as_it_was(clip):
    model, tokenizer = clip
    try:
        model.train()
        model.visual.ln_post.eval()
        before = [module.training for module in model.modules()]
        build_classifier(model, tokenizer, NAMES[:1], load_templates("none"))
        assert [module.training for module in model.modules()] == before
    finally:
        model.eval()


def test_label_ranks_equal_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(2)
    classifier = torch.randint(-1, 2, (4, 9), generator=generator).float()  # many equal scores
    features = torch.randint(-1, 2, (200, 4), generator=generator).float() * 2
    features[features.abs().sum(1) == 0] = 1.0
    labels = torch.randint(0, 9, (200,), generator=generator)
    scores = features.double() @ classifier.double()
    want = []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        want.append(sorted(range(9), key=lambda c: (-row[c], c)).index(label))
    assert label_ranks(features, classifier, labels).tolist() == want


def test_an_overflow_is_never_a_hit():
    features = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.inf, 0.0]])
    assert label_ranks(features, torch.eye(2), torch.zeros(3, dtype=torch.int64)).tolist() == [0, 2, 2]


# The image side


def test_accuracies_equal_those_of_open_clips_own_pipeline(clip, photographs):
    model, _ = clip
    classifier = classifier_of(clip)
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    files = sorted(photographs.glob("*/*.png"))
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    with torch.no_grad():
        features = model.encode_image(torch.stack([transform(Image.open(file)) for file in files]), normalize=True)
        order = (100 * features @ classifier).topk(5).indices
    hit1, hit5 = order[:, 0] == labels, (order == labels[:, None]).any(1)
    result = evaluate(model, loader_of(photographs), classifier, device="cpu", mean=MEAN, std=STD)
    assert 0 < result.acc1 < result.acc5 < 1
    assert (result.n, result.num_classes, result.skipped) == (60, 6, 0)
    assert result.acc1 == pytest.approx(hit1.double().mean().item())
    assert result.acc5 == pytest.approx(hit5.double().mean().item())
    recalls = [hit1[labels == c].double().mean().item() for c in range(6)]
    assert result.mean_per_class_recall == pytest.approx(sum(recalls) / 6)
    assert result.mean_per_class_recall != pytest.approx(result.acc1)
    assert result.class_count == [5, 7, 9, 11, 13, 15]
    assert result.class_correct == [int(hit1[labels == c].sum()) for c in range(6)]
    assert (result.tokens, result.gmacs_per_image, result.gmacs_dense) == (None, None, None)
    assert math.isfinite(result.images_per_second) and result.images_per_second > 0


def test_the_result_does_not_depend_on_the_batch_size_or_the_run(clip, photographs):
    model, _ = clip
    classifier = classifier_of(clip)
    results = [
        evaluate(model, loader_of(photographs, size), classifier, device="cpu", mean=MEAN, std=STD)
        for size in (1, 7, 60, 60)
    ]
    assert len({(r.acc1, r.acc5, tuple(r.class_correct)) for r in results}) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gives_nearly_the_same_answers(clip, photographs, precision):
    model, tokenizer = clip
    full = classifier_of(clip)
    half = build_classifier(
        model, tokenizer, [f"kind {i}" for i in range(6)], load_templates("simple"), precision=precision
    )
    assert half.dtype == torch.float32
    assert not torch.allclose(full, half, rtol=0, atol=1e-6)  # it did compute in half precision
    assert F.cosine_similarity(full, half, dim=0).min() > 0.999
    settings = {"device": "cpu", "mean": MEAN, "std": STD}
    exact = evaluate(model, loader_of(photographs), full, **settings)
    rounded = evaluate(model, loader_of(photographs), half, **settings, precision=precision)
    assert abs(exact.acc1 - rounded.acc1) <= 0.05
    assert rounded.not_finite == 0


def test_only_the_permitted_classes_compete(clip, photographs):
    model, _ = clip
    classifier = classifier_of(clip)
    loader = loader_of(photographs)
    full = evaluate(model, loader, classifier, device="cpu", mean=MEAN, std=STD)
    assert full.num_classes == 6
    # Ten classes of which the data has only six, in other places: the four strangers must not compete.
    places = [9, 1, 3, 8, 2, 5]
    loader.class_indices = sorted(places)
    wide = torch.randn(32, 10, generator=torch.Generator().manual_seed(3))
    wide[:, places] = classifier

    class Relabelled:
        class_indices = loader.class_indices

        def __iter__(self):
            for batch in loader:
                yield {"image": batch["image"], "label": torch.tensor(places)[batch["label"]]}

    result = evaluate(model, Relabelled(), wide, device="cpu", mean=MEAN, std=STD)
    assert (result.acc1, result.acc5, result.num_classes) == (full.acc1, full.acc5, 6)
    assert [result.class_correct[place] for place in places] == full.class_correct
    loader.class_indices = [0, 1, 2]
    with pytest.raises(UserError, match="the label 3 but the classifier has only 3 classes"):
        evaluate(model, loader, classifier, device="cpu", mean=MEAN, std=STD)


def test_with_few_classes_the_first_five_are_all_of_them(clip, photographs, tmp_path):
    for label in range(3):
        (tmp_path / f"class_{label}").symlink_to(photographs / f"class_{label}")
    result = evaluate(clip[0], loader_of(tmp_path), classifier_of(clip)[:, :3], device="cpu", mean=MEAN, std=STD)
    assert (result.acc5, result.num_classes) == (1, 3)
    assert result.acc1 < 1


def test_images_that_overflow_are_wrong_even_among_few_classes(clip, photographs):
    loader = labelled_loader(str(photographs), image_size=(32, 32), batch_size=9, num_workers=0, limit=1)
    classifier = classifier_of(clip)[:, :3]
    result = evaluate(clip[0], loader, classifier, device="cpu", mean=MEAN, std=(0.0, 0.0, 0.0))
    assert (result.n, result.not_finite, result.acc1, result.acc5) == (1, 1, 0, 0)


def test_a_label_without_a_column_is_refused(clip, photographs):
    with pytest.raises(UserError, match="the label 4 but the classifier has only 4 classes"):
        evaluate(clip[0], loader_of(photographs), torch.eye(32)[:, :4], device="cpu", mean=MEAN, std=STD)


def test_broken_images_are_skipped_and_a_set_of_nothing_else_is_refused(clip, photographs, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.jpg").write_bytes(b"not a JPEG")
    settings = {"device": "cpu", "mean": MEAN, "std": STD}
    with pytest.raises(UserError, match=r"None of the images could be read \(1 were tried\)"):
        evaluate(clip[0], loader_of(tmp_path), torch.eye(32)[:, :1], **settings)
    (tmp_path / "a" / "whole.png").write_bytes((photographs / "class_0" / "00.png").read_bytes())
    result = evaluate(clip[0], loader_of(tmp_path), torch.eye(32)[:, :1], **settings)
    assert (result.n, result.skipped) == (1, 1)


# The command


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"model": None}, "Neither a model nor a checkpoint"),
        ({"checkpoint": "absent.ckpt"}, r"The checkpoint absent\.ckpt does not exist"),
        ({"data": "absent"}, "absent is no folder"),
        ({"data": "empty"}, "holds no class folders"),
        ({"templates": "openia"}, "openia is no file of templates"),
        ({"classnames": "absent.txt"}, "no file of class names"),
        ({"output": "absent/result.json"}, "cannot be written to"),
        ({"device": "toaster"}, "'toaster' cannot be used"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"limit": -1}, "limit is -1"),
    ],
)
def test_a_mistake_is_named_before_any_work_starts(photographs, tmp_path, monkeypatch, settings, found):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    # A model of this name does not exist: loading it would be another error.
    arguments = {"data": str(photographs), "model": "no-such-model"} | settings
    with pytest.raises(UserError, match=found):
        zeroshot(**arguments)


SMALL = {
    "embed_dim": 32,
    "vision": {
        "image_size": 32,
        "patch_size": 8,
        "dim": 64,
        "depth": 4,
        "num_heads": 2,
        "reducers": {2: {"class_path": "DynamicPooling", "init_args": {"compression": 2.5}}},
    },
    "text": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, photographs) -> Path:
    """What training leaves behind: calibrated weights and the model's own config."""
    torch.manual_seed(5)
    clip = build_clip(model_config(SMALL))
    with torch.no_grad():
        clip.visual.trunk.patch_embed.proj.weight.mul_(20)
        for batch in loader_of(photographs):
            clip.train().encode_image(batch["image"] / 127.5 - 1)
    file = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save({"state_dict": clip.state_dict(), "hyper_parameters": {"model": SMALL}}, file)
    return file


def run(photographs: Path, checkpoint: Path, output: Path, **settings) -> dict:
    arguments = {"templates": "simple", "workers": 0, "device": "cpu", "output": str(output)} | settings
    zeroshot(str(photographs), checkpoint=str(checkpoint), **arguments)
    return json.loads(output.read_text())


def test_the_command_reports_what_its_parts_measure(photographs, checkpoint, tmp_path, capsys):
    record = run(photographs, checkpoint, tmp_path / "result.json", per_class=True)
    printed = capsys.readouterr().out

    loaded = load_clip(checkpoint=checkpoint)
    names = [f"class {label}" for label in range(6)]
    classifier = open_clip.build_zero_shot_classifier(loaded.model, loaded.tokenize, names, load_templates("simple"))
    transform = open_clip.image_transform(32, is_train=False, mean=loaded.mean, std=loaded.std)
    files = sorted(photographs.glob("*/*.png"))
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    with torch.no_grad():
        images = torch.stack([transform(Image.open(file)) for file in files])
        features, encoding = loaded.model.visual.encode(images)
        hits = (F.normalize(features, dim=1) @ classifier).argmax(1) == labels
    lengths = encoding.tokens.lengths.double()
    assert record["metrics"].keys() == {"acc1", "acc5", "mean_per_class_recall"}
    assert record["metrics"]["acc1"] == pytest.approx(hits.double().mean().item())
    assert record["tokens_per_image"]["mean"] == pytest.approx(lengths.mean().item())
    assert record["tokens_per_image"]["std"] == pytest.approx(lengths.std(correction=0).item())
    assert record["tokens_per_image"]["min"] == lengths.min() < lengths.max() == record["tokens_per_image"]["max"]
    macs = image_macs(loaded.model.visual.trunk, encoding, 32)
    assert record["gmacs_per_image"] == pytest.approx(macs.mean().item() / 1e9)
    assert record["gmacs_per_image"] < record["gmacs_dense"]
    assert record["gmacs_dense"] == pytest.approx(dense_macs(loaded.model.visual.trunk, 32) / 1e9)
    assert record["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert [row["n"] for row in record["per_class"]] == [5, 7, 9, 11, 13, 15]
    assert [row["name"] for row in record["per_class"]] == names
    correct = sum(row["n"] * row["recall"] for row in record["per_class"])
    assert correct / record["n"] == pytest.approx(record["metrics"]["acc1"])
    benchmark = {"dataset", "model", "pretrained", "task", "metrics", "language"}
    ours = {"n", "precision", "images_per_second", "versions", "skipped", "num_classes", "templates"}
    assert benchmark | ours <= record.keys()
    assert (record["task"], record["n"]) == ("zeroshot_classification", 60)
    assert f"{record['metrics']['acc1']:.2%}   (chance 16.67%)" in printed
    assert f"{lengths.mean():.1f} ± {lengths.std(correction=0):.1f}" in printed


def test_the_command_gives_the_same_in_any_batch_size_and_as_an_exported_folder(photographs, checkpoint, tmp_path):
    output = tmp_path / "result.json"
    records = [run(photographs, checkpoint, output, batch_size=size) for size in (1, 7, 60)]
    export(str(checkpoint), str(tmp_path / "exported"))
    records.append(run(photographs, tmp_path / "exported", output))
    for record in records[1:]:
        for key in ("metrics", "n", "tokens_per_image", "gmacs_dense"):
            assert record[key] == records[0][key]
        assert record["gmacs_per_image"] == pytest.approx(records[0]["gmacs_per_image"], rel=1e-12)
    assert list(records[-1]["checkpoint_sha256"]) == ["open_clip_model.safetensors"]


def test_the_command_line_prints_a_summary_or_one_sentence(photographs, checkpoint, capsys, tmp_path):
    (photographs / "class_3" / "broken.png").write_bytes(b"broken")
    arguments = ["--checkpoint", str(checkpoint), "--templates", "none", "--workers", "0", "--device", "cpu"]
    try:
        assert main(["zeroshot", "--data", str(photographs), "--batch-size", "5", *arguments]) == 0
    finally:
        (photographs / "class_3" / "broken.png").unlink()
    printed = capsys.readouterr().out
    assert f"{photographs}: 60 images, 6 classes" in printed
    assert "GMACs/image" in printed
    assert re.search(r"skipped +1 images .*broken\.png", printed)
    assert main(["zeroshot", "--data", str(tmp_path), *arguments]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "holds no class folders" in sentence
