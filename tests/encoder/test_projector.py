"""Tokens on their way to a language model."""

import math

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.projector import Projector, where
from dtpvit.encoder.reducers import DynamicPooling, TopK


def encoder(**options):
    return VisionEncoder(image_size=(32, 48), patch_size=8, dim=16, depth=2, num_heads=2, **options)


def ragged():
    made = encoder(reducers={1: lambda dim: DynamicPooling(dim, compression=3)})
    return made(torch.randn(4, 3, 32, 48)).tokens  # in training, so that lengths differ


def test_prefix_tokens_are_left_out_of_ragged_tokens_too():
    tokens = ragged()
    assert not tokens.layout.uniform
    projector = Projector(16, 5, "linear")
    found = projector(tokens, (4, 6)).split((tokens.lengths - 1).tolist())
    for one, wanted in zip(found, tokens.split(), strict=True):
        torch.testing.assert_close(one, projector.layers(wanted.features[1:]))


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_kinds_are_those_of_llava(kind, layers):
    made = Projector(16, 5, kind)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in made.layers) == layers
    assert next(iter(made.state_dict())) == "layers.0.weight"


def test_unknown_kind():
    with pytest.raises(ValueError, match="expected linear or mlp2x_gelu"):
        Projector(16, 5, "resampler")


def test_position_changes_nothing_at_first_and_learns():
    tokens = ragged()
    torch.manual_seed(0)
    plain = Projector(16, 5)
    torch.manual_seed(0)
    placed = Projector(16, 5, position=True)
    torch.testing.assert_close(placed(tokens, (4, 6)), plain(tokens, (4, 6)))
    placed(tokens, (4, 6)).square().sum().backward()
    assert placed.place is not None and placed.place.weight.grad is not None
    assert placed.place.weight.grad.abs().sum() > 0


def test_place_is_the_mean_place_of_a_tokens_patches():
    tokens = ragged()
    found = where(tokens, (4, 6)).split(tokens.lengths.tolist())
    for said, image in zip(found, tokens.split(), strict=True):
        for token in range(len(said) - 1):
            patches = [p for p, source in enumerate(image.source.tolist()) if source == token]
            y = sum((p // 6 + 0.5) / 4 for p in patches) / len(patches)
            x = sum((p % 6 + 0.5) / 6 for p in patches) / len(patches)
            angles = [math.pi * value * 2**octave for value in (y, x) for octave in range(6)]
            wanted = [*map(math.sin, angles), *map(math.cos, angles), math.log(len(patches))]
            torch.testing.assert_close(said[token + 1], torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_places_tell_all_patches_of_a_fine_grid_apart():
    tokens = Tokens.from_dense(torch.zeros(1, 24 * 24, 1), grid=(24, 24))
    apart = torch.cdist(where(tokens, (24, 24)), where(tokens, (24, 24)))
    assert apart.fill_diagonal_(9).min() > 0.1


def test_dropped_patches_have_no_place():
    made = encoder(reducers={0: lambda dim: TopK(dim, keep=0.5)}).eval()
    tokens = made(torch.randn(2, 3, 32, 48)).tokens
    assert torch.isfinite(where(tokens, (4, 6))).all()


def test_first_blocks_alone():
    made = encoder(reducers={1: lambda dim: DynamicPooling(dim, compression=3)}).eval()
    images = torch.randn(2, 3, 32, 48)
    before = made.encode_until(1, images)
    assert before.tokens.lengths.tolist() == [25, 25]
    torch.testing.assert_close(before.tokens.features, made.run_block(0, made.embed(images)).features)
    whole = made.encode_until(2, images)
    torch.testing.assert_close(whole.tokens.features, made(images).tokens.features)
    with pytest.raises(ValueError, match="the encoder has 2 blocks"):
        made.encode_until(3, images)
