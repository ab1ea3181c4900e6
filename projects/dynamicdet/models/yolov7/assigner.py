"""Which anchors and cells answer for which object: candidates near the object, then SimOTA.

Letters: G objects, A anchors of a level, K candidates, C classes. Boxes are pixels.
"""
from typing import Tuple

import torch
from torch import Tensor

from mmdet.structures.bbox import bbox_overlaps

#: A cell and its two nearest neighbours: in units of a cell, (x, y); YOLOv5 and YOLOv7.
_OFFSETS = ((0, 0), (0.5, 0), (0, 0.5), (-0.5, 0), (0, -0.5))


def candidates(boxes: Tensor, anchors: Tensor, stride: int, size: Tuple[int, int],
               max_ratio: float) -> Tuple[Tensor, Tensor, Tensor]:
    """Anchors and cells of one level that may answer for an object.

    Anchors are near an object if neither side differs by ``max_ratio`` or more; cells are the one with
    the object's centre and the two that are nearest to it.

    Args:
        boxes (Tensor): (G, 4), centre x, centre y, width, height.
        anchors (Tensor): (A, 2), width and height.
        stride (int): Pixels per cell.
        size (tuple[int, int]): Rows and columns of the level.
        max_ratio (float): Above 1.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Anchor, row and column of each candidate, (K,). Cells that are
        near several objects are there several times.
    """
    rows, columns = size
    centre, extent = boxes[:, :2] / stride, boxes[:, 2:]
    ratio = extent[None] / anchors[:, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(dim=2) < max_ratio  # (A, G)
    limit = centre.new_tensor([columns, rows])
    low = (centre % 1 < 0.5) & (centre > 1)
    high = ((limit - centre) % 1 < 0.5) & (limit - centre > 1)
    near = torch.stack([torch.ones_like(low[:, 0]), *low.T, *high.T])  # (5, G)
    offset, anchor, index = (near[:, None] & fits).nonzero(as_tuple=True)
    cell = (centre[index] - centre.new_tensor(_OFFSETS)[offset]).long()
    return anchor, cell[:, 1].clamp(0, rows - 1), cell[:, 0].clamp(0, columns - 1)


def sim_ota(boxes: Tensor, labels: Tensor, predicted: Tensor,
            probabilities: Tensor) -> Tuple[Tensor, Tensor]:
    """Choose among candidates by what the detector says of them (YOLOX, arXiv 2107.08430, section 2.1; as
    YOLOv7 weighs it: ``cost = cls + 3 * iou``).

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
    contested = taken.sum(dim=0) > 1
    taken[:, contested] = False
    taken[cost[:, contested].argmin(dim=0), contested.nonzero().squeeze(1)] = True
    index = taken.any(dim=0).nonzero().squeeze(1)
    return index, taken[:, index].int().argmax(dim=0)
