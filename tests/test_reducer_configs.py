"""Fragments of configs/reducers fit a Vision Transformer of twelve blocks, at half its cost where that is fixed."""

from pathlib import Path

import pytest
import torch
import yaml

from dtpvit.evaluation.cost import dense_macs, image_macs
from dtpvit.interop.create import create_encoder

FRAGMENTS = sorted((Path(__file__).parents[1] / "configs" / "reducers").glob("*.yaml"))


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_a_fragment_halves_the_cost(path):
    encoder = create_encoder("vit_tiny_patch16_224", reducers=yaml.safe_load(path.read_text())).eval()
    with torch.no_grad():
        macs = image_macs(encoder, encoder(torch.randn(2, 3, 224, 224)))
    assert path.read_text().startswith("# ")
    if all(reducer.holds_rate for reducer in encoder.reducers.values()):
        assert (0.4 < macs / dense_macs(encoder)).all() and (macs / dense_macs(encoder) < 0.6).all()
