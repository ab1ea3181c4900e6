"""What of an image lies in which cell of its grid, and which of a crop's detections count. Needs
numpy alone: a standalone export has a copy.

Letters: ``D``: detections of an image. ``h``, ``w``: rows and columns of its grid of cells, see
`regions`. ``P``: planes of a grid.

* ``boxes``, (D, 4): left, top, right, bottom, in pixels of the image as its network sees it.
* ``scores``, (D,), in [0, 1]; ``labels``, (D,), from 0 on.
* ``weights``, (C,): what an object of each class counts; see `class_weights.class_weights`.
"""

import numpy as np

from .regions import CELL, Rectangle, with_halo

#: Largest sides, in pixels of the image as delivered, of what counts as small and as medium: COCO's
#: 32^2 and 96^2 square pixels.
_SIDES = (32, 96)
#: The view for which they are meant: 320 of 640 pixels, at which the rule was chosen.
_HALF = 0.5
#: Planes of `detection_planes`: of each size doubt and confidence, weighted by class, and
#: confidence alone; the number of detections.
PLANES = 3 * (len(_SIDES) + 1) + 1
#: Of these, doubt about what is small and medium.
RULE_PLANES = (0, 3)


def cells_of(boxes: np.ndarray, grid: tuple[int, int], cell: int = CELL) -> np.ndarray:
    """The cell of each box's center, (D,), counted row by row; those outside are in the nearest."""
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    x = (boxes[:, 0] + boxes[:, 2]) / 2 // cell
    y = (boxes[:, 1] + boxes[:, 3]) / 2 // cell
    row, column = np.clip(y, 0, grid[0] - 1), np.clip(x, 0, grid[1] - 1)
    return (row * grid[1] + column).astype(np.int64)


def detection_planes(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    grid: tuple[int, int],
    weights: np.ndarray,
    cell: int = CELL,
    view: float = 1.0,
) -> np.ndarray:
    """Sums over the detections of each cell, (`PLANES`, h, w), float32.

    For small, medium and large boxes in turn: p (1 - p) weighted by class, were scores
    probabilities the variance of what is right there; p weighted by class; p alone. Then the
    number of detections.

    ``view`` is how large the first exit sees the image, as a share of its sides. Below a half, what
    counts as small grows as the view shrinks: in an image of 4000 pixels that is seen at 640, all
    that is found is more than 32 pixels large.
    """
    where = cells_of(boxes, grid, cell)
    p, count = np.asarray(scores, float), grid[0] * grid[1]
    weight, size = np.asarray(weights)[labels], _size_of(boxes, min(1.0, view / _HALF))
    planes = []
    for index in range(len(_SIDES) + 1):
        of_size = size == index
        for values in (weight * p * (1 - p), weight * p, p):
            planes.append(np.bincount(where[of_size], values[of_size], minlength=count))
    planes.append(np.bincount(where, minlength=count))
    return np.stack(planes).reshape(-1, *grid).astype(np.float32)


def rule_map(planes: np.ndarray) -> np.ndarray:
    """Gain of each cell with nothing trained, (..., h, w), of planes, (..., P, h, w): p (1 - p) of
    small and medium detections, by class weight. What a second look adds is such objects, where
    the first is not sure of them."""
    small, medium = RULE_PLANES
    return planes[..., small, :, :] + planes[..., medium, :, :]


def kept_of_crop(
    boxes: np.ndarray,
    rectangle: Rectangle,
    grid: tuple[int, int],
    halo: int = 1,
    cell: int = CELL,
    core: bool = False,
    margin: float = 1.0,
    step: int = 1,
) -> np.ndarray:
    """Which boxes of a crop count, (D,): not those that touch an edge inside the image, which cut
    through an object or may have.

    Args:
        boxes (np.ndarray): (D, 4), left, top, right, bottom, in pixels of the image as delivered.
        rectangle (Rectangle): In cells, without halo.
        grid (tuple[int, int]): (h, w).
        halo, cell (int): As of `choose_rectangles`.
        core (bool): Whether the center must lie in the rectangle itself, not in its halo. Defaults
            to False.
        margin (float): What is this near an edge touches it, in pixels. Defaults to 1.
        step (int): As of `choose_rectangles`.
    """
    top, left, bottom, right = with_halo(rectangle, grid, halo, step)
    low = np.array([left, top]) * float(cell) + margin
    high = np.array([right, bottom]) * float(cell) - margin
    # At the image's own edges nothing is cut.
    low[[left == 0, top == 0]] = -np.inf
    high[[right == grid[1], bottom == grid[0]]] = np.inf
    inside = (boxes[:, :2] >= low).all(1) & (boxes[:, 2:] <= high).all(1)
    return inside & _centered(boxes, rectangle, grid, cell) if core else inside


def kept_of_earlier(
    boxes: np.ndarray,
    rectangle: Rectangle,
    grid: tuple[int, int],
    halo: int = 1,
    cell: int = CELL,
    step: int = 1,
) -> np.ndarray:
    """Which boxes of an earlier exit a crop does not replace, (D,): those whose center is outside
    the rectangle, and those that reach out of the crop, which sees but a part. Arguments as of
    `kept_of_crop`."""
    return ~kept_of_crop(boxes, rectangle, grid, halo, cell, core=True, step=step)


def _size_of(boxes: np.ndarray, scale: float) -> np.ndarray:
    """0, 1 or 2 for small, medium and large boxes, (D,), once they are scaled."""
    sides = scale * np.asarray(boxes, float).reshape(-1, 4)
    area = np.maximum(sides[:, 2] - sides[:, 0], 0) * np.maximum(sides[:, 3] - sides[:, 1], 0)
    return np.searchsorted(np.square(_SIDES), area, side='right')


def _centered(
    boxes: np.ndarray, rectangle: Rectangle, grid: tuple[int, int], cell: int
) -> np.ndarray:
    row, column = np.divmod(cells_of(boxes, grid, cell), grid[1])
    top, left, bottom, right = rectangle
    return (top <= row) & (row < bottom) & (left <= column) & (column < right)
