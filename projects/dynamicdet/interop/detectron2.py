"""Detectron2's model zoo: Faster and Mask R-CNN with R-50, R-101 and X-101-32x8d FPN.

The table of names is `exchange.detectron2`.
"""

from torch import nn

from ..errors import UsageError
from ..exchange.detectron2 import BACKBONE_ROWS, HEAD_ROWS, prefixed, rules_of
from ..exchange.rules import Rule, WeightSource, skip
from ..private_mmengine import swaps_channels

_ROWS = [
    skip(r'pixel_(mean|std)', "the images' normalization, which the config has"),
    skip(r'proposal_generator\.anchor_generator\..*', 'anchors, which follow from the config'),
    *rules_of([*prefixed(BACKBONE_ROWS, 'backbone.bottom_up.', 'backbone.'), *HEAD_ROWS]),
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
