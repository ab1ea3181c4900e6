"""A branch: a stock detector that is handed ready feature maps instead of an image."""

import copy
from collections.abc import Sequence

from mmengine.model import BaseModule, ModuleList

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS

from ..errors import UsageError


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


def _heads(branch: BaseDetector) -> list:
    """What judges objects in the end: of two-stage detectors the heads on RoIs."""
    roi_head = getattr(branch, 'roi_head', None)
    head = getattr(branch if roi_head is None else roi_head, 'bbox_head', None)
    return [] if head is None else list(head) if isinstance(head, ModuleList) else [head]


def head_types(branch: BaseDetector) -> tuple[str, ...]:
    """Names of the kinds of a branch: its detector's, and of its heads' on objects."""
    return (type(branch).__name__, *(type(head).__name__ for head in _heads(branch)))


def require_exits_agree(branches: Sequence[BaseDetector]) -> None:
    """Raise a `UsageError` unless branches know as many classes."""
    counts = [
        [head.num_classes for head in _heads(branch) if hasattr(head, 'num_classes')]
        for branch in branches
    ]
    known = [exit_counts[-1] for exit_counts in counts if exit_counts]
    if len(set(known)) > 1:
        raise UsageError(
            'the detectors of a pair must know the same classes; these have heads for '
            f'{" and ".join(map(str, known))}'
        )


def number_of_classes(branch: BaseDetector) -> int:
    """Classes of a branch's heads; of a cascade's, its last."""
    return int(_heads(branch)[-1].num_classes)
