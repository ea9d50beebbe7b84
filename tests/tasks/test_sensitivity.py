"""The closed-form fit of what an encoder's output depends on, and the segments that follow from it."""

import pytest
import torch
from torch.nn.functional import kl_div, layer_norm

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling, Evidence
from dtpvit.interop.create import create_encoder
from dtpvit.tasks.sensitivity import fit_sensitivity, sensitivity


def small(**reducers):
    torch.manual_seed(0)
    made = {int(block[1:]): reducer for block, reducer in reducers.items()}
    return VisionEncoder(image_size=48, patch_size=8, dim=32, depth=4, num_heads=2, reducers=made).eval()


def by_sensitivity(**options):
    return DynamicPooling(32, compression=3, router="sensitivity", **options)


def test_unfitted_it_is_minimum_variance():
    tokens = Tokens.from_dense(torch.randn(3, 37, 32), num_prefix=1, grid=(6, 6))
    plain = DynamicPooling(32, compression=3, router="minimum_variance").eval()(tokens, Evidence()).tokens
    found = by_sensitivity().eval()(tokens, Evidence()).tokens
    assert torch.equal(found.source, plain.source)
    torch.testing.assert_close(found.features, plain.features)


def test_the_mean_is_weighted_and_the_size_is_not():
    tokens = Tokens.from_dense(torch.randn(1, 37, 32, dtype=torch.float64), num_prefix=1, grid=(6, 6))
    reducer = by_sensitivity().eval()
    reducer.boundary_predictor.boundary_sensitivity.data.normal_()
    found = reducer(tokens, Evidence()).tokens
    assert found.size[1:].sum() == 36 and torch.equal(found.size, found.size.round())
    weights = reducer.boundary_predictor.weights(tokens).double()
    assert weights[0] == 1 and weights.min() < 0.5 and weights.max() > 2
    for token in range(12):
        mine = torch.nonzero(found.source == token)[:, 0] + 1
        mean = (tokens.features[mine] * weights[mine, None]).sum(0) / weights[mine].sum()
        torch.testing.assert_close(found.features[1 + token], mean, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_the_output():
    """Against autograd through the whole encoder, by a perturbation of the tokens themselves."""
    encoder = small(b2=by_sensitivity())
    images = torch.randn(2, 3, 48, 48)
    head = torch.nn.Linear(32, 5)
    tokens, squared = sensitivity(
        encoder, images, 2, head=head, classes=True, generator=torch.Generator().manual_seed(3)
    )
    assert tokens.layout.total == 2 * 37 and squared.shape == (74,) and (squared[1:37] > 0).all()
    dense = small()
    dense.load_state_dict(encoder.state_dict(), strict=False)
    features = tokens.features.clone().requires_grad_()
    later = tokens.with_features(features)
    for block in dense.blocks[2:]:
        later = block(later)
    logits = head(dense.norm(later.features)[::37])
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(-logits.log_softmax(-1).gather(1, drawn).sum(), features)
    torch.testing.assert_close(squared, gradient.square().sum(1))


def test_the_fit_finds_a_linear_law():
    """Where the logarithm really is linear in the inputs, the solution of the normal equations predicts it."""
    encoder = small(b1=by_sensitivity(), b3=by_sensitivity())
    batches = [torch.randn(16, 3, 48, 48) for _ in range(3)]
    explained = fit_sensitivity(encoder, batches, generator=torch.Generator().manual_seed(0))
    assert list(explained) == [1, 3] and all(0 < share < 1 for share in explained.values())
    assert encoder.reducers["1"].boundary_predictor.boundary_sensitivity.abs().sum() > 0
    # No other solution explains more: least squares on the same draws, by torch's own solver.
    rows, targets = [], []
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        tokens, squared = sensitivity(encoder, batch, 1, generator=generator)
        h = layer_norm(tokens.features, (32,)).view(16, 37, 32)
        inputs = torch.cat((h, h * h[:, :1]), dim=2)[:, 1:]
        target = squared.view(16, 37)[:, 1:].log()
        rows.append((inputs - inputs.mean(1, keepdim=True)).flatten(0, 1))
        targets.append((target - target.mean(1, keepdim=True)).flatten())
    x, y = torch.cat(rows).double(), torch.cat(targets).double()
    best = torch.linalg.lstsq(torch.cat((x, 10 * torch.eye(64))), torch.cat((y, torch.zeros(64))).double()).solution
    found = encoder.reducers["1"].boundary_predictor.boundary_sensitivity.flatten().double()
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-5)
    assert explained[1] == pytest.approx(float(1 - (y - x @ best).square().sum() / y.square().sum()), abs=1e-4)


def test_an_encoder_without_such_a_router_is_refused():
    with pytest.raises(ValueError, match="no reducer whose router is sensitivity or local"):
        fit_sensitivity(small(), [])


@pytest.mark.slow
def test_on_real_images_it_beats_minimum_variance(shared_data):
    """DeiT-Tiny, 4x before block 4: divergence from the dense model on images that were not fitted on."""
    from dtpvit.datamodules.labelled import labelled_loader

    weights = torch.load(shared_data / "weights" / "deit_tiny_patch16_224.pth", weights_only=True)["model"]
    head = torch.nn.Linear(192, 1000)
    head.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
    loader = labelled_loader(str(shared_data / "imagenet_sample"), image_size=(224, 224), batch_size=50, limit=400)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = [(b["image"].float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1) for b in loader]
    logits = {}
    for router in (None, "minimum_variance", "sensitivity"):
        options = {"compression": 4, "router": router, "order": "hilbert"}
        reducers = {} if router is None else {4: {"class_path": "DynamicPooling", "init_args": options}}
        path = shared_data / "weights" / "deit_tiny_patch16_224.pth"
        encoder = create_encoder("vit_tiny_patch16_224", reducers=reducers, init=path).eval()
        if router == "sensitivity":
            fit_sensitivity(encoder, images[::2], head=head, classes=True, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits[router] = torch.cat([head(encoder(batch).pooled) for batch in images[1::2]]).log_softmax(-1)
    far = {
        router: kl_div(found, logits[None], log_target=True, reduction="batchmean").item()
        for router, found in logits.items()
    }
    assert far["sensitivity"] < 0.8 * far["minimum_variance"]


def test_a_second_pooling_is_fitted_behind_exact_segments_whatever_finds_them_later():
    """A predictor that has not learned yet must not decide what the weights behind it are fitted on."""
    found = []
    for options in ({"router": "sensitivity"}, {"router": "local", "estimator": "imitation", "budget": "fixed"}):
        reducers = {block: DynamicPooling(24, compression=2, **options) for block in (1, 2)}
        torch.manual_seed(0)  # of the trunk
        encoder = VisionEncoder(image_size=48, patch_size=8, dim=24, depth=4, num_heads=2, reducers=reducers).eval()
        images = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(1))
        fit_sensitivity(encoder, [images], generator=torch.Generator().manual_seed(2))
        assert not any(module.training for module in encoder.modules())
        found.append([encoder.reducers[str(b)].boundary_predictor.boundary_sensitivity for b in (1, 2)])
    for one, two in zip(*found, strict=True):
        assert one.any() and torch.equal(one, two)
