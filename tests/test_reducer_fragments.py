"""Every file of configs/reducers/: both tasks build with it and take a training step."""

from pathlib import Path

import pytest
import torch
import yaml

from dtpvit.evaluation.cost import dense_macs, image_macs
from dtpvit.interop.create import create_encoder
from dtpvit.tasks.classification import Classification
from dtpvit.tasks.contrastive import Contrastive

FRAGMENTS = sorted((Path(__file__).parents[1] / "configs" / "reducers").glob("*.yaml"))
NARROW = {"preset": "vit_tiny_patch16_224", "dim": 24, "num_heads": 3}


@pytest.fixture(params=FRAGMENTS, ids=lambda path: path.stem)
def fragment(request):
    return yaml.safe_load(request.param.read_text())


def takes_a_step(trunk, encoding):
    out = encoding.pooled.square().mean()
    torch.stack([out, *encoding.losses.values()]).sum().backward()
    assert all(p.grad is not None for p in trunk.reducers.parameters())


def test_classification_builds_and_steps(fragment):
    task = Classification(model=NARROW, num_classes=3, vision={"reducers": fragment}).train()
    assert task.model.reducers and task.hparams["model"]["reducers"] == fragment and "vision" not in task.hparams
    takes_a_step(task.model, task.model.encode(torch.randn(2, 3, 224, 224)))
    again = Classification(**task.hparams)
    again.load_state_dict(task.state_dict())


def test_contrastive_builds_and_steps(fragment):
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    task = Contrastive(model={"embed_dim": 8, "vision": NARROW, "text": text}, vision={"reducers": fragment}).train()
    takes_a_step(task.trunk, task.model.visual.encode(torch.randn(2, 3, 224, 224))[1])


def test_the_cost_is_lower(fragment):
    """About half; methods that shorten the attention alone cannot save more than its share."""
    encoder = create_encoder("vit_tiny_patch16_224", reducers=fragment).eval()
    if not all(reducer.holds_rate for reducer in encoder.reducers.values()):
        pytest.skip("the number of tokens is the images' own, and noise is not one of these")
    places = {reducer.place for reducer in encoder.reducers.values()}
    with torch.no_grad():
        macs = image_macs(encoder, encoder(torch.randn(4, 3, 224, 224)))
    most = 0.8 if places & {"attention", "keys"} else 0.65
    assert 0.4 < float(macs.mean()) / dense_macs(encoder) < most


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_the_header_says_what_it_is(path):
    assert path.read_text().startswith("# ")
