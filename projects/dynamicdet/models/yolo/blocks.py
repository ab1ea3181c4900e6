"""Convolutions as YOLOv5 and YOLOv7 have them."""

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor

#: As the published networks were trained.
NORM = dict(type='BN', momentum=0.03, eps=0.001)
ACTIVATION = dict(type='SiLU', inplace=True)


def conv(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> ConvModule:
    """Convolution, norm, SiLU; keeps the size but for the stride. An even kernel takes an even
    stride."""
    return ConvModule(
        in_channels,
        out_channels,
        kernel,
        stride,
        (kernel - 1) // 2,
        norm_cfg=NORM,
        act_cfg=ACTIVATION,
    )


def pyramid(x: Tensor) -> Tensor:
    """A map, (N, C, H, W), joined with its maxima over 5, 9 and 13 pixels, each as one more pooling
    over 5: (N, 4 * C, H, W)."""
    pooled = [x]
    for _ in range(3):
        pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
    return torch.cat(pooled, dim=1)
