"""The encoder as a whole: parity with timm and open_clip, determinism, golden values."""

import copy

import open_clip
import pytest
import timm
import torch

from dtpvit.encoder import VisionEncoder, preset
from dtpvit.encoder.layers import Block
from dtpvit.encoder.reducers import DynamicPooling, Evidence, FixedStride, RandomBoundaries
from dtpvit.interop.create import create_clip, create_encoder
from dtpvit.interop.dense_weights import load_dense, to_our_names


def small(**options):
    sizes = {"image_size": 64, "patch_size": 8, "dim": 48, "depth": 4, "num_heads": 3} | options
    return VisionEncoder(**sizes)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vit_base_patch32_224", "vit_base_patch32_224"),
        ("vit_base_patch32_clip_224", "vit_base_patch32_clip_224"),
        ("vit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("vit_small_patch8_224", "vit_small_patch8_224"),
    ],
)
def test_dense_encoder_equals_timm(ours, theirs):
    torch.manual_seed(0)
    reference = timm.create_model(theirs, num_classes=0).eval()
    encoder = create_encoder(ours).eval()
    encoder.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).pooled, reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-B-32-quickgelu"])
def test_dense_towers_equal_open_clip(name, tmp_path):
    torch.manual_seed(0)
    reference = open_clip.create_model(name).eval()
    torch.save(reference.state_dict(), tmp_path / "dense.pt")
    config = {"name": f"DTP-ViT-B-{name[6:8]}-1x"}
    if "quickgelu" in name:
        config |= {"vision": {"act": "quick_gelu"}, "text": {"act": "quick_gelu"}}
    model = create_clip(config, init=tmp_path / "dense.pt").eval()
    images = torch.randn(2, 3, 224, 224)
    text = open_clip.get_tokenizer(name)(["a photo of a cat", "two dogs", "", "word " * 100])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), reference.encode_image(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(text), reference.encode_text(text), rtol=0, atol=1e-5)


def test_text_gradients_equal_open_clip():
    torch.manual_seed(0)
    text_config = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision_config = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
    reference = open_clip.CLIP(16, vision_config, text_config)
    model = create_clip({"embed_dim": 16, "vision": {"preset": "vit_tiny_patch32_224"}, "text": text_config})
    ours = model.state_dict()
    model.load_state_dict({n: v for n, v in reference.state_dict().items() if n in ours}, strict=False)
    text = open_clip.SimpleTokenizer(context_length=20)(["a b c", "x", "longer caption here"])
    for tower in (reference, model):
        tower.encode_text(text).square().sum().backward()
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, parameter.grad, rtol=1e-3, atol=5e-5)


def test_embedding_is_the_same_alone_in_any_batch_and_in_two_passes():
    torch.manual_seed(0)
    encoder = small(reducers={1: DynamicPooling(48, compression=4), 3: DynamicPooling(48, compression=2)})
    images = torch.randn(32, 3, 64, 64)
    encoder.train()(images)
    encoder.eval()
    with torch.no_grad():
        batch = encoder(images)
        assert torch.equal(batch.pooled, encoder(images).pooled)
        assert batch.tokens.lengths.min() < batch.tokens.lengths.max()
        for size in (1, 5):
            parts = torch.cat([encoder(part).pooled for part in images.split(size)])
            torch.testing.assert_close(parts, batch.pooled, rtol=0, atol=1e-5)


def test_training_noise_follows_from_the_seed_alone():
    encoder = small(reducers={1: DynamicPooling(48, compression=4, budget="fixed")}).train()
    images, seeds = torch.randn(6, 3, 64, 64), torch.arange(6)
    one, two = encoder(images, seeds=seeds), encoder(images, seeds=seeds)
    assert torch.equal(one.tokens.source, two.tokens.source)
    alone = encoder(images[2:3], seeds=seeds[2:3])
    assert torch.equal(alone.tokens.source, one.tokens.split()[2].source)
    assert not torch.equal(encoder(images, seeds=seeds + 1).tokens.source, one.tokens.source)


def test_pooling_equal_patches_changes_nothing():
    """An image of one colour without positions: every patch token is equal, so pooling must be invisible."""
    torch.manual_seed(0)
    dense = small(readout="mean")
    with torch.no_grad():
        dense.pos_embed.zero_()
    pooled = small(readout="mean", reducers={0: FixedStride(48, compression=7)})
    pooled.load_state_dict(dense.state_dict())
    image = torch.full((1, 3, 64, 64), 0.3)
    with torch.no_grad():
        found, expected = pooled.eval()(image), dense.eval()(image)
    assert found.layouts[0].mlp.total == 11
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-5, atol=1e-5)


