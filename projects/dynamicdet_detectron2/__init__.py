"""Detectron2 detectors that spend compute where the image needs it.

Importing the package registers the meta-architecture ``DynamicDetector`` and the backbone
``build_narrow_resnet_fpn_backbone``.
"""

from .channel_removal_hook import ChannelRemovalHook
from .checkpointer import DynamicCheckpointer
from .composite import CompositeBottomUp, register_family
from .config import add_dynamicdet_config, take_router_step
from .dynamic_detector import DynamicDetector
from .exact_resume_hook import ExactResumeHook
from .lazy import make_dynamic
from .narrow_resnet import build_narrow_resnet_fpn_backbone
from .pruning_hook import PruningHook
from .quantization_hook import QuantizationHook
from .router_hook import RouterHook

__all__ = [
    'ChannelRemovalHook',
    'CompositeBottomUp',
    'DynamicCheckpointer',
    'DynamicDetector',
    'ExactResumeHook',
    'PruningHook',
    'QuantizationHook',
    'RouterHook',
    'add_dynamicdet_config',
    'build_narrow_resnet_fpn_backbone',
    'make_dynamic',
    'register_family',
    'take_router_step',
]
