"""Adapting a pretrained encoder without labels: what learns, what stands still, what is written and refused."""

import copy

import open_clip
import pytest
import timm
import torch
from PIL import Image

from dtpvit.cli import main
from dtpvit.encoder import Tokens
from dtpvit.encoder.reducers import DynamicPooling, Evidence
from dtpvit.encoder.reducers.routers import exact_starts
from dtpvit.evaluation.agreement import answers, dense_output, divergence, outcome
from dtpvit.interop.image_models import load_classifier
from dtpvit.interop.pretrained import load_pretrained
from dtpvit.tasks.adaptation import adapt_encoder
from dtpvit.tasks.classification import Classification

NAME = "vit_tiny_patch32_224"


def pooling(router="local", **options):
    taught = {"estimator": "imitation", "budget": "fixed"} if router == "local" else {}
    return {3: {"class_path": "DynamicPooling", "init_args": {"compression": 3, "router": router, **taught, **options}}}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A classifier of six blocks' worth of signal: random, but its answers differ from image to image."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=11, patch_size=32)
    with torch.no_grad():
        model.head.weight.normal_()
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def photos():
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 255, (48, 3, 7, 7), generator=g).float()
    return torch.nn.functional.interpolate(coarse, 224, mode="bilinear").clamp(0, 255).to(torch.uint8)


def test_the_dense_output_is_timm_s(weights, photos):
    loaded = load_pretrained(NAME, weights, pooling())
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=11, patch_size=32)
    theirs.load_state_dict(torch.load(weights))
    images = loaded.normalise(photos[:4])
    with torch.no_grad():
        torch.testing.assert_close(dense_output(loaded.trunk, images, loaded.head), theirs.eval()(images))
    assert loaded.num_classes == 11 and loaded.mean == (0.485, 0.456, 0.406)


def test_a_clip_of_open_clip_s_gives_its_features(tmp_path):
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    loaded = load_pretrained("ViT-S-32-alt", str(tmp_path / "clip.pt"), pooling())
    images, text = torch.randn(2, 3, 224, 224), open_clip.tokenize(["a cat", "two dogs on a green field"])
    with torch.no_grad():
        features = dense_output(loaded.trunk, images, loaded.head)
        torch.testing.assert_close(features, theirs.encode_image(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.model.encode_text(text), theirs.encode_text(text), rtol=1e-4, atol=1e-4)
    assert loaded.num_classes == 0 and loaded.is_clip


def test_divergence_is_zero_of_equals_and_the_kl_of_classes():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    for classes in (True, False):
        torch.testing.assert_close(divergence(a, a, classes=classes), torch.zeros(5), atol=1e-6, rtol=0)
    p, q = b.softmax(1), a.softmax(1)
    torch.testing.assert_close(divergence(a, b, classes=True), (p * (p / q).log()).sum(1))
    torch.testing.assert_close(divergence(a, 3 * b, classes=False), 1 - torch.cosine_similarity(a, b))


def test_only_the_reducers_learn_and_the_same_seed_learns_the_same(weights, photos):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)  # of the predictor's first weights
        loaded = load_pretrained(NAME, weights, pooling())
        before = copy.deepcopy(loaded.model.state_dict())
        adapt_encoder(loaded, photos[:32], steps=3, batch_size=8)
        after = loaded.model.state_dict()
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert moved and all("boundary" in name for name in moved)
        assert any("boundary_sensitivity" in name for name in moved) and any("convolutions" in name for name in moved)
        assert not loaded.model.training
        runs.append(after)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_the_predictor_learns_the_exact_segments_and_the_output_stays_nearer(weights, photos):
    fitted, held = photos[:32], photos[32:]
    dense, plain = load_pretrained(NAME, weights), load_pretrained(NAME, weights, pooling("minimum_variance"))
    loaded = load_pretrained(NAME, weights, pooling())
    reference = answers(dense, [held], "cpu")

    def result(candidate):
        return outcome(answers(candidate, held.split(5), "cpu"), reference, classes=True)

    fresh = result(loaded)
    adapt_encoder(loaded, fitted, steps=60, batch_size=16, learning_rate=1e-2)
    found, exact = (result(candidate) for candidate in (loaded, plain))
    assert found.far < fresh.far and found.tokens == exact.tokens == 18
    assert found.far < 1.5 * exact.far
    assert found.gmacs < result(dense).gmacs
    reducer, tokens = loaded.trunk.reducers["3"], loaded.trunk.embed(loaded.normalise(held))
    order = reducer.line(tokens)
    with torch.no_grad():
        for block in range(3):
            tokens = loaded.trunk.run_block(block, tokens)
        wanted, most = reducer.segments_wanted(tokens.layout)
        logits = reducer.boundary_predictor(tokens, order, wanted, most)
        weights_ = reducer.boundary_predictor.weights(tokens)
    assert weights_.std() > 0 and logits.std() > 0.5


