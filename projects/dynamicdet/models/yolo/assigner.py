"""Which anchors and cells are near which object.

Letters: G objects, A anchors of a level, K candidates. Boxes are pixels.
"""
from typing import Tuple

import torch
from torch import Tensor

#: A cell and its two nearest neighbours: in units of a cell, (x, y); YOLOv5 and YOLOv7.
_OFFSETS = ((0, 0), (0.5, 0), (0, 0.5), (-0.5, 0), (0, -0.5))


def candidates(boxes: Tensor, anchors: Tensor, stride: int, size: Tuple[int, int],
               max_ratio: float) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
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
        tuple[Tensor, ...]: Anchor, row, column and object of each candidate, (K,). Cells that are near
        several objects are there several times.
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
    return anchor, cell[:, 1].clamp(0, rows - 1), cell[:, 0].clamp(0, columns - 1), index
