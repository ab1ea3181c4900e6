"""ResNets of any width on FPN: Detectron2's own builder takes 64 channels alone for ResNet-18."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from dynamicdet.errors import UsageError

#: Depth -> blocks of each stage (He et al. 2016, table 1).
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@BACKBONE_REGISTRY.register()
def build_narrow_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """A ResNet on FPN, its width by ``MODEL.RESNETS.STEM_OUT_CHANNELS`` and ``RES2_OUT_CHANNELS``;
    of bottlenecks, these are a quarter of the latter."""
    settings = cfg.MODEL.RESNETS
    if settings.DEPTH not in _BLOCKS:
        raise UsageError(
            f'a narrow ResNet has a DEPTH of {", ".join(map(str, _BLOCKS))}; got {settings.DEPTH}'
        )
    stem = BasicStem(input_shape.channels, settings.STEM_OUT_CHANNELS, settings.NORM)
    stages, entering = [], settings.STEM_OUT_CHANNELS
    for index, count in enumerate(_BLOCKS[settings.DEPTH]):
        leaving = settings.RES2_OUT_CHANNELS * 2**index
        bottleneck = dict(bottleneck_channels=leaving // 4, stride_in_1x1=settings.STRIDE_IN_1X1)
        stages.append(
            ResNet.make_stage(
                BasicBlock if settings.DEPTH < 50 else BottleneckBlock,
                count,
                stride_per_block=[1 if index == 0 else 2] + [1] * (count - 1),
                in_channels=entering,
                out_channels=leaving,
                norm=settings.NORM,
                **({} if settings.DEPTH < 50 else bottleneck),
            )
        )
        entering = leaving
    net = ResNet(
        stem, stages, out_features=settings.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    return FPN(
        net,
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
