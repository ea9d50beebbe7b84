"""What decides how much a boundary belongs at each place of the line. Logits in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtpvit.encoder.ops.entropy import spikes
from dtpvit.encoder.ops.min_variance import minimum_variance_starts
from dtpvit.encoder.reducers.precision import FullPrecision
from dtpvit.encoder.tokens import Tokens

__all__ = [
    "ROUTERS",
    "CosineRouter",
    "EntropyRouter",
    "LocalRouter",
    "MinimumVarianceRouter",
    "MlpRouter",
    "Router",
    "SensitivityRouter",
    "SensitivityWeights",
    "centred",
    "entropy_rise",
    "exact_starts",
    "sensitivity_inputs",
]


class Router(FullPrecision):
    """Scores the places of the line; ``order`` is the token at each place, or None for the packed order.

    Attributes:
        learned: Whether a gradient at the scores teaches anything.
        decides: Whether the scores are the decision itself: one at the best starts for the asked number, else zero.
    """

    learned: bool = True
    decides: bool = False

    def __init__(self, dim: int, *, initial_rate: float | None) -> None:
        super().__init__()

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        """Logits of shape (T,), in line order; ``segments`` wanted of each image, shape (B,), ``most`` of any."""
        raise NotImplementedError

    def weights(self, tokens: Tokens) -> Tensor | None:
        """What a token counts for in its segment's mean, beside its patches, float32, shape (T,); None for 1 each."""
        return None

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        """Multiply-accumulates for each image of ``tokens`` tokens, float64, shape (B,)."""
        raise NotImplementedError


class MlpRouter(Router):
    """LayerNorm, Linear, GELU, Linear on each token: the boundary predictor of dynamic token pooling.

    The last layer takes the cosine of its input and its weight, times ``LIMIT``, so that logits cannot outgrow the
    noise that explores around them. Without it their spread went from 0.3 to 30 in 180 steps under the symmetric vote,
    which asks for more of the same for ever, and the threshold of evaluation could not follow.

    Args:
        dim: Width D of the tokens.
        initial_rate: Where a rate loss steers, the last layer has a bias that starts at its logit; where the threshold
            follows the logits (None), a bias would change nothing and there is none.
    """

    LIMIT = 8.0

    def __init__(self, dim: int, *, initial_rate: float | None) -> None:
        super().__init__(dim, initial_rate=initial_rate)
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, 1, bias=initial_rate is not None)
        nn.init.trunc_normal_(self.fc1.weight, std=dim**-0.5)
        nn.init.zeros_(self.fc1.bias)
        # Its length is normalised away; a short one would turn by tenths of a radian in every step of Adam.
        nn.init.trunc_normal_(self.fc2.weight, std=dim**-0.5)
        if initial_rate is not None:
            nn.init.constant_(self.fc2.bias, torch.logit(torch.tensor(initial_rate), eps=1e-3).item())

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        x = self.norm(tokens.features.to(self.fc1.weight.dtype))
        hidden = nn.functional.gelu(self.fc1(x))
        weight = self.LIMIT * nn.functional.normalize(self.fc2.weight, dim=1)
        # The cosine to the centred hidden units: GELU's positive mean would shift all logits at the start. Centring the
        # weight instead gives the same product, the variance gives the length, and no further (T, D) tensor is made.
        length = (hidden.var(dim=1, correction=0) * hidden.shape[1]).clamp(min=1e-24).sqrt()
        logits = nn.functional.linear(hidden, weight - weight.mean()).squeeze(-1) / length
        if self.fc2.bias is not None:
            logits = logits + self.fc2.bias
        return logits if order is None else logits[order]

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        return tokens * (dim * dim + dim)


class CosineRouter(Router):
    """Dissimilarity of neighbours on the line, p = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, as a logit.

    The routing module of H-Net (Hwang, Wang and Gu 2025); W_q and W_k start at the identity, so that it is of use
    before any training.
    """

    def __init__(self, dim: int, *, initial_rate: float | None) -> None:
        super().__init__(dim, initial_rate=initial_rate)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        x = tokens.features.to(self.query.weight.dtype)
        x = x if order is None else x.index_select(0, order)
        cosine = nn.functional.cosine_similarity(self.query(x[:-1]), self.key(x[1:]), dim=1, eps=1e-8)
        logits = torch.logit((1 - cosine) / 2, eps=1e-6)
        return nn.functional.pad(logits, (1, 0))  # the line's first place always starts a segment

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        return (tokens - 1) * (2 * dim * dim + 3 * dim)


