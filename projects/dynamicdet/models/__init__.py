"""Detectors, backbones, heads and routers; importing registers them."""

from mmdet.registry import MODELS

from ..routing.router import Router
from .branch import PassThroughBackbone, build_branch
from .composite import CompositeBackbone, build_composite, register_family
from .dynamic_detector import DynamicDetector
from .exits_scheme import load_from_exits
from .fusing import can_fuse, fuse
from .pruned_detector import build_pruned
from .raw_outputs import detector_outputs
from .yolov5 import YOLOV5PAFPN, YOLOV5Backbone, YOLOV5Head
from .yolov7 import YOLOV7PAFPN, YOLOV7Backbone, YOLOV7Head

__all__ = [
    'CompositeBackbone',
    'DynamicDetector',
    'PassThroughBackbone',
    'Router',
    'YOLOV5Backbone',
    'YOLOV5Head',
    'YOLOV5PAFPN',
    'YOLOV7Backbone',
    'YOLOV7Head',
    'YOLOV7PAFPN',
    'build_branch',
    'build_composite',
    'build_pruned',
    'detector_outputs',
    'can_fuse',
    'fuse',
    'register_family',
]

# It knows no framework; configs name it.
MODELS.register_module(module=Router)
