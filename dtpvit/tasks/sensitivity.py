"""How much an encoder's output depends on each token, and a linear function that predicts it.

Shape letters: B images, T packed tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.encoder.reducers.routers import SensitivityWeights, centred, sensitivity_inputs
from dtpvit.encoder.tokens import Tokens

__all__ = ["fit_sensitivity", "sensitivity"]

_RIDGE = 100.0  # of inputs of unit variance: nothing beside the 10,000 tokens of 50 images, a prior beside few


def fit_sensitivity(
    encoder: VisionEncoder,
    images: Iterable[Tensor],
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    classes: bool = False,
    generator: torch.Generator | None = None,
) -> dict[int, float]:
    """Fit all :class:`SensitivityWeights` of an encoder on unlabelled images, by ridge regression in closed form.

    What is predicted is the logarithm of a token's squared gradient against its image's mean. Reducers are fitted in
    the order of the blocks, each behind those already fitted and with none behind it. One forward and one backward
    pass an image and reducer; no step size, nothing to stop early.

    Args:
        encoder: In evaluation mode.
        images: Normalised batches, shape (B, 3, H, W); gone through once for each router.
        head: What follows the read-out: (B, D) to (B, D').
        classes: Whether the head gives logits of classes; then the output's distance is the Kullback-Leibler
            divergence, else that of normalised features.
        generator: Of the draws that stand for the output's directions.

    Returns:
        By block, the share of the variance within images that the fit explains on these images.

    Raises:
        ValueError: If the encoder has no such router.
    """
    found: dict[int, float] = {}
    # A predictor that is yet to imitate exact segments says nothing; in training mode it is given these.
    imitating = [r for r in encoder.reducers.values() if isinstance(r, DynamicPooling) and r.imitate and not r.training]
    for reducer in imitating:
        reducer.train()
    for block in sorted(map(int, encoder.reducers)):
        reducer = encoder.reducers[str(block)]
        if not (isinstance(reducer, DynamicPooling) and isinstance(reducer.boundary_predictor, SensitivityWeights)):
            continue
        normal = moment = spread = torch.zeros((), dtype=torch.float64)
        for batch in images:
            tokens, squared = sensitivity(encoder, batch, block, head=head, classes=classes, generator=generator)
            target = centred(squared.clamp(min=torch.finfo(squared.dtype).tiny).log(), tokens).double()
            inputs = centred(sensitivity_inputs(tokens).flatten(1).double(), tokens)
            normal = normal + inputs.T @ inputs
            moment = moment + inputs.T @ target
            spread = spread + target.square().sum()
        ridge = _RIDGE * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        solution = torch.linalg.solve(normal + ridge, moment)
        rest = spread - 2 * solution @ moment + solution @ normal @ solution
        reducer.boundary_predictor.boundary_sensitivity.data.copy_(solution)
        found[block] = float(1 - rest / spread)
    for reducer in imitating:
        reducer.eval()
    if not found:
        raise ValueError("the encoder has no reducer whose router is sensitivity or local, which have weights to fit")
    return found


def sensitivity(
    encoder: VisionEncoder,
    images: Tensor,
    block: int,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    classes: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tokens, Tensor]:
    """Squared gradient at each token in front of ``block``, of the output in a random direction.

    Its mean over draws is the trace of that token's block of the Fisher information, the curvature of the divergence
    between outputs: for classes the gradient of the log-probability of a class drawn from the encoder's own prediction,
    for features that of their inner product with Gaussian noise.

    Returns:
        The tokens in front of ``block``; and shape (T,), float32.
    """
    with torch.no_grad():
        tokens = encoder.embed(images)
        for index in range(block):
            tokens = encoder.run_block(index, tokens)
        reduced = tokens
    features = tokens.features.detach().requires_grad_()
    tokens = tokens.with_features(features)
    with torch.enable_grad():
        for index in range(block, encoder.depth):
            tokens = encoder.blocks[index](tokens)
        tokens = tokens.with_features(encoder.norm(tokens.features))
        output = encoder.read_out(tokens)
        output = output if head is None else head(output)
        if classes:
            drawn = torch.multinomial(output.detach().float().softmax(-1), 1, generator=generator)[:, 0]
            loss = cross_entropy(output.float(), drawn, reduction="sum")
        else:
            noise = torch.randn(output.shape, generator=generator, device=output.device)
            loss = (normalize(output.float(), dim=-1) * noise).sum()
        (gradient,) = torch.autograd.grad(loss, features)
    return reduced, gradient.float().square().sum(1)
