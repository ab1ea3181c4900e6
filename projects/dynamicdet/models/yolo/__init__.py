"""What YOLOv5 and YOLOv7 have in common."""

from .assigner import candidate_cells
from .blocks import ACTIVATION, NORM, conv
from .head import AnchorHead, Matches, ciou
from .layers import YOLOLayer, concatenate_maps

__all__ = [
    'ACTIVATION',
    'AnchorHead',
    'YOLOLayer',
    'Matches',
    'NORM',
    'candidate_cells',
    'ciou',
    'conv',
    'concatenate_maps',
]
