"""A branch: a stock detector that is handed ready feature maps instead of an image."""

import copy

from mmengine.model import BaseModule
from torch import nn

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS


@MODELS.register_module()
class PassThroughBackbone(BaseModule):
    """Gives back what it is given. mmdet detectors touch the image in their backbone alone, so with
    this one in its place ``loss``, ``predict`` and ``_forward`` take feature maps."""

    def forward(self, maps):
        """The maps that it is given, as they are."""
        return maps


def build_branch(detector: dict) -> BaseDetector:
    """Build neck and heads of a detector.

    Args:
        detector (dict): Config of any mmdet detector. Left as it is: some detectors write into
            the config they are given, so it is copied.

    Returns:
        BaseDetector: The detector; its ``loss(maps, data_samples)`` and the like take the
        backbone's maps, a tuple of (N, C_i, H_i, W_i).
    """
    detector = copy.deepcopy(detector)
    detector['backbone'] = dict(type='mmdet.PassThroughBackbone')
    detector.pop('data_preprocessor', None)
    return MODELS.build(detector)


def number_of_classes(branch: BaseDetector) -> int:
    """Classes of a detector's heads; of a cascade's, its last."""
    head = branch.roi_head.bbox_head if hasattr(branch, 'roi_head') else branch.bbox_head
    return int((head[-1] if isinstance(head, nn.ModuleList) else head).num_classes)
