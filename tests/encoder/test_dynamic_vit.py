"""DynamicViT and its masked attention against a slow reference with loops, written from the paper's formulas."""

import copy

import pytest
import torch
from torch.nn.functional import gelu, one_hot

from dtpvit.encoder import Layout, Tokens, VisionEncoder
from dtpvit.encoder.ops.attention import packed_attention
from dtpvit.encoder.ops.noise import advance_seed, logistic_noise
from dtpvit.encoder.ops.policy import policy_attention
from dtpvit.encoder.reducers import DynamicViT, Evidence, RandomBoundaries, ToDo, ToMe
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.create import create_encoder
from dtpvit.tasks.distillation import tokens_loss

STAGES = {0: 0.6, 1: 0.36, 2: 0.2}


def small(stages=STAGES, **options):
    sizes = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 4, "num_heads": 2} | options
    encoder = VisionEncoder(**sizes, reducers={block: DynamicViT(24, keep=keep) for block, keep in stages.items()})
    with torch.no_grad():  # attention that is not uniform, predictors with opinions
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(4)
        for name, parameter in encoder.reducers.named_parameters():
            if "score" in name:
                parameter.normal_(std=0.5)
    return encoder


def slow_attention(q, k, v, policy, bias):
    """One head of one image."""
    rows = []
    for i in range(len(q)):
        logits = k @ q[i] / q.shape[1] ** 0.5 + bias
        weight = [(logits[j] - logits.max()).exp() * (1 if i == j else policy[j]) for j in range(len(k))]
        total = sum(weight)
        shares = [(w + 1e-6 / len(k)) / (total + 1e-6) for w in weight]
        rows.append(sum(share * value for share, value in zip(shares, v, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", [[5, 5], [1, 7, 3]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_masked_attention_and_gradients_equal_the_formula(lengths, with_bias):
    total, layout = sum(lengths), Layout.fetched(torch.tensor(lengths))
    fast = [torch.randn(total, 3, 2, 4, dtype=torch.float64), torch.rand(total, dtype=torch.float64).round(decimals=1)]
    fast = [x.requires_grad_() for x in fast]
    slow = [x.detach().clone().requires_grad_() for x in fast]
    bias = torch.rand(total, dtype=torch.float64) * 3 if with_bias else None
    found = policy_attention(fast[0], layout, fast[1], key_bias=bias)
    heads = []
    for head in range(2):
        parts = zip(
            *(slow[0][:, part, head].split(lengths) for part in range(3)),
            slow[1].split(lengths),
            (torch.zeros(total) if bias is None else bias).split(lengths),
            strict=True,
        )
        heads.append(torch.cat([slow_attention(*part) for part in parts]))
    expected = torch.stack(heads, dim=1)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, two in zip(fast, slow, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_with_everything_kept_it_is_plain_softmax_and_what_is_masked_is_not_seen():
    layout = Layout.fetched(torch.tensor([9, 6]))
    qkv = torch.randn(15, 3, 2, 4)
    plain = packed_attention(qkv, layout)
    torch.testing.assert_close(policy_attention(qkv, layout, torch.ones(15)), plain, rtol=1e-5, atol=1e-5)
    policy = (torch.arange(15) % 3 != 1).float()
    kept = policy.nonzero().squeeze(1)
    removed = packed_attention(qkv[kept], Layout.fetched(torch.tensor([6, 4])))
    torch.testing.assert_close(policy_attention(qkv, layout, policy)[kept], removed, rtol=1e-4, atol=1e-5)


def slow_log_probabilities(predictor, x, there):
    """Of one image's patches, shape (N, 2)."""
    z = gelu(predictor.embed(predictor.norm(x)))
    half = z.shape[1] // 2
    mean = sum(there[i] * z[i, half:] for i in range(len(z))) / sum(there)
    rows = []
    for row in z:
        score = torch.cat((row[:half], mean))
        for layer in predictor.score:
            score = layer(score)
        rows.append(score - score.exp().sum().log())
    return torch.stack(rows)


def slow_encode(encoder, image, seed, stages):
    """One image through the ViT: class token after the norm, patches left in their order, and the ratio losses."""
    x = encoder.embed(image[None], seeds=seed[None]).features
    left, there, losses = list(range(1, len(x))), torch.ones(len(x), dtype=x.dtype), []
    for index, block in enumerate(encoder.blocks):
        if index in stages:
            log = slow_log_probabilities(encoder.reducers[str(index)].keep_predictor, x[1:], there[1:])
            if encoder.training:
                noise = logistic_noise(seed, torch.arange(1, len(x)))  # a difference of two Gumbel variables
                soft = torch.stack((log[:, 0] + noise, log[:, 1]), dim=1).softmax(1)
                hard = one_hot(soft.argmax(1), 2)
                there = torch.cat((there[:1], (hard - soft.detach() + soft)[:, 0] * there[1:]))
                losses.append((there[1:].mean() - stages[index]) ** 2)
                seed = advance_seed(seed)
            else:
                count = int(16 * stages[index])
                best = sorted(range(len(left)), key=lambda place: -log[place, 0].item())[:count]
                x = torch.stack([x[0]] + [x[1 + place] for place in best])
                left, there = [left[place] for place in best], there[: count + 1]
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, 2, -1).unbind(1)
        heads = [slow_attention(q[:, h], k[:, h], v[:, h], there, torch.zeros(len(x))) for h in range(2)]
        x = x + block.attn.proj(torch.cat(heads, dim=1))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)[0], left, there, losses


def test_training_equals_the_slow_reference_gradients_included():
    encoder = small().double().train()
    images, seeds = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(2) + 5
    parameters = list(encoder.parameters())
    encoding = encoder(images, seeds=seeds)
    losses = torch.stack(list(encoding.losses.values()))
    expected = [slow_encode(encoder, image, seed, STAGES) for image, seed in zip(images, seeds, strict=True)]
    ratio = torch.stack([2 / 3 * sum(losses) / len(images) for losses in zip(*(e[3] for e in expected), strict=True)])
    torch.testing.assert_close(losses, ratio)
    pooled = torch.stack([e[0] for e in expected])
    torch.testing.assert_close(encoding.pooled, pooled)
    policy = torch.cat([e[2] for e in expected])
    torch.testing.assert_close(encoding.tokens.policy, policy)
    assert encoding.tokens.lengths.tolist() == [17] * 2 and 0 < policy.sum() - 2 < 2 / 3 * 32
    task, slow = ((rows * torch.arange(24)).sum() for rows in (encoding.pooled, pooled))
    for with_losses in (False, True):
        found = torch.autograd.grad(task + with_losses * losses.sum(), parameters, retain_graph=True)
        wanted = torch.autograd.grad(slow + with_losses * ratio.sum(), parameters, retain_graph=True)
        assert all(grad.any() for grad in found)  # the task alone teaches every predictor
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_evaluation_equals_the_slow_reference():
    encoder = small().double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    encoding = encoder(images)
    assert [seen.mlp.longest for seen in encoding.layouts] == [10, 6, 4, 4] and not encoding.losses
    for image, tokens, pooled in zip(images, encoding.tokens.split(), encoding.pooled, strict=True):
        expected, left, _, _ = slow_encode(encoder, image, torch.zeros((), dtype=torch.int64), STAGES)
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)  # the reference has the eps
        rows = [(tokens.source == row).nonzero().item() + 1 for row in range(3)]
        assert rows == left and (tokens.source < 0).sum() == 13


@pytest.mark.parametrize("readout", ["class", "mean"])
def test_masking_is_removing(readout):
    """What training computes with masks is what the trunk computes on the tokens that are left."""
    encoder = small({1: 0.5}, readout=readout, image_size=48).train()
    with torch.no_grad():  # against a masked token that everybody looks at, the eps would show
        for block in encoder.blocks:
            block.attn.qkv.weight.div_(4)
    images = torch.randn(2, 3, 48, 48)
    encoding = encoder(images, seeds=torch.arange(2))
    for index, image in enumerate(images):
        policy = encoding.tokens.split()[index].policy
        x = encoder.run_block(0, encoder.embed(image[None])).features[policy > 0.5]
        tokens = Tokens.from_dense(x[None], num_prefix=1)
        for block in encoder.blocks[1:]:
            tokens = block(tokens)
        left = encoder.norm(tokens.features)
        expected = left[0] if readout == "class" else left[1:].mean(0)
        torch.testing.assert_close(encoding.pooled[index], expected, rtol=1e-4, atol=1e-4)
        assert 5 < len(x) < 32


def test_the_ratio_loss_alone_steers_the_share_that_stays():
    reducer = DynamicViT(24, keep=0.3).train()
    optimizer = torch.optim.Adam(reducer.parameters(), lr=3e-3)
    shares = []
    for step in range(150):
        tokens = Tokens.from_dense(torch.randn(16, 37, 24), num_prefix=1, seed=torch.arange(16) + 16 * step)
        reduction = reducer(tokens, Evidence())
        optimizer.zero_grad()
        reduction.losses["ratio"].backward()
        optimizer.step()
        shares.append(reduction.tokens.policy.view(16, 37)[:, 1:].mean().item())
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert sum(shares[-20:]) / 20 == pytest.approx(0.3, abs=0.02)


def test_ragged_batches():
    tokens = Tokens.from_dense(torch.randn(5, 37, 24), num_prefix=1, seed=torch.arange(5))
    ragged = RandomBoundaries(24, compression=2)(tokens, Evidence()).tokens
    reducer = small().reducers["1"].eval()  # 0.36: 12 of 36 patches
    out = reducer(ragged, Evidence()).tokens
    assert torch.equal(out.lengths, ragged.lengths.clamp(max=13)) and not ragged.layout.uniform
    layout = ragged.layout
    unknown = copy.copy(ragged)
    object.__setattr__(unknown, "layout", Layout(layout.lengths, layout.longest, layout.total, 1))
    assert torch.equal(reducer(unknown, Evidence()).tokens.source, out.source)
    trained = reducer.train()(ragged, Evidence())
    for image, alone in zip(trained.tokens.split(), ragged.split(), strict=True):
        again = reducer(alone, Evidence())
        assert torch.equal(again.tokens.policy, image.policy)
    share = torch.stack([image.policy[1:].mean() for image in trained.tokens.split()])
    target = 0.36 * 36 / (ragged.lengths - 1)
    torch.testing.assert_close(trained.losses["ratio"], 2 / 3 * (share - target).square().mean())


def test_keeping_everything_is_the_dense_encoder():
    encoder, dense = small({0: 1.0, 2: 1.0}).eval(), small({}).eval()
    dense.load_state_dict({name: value for name, value in encoder.state_dict().items() if "reducers" not in name})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images).pooled, dense(images).pooled)


