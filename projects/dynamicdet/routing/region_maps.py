"""What each cell of an image gains by a second look, as the first exit's detections tell it.

Letters: ``D``: detections of an image. ``h``, ``w``: rows and columns of its grid of cells, see
`regions`. ``P``: planes of a grid.

* ``boxes``, (D, 4): left, top, right, bottom, in pixels of the image as its network sees it.
* ``scores``, (D,), in [0, 1]; ``labels``, (D,), from 0 on.
* ``weights``, (C,): what an object of each class counts; see `class_weights.class_weights`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..precision import KeepsType
from .regions import CELL

#: Largest sides, in pixels of the image as delivered, of what counts as small and as medium: COCO's
#: 32^2 and 96^2 square pixels.
_SIDES = (32, 96)
#: The view for which they are meant: 320 of 640 pixels, at which the rule was chosen.
_HALF = 0.5
#: Planes of `detection_planes`: of each size doubt and confidence, weighted by class, and
#: confidence alone; the number of detections.
PLANES = 3 * (len(_SIDES) + 1) + 1
#: Of these, doubt about what is small and medium.
_RULE_PLANES = (0, 3)


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


def rule_map(planes: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Gain of each cell with nothing trained, (..., h, w), of planes, (..., P, h, w): p (1 - p) of
    small and medium detections, by class weight. What a second look adds is such objects, where
    the first is not sure of them."""
    small, medium = _RULE_PLANES
    return planes[..., small, :, :] + planes[..., medium, :, :]


def _size_of(boxes: np.ndarray, scale: float) -> np.ndarray:
    """0, 1 or 2 for small, medium and large boxes, (D,), once they are scaled."""
    sides = scale * np.asarray(boxes, float).reshape(-1, 4)
    area = np.maximum(sides[:, 2] - sides[:, 0], 0) * np.maximum(sides[:, 3] - sides[:, 1], 0)
    return np.searchsorted(np.square(_SIDES), area, side='right')


class RegionRouter(KeepsType):
    """Predict what each cell gains: convolutions over its grid.

    They see sums over exit 0's detections in each cell (`detection_planes`) and, with
    ``in_channels``, exit 0's maps at the size of the grid. It stays in float32 whatever type the
    detector is turned into. Untrained it gives the rule, `rule_map`.

    Args:
        in_channels (Sequence[int]): Channels of the maps that it sees, too. Defaults to none.
        hidden (int): Channels between a 3x3 convolution and a 1x1 convolution; 0 for one 1x1
            convolution, a weighted sum of what a cell holds. Defaults to 0, which a few hundred
            images fit better.
    """

    def __init__(self, in_channels: Sequence[int] = (), hidden: int = 0) -> None:
        super().__init__()
        if hidden < 0:
            raise UsageError(f"a region router's hidden channels must be 0 or more, got {hidden}")
        self.in_channels = tuple(in_channels)
        width = PLANES + sum(self.in_channels)
        self.register_buffer('mean', torch.zeros(width))
        self.register_buffer('std', torch.ones(width))
        layers = [nn.Conv2d(hidden or width, 1, 1)]
        if hidden:
            layers = [nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), *layers]
        self.layers = nn.Sequential(*layers)
        # Whether it was trained.
        self.register_buffer('trained', torch.tensor(False))

    @torch.no_grad()
    def start_training(self) -> None:
        """Begin at the rule, or with hidden channels at 0, by the mean and deviation of what it
        sees."""
        last = self.layers[-1]
        last.weight.zero_()
        last.bias.zero_()
        if len(self.layers) == 1:
            for plane in _RULE_PLANES:
                last.weight[0, plane] = self.std[plane]
                last.bias += self.mean[plane]
        self.trained.fill_(True)

    def forward(self, planes: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """Gains of each cell.

        Args:
            planes (Tensor): (N, `PLANES`, h, w).
            maps (Sequence[Tensor]): (N, C_i, H_i, W_i), of the image that the grid covers.

        Returns:
            Tensor: (N, h, w), float32.
        """
        if not self.trained:
            return rule_map(planes)
        return self.gains(self.inputs(planes, maps))

    def inputs(self, planes: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """What the convolutions see, (N, width, h, w), float32: planes, and maps averaged over each
        cell."""
        size = planes.shape[-2:]
        pooled = [
            nn.functional.adaptive_avg_pool2d(feature_map.float(), size) for feature_map in maps
        ]
        return torch.cat([planes.float(), *pooled], dim=1)

    def gains(self, inputs: Tensor) -> Tensor:
        """(N, h, w), of `inputs`'s, (N, width, h, w)."""
        with torch.autocast(inputs.device.type, enabled=False):
            shape = (1, -1, 1, 1)
            inputs = (inputs - self.mean.view(shape)) / self.std.view(shape)
            return self.layers(inputs).squeeze(1)
