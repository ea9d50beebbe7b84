"""Native segmentation grouping against a slow reference with loops, and the encoder made of it."""

import pytest
import torch

from dtpvit.encoder import NativeSegmentationEncoder, Tokens, VisionEncoder
from dtpvit.encoder.ops import neighbourhood
from dtpvit.encoder.reducers import Evidence, RandomBoundaries, SpatialGrouping
from dtpvit.evaluation.cost import counted_macs, image_cost

VARIANTS = {
    "local": {},
    "local by 3": {"stride": 3, "iterations": 2},
    "dense": {"scope": "dense"},
    "dense to 5": {"scope": "dense", "groups": 5},
    "wider": {"out_dim": 12},
}


@pytest.fixture(params=VARIANTS)
def options(request):
    return VARIANTS[request.param]


def layer(**options):
    """Logits that are not uniform, and biases that are not zero."""
    made = SpatialGrouping(8, **options).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "weight" in name and parameter.ndim == 2:
                parameter.mul_(3)
            if name == "position_bias":
                parameter.normal_()
    return made


def slow_start(made, x, grid):
    """Normed first features of each group of one image (R C, D), and the groups' places."""
    if made.groups is not None:
        return made.start_norm(made.group_embed[0]), None
    stride = made.stride
    places = [(y, x_) for y in range(-(-grid[0] // stride)) for x_ in range(-(-grid[1] // stride))]
    rows = []
    for y, across in places:
        total = made.start.bias.clone()
        for r in range(stride):
            for c in range(stride):
                row, column = y * stride + r, across * stride + c
                if row < grid[0] and column < grid[1]:
                    total = total + made.start.weight[:, :, r, c] @ x[row * grid[1] + column]
        rows.append(total)
    return made.start_norm(torch.stack(rows)), places


def slow_group(made, x, grid):
    """Groups of one image and the shares of each token in all of them, (N, G), token by token and group by group."""
    groups, places = slow_start(made, x, grid)
    reach = 1 if made.scope == "local" else 2
    normed = made.norm(x)
    keys, values = made.key(normed), made.value(normed)
    for _ in range(made.iterations):
        queries = made.query(groups)
        shares = []
        for token in range(len(x)):
            logits = []
            for group in range(len(groups)):
                logit = made.log_temperature.exp().clamp(0.01, 5) * (keys[token] @ queries[group])
                if places is not None:
                    (y, across), (row, column) = places[group], divmod(token, grid[1])
                    down, right = y - row // made.stride, across - column // made.stride
                    if made.scope == "local" and max(abs(down), abs(right)) > 1:
                        logit = torch.tensor(-torch.inf, dtype=x.dtype)
                    else:
                        offset = [min(max(away, -reach), reach) + reach for away in (down, right)]
                        inside = row % made.stride * made.stride + column % made.stride
                        logit = logit + made.position_bias[inside, offset[0] * (2 * reach + 1) + offset[1]]
                logits.append(logit)
            shares.append(torch.stack(logits).softmax(0))
        up = torch.stack(shares)
        down = up / (up.sum(0) + 1e-6)
        groups = groups + made.update_norm(down.T @ values)
        groups = groups + made.mlp_norm(made.mlp(groups))
    return groups, up


@pytest.mark.parametrize("grid", [(6, 6), (5, 4)], ids=str)
def test_it_equals_the_slow_reference_gradients_included(options, grid):
    made = layer(**options)
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    tokens = Tokens.from_dense(x, grid=grid)
    found = made.group(tokens)
    expected = [slow_group(made, image, grid) for image in x]
    features, shares = (torch.stack(part) for part in zip(*expected, strict=True))
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.matrix(), shares)
    assert torch.equal(found.chosen(), shares.argmax(-1))
    weight = torch.rand(2, grid[0] * grid[1], dtype=torch.float64)
    torch.testing.assert_close(found.mass(weight), (weight[..., None] * shares).sum(1))
    leaves, pull = [x, *made.parameters()], torch.randn_like(features)
    grads = [torch.autograd.grad((out * pull).sum(), leaves) for out in (found.features, features)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
        assert one.any()


def test_sizes_are_the_shares_and_source_the_largest(options):
    made = layer(**options).float()
    prefix = 0 if "out_dim" in options else 1
    tokens = Tokens.from_dense(torch.randn(3, prefix + 36, 8), num_prefix=prefix, grid=(6, 6))
    sized = torch.where(tokens.layout.prefix, 1.0, torch.randint(1, 5, tokens.size.shape).float())
    tokens = Tokens(tokens.features, tokens.layout, sized, tokens.source, tokens.patches, tokens.grid)
    found, shares = made(tokens, Evidence()).tokens, made.group(tokens).matrix()
    for image, (before, after) in enumerate(zip(tokens.split(), found.split(), strict=True)):
        torch.testing.assert_close(after.size[prefix:], (before.size[prefix:, None] * shares[image]).sum(0))
        assert (after.size[:prefix] == 1).all() and torch.equal(after.source, shares[image].argmax(-1))
        if prefix:
            assert torch.equal(after.features[:prefix], before.features[:prefix])


@pytest.mark.parametrize("options", [{}, {"scope": "dense"}, {"scope": "dense", "groups": 9}], ids=str)
def test_cost_in_a_plain_transformer_equals_torch_s_counter(options):
    reducers = {1: SpatialGrouping(24, **options)}
    encoder = VisionEncoder(image_size=64, patch_size=8, dim=24, depth=3, num_heads=2, reducers=reducers).eval()
    images = torch.randn(1, 3, 64, 64)
    cost = image_cost(encoder, encoder(images).layouts)
    assert float(cost.total) == counted_macs(Pooled(encoder), images)


class Pooled(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x).pooled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "global"}, "expected one of local, dense"),
        ({"stride": 0}, "1 or more"),
        ({"groups": 4}, "needs scope dense"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialGrouping(8, **options)


def test_what_it_cannot_do_it_says():
    tokens = Tokens.from_dense(torch.randn(2, 17, 8), num_prefix=1, grid=(4, 4), seed=torch.tensor([1, 2]))
    ragged = RandomBoundaries(8, compression=2).eval()(tokens, Evidence()).tokens
    with pytest.raises(ValueError, match="form a grid"):
        SpatialGrouping(8)(ragged, Evidence())
    with pytest.raises(ValueError, match="width 8 and the groups 16"):
        SpatialGrouping(8, out_dim=16)(tokens, Evidence())


def small(**options):
    sizes = {"image_size": 64, "dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "kernel_size": 3}
    return NativeSegmentationEncoder(**(sizes | options))


def test_an_image_is_independent_of_its_batch_and_two_passes_agree():
    encoder, images = small().eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        together, again = encoder(images), encoder(images)
        assert torch.equal(together.pooled, again.pooled) and together.tokens.lengths.tolist() == [4] * 4
        for index in range(4):
            alone = encoder(images[index : index + 1]).pooled[0]
            torch.testing.assert_close(alone, together.pooled[index], rtol=1e-5, atol=1e-5)


def test_every_parameter_learns():
    encoder = small(drop_path=0.1, layer_scale=0.1)
    encoding = encoder(torch.randn(6, 3, 64, 64))
    (encoding.pooled * torch.randn_like(encoding.pooled)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_masks_are_the_product_of_the_stages():
    encoder, images = small().eval(), torch.randn(2, 3, 64, 64)
    masks, encoding = encoder.masks(images), encoder(images)
    assert masks.shape == (2, 256, 4)
    torch.testing.assert_close(masks.sum(-1), torch.ones(2, 256))
    torch.testing.assert_close(masks.sum(1).flatten(), encoding.tokens.size)


def test_cost_equals_torch_s_counter(monkeypatch):
    """One query a tile: no logit is computed that a mask then takes away."""
    monkeypatch.setattr(neighbourhood, "_TILE", 1)
    encoder, images = small().eval(), torch.randn(1, 3, 64, 64)
    assert float(encoder.cost(encoder(images).layouts).total) == counted_macs(Pooled(encoder), images)


def test_half_precision_decides_like_float32():
    encoder, images = small().eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(images).pooled
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = encoder(images).pooled.float()
        cast = encoder.to(torch.bfloat16)(images.bfloat16()).pooled.float()
    assert all(p.dtype == torch.float32 for p in encoder.levels[0].transition.grouping.parameters())
    for found in (mixed, cast):
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


def test_checkpointed_blocks_give_the_same_gradients():
    encoder, images = small(), torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        encoder(images).pooled.square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
