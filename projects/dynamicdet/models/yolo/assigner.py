"""Which anchors and cells are near which object.

Letters: G objects, A anchors of a level, K candidates. Boxes are pixels.
"""

import torch
from torch import Tensor


def candidate_cells(
    boxes: Tensor, anchors: Tensor, stride: int, size: tuple[int, int], max_ratio: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors and cells of one level that may answer for an object.

    Anchors are near an object if neither side differs by ``max_ratio`` or more; cells are the one
    with the object's center and the two that are nearest to it.

    Args:
        boxes (Tensor): (G, 4), center x, center y, width, height.
        anchors (Tensor): (A, 2), width and height.
        stride (int): Pixels per cell.
        size (tuple[int, int]): Rows and columns of the level.
        max_ratio (float): Above 1.

    Returns:
        tuple[Tensor, ...]: Anchor, row, column and object of each candidate, (K,). Cells that are
        near several objects are there several times.
    """
    rows, columns = size
    center, extent = boxes[:, :2] / stride, boxes[:, 2:]
    ratio = extent[None] / anchors[:, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(dim=2) < max_ratio  # (A, G)
    # No tensors of what the host knows: they would have to be copied to the device.
    rest = torch.stack([columns - center[:, 0], rows - center[:, 1]], dim=1)
    low = (center % 1 < 0.5) & (center > 1)
    high = (rest % 1 < 0.5) & (rest > 1)
    near = torch.stack([torch.ones_like(low[:, 0]), *low.T, *high.T])  # (5, G)
    neighbor, anchor, index = (near[:, None] & fits).nonzero(as_tuple=True)
    # The cell itself; half a cell to the left, upwards, to the right, downwards.
    across = (neighbor == 1).to(center) - (neighbor == 3).to(center)
    down = (neighbor == 2).to(center) - (neighbor == 4).to(center)
    cell = (center[index] - torch.stack([across, down], dim=1) / 2).long()
    return anchor, cell[:, 1].clamp(0, rows - 1), cell[:, 0].clamp(0, columns - 1), index
