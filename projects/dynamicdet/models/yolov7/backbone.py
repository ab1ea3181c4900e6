"""YOLOv7's backbones."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from mmdet.registry import MODELS

from ...errors import UsageError
from ..yolo import conv
from .architecture import Elan, yolov7_architecture
from .blocks import ElanBlock, down


@MODELS.register_module()
class YOLOV7Backbone(BaseModule):
    """The backbone of YOLOv7, X or W6: a stem, then stages that halve the resolution each.

    Args:
        arch (str): 'v7', 'x' or 'w6'.
        width (float): Factor on all channels. Defaults to 1.
        depth (float): Factor on the length of the ELAN blocks. Defaults to 1.
        out_indices (Sequence[int], optional): Stages whose maps are given; stage 0 has stride 2.
            Defaults to those that the neck takes, from stride 8 on.
        crossed_stage (int, optional): Of a second backbone of a cascade: the stage in front of
            which the convolution that halves the resolution is given the first backbone's map in
            the place of its own, as in the released Dy-YOLOv7-X; a 'pool' row. On its own a
            backbone ignores it. Defaults to None.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(
        self,
        arch: str = 'v7',
        width: float = 1.0,
        depth: float = 1.0,
        out_indices: Sequence[int] | None = None,
        crossed_stage: int | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        table = yolov7_architecture(arch, width, depth)
        if crossed_stage is not None and not (
            1 <= crossed_stage < len(table.stages) and table.stages[crossed_stage].down == 'pool'
        ):
            raise UsageError(
                f"crossed_stage must be a stage of '{arch}' that convolution and pooling enter "
                'side by side; '
                f'got {crossed_stage}'
            )
        self.crossed_stage = crossed_stage
        self.pixel_unshuffle = table.pixel_unshuffle
        self.stem = conv(12 if table.pixel_unshuffle else 3, table.stem, 3)
        self.downs, self.blocks = ModuleList(), ModuleList()
        channels = table.stem
        for row, leaving in zip(table.stages, table.stage_channels):
            pooled = row.down == 'pool'
            self.downs.append(
                down(row.down, channels, row.entering // 2 if pooled else row.entering)
            )
            self.blocks.append(_block(row.entering, row.block))
            channels = leaving
        self.entering = [row.entering for row in table.stages]
        self.channels = list(table.stage_channels)
        #: Leading stages that a composite connection leaves out: those without a block.
        self.unconnected = sum(row.block is None for row in table.stages)
        stages = range(len(table.stages))
        self.out_indices = tuple(stages[-table.levels :] if out_indices is None else out_indices)

    def enter(self, images: Tensor) -> Tensor:
        """What enters the block of stage 0."""
        if self.pixel_unshuffle:
            images = F.pixel_unshuffle(images, 2)
        return self.downs[0](self.stem(images))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages in ``out_indices``.

        Args:
            images (Tensor): (N, 3, H, W), in [0, 1]; H and W multiples of the deepest stride.
        """
        x, maps = self.enter(images), []
        for index, block in enumerate(self.blocks):
            x = block(self.downs[index](x) if index else x)
            if index in self.out_indices:
                maps.append(x)
        return tuple(maps)


def _block(channels: int, row: object) -> nn.Module:
    if row is None:
        return nn.Identity()
    return ElanBlock(channels, row) if isinstance(row, Elan) else conv(channels, row, 3)
