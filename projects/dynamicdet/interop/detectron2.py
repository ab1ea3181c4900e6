"""Detectron2's model zoo: Faster and Mask R-CNN with R-50, R-101 and X-101-32x8d FPN.

Its stages count from ``res2``, its pyramid's levels from 2, its layers from 1. Orders agree with
mmdet's: background last, (dx, dy, dw, dh) per class, (channel, row, column) into the first linear
layer.
"""

from torch import nn

from ..errors import UsageError
from ..exchange.rules import Rule, WeightSource, rename, skip
from ..private_mmengine import swaps_channels

_RES = r'backbone\.bottom_up\.res(\d)\.(\d+)\.'
_BLOCK = 'backbone.layer<1-1>.<2>.'
_ROI, _BBOX, _MASK = r'roi_heads\.', 'roi_head.bbox_head.', 'roi_head.mask_head.'

_ROWS = [
    skip(r'pixel_(mean|std)', "the images' normalization, which the config has"),
    skip(r'proposal_generator\.anchor_generator\..*', 'anchors, which follow from the config'),
    rename(r'backbone\.bottom_up\.stem\.conv1\.weight', 'backbone.conv1.weight'),
    rename(r'backbone\.bottom_up\.stem\.conv1\.norm\.(.*)', 'backbone.bn1.<1>'),
    rename(_RES + r'conv(\d)\.weight', _BLOCK + 'conv<3>.weight'),
    rename(_RES + r'conv(\d)\.norm\.(.*)', _BLOCK + 'bn<3>.<4>'),
    rename(_RES + r'shortcut\.weight', _BLOCK + 'downsample.0.weight'),
    rename(_RES + r'shortcut\.norm\.(.*)', _BLOCK + 'downsample.1.<3>'),
    rename(r'backbone\.fpn_lateral(\d)\.(.*)', 'neck.lateral_convs.<1-2>.conv.<2>'),
    rename(r'backbone\.fpn_output(\d)\.(.*)', 'neck.fpn_convs.<1-2>.conv.<2>'),
    rename(r'proposal_generator\.rpn_head\.conv\.(.*)', 'rpn_head.rpn_conv.<1>'),
    rename(r'proposal_generator\.rpn_head\.objectness_logits\.(.*)', 'rpn_head.rpn_cls.<1>'),
    rename(r'proposal_generator\.rpn_head\.anchor_deltas\.(.*)', 'rpn_head.rpn_reg.<1>'),
    rename(_ROI + r'box_head\.fc(\d)\.(.*)', _BBOX + 'shared_fcs.<1-1>.<2>'),
    rename(_ROI + r'box_predictor\.cls_score\.(.*)', _BBOX + 'fc_cls.<1>'),
    rename(_ROI + r'box_predictor\.bbox_pred\.(.*)', _BBOX + 'fc_reg.<1>'),
    rename(_ROI + r'mask_head\.mask_fcn(\d)\.(.*)', _MASK + 'convs.<1-1>.conv.<2>'),
    rename(_ROI + r'mask_head\.deconv\.(.*)', _MASK + 'upsample.<1>'),
    rename(_ROI + r'mask_head\.predictor\.(.*)', _MASK + 'conv_logits.<1>'),
]

#: What the zoo's networks see: BGR, less this mean, over this standard deviation; and where a block
#: has its stride, in mmdet's words. (detectron2/config/defaults.py, configs/COCO-Detection/*.yaml)
_MEAN = (103.53, 116.28, 123.675)
_PLAIN = ((1.0, 1.0, 1.0), 'caffe')
_GROUPED = ((57.375, 57.12, 58.395), 'pytorch')


def detectron2_rules(model: nn.Module) -> list[Rule]:
    """The table; refuses a config under which the weights would load and see wrong images."""
    backbone = getattr(model.backbone, 'first', model.backbone)
    images = model.data_preprocessor
    std, style = _GROUPED if getattr(backbone, 'groups', 1) > 1 else _PLAIN
    wrong = [
        name
        for name, is_wrong in (
            ('bgr_to_rgb', swaps_channels(images)),
            ('mean', not _is(images, 'mean', _MEAN)),
            ('std', not _is(images, 'std', std)),
            ('style', getattr(backbone, 'style', style) != style),
        )
        if is_wrong
    ]
    if wrong:
        raise UsageError(
            f"Detectron2's weights need bgr_to_rgb=False, mean={_MEAN}, std={std} and a "
            f"backbone of style='{style}'; the config differs in {', '.join(wrong)}. Take "
            'one of configs/*_detectron2*.py or one of mmdet with caffe in its name'
        )
    return _ROWS


def _is(images: nn.Module, name: str, wanted: tuple) -> bool:
    value = getattr(images, name, None)
    return value is not None and (value.flatten() - value.new_tensor(wanted)).abs().max() < 1e-3


DETECTRON2 = WeightSource(detectron2_rules, kept=('router.', 'backbone.connections.'))
