"""What YOLOv5 and YOLOv7 have in common."""

from .assigner import candidates
from .blocks import ACTIVATION, NORM, conv
from .head import AnchorHead, Matches, ciou
from .layers import YOLOLayer, concatenate_maps

__all__ = [
    'ACTIVATION',
    'AnchorHead',
    'YOLOLayer',
    'Matches',
    'NORM',
    'candidates',
    'ciou',
    'conv',
    'join',
]
