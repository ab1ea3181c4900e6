"""Composite backbones, one module per family of backbones."""

from .composite import CompositeBackbone, Connection, build_composite, register_family
from .csp import CompositeCSP
from .independent import IndependentBackbones, build_backbones
from .resnet import CompositeResNet
from .swin import CompositeSwin
from .yolov7 import CompositeYOLOV7

__all__ = [
    'CompositeBackbone',
    'CompositeCSP',
    'CompositeResNet',
    'CompositeSwin',
    'CompositeYOLOV7',
    'Connection',
    'IndependentBackbones',
    'build_backbones',
    'build_composite',
    'register_family',
]
