"""Quadtree patches against a slow reference with loops, written from the description of the method."""

import math

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.ops.scan import scan_order
from dtpvit.encoder.reducers import Evidence, FixedStride, Quadtree
from dtpvit.evaluation.cost import dense_macs, image_cost

D, GRID = 12, (6, 9)  # one 4x4 cell in each half, 2x2 cells below and between, a last column of single patches


def random_tokens(batch=4):
    """Entropies that are the same within each cell and infinite where there is none."""
    rows, columns = GRID
    entropy = torch.full((batch, rows, columns, 3), math.inf)
    entropy[..., 0] = torch.rand(batch, rows, columns)
    for level, side in ((1, 2), (2, 4)):
        for top in range(0, rows - side + 1, side):
            for left in range(0, columns - side + 1, side):
                entropy[:, top : top + side, left : left + side, level] = torch.rand(batch, 1, 1)
    features = torch.randn(batch, 1 + rows * columns, D)
    return Tokens.from_dense(features, num_prefix=1, grid=GRID, pixel_entropy=entropy.flatten(0, 2))


def slow_cells(entropy, thresholds):
    """Patches of each token, by going down from the largest cells."""
    rows, columns = GRID

    def descend(top, left, side):
        whole = top + side <= rows and left + side <= columns
        inside = [
            (top + r, left + c) for r in range(side) for c in range(side) if top + r < rows and left + c < columns
        ]
        level = {4: 2, 2: 1}.get(side)
        if level is None or (whole and float(entropy[top, left, level]) < thresholds[level - 1]):
            return [inside] if inside else []
        half = side // 2
        corners = [(top, left), (top, left + half), (top + half, left), (top + half, left + half)]
        return [cell for r, c in corners for cell in descend(r, c, half)]

    return [cell for r in range(0, rows, 4) for c in range(0, columns, 4) for cell in descend(r, c, 4)]


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.9, 0.0), (0.0, 0.7), (2.0, 2.0)])
def test_it_equals_the_slow_reference_gradients_included(order, thresholds):
    tokens = random_tokens()
    reducer = Quadtree(D, thresholds=thresholds, order=order)
    torch.nn.init.normal_(reducer.mlp.fc2.weight)
    torch.nn.init.normal_(reducer.mlp.fc2.bias)
    x = tokens.features.requires_grad_()
    out = reducer(tokens, Evidence()).tokens
    rows, columns = GRID
    place = {int(patch): at for at, patch in enumerate(scan_order(order, rows, columns))}
    expected, lengths = [], []
    for index, image in enumerate(tokens.split()):
        cells = [
            [r * columns + c for r, c in cell]
            for cell in slow_cells(image.pixel_entropy.view(rows, columns, 3), thresholds)
        ]
        cells.sort(key=lambda cell: min(place[patch] for patch in cell))
        own = x.view(4, -1, D)[index]
        expected.append(own[:1])
        for row, cell in enumerate(cells):
            mean = own[[1 + patch for patch in cell]].mean(0)
            expected.append((mean + reducer.mlp(mean) if len(cell) > 1 else mean)[None])
            assert all(out.split()[index].source[patch] == row for patch in cell)
            assert out.split()[index].size[1 + row] == len(cell)
        lengths.append(1 + len(cells))
    expected = torch.cat(expected)
    assert out.lengths.tolist() == lengths and out.grid is None
    torch.testing.assert_close(out.features, expected)
    weight, wanted = torch.randn_like(expected), [x, *reducer.parameters()]
    found = torch.autograd.grad((out.features * weight).sum(), wanted)
    slow = torch.autograd.grad((expected * weight).sum(), wanted, materialize_grads=True)
    for one, two in zip(found, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_at_first_a_cell_is_its_mean():
    tokens = random_tokens()
    out = Quadtree(D, thresholds=(2.0, 2.0))(tokens, Evidence()).tokens
    first = tokens.features.view(4, -1, D)[:, 1:].view(4, *GRID, D)[:, :4, :4].mean((1, 2))
    torch.testing.assert_close(out.unpool().view(4, *GRID, D)[:, 0, 0], first)


def trunk(**options):
    made = {0: Quadtree(24, thresholds=(6.0, 7.0))}
    encoder = VisionEncoder(image_size=64, patch_size=8, dim=24, depth=2, num_heads=2, reducers=made)
    return encoder.train(options.get("training", False))


def half_plain(batch=3):
    """The left half of one colour, the right half noise: 4 x 4 cells on the left, single patches on the right."""
    images = torch.rand(batch, 3, 64, 64)
    images[..., :32] = 0.4
    return images


def test_a_plain_half_costs_two_tokens():
    encoder = trunk()
    encoding = encoder(half_plain())
    assert encoding.tokens.lengths.tolist() == [1 + 2 + 32] * 3
    assert encoding.tokens.split()[0].source.view(8, 8)[:4, :4].unique().numel() == 1
    cost = image_cost(encoder, encoding.layouts)
    assert cost.reducers.tolist() == [2 * 35 * 24**2] * 3  # its MLP, over all tokens
    assert (cost.total < dense_macs(encoder)).all() and (cost.full_blocks == 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_in_mixed_precision(checkpointing):
    encoder = trunk(training=True)
    encoder.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):  # the last layer is zero at first: what is before it learns from the second step on
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = encoder(half_plain()).pooled
        pooled.float().square().mean().backward()
        optimizer.step()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_what_it_cannot_do_is_refused():
    tokens = random_tokens()
    pooled = FixedStride(D, compression=2)(tokens, Evidence()).tokens
    with pytest.raises(ValueError, match="form a grid"):
        Quadtree(D)(pooled, Evidence())
    with pytest.raises(ValueError, match="expected two"):
        Quadtree(D, thresholds=(5.5,))
    with pytest.raises(ValueError, match="expected one of raster"):
        Quadtree(D, order="zigzag")