class MinimumVarianceRouter(Router):
    """The exact K contiguous segments of least size-weighted variance of the normalised tokens; nothing to train."""

    decides = True

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        return exact_starts(tokens, order, segments, most)

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        # The Gram matrix, and one addition for each segment, start and end of the recursion.
        return tokens**2 * dim + tokens**3 / compression


class EntropyRouter(Router):
    """How far the entropy of a token's pixels rises above that of both places before it; nothing to train.

    The entropy spikes of Nawrot et al. (ACL 2023), who put boundaries where the entropy of a language model is higher
    than at the two positions before. What a patch shows stands in for what a model expects: a boundary is put where
    something begins to happen. The best-ranked places are spikes as long as there are as many of them.
    """

    learned = False

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        return entropy_rise(tokens, order)

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        return torch.zeros_like(tokens)


class SensitivityWeights(Router):
    """Tokens count in their segment by how much the encoder's output depends on them, not all alike.

    What pooling costs is the second-order change of the output, which grows with the squared gradient at a token times
    its distance to the segment's mean. How much hangs on a token is predicted, from the token and the class token, by a
    linear function that :func:`dtpvit.tasks.sensitivity.fit_sensitivity` finds in closed form on unlabelled images, and
    that the exact gradient of the weighted mean then improves. Until it is fitted all tokens count the same.
    """

    POWER = 0.5  # of the squared gradient: at 1 single tokens outweigh the rest (on DeiT-Tiny worse than none)
    LIMIT = 6.0  # natural logarithms within which a prediction is trusted

    def __init__(self, dim: int, *, initial_rate: float | None) -> None:
        super().__init__(dim, initial_rate=initial_rate)
        self.boundary_sensitivity = nn.Parameter(torch.zeros(2 * dim))  # a vector: weight decay leaves it alone

    def weights(self, tokens: Tokens) -> Tensor:
        predicted = sensitivity_inputs(tokens).flatten(1) @ self.boundary_sensitivity
        predicted = centred(predicted, tokens).clamp(-self.LIMIT, self.LIMIT)
        return (self.POWER * predicted).exp()


class SensitivityRouter(SensitivityWeights):
    """The exact segments of :class:`MinimumVarianceRouter` where every token counts by :class:`SensitivityWeights`.

    So tokens that the output hangs on get short segments, and more say in the mean.
    """

    decides = True

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        return exact_starts(tokens, order, segments, most)

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        return tokens**2 * dim + tokens**3 / compression + 2 * tokens * dim


class LocalRouter(SensitivityWeights):
    """Two convolutions along the line over each token's weight and its distances to the places shortly before it.

    What the exact segments of :class:`SensitivityRouter` go by, but of a neighbourhood only and without their recursion
    over segments: made to be taught by them (``estimator="imitation"``), or by a task's votes. It sees no features, so
    few images teach it.
    """

    REACH = 4  # places before; 6 and 8 imitate no better
    WIDTH = 64  # 32 imitate worse: on DeiT-Tiny, 4x before block 4, divergence .236 against .220
    KERNEL = 5

    def __init__(self, dim: int, *, initial_rate: float | None) -> None:
        super().__init__(dim, initial_rate=initial_rate)
        self.inputs = nn.Linear(1 + self.REACH, self.WIDTH)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(self.WIDTH, self.WIDTH, self.KERNEL, padding="same") for _ in range(2)
        )
        self.logits = nn.Linear(self.WIDTH, 1, bias=initial_rate is not None)
        if initial_rate is not None:
            nn.init.constant_(self.logits.bias, torch.logit(torch.tensor(initial_rate), eps=1e-3).item())

    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        layout, prefix = tokens.layout, tokens.num_prefix
        x, size = _grid_of_line(tokens, order, torch.promote_types(tokens.features.dtype, torch.float32))
        hidden = self.inputs(torch.stack((size.clamp(min=1e-6).log(), *self._distances(x)), dim=2))
        outside = None if layout.uniform else layout.padding[:, prefix:, None]
        for convolution in self.convolutions:
            # Behind an image's end there is nothing, as there is behind the end of the longest.
            hidden = hidden if outside is None else hidden.masked_fill(outside, 0.0)
            hidden = hidden + nn.functional.gelu(convolution(hidden.transpose(1, 2)).transpose(1, 2))
        logits = nn.functional.pad(self.logits(hidden).squeeze(2), (prefix, 0))
        return logits.reshape(-1)[layout.unpadded]

    def _distances(self, x: Tensor) -> list[Tensor]:
        """1 - cosine to the place 1, 2, ... before, 0 where there is none; (B, N, D) to REACH times (B, N)."""
        length = x.shape[1]
        found = [1 - (x[:, back:] * x[:, : length - back]).sum(2) for back in range(1, min(self.REACH, length) + 1)]
        found += [x.new_zeros(x.shape[0], 0)] * (self.REACH - len(found))
        return [nn.functional.pad(distance, (length - distance.shape[1], 0)) for distance in found]

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        inside = (1 + self.REACH) * self.WIDTH + len(self.convolutions) * self.KERNEL * self.WIDTH**2 + self.WIDTH
        return tokens * ((self.REACH + 2) * dim + inside)


