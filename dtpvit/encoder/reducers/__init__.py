"""Token reducers: one published method a file, all behind :class:`TokenReducer`."""

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.controls import FixedStride, GridPooling, RandomBoundaries
from dtpvit.encoder.reducers.dynamic_pooling import DynamicPooling
from dtpvit.encoder.reducers.spatial_grouping import SpatialGrouping
from dtpvit.encoder.reducers.tome import ToMe
from dtpvit.encoder.reducers.windowed_tome import WindowedToMe

__all__ = [
    "DynamicPooling",
    "Evidence",
    "FixedStride",
    "GridPooling",
    "RandomBoundaries",
    "Reduction",
    "SpatialGrouping",
    "ToMe",
    "TokenReducer",
    "WindowedToMe",
]
