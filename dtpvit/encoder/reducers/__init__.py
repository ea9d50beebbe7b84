"""Token reducers: one published method a file, all behind :class:`TokenReducer`."""

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.controls import FixedStride, GridPooling, RandomBoundaries
from dtpvit.encoder.reducers.dtome import DToMe
from dtpvit.encoder.reducers.dynamic_pooling import DynamicPooling
from dtpvit.encoder.reducers.dynamic_vit import DynamicViT
from dtpvit.encoder.reducers.evit import EViT, TopK
from dtpvit.encoder.reducers.pitome import PiToMe
from dtpvit.encoder.reducers.quadtree import Quadtree
from dtpvit.encoder.reducers.spatial_grouping import SpatialGrouping
from dtpvit.encoder.reducers.todo import ToDo
from dtpvit.encoder.reducers.token_learner import TokenLearner
from dtpvit.encoder.reducers.tome import ToMe
from dtpvit.encoder.reducers.tomesd import ToMeSD
from dtpvit.encoder.reducers.windowed_tome import WindowedToMe

__all__ = [
    "DToMe",
    "DynamicPooling",
    "DynamicViT",
    "EViT",
    "Evidence",
    "FixedStride",
    "GridPooling",
    "PiToMe",
    "Quadtree",
    "RandomBoundaries",
    "Reduction",
    "SpatialGrouping",
    "ToDo",
    "ToMe",
    "ToMeSD",
    "TokenLearner",
    "TokenReducer",
    "TopK",
    "WindowedToMe",
]
