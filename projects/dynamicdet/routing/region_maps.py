"""What each cell of an image gains by a second look, as the first exit's detections tell it.

Letters: ``h``, ``w``: rows and columns of an image's grid of cells, see `regions`. ``P``: planes of
a grid, see `region_cells.detection_planes`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..precision import KeepsType
from .region_cells import PLANES, RULE_PLANES, rule_map


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
            for plane in RULE_PLANES:
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


def is_linear(router: RegionRouter) -> bool:
    """Whether a router's gain of a cell is a weighted sum of that cell's planes."""
    return len(router.layers) == 1 and not router.in_channels


def linear_weights(router: RegionRouter) -> dict[str, object] | None:
    """Of a router that `is_linear`: the ``weight`` of each plane, (`PLANES`,), and the ``bias``;
    None of an untrained one, which is the rule."""
    if not router.trained:
        return None
    layer = router.layers[-1]
    weight = layer.weight.flatten() / router.std
    return dict(weight=weight.tolist(), bias=float(layer.bias - (weight * router.mean).sum()))
