"""A ViT that merges tokens inside its blocks, one image at a time and with loops: what the packed one must equal."""

import torch

from dtpvit.encoder import Layout, Tokens, VisionEncoder
from dtpvit.encoder.reducers import Evidence


def small(reducers, **options):
    """An encoder of 37 tokens whose attention is not uniform."""
    sizes = {"image_size": 48, "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 2} | options
    encoder = VisionEncoder(**sizes, reducers=reducers)
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(4)
    return encoder


def cosine(a, b):
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def slow_merge(x, size, members, pairs, order):
    """Size-weighted averages after each a of the pairs (a, b) went into its b, those left in the given order."""
    gone = {a for a, _ in pairs}
    rows, sizes, patches = [], [], []
    for place in order:
        if place in gone:
            continue
        group = [place] + [a for a, b in pairs if b == place]
        total = sum(size[i] for i in group)
        rows.append(sum(x[i] * size[i] for i in group) / total)
        sizes.append(total)
        patches.append([patch for i in group for patch in members[i]])
    return torch.stack(rows), sizes, patches


def slow_encode(encoder, image, matchings):
    """One image through a ViT that merges in its blocks: class token after the norm, sizes and patches of each token.

    Each of ``matchings`` makes pairs and order of keys and the number of prefix tokens.
    """
    x = encoder.embed(image[None]).features
    size, members = [1.0] * len(x), [[i] for i in range(len(x))]
    for block, matching in zip(encoder.blocks, matchings, strict=True):
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).unbind(1)
        mixed = []
        for head in range(heads):
            logits = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
            mixed.append((logits + torch.tensor(size, dtype=torch.float32).log()).softmax(-1) @ v[:, head])
        x = x + block.attn.proj(torch.cat(mixed, dim=1))
        x, size, members = slow_merge(x, size, members, *matching(k.detach().mean(1), 1))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)[0], size, members


def assert_equals_slow_reference(encoder, images, matchings):
    """The same class token, sizes, sources and gradients, of every image."""
    encoding = encoder(images)
    parameters = list(encoder.parameters())
    weight = torch.arange(encoder.dim)
    grads = torch.autograd.grad((encoding.pooled * weight).sum(), parameters)
    expected = [slow_encode(encoder, image, matchings) for image in images]
    pooled = torch.stack([features for features, _, _ in expected])
    torch.testing.assert_close(encoding.pooled, pooled, rtol=1e-6, atol=1e-6)
    for tokens, (_, size, members) in zip(encoding.tokens.split(), expected, strict=True):
        assert tokens.size.tolist() == size and members[0] == [0]
        assert all((tokens.source[torch.tensor(patches) - 1] == row).all() for row, patches in enumerate(members[1:]))
    slow = torch.autograd.grad((pooled * weight).sum(), parameters)
    for one, two in zip(grads, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # shares of a mean are float32
    return encoding


def random_tokens(lengths, num_prefix):
    """Tokens of unequal lengths and sizes, and keys for them."""
    total = sum(lengths)
    layout = Layout.fetched(torch.tensor(lengths), num_prefix)
    patches = Layout.fetched(torch.tensor(lengths) - num_prefix)
    size = torch.where(layout.prefix, 1.0, torch.randint(1, 5, (total,)).float())
    source = torch.cat([torch.arange(length - num_prefix) for length in lengths])
    return Tokens(torch.randn(total, 6), layout, size, source, patches), torch.randn(total, 4)


def assert_merges_like(reducer, matching, tokens, keys):
    """One reducer on tokens of any lengths, image by image."""
    found = reducer(tokens, Evidence(keys=keys)).tokens
    num_prefix = tokens.num_prefix
    assert found.layout.total == found.lengths.sum() and found.layout.longest == found.lengths.max()
    parts = zip(tokens.split(), keys.split(tokens.lengths.tolist()), found.split(), strict=True)
    for before, own_keys, after in parts:
        members = [[place] for place in range(len(own_keys))]
        pairs, order = matching(own_keys, num_prefix)
        x, sizes, groups = slow_merge(before.features, before.size.tolist(), members, pairs, order)
        torch.testing.assert_close(after.features, x)
        assert after.size.tolist() == sizes
        for row, group in enumerate(groups[num_prefix:]):
            assert (after.source[torch.tensor(group) - num_prefix] == row).all()
        assert torch.equal(after.features[:num_prefix], before.features[:num_prefix])
    return found
