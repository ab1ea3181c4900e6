"""Which anchors and cells are near which object.

Letters: G objects, A anchors of a level, K candidates. Boxes are pixels.
"""
from typing import Tuple

import torch
from torch import Tensor


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
    # No tensors of what the host knows: they would have to be copied to the device.
    rest = torch.stack([columns - centre[:, 0], rows - centre[:, 1]], dim=1)
    low = (centre % 1 < 0.5) & (centre > 1)
    high = (rest % 1 < 0.5) & (rest > 1)
    near = torch.stack([torch.ones_like(low[:, 0]), *low.T, *high.T])  # (5, G)
    neighbour, anchor, index = (near[:, None] & fits).nonzero(as_tuple=True)
    # The cell itself; half a cell to the left, upwards, to the right, downwards.
    across = (neighbour == 1).to(centre) - (neighbour == 3).to(centre)
    down = (neighbour == 2).to(centre) - (neighbour == 4).to(centre)
    cell = (centre[index] - torch.stack([across, down], dim=1) / 2).long()
    return anchor, cell[:, 1].clamp(0, rows - 1), cell[:, 0].clamp(0, columns - 1), index
