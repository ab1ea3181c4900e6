"""What YOLOv7 is built of. Letters: N images, C channels, H x W the map's size."""

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from ..fusing import Fusible
from ..yolo import ACTIVATION, NORM, conv, pyramid
from .architecture import Elan


class ElanBlock(BaseModule):
    """Efficient layer aggregation (arXiv 2207.02696, figure 2): (N, in_channels, H, W) to
    (N, row.out, H, W)."""

    def __init__(self, in_channels: int, row: Elan) -> None:
        super().__init__()
        self.every = row.every
        self.shortcut = conv(in_channels, row.branch)
        self.entry = conv(in_channels, row.branch)
        self.convs = ModuleList(
            conv(row.width if index else row.branch, row.width, 3) for index in range(row.count)
        )
        self.out = conv(2 * row.branch + row.count // row.every * row.width, row.out)

    def forward(self, x: Tensor) -> Tensor:
        """Join both entries and every ``every``-th map of the convolutions."""
        kept = [self.shortcut(x), self.entry(x)]
        x = kept[-1]
        for index, layer in enumerate(self.convs, start=1):
            x = layer(x)
            if index % self.every == 0:
                kept.append(x)
        # Deepest first, as published weights have it.
        return self.out(torch.cat(kept[::-1], dim=1))


class PoolDown(BaseModule):
    """Halve the resolution twice, by a convolution and by max pooling: (N, in_channels, H, W) to
    (N, 2 * width, H / 2, W / 2)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.pooled = conv(in_channels, width)
        self.entry = conv(in_channels, width)
        self.strided = conv(width, width, 3, 2)

    def forward(self, x: Tensor, convolved: Tensor | None = None) -> Tensor:
        """The convolution may be given another map than the pooling, of the same shape."""
        entering = x if convolved is None else convolved
        return torch.cat(
            [self.strided(self.entry(entering)), self.pooled(F.max_pool2d(x, 2))], dim=1
        )


def down(kind: str, in_channels: int, width: int) -> nn.Module:
    """What halves the resolution: a row's ``down``. ``width`` is that of one branch."""
    if kind == 'pool':
        return PoolDown(in_channels, width)
    return conv(in_channels, width, 3, 2) if kind == 'conv' else nn.Identity()


class SppCsp(BaseModule):
    """A `pyramid` of max pooling inside a cross-stage partial block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels
        self.entry = nn.Sequential(
            conv(in_channels, width), conv(width, width, 3), conv(width, width)
        )
        self.shortcut = conv(in_channels, width)
        self.fused = nn.Sequential(conv(4 * width, width), conv(width, width, 3))
        self.out = conv(2 * width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a map by 5, 9 and 13 and join it with a map that was not pooled."""
        pooled = pyramid(self.entry(x))
        return self.out(torch.cat([self.fused(pooled), self.shortcut(x)], dim=1))


class RepConv(Fusible, BaseModule):
    """A 3x3 and a 1x1 convolution side by side in training, one 3x3 after `fuse` (RepVGG, arXiv
    2101.03697; without its identity branch, which YOLOv7's outputs do not have)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.dense = self._branch(in_channels, out_channels, 3)
        self.point = self._branch(in_channels, out_channels, 1)
        self.activate = nn.SiLU(inplace=True)

    @staticmethod
    def _branch(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=NORM['eps'], momentum=NORM['momentum']),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Both convolutions of x, summed, and the activation; one convolution once fused."""
        y = self.dense(x)
        return y if self.point is None else self.activate(y + self.point(x))

    def fuse(self) -> None:
        """Add the 1x1 convolution to the middle of the 3x3 one. Norms must be fused before."""
        if self.point is not None:
            dense, point = self.dense[0], self.point[0]
            dense.weight.data += F.pad(point.weight.data, [1, 1, 1, 1])
            dense.bias.data += point.bias.data
            self.dense = ConvModule(*dense.weight.shape[1::-1], 3, padding=1, act_cfg=ACTIVATION)
            self.dense.conv = dense
            self.point = None
