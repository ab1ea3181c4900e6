"""What YOLOv5 and YOLOv7 have in common."""

from .assigner import candidates
from .blocks import ACTIVATION, NORM, conv
from .head import AnchorHead, Matches, ciou
from .layers import Layer, join

__all__ = [
    'ACTIVATION',
    'AnchorHead',
    'Layer',
    'Matches',
    'NORM',
    'candidates',
    'ciou',
    'conv',
    'join',
]