def test_gradient_checkpointing_and_mixed_precision_train_as_well():
    images, seeds = torch.randn(4, 3, 32, 32), torch.arange(4)
    encoder, grads, policies = small().train(), [], []
    for checkpointing, autocast in ((False, False), (True, False), (False, True)):
        encoder.zero_grad()
        encoder.set_grad_checkpointing(checkpointing)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            encoding = encoder(images, seeds=seeds)
        (encoding.pooled.float() * torch.arange(24)).sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
        policies.append(encoding.tokens.policy.detach())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
        assert grads[2][name].isfinite().all()
    assert policies[2].dtype == torch.float32 and (policies[2] == policies[0]).double().mean() > 0.95


def test_counts_and_costs_are_the_published_ones():
    """GMACs of DeiT-S with its classifier, predictors left out: 4.6 dense, 2.9 at 0.7 of the tokens a stage."""
    reducer = {"class_path": "DynamicViT", "each": {"keep": [0.7**stage for stage in (1, 2, 3)]}}
    encoder = create_encoder("vit_small_patch16_224", reducers={"3,6,9": reducer})
    with torch.no_grad():
        encoding, trained = (encoder.train(mode)(torch.randn(1, 3, 224, 224)) for mode in (False, True))
    assert [encoding.layouts[block].attention.longest for block in (2, 3, 6, 9)] == [197, 138, 97, 68]
    cost, in_training = (image_cost(encoder, e.layouts, 1000) for e in (encoding, trained))
    assert float(cost.total - cost.reducers) / 1e9 == pytest.approx(2.9, abs=0.05)
    assert float(in_training.total - in_training.reducers) / 1e9 == pytest.approx(4.6, abs=0.05)
    predictor = 384 * 384 + 384 * 192 + 192 * 96 + 96 * 2
    assert float(cost.reducers) == predictor * (197 + 138 + 97)


