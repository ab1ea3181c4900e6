"""Convolutions as YOLOv5 and YOLOv7 have them."""

from mmcv.cnn import ConvModule

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
