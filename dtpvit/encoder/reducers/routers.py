"""What decides how much a boundary belongs at each place of the line. Logits in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtpvit.encoder.ops.min_variance import minimum_variance_starts
from dtpvit.encoder.reducers.precision import FullPrecision
from dtpvit.encoder.tokens import Tokens

__all__ = [
    "ROUTERS",
    "CosineRouter",
    "MinimumVarianceRouter",
    "MlpRouter",
    "Router",
    "SensitivityRouter",
    "centred",
    "sensitivity_inputs",
]


class Router(FullPrecision):
    """Scores the places of the line; ``order`` is the token at each place, or None for the packed order.

    Attributes:
        decides: Whether the scores are the decision itself: one at the best starts for the asked number, else zero.
    """

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
            nn.init.constant_(self.fc2.bias, torch.logit(torch.tensor(initial_rate)).item())

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

    @torch.no_grad()
    def forward(self, tokens: Tokens, order: Tensor | None, segments: Tensor, most: int) -> Tensor:
        layout, prefix = tokens.layout, tokens.num_prefix
        x = nn.functional.normalize(tokens.features.to(torch.float64), dim=1)
        size = tokens.size
        if order is not None:
            x, size = x.index_select(0, order), size[order]
        cells = (layout.batch, layout.longest)
        features = x[layout.padded].view(*cells, -1)[:, prefix:]
        weight = size[layout.padded].view(cells).masked_fill(layout.padding, 0.0)[:, prefix:]
        starts = minimum_variance_starts(features, weight, segments, most)
        starts = nn.functional.pad(starts, (prefix, 0), value=True)
        return starts.reshape(-1)[layout.unpadded].to(torch.float32)

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        # The Gram matrix, and one addition for each segment, start and end of the recursion.
        return tokens**2 * dim + tokens**3 / compression


class SensitivityRouter(MinimumVarianceRouter):
    """Minimum variance where every token counts by how much the encoder's output depends on it, not all alike.

    What pooling costs is the second-order change of the output, which grows with the squared gradient at a token times
    its distance to the segment's mean. So tokens that the output hangs on get short segments, and more say in the mean.
    How much hangs on a token is predicted, from the token and the class token, by a linear function that
    :func:`dtpvit.tasks.sensitivity.fit_sensitivity` finds in closed form on unlabelled images. Until then all tokens
    count the same, and the segments are those of :class:`MinimumVarianceRouter`.
    """

    POWER = 0.5  # of the squared gradient: at 1 single tokens outweigh the rest (on DeiT-Tiny worse than none)
    LIMIT = 6.0  # natural logarithms within which a prediction is trusted

    boundary_sensitivity: Tensor

    def __init__(self, dim: int, *, initial_rate: float | None) -> None:
        super().__init__(dim, initial_rate=initial_rate)
        self.register_buffer("boundary_sensitivity", torch.zeros(2, dim))

    @torch.no_grad()
    def weights(self, tokens: Tokens) -> Tensor:
        predicted = (sensitivity_inputs(tokens) * self.boundary_sensitivity).sum((1, 2))
        predicted = centred(predicted, tokens).clamp(-self.LIMIT, self.LIMIT)
        return (self.POWER * predicted).exp()

    def macs(self, tokens: Tensor, dim: int, compression: float) -> Tensor:
        return super().macs(tokens, dim, compression) + 2 * tokens * dim


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
    count = (layout.lengths - layout.num_prefix).clamp(min=1).to(values.dtype)
    total = values.new_zeros(layout.batch, *values.shape[1:]).index_add_(0, layout.image, values)
    mean = total / count.view(-1, *[1] * (values.ndim - 1))
    return (values - mean[layout.image]).masked_fill(prefix, 0.0)


ROUTERS: dict[str, type[Router]] = {
    "mlp": MlpRouter,
    "cosine": CosineRouter,
    "minimum_variance": MinimumVarianceRouter,
    "sensitivity": SensitivityRouter,
}
