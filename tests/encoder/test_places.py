"""Where reducers act: on a whole block with the way back, on its attention, on its keys alone; and what that costs."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dtpvit.encoder import Layout, VisionEncoder
from dtpvit.encoder.ops.attention import cross_attention, packed_attention
from dtpvit.encoder.ops.segments import spread_rows
from dtpvit.encoder.reducers import Evidence, FixedStride, GridPooling, RandomBoundaries, ToDo, TokenLearner, ToMeSD
from dtpvit.evaluation.cost import dense_macs, image_cost, image_macs
from dtpvit.interop.create import create_encoder


def small(**options):
    sizes = {"image_size": (48, 64), "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 2} | options
    return VisionEncoder(**sizes)


def fused(num_tokens=5, **options):
    reducer = TokenLearner(24, num_tokens=num_tokens, fuse=True, **options)
    torch.nn.init.normal_(reducer.fuser.among.weight, std=0.5)
    return reducer


EVERY = {
    "tomesd": lambda: ToMeSD(24, ratio=0.5, random=True),
    "todo": lambda: ToDo(24, factor=2),
    "token learner": lambda: TokenLearner(24, num_tokens=5),
    "token learner 1.0": lambda: TokenLearner(24, num_tokens=5, version="1.0"),
    "token fuser": fused,
    "token fuser 1.0": lambda: fused(version="1.0"),
}


def slow_attention(q, k, v, bias):
    """One image: queries (N, H, E), keys and values (M, H, E), bias (M,)."""
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(q.shape[1]):
            logits = torch.stack([q[i, h] @ k[j, h] / q.shape[2] ** 0.5 + bias[j] for j in range(len(k))])
            share = logits.exp() / logits.exp().sum()
            heads.append(sum(share[j] * v[j, h] for j in range(len(k))))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [([4, 4], [3, 3]), ([5, 2, 4], [1, 3, 2]), ([3, 3], [1, 4])])
def test_attention_to_other_keys_equals_loops(queries, keys, with_bias):
    layout, key_layout = Layout.fetched(torch.tensor(queries)), Layout.fetched(torch.tensor(keys))
    q = torch.randn(sum(queries), 2, 6, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(sum(keys), 2, 2, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(sum(keys), dtype=torch.float64)
    found = cross_attention(q, kv, layout, key_layout, key_bias=bias if with_bias else None)
    parts = zip(q.split(queries), kv.split(keys), bias.split(keys), strict=True)
    expected = torch.cat([slow_attention(a, b[:, 0], b[:, 1], c if with_bias else 0 * c) for a, b, c in parts])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((out * weight).sum(), (q, kv)) for out in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_to_the_same_tokens_is_self_attention(ragged):
    layout = Layout.fetched(torch.tensor([3, 7, 5] if ragged else [5, 5, 5]))
    qkv, bias = torch.randn(15, 3, 2, 8), torch.randn(15)
    found = cross_attention(qkv[:, 0], qkv[:, 1:], layout, layout, key_bias=bias)
    torch.testing.assert_close(found, packed_attention(qkv, layout, key_bias=bias))


FRAGMENTS = {"tomesd": (0.68, 0.73), "todo": (0.79, 0.85), "token_learner": (0.53, 0.53), "token_fuser": (0.51, 0.48)}


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_fragment_costs_what_its_header_says(name):
    path = Path(__file__).parents[2] / "configs" / "reducers" / f"{name}.yaml"
    header, config = path.read_text(), yaml.safe_load(path.read_text())
    for size, share in zip(("tiny", "base"), FRAGMENTS[name], strict=True):
        encoder = create_encoder(f"vit_{size}_patch16_224", reducers=config).eval()
        with torch.no_grad():
            found = float(image_macs(encoder, encoder(torch.randn(1, 3, 224, 224))))
        assert found / dense_macs(encoder) == pytest.approx(share, abs=0.005) and f"{share:.2f} of" in header


class StrideKeys(FixedStride):
    place = "keys"


@pytest.mark.parametrize("first", [FixedStride, RandomBoundaries])
def test_a_reducer_of_keys_leaves_every_token(first):
    """On dense batches and on ragged ones, with sizes above one."""
    encoder = small(reducers={1: first(24, compression=2), 2: StrideKeys(24, compression=4)}).eval()
    images = torch.randn(3, 3, 48, 64)
    with torch.no_grad():
        tokens = encoder.run_block(1, encoder.run_block(0, encoder.embed(images)))
        found, block = encoder.run_block(2, tokens), encoder.blocks[2]
        for before, after in zip(tokens.split(), found.split(), strict=True):
            x = block.norm1(before.features)
            keys = FixedStride(24, compression=4)(before.with_features(x), Evidence()).tokens
            q = block.attn.qkv(x)[:, :24].view(-1, 2, 12)
            k, v = block.attn.qkv(keys.features)[:, 24:].view(-1, 2, 2, 12).unbind(1)
            mixed = block.attn.proj(slow_attention(q, k, v, keys.size.log()).flatten(1))
            x = before.features + mixed
            torch.testing.assert_close(after.features, x + block.mlp(block.norm2(x)), rtol=1e-5, atol=1e-5)
            assert torch.equal(after.source, before.source) and torch.equal(after.key_bias, before.key_bias)
        encoding = encoder(images)
    seen = encoding.layouts[2]
    assert seen.arrived is seen.attention is seen.mlp and torch.equal(seen.arrived.lengths, tokens.lengths)
    wanted = 1 + ((tokens.lengths - 1) / 4).ceil()
    assert torch.equal(seen.keys.lengths, wanted.long()) and seen.reduced is seen.keys
    assert encoding.compression[2] == pytest.approx(float((tokens.lengths - 1).sum() / (wanted - 1).sum()))


@pytest.mark.parametrize("name", EVERY)
def test_costs_equal_torch_s_counter(name):
    """Queries N and keys M, blocks around which tokens are restored, and the reducers' own products."""
    encoder = small(
        reducers={0: EVERY[name](), 2: EVERY[name]() if "fuser" in name else FixedStride(24, compression=3)}
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        encoding = encoder.eval()(torch.randn(1, 3, 48, 64))
    cost = image_cost(encoder, encoding.layouts)
    assert 2 * float(cost.total) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_layouts_say_what_each_part_saw():
    reducers = {0: ToMeSD(24, ratio=0.5), 1: ToDo(24, factor=2), 2: fused()}
    encoding = small(reducers=reducers).eval()(torch.randn(2, 3, 48, 64))
    seen = [[part.longest for part in (b.arrived, b.attention, b.keys, b.mlp, b.reduced)] for b in encoding.layouts]
    assert seen == [[49, 25, 25, 49, 25], [49, 49, 13, 49, 13], [49, 6, 6, 6, 6]]
    assert encoding.compression == {0: 2.0, 1: 4.0, 2: 9.6}
    assert encoding.tokens.lengths.tolist() == [49, 49] and encoding.tokens.grid == (6, 8)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_changes_no_gradient(name):
    encoder = small(reducers={0: EVERY[name](), 1: ToDo(24)} if "fuser" in name else {1: EVERY[name]()}).train()
    images, seeds = torch.randn(4, 3, 48, 64), torch.arange(4)
    grads = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        encoder(images, seeds=seeds).pooled.square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_what_draws_hands_on_a_fresh_seed():
    """Else two blocks in a row would keep the very same tokens."""
    encoder = small(reducers={0: ToMeSD(24, random=True), 1: ToDo(24), 2: fused()}).train()
    seeds = [encoder.embed(torch.randn(2, 3, 48, 64), torch.arange(2))]
    for index in range(3):
        seeds.append(encoder.run_block(index, seeds[-1]))
    assert [torch.equal(one.seed, two.seed) for one, two in pairwise(seeds)] == [False, True, True]


def test_several_in_one_encoder_after_grid_pooling():
    """Tokens that are weighed by size stay weighed where they are merged or chosen among."""
    reducers = {0: GridPooling(24), 1: ToMeSD(24, ratio=0.5), 2: ToDo(24, factor=2)}
    encoder = small(reducers=reducers).eval()
    tokens = encoder.run_block(0, encoder.embed(torch.randn(2, 3, 48, 64)))
    for index in (1, 2):
        few = encoder.enter_block(index, tokens).reduction.tokens
        assert torch.equal(few.key_bias, few.size.log()) and few.size[1:13].sum() > 12
        assert torch.equal(encoder.run_block(index, tokens).key_bias, tokens.key_bias)


def test_spreading_and_its_gradient():
    rows = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    destination = torch.tensor([2, 0, 1, 2, 2])
    assert torch.equal(spread_rows(rows, destination), rows[destination])
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, destination), (rows.requires_grad_(),), atol=1e-5)
