"""The encoder package that every task shares; it needs torch and nothing else."""

from dtpvit.encoder.dual import DualEncoder, VisualTower
from dtpvit.encoder.encoding import Encoding
from dtpvit.encoder.image_encoder import ImageEncoder
from dtpvit.encoder.layout import BlockLayouts, Layout
from dtpvit.encoder.native_segmentation_encoder import NativeSegmentationEncoder
from dtpvit.encoder.neighbourhood_encoder import NeighbourhoodEncoder
from dtpvit.encoder.presets import preset
from dtpvit.encoder.text import TextTower
from dtpvit.encoder.tokens import Tokens
from dtpvit.encoder.vision import VisionEncoder

__all__ = [
    "BlockLayouts",
    "DualEncoder",
    "Encoding",
    "ImageEncoder",
    "Layout",
    "NativeSegmentationEncoder",
    "NeighbourhoodEncoder",
    "TextTower",
    "Tokens",
    "VisionEncoder",
    "VisualTower",
    "preset",
]