@torch.no_grad()
def exact_starts(tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
    """One where a segment of least variance starts, in line order, float32, shape (T,); see :meth:`Router.forward`."""
    features, weight = _grid_of_line(tokens, order, torch.float64)
    weight = weight.masked_fill(tokens.layout.padding[:, tokens.num_prefix :], 0.0)
    starts = minimum_variance_starts(features, weight, segments, most)
    starts = nn.functional.pad(starts, (tokens.num_prefix, 0), value=True)
    return starts.reshape(-1)[tokens.layout.unpadded].to(torch.float32)


def entropy_rise(tokens: Tokens, order: Tensor | None) -> Tensor:
    """How far each place's pixel entropy rises over the two places before, in bits, float32, shape (T,), in line order.

    Raises:
        ValueError: If the tokens came without the entropy of their pixels.
    """
    if tokens.pixel_entropy is None:
        raise ValueError("boundaries at entropy spikes need tokens.pixel_entropy, which VisionEncoder.embed computes")
    entropy = tokens.patch_mean(tokens.pixel_entropy[:, 0])
    return spikes(entropy if order is None else entropy[order], tokens.layout)


def _grid_of_line(tokens: Tokens, order: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised features, shape (B, N, D), and sizes, shape (B, N), of the patches in line order, padded."""
    layout, prefix = tokens.layout, tokens.num_prefix
    x, size = nn.functional.normalize(tokens.features.to(dtype), dim=1), tokens.size
    if order is not None:
        x, size = x.index_select(0, order), size[order]
    cells = (layout.batch, layout.longest)
    return x[layout.padded].view(*cells, -1)[:, prefix:], size[layout.padded].view(cells)[:, prefix:]


def sensitivity_inputs(tokens: Tokens) -> Tensor:
    """The normed token, and its product with the image's normed first prefix token, float32, shape (T, 2, D)."""
    normed = nn.functional.layer_norm(tokens.features.float(), tokens.features.shape[1:])
    if not tokens.num_prefix:
        return torch.stack((normed, torch.zeros_like(normed)), dim=1)
    asks = normed.index_select(0, tokens.layout.first)[tokens.layout.image]
    return torch.stack((normed, normed * asks), dim=1)


def centred(values: Tensor, tokens: Tokens) -> Tensor:
    """Values against the mean over their image's patch tokens, 0 at prefix tokens; shape (T,) or (T, K)."""
    layout = tokens.layout
    prefix = layout.prefix.view(-1, *[1] * (values.ndim - 1))
    values = values.masked_fill(prefix, 0.0)
    count = (layout.lengths - layout.num_prefix).clamp(min=1).view(-1, *[1] * (values.ndim - 1))
    wide = values.double()  # where the order in which the device adds does not show in the result
    total = wide.new_zeros(layout.batch, *values.shape[1:]).index_add_(0, layout.image, wide)
    mean = (total / count).to(values.dtype)
    return (values - mean[layout.image]).masked_fill(prefix, 0.0)


ROUTERS: dict[str, type[Router]] = {
    "mlp": MlpRouter,
    "cosine": CosineRouter,
    "minimum_variance": MinimumVarianceRouter,
    "sensitivity": SensitivityRouter,
    "local": LocalRouter,
    "entropy": EntropyRouter,
}