def test_mean_read_out_is_weighted_by_patches():
    encoder = small(readout="mean", reducers={2: DynamicPooling(48, compression=5)}).eval()
    encoding = encoder(torch.randn(3, 3, 64, 64))
    spread = encoding.tokens.unpool().view(3, 64, 48)
    torch.testing.assert_close(encoding.pooled, spread.mean(1))


class StrideInside(FixedStride):
    """Cuts a stride between attention and MLP and keeps what it was told."""

    place, needs = "inside", frozenset({"keys", "class_attention"})

    def forward(self, tokens, evidence):
        self.told = tokens, evidence
        return super().forward(tokens, evidence)


@pytest.mark.parametrize("first", [FixedStride, RandomBoundaries])
def test_a_reducer_inside_a_block_acts_between_its_halves(first):
    """On dense batches and on ragged ones, with sizes above one."""
    encoder = small(reducers={1: first(48, compression=2), 2: StrideInside(48, compression=4)}).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        encoding = encoder(images)
        tokens = encoder.run_block(1, encoder.run_block(0, encoder.embed(images)))
        block, (given, evidence) = encoder.blocks[2], encoder.reducers["2"].told
        qkv = block.attn.qkv(block.norm1(tokens.features)).view(-1, 3, 3, 16)
        mixed = block.attn(block.norm1(tokens.features), tokens.layout, tokens.key_bias)[0]
        torch.testing.assert_close(given.features, tokens.features + mixed)
        torch.testing.assert_close(evidence.keys, qkv[:, 1].mean(1))
        sums = torch.zeros(3).index_add(0, given.layout.image, evidence.class_attention)
        torch.testing.assert_close(sums, torch.ones(3))
        pooled = FixedStride(48, compression=4)(given, Evidence()).tokens
        x = pooled.features + block.mlp(block.norm2(pooled.features))
        expected = encoder.run_block(3, pooled.with_features(x))
        torch.testing.assert_close(encoding.tokens.features, encoder.norm(expected.features))
    seen = encoding.layouts[2]
    assert torch.equal(seen.attention.lengths, tokens.lengths) and torch.equal(seen.mlp.lengths, pooled.lengths)
    assert encoding.compression[2] == pytest.approx((tokens.layout.total - 3) / (pooled.layout.total - 3))


def test_evidence_is_computed_only_where_it_is_needed():
    block, tokens = Block(48, num_heads=3), small().embed(torch.randn(2, 3, 64, 64))
    assert block.attend(tokens)[1] == Evidence()
    assert block.attend(tokens, frozenset({"keys"}))[1].class_attention is None
    before = type("Before", (StrideInside,), {"place": "before"})
    with pytest.raises(ValueError, match="Before acts before attention and needs"):
        small(reducers={1: before(48, compression=2)})


def test_thresholds_behind_a_reducer_inside_a_block():
    encoder = small(reducers={0: StrideInside(48, compression=2), 2: DynamicPooling(48, compression=4)}).train()
    images, seeds = torch.randn(3, 3, 64, 64), torch.arange(3)
    scores, patches = encoder.boundary_scores(images, 2, seeds=seeds, thresholds={})
    assert scores.shape == (2, 3 * 31) and patches == 3 * 32
    assert encoder.boundary_scores(images, 0, seeds=seeds, thresholds={}) == (None, 3 * 64)
    with pytest.raises(ValueError, match="block 1 has no reducer"):
        encoder.boundary_scores(images, 1, seeds=seeds, thresholds={})


