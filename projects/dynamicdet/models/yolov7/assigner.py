"""Which candidates answer for which object: SimOTA.

Letters: G objects, K candidates, C classes. Boxes are pixels.
"""

import torch
from torch import Tensor

from mmdet.structures.bbox import bbox_overlaps


def sim_ota(
    boxes: Tensor, labels: Tensor, predicted: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose among candidates by what the detector says of them (YOLOX, arXiv 2107.08430, section
    2.1; as YOLOv7 weighs it: ``cost = cls + 3 * iou``).

    An object takes as many candidates as its ten best overlaps sum to, at least one: those of the
    lowest cost. A candidate that several objects take goes to the one for which it costs least.

    Args:
        boxes (Tensor): (G, 4), corners; G above 0.
        labels (Tensor): (G,).
        predicted (Tensor): (K, 4), corners; K above 0.
        probabilities (Tensor): (K, C), class times objectness, in [0, 1].

    Returns:
        tuple[Tensor, Tensor]: Indices of the candidates taken, and of their objects.
    """
    overlaps = bbox_overlaps(boxes, predicted)  # (G, K)
    count = overlaps.topk(min(10, len(predicted)), dim=1).values.sum(dim=1).int().clamp(min=1)
    # Binary cross-entropy of the geometric mean of class and objectness, summed over classes.
    mean = probabilities.sqrt().clamp(1e-7, 1 - 1e-7)
    absent, present = -torch.log1p(-mean), -mean.log()
    cls = absent.sum(dim=1) + (present - absent)[:, labels].T
    cost = cls - 3 * (overlaps + 1e-8).log()
    taken = cost.argsort(dim=1).argsort(dim=1) < count[:, None]
    cheapest = torch.zeros_like(taken).scatter_(0, cost.argmin(dim=0, keepdim=True), True)
    taken = torch.where(taken.sum(dim=0) > 1, cheapest, taken)
    index = taken.any(dim=0).nonzero().squeeze(1)
    return index, taken[:, index].int().argmax(dim=0)
