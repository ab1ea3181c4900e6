"""What YOLOv5 is built of. Letters: N images, C channels, H x W the map's size."""

from collections.abc import Iterable, Sequence

from mmengine.model import BaseModule, ModuleDict
from torch import Tensor, nn

from mmdet.models.layers import CSPLayer

from ..yolo import ACTIVATION, NORM, concatenate_maps, conv, pyramid
from .architecture import YOLOv5Architecture, YOLOv5Row


class PyramidPooling(BaseModule):
    """A `pyramid` of max pooling between two 1x1 convolutions: (N, in_channels, H, W) to
    (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.entry = conv(in_channels, in_channels // 2)
        self.out = conv(in_channels // 2 * 4, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a map, (N, C, H, W), one, two and three times by 5, and join all four."""
        return self.out(pyramid(self.entry(x)))


def build_layers(table: YOLOv5Architecture, rows: Iterable[YOLOv5Row]) -> ModuleDict:
    """Modules of rows, by number."""
    return ModuleDict({str(row.number): _build(row, table.entering(row)) for row in rows})


def _build(row: YOLOv5Row, entering: int) -> nn.Module:
    if row.kind == 'conv':
        return conv(entering, row.channels, row.kernel, row.stride)
    if row.kind == 'spp':
        return PyramidPooling(entering, row.channels)
    return CSPLayer(
        entering,
        row.channels,
        num_blocks=row.count,
        add_identity=row.shortcut,
        norm_cfg=NORM,
        act_cfg=ACTIVATION,
    )


def run_layers(
    layers: ModuleDict, rows: Sequence[YOLOv5Row], maps: dict[int, Tensor], wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """Run rows in order; maps are let go once nothing needs them.

    Args:
        layers (ModuleDict): From `build_layers`.
        rows (Sequence[YOLOv5Row]): The same rows.
        maps (dict[int, Tensor]): What they are given, by number; -1 is the image.
        wanted (Sequence[int]): Numbers of the maps to give.
    """
    for index, row in enumerate(rows):
        x = layers[str(row.number)](
            concatenate_maps([maps[number] for number in row.sources or (-1,)])
        )
        needed = {number for later in rows[index + 1 :] for number in later.sources}.union(wanted)
        maps = {
            number: feature_map
            for number, feature_map in {**maps, row.number: x}.items()
            if number in needed
        }
    return tuple(maps[number] for number in wanted)
