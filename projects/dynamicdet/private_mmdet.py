"""All that is used of mmdet's private API, in one place: it may move with any release.

``tests/test_private_apis.py`` fails when it does. Which code decodes a head's outputs is a private
method of the head. Overridden methods stay in the classes that override them.
"""

from torch import Tensor, nn


def decodes_as(head: nn.Module, kind: type) -> bool:
    """Whether a dense head decodes a level of its outputs, or a box head an image's, as another
    class does."""
    return type(head)._predict_by_feat_single is kind._predict_by_feat_single


def decode_yolox(head: nn.Module, priors: Tensor, raw: Tensor) -> Tensor:
    """Boxes, (P, 4), of a YOLOX head's points with strides, (P, 4), and raw predictions, (P, 4)."""
    return head._bbox_decode(priors, raw)
