"""The detector inside what distributed training and test-time augmentation wrap it in."""

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside wrappers such as ``MMDistributedDataParallel`` and ``DetTTAModel``."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
