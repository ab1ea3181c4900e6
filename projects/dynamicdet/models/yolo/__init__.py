"""What YOLOv5 and YOLOv7 have in common."""

from .assigner import candidate_cells
from .blocks import ACTIVATION, NORM, conv, pyramid
from .head import AnchorHead, LevelOutput, Matches, ciou
from .layers import YOLOLayer, append_layer, concatenate_maps

__all__ = [
    'ACTIVATION',
    'AnchorHead',
    'LevelOutput',
    'Matches',
    'NORM',
    'YOLOLayer',
    'append_layer',
    'candidate_cells',
    'ciou',
    'concatenate_maps',
    'conv',
    'pyramid',
]
