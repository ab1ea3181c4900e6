"""YOLOv7's neck: upwards from the deepest map, then down again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList
from torch import Tensor

from mmdet.registry import MODELS

from ..yolo import conv
from .architecture import yolov7_architecture
from .blocks import ElanBlock, RepConv, SppCsp, down


@MODELS.register_module()
class YOLOV7PAFPN(BaseModule):
    """Path aggregation over the deepest maps of `YOLOV7Backbone`.

    Args:
        arch (str): 'v7', 'x' or 'w6'.
        width (float): Factor on all channels. Defaults to 1.
        depth (float): Factor on the length of the ELAN blocks. Defaults to 1.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(
        self, arch: str = 'v7', width: float = 1.0, depth: float = 1.0, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        table = yolov7_architecture(arch, width, depth)
        # Deep to shallow, without the deepest.
        laterals = table.stage_channels[-table.levels :][-2::-1]
        self.architecture = table
        self.spp = SppCsp(table.stage_channels[-1], table.spp)
        self.reduces, self.laterals, self.up_blocks = ModuleList(), ModuleList(), ModuleList()
        widths = [table.spp]
        for lateral, (entering, row) in zip(laterals, table.up):
            self.reduces.append(conv(widths[-1], entering))
            self.laterals.append(conv(lateral, entering))
            self.up_blocks.append(ElanBlock(2 * entering, row))
            widths.append(row.out)
        self.downs, self.down_blocks = ModuleList(), ModuleList()
        outputs = [widths.pop()]
        branches = 2 if table.down_kind == 'pool' else 1
        for entering, row in table.down:
            self.downs.append(down(table.down_kind, outputs[-1], entering))
            self.down_blocks.append(ElanBlock(branches * entering + widths.pop(), row))
            outputs.append(row.out)
        self.outs = ModuleList(
            RepConv(channels, wanted) if table.reparameterized else conv(channels, wanted, 3)
            for channels, wanted in zip(outputs, table.outputs)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Mix the maps.

        Args:
            maps (Sequence[Tensor]): (N, C_i, H_i, W_i), shallow to deep, each half the size before.

        Returns:
            tuple[Tensor]: As many maps of the same sizes.
        """
        kept = [self.spp(maps[-1])]
        for index, block in enumerate(self.up_blocks):
            upper = F.interpolate(self.reduces[index](kept[-1]), scale_factor=2.0, mode='nearest')
            kept.append(block(torch.cat([self.laterals[index](maps[-2 - index]), upper], dim=1)))
        outputs = [kept.pop()]
        for lower, block in zip(self.downs, self.down_blocks):
            outputs.append(block(torch.cat([lower(outputs[-1]), kept.pop()], dim=1)))
        return tuple(out(feature_map) for out, feature_map in zip(self.outs, outputs))
