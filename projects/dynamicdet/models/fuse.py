"""Fewer operations for the same result, at inference."""
from mmcv.cnn import fuse_conv_bn
from torch import nn


def can_fuse(model: nn.Module) -> bool:
    """Whether a model has parts of its own to fuse, as YOLOv7 has."""
    return any(hasattr(module, 'fuse') for module in model.modules())


def fuse(model: nn.Module) -> nn.Module:
    """Put norms into convolutions, and what else a model's parts know to fuse, for inference.

    In place and for good: a fused model cannot be trained or loaded into.

    Args:
        model (nn.Module): Any detector.

    Returns:
        nn.Module: The same, in eval mode.
    """
    # mmcv's walks over everything; parts rely on their norms being gone.
    fuse_conv_bn(model.eval())
    for module in model.modules():
        if hasattr(module, 'fuse'):
            module.fuse()
    return model