def test_imitation_trains_on_the_exact_segments_and_evaluates_on_its_own():
    reducer = DynamicPooling(24, compression=4, router="local", estimator="imitation")
    tokens = Tokens.from_dense(torch.randn(3, 37, 24), num_prefix=1, grid=(6, 6), seed=torch.arange(3))
    out = reducer.train()(tokens, Evidence())
    order = reducer.line(tokens)
    starts = exact_starts(tokens, order, *reducer.segments_wanted(tokens.layout))
    assert (out.tokens.lengths == 10).all() and starts.sum() == out.tokens.layout.total
    size = torch.zeros(30).index_add_(0, starts.long().cumsum(0) - 1, torch.ones(111))
    assert torch.equal(out.tokens.size, size)
    assert out.losses["imitation"].requires_grad and not reducer.eval()(tokens, Evidence()).losses


def test_adapt_is_a_mode_of_the_classifier_too():
    task = Classification(model={"preset": NAME, "reducers": pooling()}, num_classes=11, mode="adapt")
    learning = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert learning and all(name.startswith("reducers.") for name in learning)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, photos):
    root = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(photos):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"{number:02}.png")
    return str(root)


def test_the_command_writes_a_checkpoint_that_loads(weights, folder, tmp_path, capsys, photos):
    out = str(tmp_path / "adapted.ckpt")
    command = ["adapt", NAME, "--images", folder, "--init", weights, "--compression", "2", "--before", "[3, 7]"]
    assert main([*command, "--steps", "2", "--batch-size", "8", "--rounds", "1", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "minimum variance" in printed and "adapted" in printed and "24 images" in printed
    rows = {line[:8].strip(): line.split() for line in printed.splitlines()}
    ours, merged = (float(rows[name][-2]) for name in ("adapted", "ToMe, r"))
    assert abs(merged / ours - 1) < 0.07  # of 49 patches one more merge a block is 12 percent
    assert load_classifier(out).model.num_classes == 11
    task = Classification.load_from_checkpoint(out, weights_only=True).eval()
    assert task.num_classes == 11 and sorted(task.model.reducers) == ["3", "7"]
    assert task.model.encode(task.normalise(photos[:2])).tokens.lengths.tolist() == [14, 14]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such_model", "--init", "WEIGHTS"], "no encoder is called"),
        (["RN50:openai"], "no CLIP with a plain Vision Transformer"),
        (["ViT-B-32"], "several weights"),
        ([NAME, "--init", "nowhere.pt"], "does not exist"),
        ([NAME, "--init", "WEIGHTS", "--before", "[3,5]", "--compression", "[2,2,2]"], "give one each"),
        ([NAME, "--init", "WEIGHTS", "--before", "12"], "blocks 0 to 11"),
        ([NAME, "--init", "WEIGHTS", "--images", "nowhere"], "nowhere"),
        ([NAME, "--init", "WEIGHTS", "--out", "no/such/folder.ckpt"], "cannot be written"),
        ([NAME, "--init", "WEIGHTS", "--steps", "-1"], "steps"),
        ([NAME, "--init", "WEIGHTS", "--compression", "0.5"], "at least 1"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments, sentence, weights, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [weights if a == "WEIGHTS" else a for a in arguments]
    images = [] if "--images" in arguments else ["--images", folder]
    assert main(["adapt", *arguments, *images]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and "Traceback" not in printed
