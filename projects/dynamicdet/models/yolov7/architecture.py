"""YOLOv7, YOLOv7-X and YOLOv7-W6 as one table (arXiv 2207.02696, figure 2 and its appendix).

A row is a stage. Rows of the backbone run from shallow to deep, rows of the neck in the order in
which they run: upwards from the deepest map, then down again.
"""

from functools import partial
from typing import NamedTuple

from ..yolo import YOLOLayer, append_layer


class Elan(NamedTuple):
    """An ELAN block: two 1x1 branches; ``count`` 3x3 convolutions follow the second one, and what
    every ``every``-th of them gives is put together with both branches."""

    branch: int  # channels of each 1x1 branch
    width: int  # channels of the 3x3 convolutions
    count: int
    every: int
    out: int  # channels that leave


class YOLOv7Stage(NamedTuple):
    """A stage of the backbone: it halves the resolution, then works at it.

    ``down``: 'conv', a 3x3 convolution of stride 2; 'pool', one beside max pooling, half of the
    channels each; 'none', where the stem has halved it already.
    ``block``: None for nothing; a width for one 3x3 convolution; or an ELAN.
    """

    down: str
    entering: int  # channels that enter the block
    block: object


class YOLOv7Architecture(NamedTuple):
    """A table of the whole detector; strides of the first stage and the first output follow from
    it.

    ``pixel_unshuffle``: whether the stem begins by putting each 2 x 2 pixels into one.
    ``up``, ``down``: the neck's rows. A row of ``up`` is the width to which the deeper map and the
    lateral one are brought, and an ELAN; of ``down`` the channels of its convolution of stride 2
    (and, under 'pool', of the pooled branch), and an ELAN.
    ``outputs``: channels of the maps that the head gets, by a re-parameterized convolution or a
    plain one.
    """

    stem: int
    pixel_unshuffle: bool
    stages: tuple[YOLOv7Stage, ...]
    spp: int
    up: tuple[tuple[int, Elan], ...]
    down_kind: str
    down: tuple[tuple[int, Elan], ...]
    reparameterized: bool
    outputs: tuple[int, ...]

    def scaled(self, width: float = 1.0, depth: float = 1.0) -> 'YOLOv7Architecture':
        """The table with all channels times ``width``, to multiples of 8, and all counts times
        ``depth``."""

        def channels(value: int) -> int:
            return max(8, 8 * round(value * width / 8))

        def elan(row: Elan) -> Elan:
            count = max(1, round(row.count * depth / row.every)) * row.every
            return Elan(
                channels(row.branch), channels(row.width), count, row.every, channels(row.out)
            )

        def block(row: object) -> object | None:
            return elan(row) if isinstance(row, Elan) else row and channels(row)

        return self._replace(
            stem=channels(self.stem),
            stages=tuple(
                YOLOv7Stage(row.down, channels(row.entering), block(row.block))
                for row in self.stages
            ),
            spp=channels(self.spp),
            up=tuple((channels(entering), elan(row)) for entering, row in self.up),
            down=tuple((channels(entering), elan(row)) for entering, row in self.down),
            outputs=tuple(map(channels, self.outputs)),
        )

    @property
    def levels(self) -> int:
        """How many maps the neck takes and gives: the deepest ones."""
        return len(self.outputs)

    def layers(self) -> tuple[YOLOLayer, ...]:
        """The detector as a list to be run, one by one; what the head is given are its entries
        ``output_layers``.

        Raises:
            ValueError: Of W6, which begins by putting pixels into one, outside of any layer.
        """
        if self.pixel_unshuffle:
            raise ValueError(
                'YOLOv7-W6 has no table of layers: it rearranges the image before its first one'
            )
        rows: list[YOLOLayer] = []
        add = partial(append_layer, rows)
        last, stages = add('backbone.stem', (), self.stem), []
        for index, (row, channels) in enumerate(zip(self.stages, self.stage_channels)):
            last = add(f'backbone.downs.{index}', (last,), row.entering, 2)
            last = add(f'backbone.blocks.{index}', (last,), channels)
            stages.append(last)
        kept = [add('neck.spp', (last,), self.spp)]
        for index, (entering, row) in enumerate(self.up):
            upper = add(f'neck.reduces.{index}', (kept[-1],), entering)
            lateral = add(f'neck.laterals.{index}', (stages[-2 - index],), entering)
            kept.append(add(f'neck.up_blocks.{index}', (lateral, upper), row.out))
        outputs = [kept.pop()]
        for index, (entering, row) in enumerate(self.down):
            wide = 2 * entering if self.down_kind == 'pool' else entering
            lower = add(f'neck.downs.{index}', (outputs[-1],), wide, 2)
            outputs.append(add(f'neck.down_blocks.{index}', (lower, kept.pop()), row.out))
        for index, (source, channels) in enumerate(zip(outputs, self.outputs)):
            add(f'neck.outs.{index}', (source,), channels)
        return tuple(rows)

    @property
    def output_layers(self) -> tuple[int, ...]:
        """Positions in `layers` of what the head is given."""
        count = len(self.layers())
        return tuple(range(count - self.levels, count))

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the map of each stage."""
        return tuple(
            row.block.out if isinstance(row.block, Elan) else row.block or row.entering
            for row in self.stages
        )


ARCHITECTURES = dict(
    v7=YOLOv7Architecture(
        stem=32,
        pixel_unshuffle=False,
        stages=(
            YOLOv7Stage('conv', 64, 64),
            YOLOv7Stage('conv', 128, Elan(64, 64, 4, 2, 256)),
            YOLOv7Stage('pool', 256, Elan(128, 128, 4, 2, 512)),
            YOLOv7Stage('pool', 512, Elan(256, 256, 4, 2, 1024)),
            YOLOv7Stage('pool', 1024, Elan(256, 256, 4, 2, 1024)),
        ),
        spp=512,
        up=((256, Elan(256, 128, 4, 1, 256)), (128, Elan(128, 64, 4, 1, 128))),
        down_kind='pool',
        down=((128, Elan(256, 128, 4, 1, 256)), (256, Elan(512, 256, 4, 1, 512))),
        reparameterized=True,
        outputs=(256, 512, 1024),
    ),
    x=YOLOv7Architecture(
        stem=40,
        pixel_unshuffle=False,
        stages=(
            YOLOv7Stage('conv', 80, 80),
            YOLOv7Stage('conv', 160, Elan(64, 64, 6, 2, 320)),
            YOLOv7Stage('pool', 320, Elan(128, 128, 6, 2, 640)),
            YOLOv7Stage('pool', 640, Elan(256, 256, 6, 2, 1280)),
            YOLOv7Stage('pool', 1280, Elan(256, 256, 6, 2, 1280)),
        ),
        spp=640,
        up=((320, Elan(256, 256, 6, 2, 320)), (160, Elan(128, 128, 6, 2, 160))),
        down_kind='pool',
        down=((160, Elan(256, 256, 6, 2, 320)), (320, Elan(512, 512, 6, 2, 640))),
        reparameterized=False,
        outputs=(320, 640, 1280),
    ),
    w6=YOLOv7Architecture(
        stem=64,
        pixel_unshuffle=True,
        stages=(
            YOLOv7Stage('none', 64, None),
            YOLOv7Stage('conv', 128, Elan(64, 64, 4, 2, 128)),
            YOLOv7Stage('conv', 256, Elan(128, 128, 4, 2, 256)),
            YOLOv7Stage('conv', 512, Elan(256, 256, 4, 2, 512)),
            YOLOv7Stage('conv', 768, Elan(384, 384, 4, 2, 768)),
            YOLOv7Stage('conv', 1024, Elan(512, 512, 4, 2, 1024)),
        ),
        spp=512,
        up=(
            (384, Elan(384, 192, 4, 1, 384)),
            (256, Elan(256, 128, 4, 1, 256)),
            (128, Elan(128, 64, 4, 1, 128)),
        ),
        down_kind='conv',
        down=(
            (256, Elan(256, 128, 4, 1, 256)),
            (384, Elan(384, 192, 4, 1, 384)),
            (512, Elan(512, 256, 4, 1, 512)),
        ),
        reparameterized=False,
        outputs=(256, 512, 768, 1024),
    ),
)


def yolov7_architecture(name: str, width: float = 1.0, depth: float = 1.0) -> YOLOv7Architecture:
    """A row of `ARCHITECTURES`, scaled.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got '{name}'")
    return ARCHITECTURES[name].scaled(width, depth)
