from .branch import PassThroughBackbone, build_branch
from .composite import CompositeBackbone, build_composite, register_family
from .dynamic_detector import DynamicDetector
from .router import Router

__all__ = [
    'CompositeBackbone', 'DynamicDetector', 'PassThroughBackbone', 'Router', 'build_branch',
    'build_composite', 'register_family'
]
