"""What all methods that cut a line of patches into segments share: the line, the mean, the bookkeeping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.exportable import means_by_product
from dtpvit.encoder.ops.scan import ORDERS, scan_order
from dtpvit.encoder.ops.segments import ESTIMATORS, Segments, group_sums, pool_segments
from dtpvit.encoder.reducers.base import TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["BoundaryPooling"]


class BoundaryPooling(TokenReducer):
    """Averages the tokens between boundaries; subclasses say where the boundaries are.

    Args:
        compression: Tokens in for each token out, at least 1.
        order: How the grid of patches becomes a line: ``"raster"``, ``"serpentine"`` or ``"hilbert"``. Tokens that no
            longer form a grid keep the order they have.
        proportional: Whether later blocks weigh a token by the patches it stands for (log size on the keys), so that
            pooling equal tokens changes nothing.
        estimator: Gradient of the boundaries, see :func:`dtpvit.encoder.ops.segments.pool_segments`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, compression: float, *, order: str = "raster", proportional: bool = True, estimator: str = "symmetric"
    ) -> None:
        super().__init__()
        if compression < 1:
            raise ValueError(f"compression is {compression}; expected at least 1")
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
        self.compression = compression
        self.order = order
        self.proportional = proportional
        self.estimator = estimator

    def extra_repr(self) -> str:
        return f"compression={self.compression}, order={self.order!r}, proportional={self.proportional}"

    def line(self, tokens: Tokens) -> Tensor | None:
        """Packed position of the token at each place of the line, shape (T,); None where that is the packed order."""
        if tokens.grid is None or self.order == "raster":
            return None
        return place_in_batch(scan_order(self.order, *tokens.grid, tokens.features.device), tokens.layout)

    def segments_wanted(self, layout: Layout) -> tuple[Tensor, int]:
        """Segments of each image at the nominal rate, ceil(N / compression), shape (B,), and the most of any image."""
        patches = layout.lengths - layout.num_prefix
        wanted = (patches.to(torch.float64) / self.compression).ceil().to(torch.int64).clamp(min=1)
        return wanted, max(1, math.ceil((layout.longest - layout.num_prefix) / self.compression))

    def pool(
        self,
        tokens: Tokens,
        starts: Tensor,
        order: Tensor | None,
        *,
        fixed: int | None = None,
        weights: Tensor | None = None,
    ) -> Tokens:
        """Average each segment.

        Args:
            tokens: What to pool.
            starts: Zero or one in value, in line order, one at every opening place, shape (T,).
            order: As :meth:`line` gives it.
            weights: What a token counts for in its segment's mean, beside its patches, shape (T,).
            fixed: Segments of every image where they are equal and known on the host; else one synchronisation.
        """
        layout = tokens.layout
        pooled_layout = self._pooled_layout(starts, layout, fixed)
        weight = tokens.size if weights is None else tokens.size * weights
        segments = Segments.of(starts, pooled_layout.total, weight, layout.opening, order)
        segment = segments.tokens()
        # What attention goes by, whatever a token counted for in the mean.
        patches = segments.total
        if weights is not None:
            patches = group_sums(tokens.size, segment, pooled_layout.total)
        if torch.compiler.is_exporting():
            features = means_by_product(tokens.features, segments, layout.batch)
        else:
            features = pool_segments(tokens.features, starts, segments, estimator=self.estimator)
        return tokens.regrouped(features, segment, pooled_layout, patches, proportional=self.proportional)

    @staticmethod
    def _pooled_layout(starts: Tensor, layout: Layout, fixed: int | None) -> Layout:
        if fixed is not None:
            return Layout.uniform_of(layout.batch, fixed + layout.num_prefix, layout.num_prefix, starts.device)
        hard = (starts.detach() > 0.5).to(torch.int64)
        lengths = torch.zeros_like(layout.lengths).index_add_(0, layout.image, hard)
        return Layout.fetched(lengths, layout.num_prefix)  # the reducer's one synchronisation


def place_in_batch(order: Tensor, layout: Layout) -> Tensor:
    """Repeat an order over the patches of one image for a whole batch of equal lengths, prefix tokens in place.

    Args:
        order: Patch at each place, shape (N,).
        layout: Of B sequences of num_prefix + N tokens.

    Returns:
        Packed position at each place, shape (B * (num_prefix + N),).
    """
    prefix = torch.arange(layout.num_prefix, device=order.device)
    within = torch.cat((prefix, order + layout.num_prefix))
    return (layout.first[:, None] + within).reshape(-1)
