"""What is at stake in each cell of a frame: what its film showed there, where pixels changed.

Letters: ``D``: detections of a frame. ``h``, ``w``: rows and columns of its grid of cells, see
`routing.regions`.

* ``boxes``, (D, 4): left, top, right, bottom, in pixels of the frame as its network sees it.
* ``spans``, (D, 4), int64: the cells that boxes touch: top, left, bottom, right, the last excluded.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

#: Parts, on each side of a cell, of a thumbnail: an object of 8 pixels changes one much, noise of a
#: sensor, averaged over 192 values, changes none.
PARTS = 4
#: Stakes are sums of differences; what is below is none.
_TINY = 1e-9
#: Share of the newest motion in a velocity, so that one bad box does not throw it.
_NEWEST = 0.5


def thumbnail_of(image: Tensor, cell: int) -> Tensor:
    """Means of an image, (3, H, W), over `PARTS` x `PARTS` parts of each cell, (3, h', w')."""
    return F.avg_pool2d(image[None].float(), cell // PARTS, ceil_mode=True)[0]


def cell_changes(thumbnail: Tensor, before: Tensor, scale: Tensor | float = 1.0) -> np.ndarray:
    """How much the part of each cell changed that changed most, (h, w).

    Args:
        thumbnail (Tensor): From `thumbnail_of`, (3, h', w').
        before (Tensor): As large.
        scale (Tensor or float): Of each channel, (3, 1, 1): what makes of normalized values gray
            levels.
    """
    change = ((thumbnail - before).abs() * scale).mean(dim=0)
    return F.max_pool2d(change[None, None], PARTS, ceil_mode=True)[0, 0].cpu().numpy()


def spans_of(boxes: np.ndarray, grid: tuple[int, int], cell: int) -> np.ndarray:
    """The cells that each box touches; of boxes outside, the nearest."""
    ends = np.array([grid[1], grid[0], grid[1], grid[0]]) - 1
    left, top, right, bottom = np.clip(boxes // cell, 0, ends).astype(np.int64).T
    return np.column_stack([top, left, np.maximum(bottom, top) + 1, np.maximum(right, left) + 1])


def touches(mask: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Whether a mask, (h, w), is set in any cell of each span, (D,)."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    table[1:, 1:] = mask.cumsum(0).cumsum(1)
    top, left, bottom, right = spans.T
    return table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left] > 0


def spread(values: np.ndarray, spans: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Values, (D,), in equal parts on the cells of their spans, (h, w)."""
    top, left, bottom, right = spans.T
    values = values / ((bottom - top) * (right - left))
    table = np.zeros((grid[0] + 1, grid[1] + 1))
    for rows, columns, sign in ((top, left, 1), (bottom, right, 1), (top, right, -1)):
        np.add.at(table, (rows, columns), sign * values)
    np.add.at(table, (bottom, left), -values)
    cells = table.cumsum(0).cumsum(1)[:-1, :-1]
    return np.where(cells > _TINY, cells, 0.0)


def stakes_of(
    values: np.ndarray, spans: np.ndarray, standing_out: np.ndarray, appearing: float
) -> np.ndarray:
    """What a frame loses where it is not looked at, (h, w).

    Args:
        values (np.ndarray): Of each detection: its score, weighted by class, (D,).
        spans (np.ndarray): Where it is expected, (D, 4).
        standing_out (np.ndarray): Cells that changed more than the frame does as a whole, (h, w),
            bool. What appears, appears in one of those where nothing is expected.
        appearing (float): Expected number of objects that appear, weighted by class.
    """
    grid = standing_out.shape
    stakes = spread(values, spans, grid)
    fresh = standing_out & (stakes == 0)
    return stakes + appearing * fresh / max(1, fresh.sum())


def velocities(
    before: tuple[np.ndarray, np.ndarray],
    velocity: np.ndarray,
    after: tuple[np.ndarray, np.ndarray],
    frames: int,
) -> np.ndarray:
    """How far each detection moves per frame, across and down, (D', 2); 0 where it is new.

    It is the one of its class that was expected nearest, no farther away than that one is large.

    Args:
        before (tuple): Boxes, (D, 4), and labels, (D,).
        velocity (np.ndarray): Of those, (D, 2).
        after (tuple): The same of the later frame, D'.
        frames (int): How many later that is, above 0.
    """
    result = np.zeros((len(after[1]), 2))
    if not len(before[1]) or not len(result):
        return result
    center, later = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes, _ in (before, after))
    ways = later[:, None] - (center + frames * velocity)
    distances = np.where(after[1][:, None] == before[1], np.hypot(*ways.T).T, np.inf)
    nearest = distances.argmin(1)
    sides = (before[0][:, 2:] - before[0][:, :2]).max(1)
    same = distances[np.arange(len(result)), nearest] <= sides[nearest]
    moved = (later - center[nearest]) / frames
    result[same] = (_NEWEST * moved + (1 - _NEWEST) * velocity[nearest])[same]
    return result
