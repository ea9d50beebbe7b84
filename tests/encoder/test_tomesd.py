"""Merging around attention against a slow reference with loops, written from the description of the method."""

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.ops.grid_matching import grid_destinations
from dtpvit.encoder.reducers import Evidence, ToMeSD
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.create import create_encoder


def small(reducers=None, **options):
    sizes = {"image_size": (40, 56), "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2} | options
    encoder = VisionEncoder(**sizes, reducers=reducers or {})
    with torch.no_grad():  # attention that is not uniform
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(4)
    return encoder


def slow_groups(x, grid, cell, ratio, chosen=None):
    """Members of each group, destination first; unmerged tokens are groups of their own. ``x`` has no class token."""
    rows, columns = grid
    destinations = []
    for top in range(0, rows - cell[0] + 1, cell[0]):
        for left in range(0, columns - cell[1] + 1, cell[1]):
            inside = [(top + i) * columns + left + j for i in range(cell[0]) for j in range(cell[1])]
            destinations.append(inside[0] if chosen is None else next(i for i in inside if i in chosen))
    sources = [i for i in range(len(x)) if i not in destinations]
    edges = []
    for source in sources:
        cosines = [float(x[source] @ x[d] / (x[source].norm() * x[d].norm())) for d in destinations]
        best = max(range(len(cosines)), key=cosines.__getitem__)
        edges.append((cosines[best], source, destinations[best]))
    edges.sort(key=lambda edge: -edge[0])
    merged = edges[: min(int(len(x) * ratio), len(sources))]
    groups = {d: [d] for d in destinations}
    for _, source, destination in merged:
        groups[destination].append(source)
    gone = {source for _, source, _ in merged}
    return list(groups.values()) + [[i] for i in sources if i not in gone]


def slow_encode(encoder, image, cell, ratio, proportional):
    x = encoder.embed(image[None]).features
    for block in encoder.blocks:
        normed = block.norm1(x)
        groups = [[0]] + [[i + 1 for i in g] for g in slow_groups(normed[1:].detach(), encoder.grid_size, cell, ratio)]
        few = torch.stack([sum(normed[i] for i in group) / len(group) for group in groups])
        bias = torch.tensor([float(len(group)) for group in groups]).log() * proportional
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(few).view(len(few), 3, heads, -1).unbind(1)
        mixed = [((q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5) + bias).softmax(-1) @ v[:, h] for h in range(heads)]
        found = block.attn.proj(torch.cat(mixed, dim=1))
        back = {member: row for row, group in enumerate(groups) for member in group}
        x = x + torch.stack([found[back[i]] for i in range(len(x))])
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize(("cell", "ratio"), [((2, 2), 0.5), ((2, 3), 0.3), ((2, 2), 0.99), ((3, 2), 0.0)])
def test_it_equals_the_slow_reference_gradients_included(cell, ratio, proportional):
    """A grid of 5 by 7, so that some tokens are in no whole cell and only ever merged into others."""
    options = {"ratio": ratio, "cell": cell, "proportional": proportional}
    encoder = small({block: ToMeSD(24, **options) for block in (0, 1)}).double().train()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    encoding = encoder(images)
    found = encoding.tokens.features
    expected = torch.cat([slow_encode(encoder, image, cell, ratio, proportional) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weight, parameters = torch.randn_like(found), list(encoder.parameters())
    one, two = (torch.autograd.grad((out * weight).sum(), parameters) for out in (found, expected))
    for mine, slow in zip(one, two, strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-5, atol=1e-5)  # shares of a mean are float32
    assert encoding.tokens.grid == (5, 7) and encoding.tokens.lengths.tolist() == [36] * 3


def tokens(features, grid, seed=None):
    return Tokens.from_dense(features, num_prefix=1, grid=grid, seed=seed)


def test_merging_and_unmerging_a_constant_field_is_the_identity():
    field = torch.cat((torch.randn(2, 1, 8), torch.randn(2, 1, 8).expand(-1, 30, -1)), dim=1)
    given = tokens(field, (5, 6))
    reduction = ToMeSD(8, ratio=0.5)(given, Evidence())
    assert reduction.tokens.lengths.tolist() == [16, 16]
    torch.testing.assert_close(reduction.restore(reduction.tokens.features), given.features)


def test_constant_images_pass_as_through_the_dense_encoder_if_weighed():
    encoder, dense = small({b: ToMeSD(24, ratio=0.7, proportional=True) for b in (0, 1)}), small()
    with torch.no_grad():
        encoder.pos_embed.zero_()
    dense.load_state_dict(encoder.state_dict())
    image = torch.full((1, 3, 40, 56), 0.3)
    with torch.no_grad():
        expected = dense(image).tokens.features
        torch.testing.assert_close(encoder(image).tokens.features, expected, rtol=1e-5, atol=1e-5)
        for reducer in encoder.reducers.values():
            reducer.proportional = False
        assert (encoder(image).tokens.features - expected).abs().max() > 1e-3


def test_the_class_token_takes_no_part():
    features = torch.randn(2, 31, 8)
    features[:, 0] = features[:, 8]  # as similar to others as can be
    reduction = ToMeSD(8, ratio=0.75)(tokens(features, (5, 6)), Evidence())
    few = reduction.tokens
    assert torch.equal(few.prefix_features()[:, 0], features[:, 0]) and (few.size[few.layout.first] == 1).all()
    assert few.size.sum() == 2 * 31
    assert torch.equal(reduction.restore(few.features).view(2, 31, 8)[:, 0], features[:, 0])


def test_random_destinations_are_one_of_each_cell_and_follow_from_the_seed():
    seed = torch.arange(200)
    places = grid_destinations((4, 6), (2, 3), torch.device("cpu"), seed=seed)
    cells = (places // 6 // 2) * 2 + places % 6 // 3
    assert torch.equal(cells, torch.arange(4).expand(200, -1))
    for column in places.unbind(1):
        assert len(column.unique()) == 6 and torch.bincount(column).max() < 60
    assert torch.equal(grid_destinations((4, 6), (2, 3), torch.device("cpu"), seed=seed[7:8]), places[7:8])
    reducer, features = ToMeSD(8, ratio=0.5, cell=(2, 3), random=True), torch.randn(1, 25, 8)
    for number in range(5):
        drawn = set(grid_destinations((4, 6), (2, 3), torch.device("cpu"), seed=seed[number : number + 1])[0].tolist())
        few = reducer.train(number % 2 == 0)(tokens(features, (4, 6), seed[number : number + 1]), Evidence()).tokens
        groups = slow_groups(features[0, 1:], (4, 6), (2, 3), 0.5, drawn)
        sources = few.source.tolist()
        found = {tuple(sorted(i for i in range(24) if sources[i] == row)) for row in range(12)}
        assert found == {tuple(sorted(group)) for group in groups}
    with pytest.raises(ValueError, match=r"tokens\.seed"):
        reducer(tokens(features, (4, 6)), Evidence())


def test_counts_and_costs():
    """At ratio 0.5 attention sees 99 of 197 tokens, MLPs all; 49 of 196 stay whatever the ratio."""
    image = torch.randn(1, 3, 224, 224)
    for ratio, left in ((0.5, 99), (0.75, 50), (0.9, 50), (0.0, 197)):
        config = {"0-11": {"class_path": "ToMeSD", "init_args": {"ratio": ratio}}}
        encoder = create_encoder("vit_tiny_patch16_224", reducers=config).eval()
        with torch.no_grad():
            encoding = encoder(image)
        assert [(b.attention.longest, b.mlp.longest) for b in encoding.layouts] == [(left, 197)] * 12
        cost = image_cost(encoder, encoding.layouts)
        block = 4 * left * 192**2 + 2 * left**2 * 192 + 8 * 197 * 192**2
        matching = 196 * 49 * 192 if ratio else 0
        assert float(cost.total) == 12 * (block + matching) + 196 * 768 * 192


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ratio": 1}, "below 1"), ({"ratio": -0.1}, "at least 0"), ({"cell": (2, 0)}, "rows and columns")],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ToMeSD(8, **options)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="merging on a grid needs tokens that form one"):
        ToMeSD(8)(Tokens.from_dense(torch.randn(2, 9, 8), num_prefix=1), Evidence())
