from .composite import (CompositeBackbone, Connection, build_composite, register_family,
                        upsample_sum)
from .resnet import CompositeResNet

__all__ = [
    'CompositeBackbone', 'CompositeResNet', 'Connection', 'build_composite', 'register_family',
    'upsample_sum'
]