@pytest.mark.parametrize("reducer", [DynamicPooling, StrideInside])
def test_gradient_checkpointing_changes_no_gradient(reducer):
    torch.manual_seed(0)
    encoder = small(drop_path=0.0, reducers={1: reducer(48, compression=4)}).train()
    images, seeds = torch.randn(4, 3, 64, 64), torch.arange(4)
    grads = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        encoder(images, seeds=seeds).pooled.square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_long_lines_under_bfloat16_have_right_segments():
    """L = 1024: a cumulative sum in bfloat16 would stop counting at 256."""
    encoder = VisionEncoder(
        image_size=128, patch_size=4, dim=32, depth=2, num_heads=2, reducers={1: DynamicPooling(32, compression=2)}
    )
    images = torch.randn(3, 3, 128, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = encoder.train()(images)
    for image in encoding.tokens.split():
        count = len(image.size) - 1
        assert count > 400 and torch.equal(image.source.unique(), torch.arange(count))
        line = image.source[_hilbert(32)]
        assert torch.equal(line, line.sort().values)  # ids rise along the line
        assert torch.equal(torch.bincount(image.source).float(), image.size[1:])


def _hilbert(side):
    from dtpvit.encoder.ops.scan import scan_order

    return scan_order("hilbert", side, side)


def test_set_input_size_resamples_positions_like_timm():
    torch.manual_seed(0)
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    encoder = create_encoder("vit_tiny_patch16_224")
    encoder.load_state_dict(reference.state_dict())
    reference.set_input_size(img_size=(160, 256))
    encoder.set_input_size((160, 256))
    images = torch.randn(1, 3, 160, 256)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(images).pooled, reference.eval()(images), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not a multiple"):
        encoder.set_input_size(100)
    with pytest.raises(ValueError, match="images are 224x224, the encoder was made for 160x256"):
        encoder(torch.randn(1, 3, 224, 224))


def test_golden_values():
    """A refactor leaves these unchanged; a change of the numbers is a change of behaviour and says so."""
    sizes = {"image_size": 64, "patch_size": 8, "dim": 48, "depth": 4, "num_heads": 3}
    reducers = {2: DynamicPooling(48, compression=4)}
    encoder = VisionEncoder(**sizes, reducers=reducers)
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(encoder.named_parameters())):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.2 * torch.sin(places * 0.7 + index)).view(parameter.shape))
    pixels = torch.arange(2 * 3 * 64 * 64, dtype=torch.float64)
    images = torch.sin(pixels * 0.013).view(2, 3, 64, 64).float()
    with torch.no_grad():
        encoding = encoder.eval()(images)
    assert encoding.tokens.lengths.tolist() == [17, 17]
    torch.testing.assert_close(encoding.pooled.norm(dim=1), torch.tensor(GOLDEN_NORM), rtol=1e-4, atol=0)
    torch.testing.assert_close(encoding.pooled[:, 5], torch.tensor(GOLDEN_ENTRY), rtol=1e-3, atol=0)


GOLDEN_NORM = [1.22108221, 1.22111654]
GOLDEN_ENTRY = [0.16572313, 0.16571766]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 65}, "not a multiple of the patch"),
        ({"dim": 50}, "not divisible by 3 heads"),
        ({"readout": "last"}, "expected class or mean"),
        ({"reducers": {4: lambda dim: FixedStride(dim, compression=2)}}, "blocks 0 to 3"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_presets_cover_sizes_and_patches():
    for size in ("tiny", "small", "base", "large"):
        for patch in (8, 14, 16, 32):
            assert preset(f"vit_{size}_patch{patch}_224")["patch_size"] == patch
    with pytest.raises(ValueError, match=r"expected vit_\(tiny"):
        preset("vit_enormous_patch16_224")


def test_init_reports_what_was_taken_and_what_not(tmp_path):
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    torch.save({"model": reference.state_dict()}, tmp_path / "dense.pth")
    encoder = create_encoder(
        "vit_tiny_patch16_224", image_size=96, reducers={2: lambda dim: DynamicPooling(dim, compression=4)}
    )
    fresh = copy.deepcopy(encoder.state_dict())
    transfer = load_dense(encoder, tmp_path / "dense.pth")
    assert set(transfer.left) == {"visual.trunk.head.weight", "visual.trunk.head.bias"}
    assert all("boundary" in name for name in transfer.fresh) and transfer.fresh
    assert "no such tensor" in str(transfer) and "no dense model has it" in str(transfer)
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, reference.blocks[3].mlp.fc1.weight)
    assert not torch.equal(encoder.pos_embed, fresh["pos_embed"]) and encoder.pos_embed.shape == (1, 37, 192)
    assert encoder.eval()(torch.randn(1, 3, 96, 96)).pooled.isfinite().all()
    assert set(to_our_names(reference.state_dict())) >= {"visual.trunk.cls_token"}