def test_no_other_reducer_can_follow_in_training():
    sizes = {"image_size": 48, "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 2}
    encoder = VisionEncoder(**sizes, reducers={0: DynamicViT(24, keep=0.5), 1: ToMe(24, r=3)})
    assert encoder.eval()(torch.randn(1, 3, 48, 48)).tokens.lengths.tolist() == [16]
    with pytest.raises(ValueError, match="masked in training cannot be merged or removed"):
        encoder.train()(torch.randn(1, 3, 48, 48))
    tokens = Tokens.from_dense(torch.randn(2, 7, 24), num_prefix=1)
    with pytest.raises(ValueError, match=r"tokens\.seed"):
        DynamicViT(24, keep=0.5).train()(tokens, Evidence())


def test_a_dense_teacher_s_tokens_are_learned_where_they_are_kept():
    student, teacher = (Tokens.from_dense(torch.randn(2, 5, 3), num_prefix=1) for _ in range(2))
    policy = torch.tensor([1.0, 1, 0, 1, 0, 1.0, 0, 0, 0, 1]).requires_grad_()
    masked = copy.copy(student)
    object.__setattr__(masked, "policy", policy)
    difference = (student.features - teacher.features)[torch.tensor([1, 3, 9])]
    torch.testing.assert_close(tokens_loss(masked, teacher, "mse"), difference.square().mean())
    assert tokens_loss(masked, teacher, "cosine") != tokens_loss(student, teacher, "cosine")
    assert not tokens_loss(masked, teacher, "mse").requires_grad  # no gradient through which ones


def test_masks_hold_where_keys_are_not_downsampled():
    """ToDo by a factor of 1 is the identity, also among masked tokens."""
    images, seeds, found = torch.randn(3, 3, 32, 32), torch.arange(3), []
    for more in ({}, {2: ToDo(24, factor=1)}):
        torch.manual_seed(0)
        reducers = {1: DynamicViT(24, keep=0.4), **more}
        encoder = VisionEncoder(image_size=32, patch_size=8, dim=24, depth=4, num_heads=2, reducers=reducers).train()
        found.append(encoder(images, seeds=seeds).pooled)
    torch.testing.assert_close(*found)
