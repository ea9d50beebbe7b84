"""The reducer that CONTRIBUTING.md shows works as it stands there."""

import re
import sys
from pathlib import Path
from textwrap import dedent

import torch
import yaml

from dtpvit.interop.create import create_encoder

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return dedent(found[0])


def test_the_reducer_that_is_shown(tmp_path, monkeypatch):
    (tmp_path / "every_other.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    fragment = yaml.safe_load(block("yaml").replace("dtpvit.encoder.reducers.", ""))
    encoder = create_encoder("vit_tiny_patch16_224", dim=24, num_heads=3, reducers=fragment).eval()
    tokens = encoder(torch.randn(2, 3, 224, 224)).tokens
    assert tokens.lengths.tolist() == [99, 99]
    assert tokens.source.view(2, -1)[:, :4].tolist() == [[0, -1, 1, -1]] * 2
    sys.modules.pop("every_other")
