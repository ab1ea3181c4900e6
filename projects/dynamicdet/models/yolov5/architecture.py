"""YOLOv5 of release 6.0 and later, P5, as one table: n, s, m, l and x are its width and depth.

Layers are numbered as in its published description; those that only resize or put together have a
number there and no row here. Layers up to `LAST_OF_BACKBONE` are the backbone.
"""

import math
from typing import NamedTuple

from ..yolo import YOLOLayer, append_layer

LAST_OF_BACKBONE = 9


class YOLOv5Row(NamedTuple):
    """A layer.

    ``kind``: 'conv', a convolution; 'csp', a cross-stage partial block of bottlenecks; 'spp',
    pyramid pooling.
    ``sources``: numbers of the layers that it is given, smaller maps doubled; none for the image.
    ``channels``: that leave.
    ``kernel``, ``stride``: of a convolution.
    ``count``, ``shortcut``: of a csp: how many bottlenecks, and whether they add their input.
    """

    number: int
    kind: str
    sources: tuple[int, ...]
    channels: int
    kernel: int = 1
    stride: int = 1
    count: int = 1
    shortcut: bool = False

    @property
    def name(self) -> str:
        """Of the module, in the detector."""
        return f'{"backbone" if self.number <= LAST_OF_BACKBONE else "neck"}.layers.{self.number}'


class YOLOv5Architecture(NamedTuple):
    """A table of the whole detector: its rows in the order in which they run, and the numbers of
    those that the head is given."""

    rows: tuple[YOLOv5Row, ...]
    outputs: tuple[int, ...]

    def scaled(self, width: float = 1.0, depth: float = 1.0) -> 'YOLOv5Architecture':
        """The table with all channels times ``width``, up to multiples of 8, and all counts times
        ``depth``, rounded."""
        return self._replace(
            rows=tuple(
                row._replace(
                    channels=8 * math.ceil(row.channels * width / 8),
                    count=max(1, round(row.count * depth)),
                )
                for row in self.rows
            )
        )

    def channels(self, *numbers: int) -> tuple[int, ...]:
        """Of the maps of some layers."""
        by_number = {row.number: row.channels for row in self.rows}
        return tuple(by_number[number] for number in numbers)

    def entering(self, row: YOLOv5Row) -> int:
        """Channels that a layer is given."""
        return sum(self.channels(*row.sources)) if row.sources else 3

    @property
    def backbone(self) -> tuple[YOLOv5Row, ...]:
        """Rows of the backbone."""
        return tuple(row for row in self.rows if row.number <= LAST_OF_BACKBONE)

    @property
    def neck(self) -> tuple[YOLOv5Row, ...]:
        """Rows of the neck."""
        return tuple(row for row in self.rows if row.number > LAST_OF_BACKBONE)

    @property
    def passed_on(self) -> tuple[int, ...]:
        """Layers of the backbone that the neck is given, shallow to deep."""
        numbers = {number for row in self.neck for number in row.sources}
        return tuple(row.number for row in self.backbone if row.number in numbers)

    def layers(self) -> tuple[YOLOLayer, ...]:
        """The rows as a list to be run, one by one; what the head is given are its entries
        ``output_layers``."""
        layers: list[YOLOLayer] = []
        for row in self.rows:
            append_layer(layers, row.name, self._positions(row.sources), row.channels, row.stride)
        return tuple(layers)

    @property
    def output_layers(self) -> tuple[int, ...]:
        """Positions in `layers` of what the head is given."""
        return self._positions(self.outputs)

    def _positions(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        every = [row.number for row in self.rows]
        return tuple(map(every.index, numbers))


#: At width and depth 1.
_TABLE = YOLOv5Architecture(
    rows=(
        YOLOv5Row(0, 'conv', (), 64, kernel=6, stride=2),
        YOLOv5Row(1, 'conv', (0,), 128, kernel=3, stride=2),
        YOLOv5Row(2, 'csp', (1,), 128, count=3, shortcut=True),
        YOLOv5Row(3, 'conv', (2,), 256, kernel=3, stride=2),
        YOLOv5Row(4, 'csp', (3,), 256, count=6, shortcut=True),
        YOLOv5Row(5, 'conv', (4,), 512, kernel=3, stride=2),
        YOLOv5Row(6, 'csp', (5,), 512, count=9, shortcut=True),
        YOLOv5Row(7, 'conv', (6,), 1024, kernel=3, stride=2),
        YOLOv5Row(8, 'csp', (7,), 1024, count=3, shortcut=True),
        YOLOv5Row(9, 'spp', (8,), 1024),
        YOLOv5Row(10, 'conv', (9,), 512),
        YOLOv5Row(13, 'csp', (10, 6), 512, count=3),
        YOLOv5Row(14, 'conv', (13,), 256),
        YOLOv5Row(17, 'csp', (14, 4), 256, count=3),
        YOLOv5Row(18, 'conv', (17,), 256, kernel=3, stride=2),
        YOLOv5Row(20, 'csp', (18, 14), 512, count=3),
        YOLOv5Row(21, 'conv', (20,), 512, kernel=3, stride=2),
        YOLOv5Row(23, 'csp', (21, 10), 1024, count=3),
    ),
    outputs=(17, 20, 23),
)
#: The published factors on the width and on the depth.
SIZES = dict(n=(0.25, 0.33), s=(0.5, 0.33), m=(0.75, 0.67), l=(1.0, 1.0), x=(1.25, 1.33))


def yolov5_architecture(arch: str, width: float = 1.0, depth: float = 1.0) -> YOLOv5Architecture:
    """The table of a size, scaled further.

    Raises:
        ValueError: If there is none of that name.
    """
    if arch not in SIZES:
        raise ValueError(f"arch must be one of {', '.join(SIZES)}; got '{arch}'")
    own_width, own_depth = SIZES[arch]
    return _TABLE.scaled(own_width * width, own_depth * depth)
