"""Votes as targets: scale-free, local to the image, at rest where they are predicted."""

import torch

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.regression import regress_votes, vote_targets

LAYOUT = Layout(torch.tensor([6, 9, 4]), 9, 19, 1)


def votes():
    return torch.rand(19, generator=torch.Generator().manual_seed(0)) + 0.01


def test_targets_are_centred_logarithms_within_each_image():
    targets, mean = vote_targets(votes(), LAYOUT)
    for image in range(3):
        mine = (LAYOUT.image == image) & ~LAYOUT.opening
        logarithm = votes()[mine].log()
        torch.testing.assert_close(targets[mine], 2 * (logarithm - logarithm.mean()))
        torch.testing.assert_close(mean[mine], votes()[mine].mean().expand(int(mine.sum())))
    assert not targets[LAYOUT.opening].any()


def test_scaling_the_loss_of_one_image_moves_no_target():
    scaled = votes() * torch.tensor([1.0, 100.0, 1e-6])[LAYOUT.image]
    torch.testing.assert_close(vote_targets(scaled, LAYOUT)[0], vote_targets(votes(), LAYOUT)[0], rtol=1e-4, atol=1e-4)


def test_votes_of_zero_are_finite():
    targets, _ = vote_targets(torch.zeros(19), LAYOUT)
    torch.testing.assert_close(targets, torch.zeros(19), rtol=0, atol=1e-5)
    some = votes().masked_fill(torch.arange(19) == 3, 0.0)
    assert vote_targets(some, LAYOUT)[0].isfinite().all() and vote_targets(some, LAYOUT)[0][3] < -8


def test_gradient_rests_at_the_targets_and_never_moves_an_image_as_a_whole():
    hard = torch.ones(19, requires_grad=True)
    targets, mean = vote_targets(votes(), LAYOUT)
    for logits, expected in ((targets, torch.zeros(19)), (torch.zeros(19), -mean * targets)):
        logits = logits.clone().requires_grad_()
        out = regress_votes(hard, logits, LAYOUT)
        assert torch.equal(out, hard)
        out.backward(-votes())
        torch.testing.assert_close(logits.grad, expected)
        sums = torch.zeros(3).index_add_(0, LAYOUT.image, logits.grad)
        torch.testing.assert_close(sums, torch.zeros(3), atol=1e-5, rtol=0)
