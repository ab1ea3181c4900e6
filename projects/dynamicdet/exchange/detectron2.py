"""Names of Detectron2's R-CNN detectors on FPN, and those of mmdet's: one table, read both ways.

Detectron2's stages count from ``res2``, its pyramid's levels from 2, its layers from 1. Orders of
numbers agree: background last, (dx, dy, dw, dh) per class, (channel, row, column) into the first
linear layer.

``<name>`` is a number, ``<name-2>`` the same less 2, ``<rest>`` anything.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..cascade.composite import ORDINALS
from ..cascade.weights import SETTINGS, is_plain
from ..errors import UsageError
from .origin import framework_of
from .rules import Rule, apply_rules, rename

Rows = Sequence[tuple[str, str]]

#: Of a ResNet or ResNeXt by itself.
BACKBONE_ROWS: Rows = (
    ('stem.conv1.weight', 'conv1.weight'),
    ('stem.conv1.norm.<rest>', 'bn1.<rest>'),
    ('res<s>.<b>.conv<c>.weight', 'layer<s-1>.<b>.conv<c>.weight'),
    ('res<s>.<b>.conv<c>.norm.<rest>', 'layer<s-1>.<b>.bn<c>.<rest>'),
    ('res<s>.<b>.shortcut.weight', 'layer<s-1>.<b>.downsample.0.weight'),
    ('res<s>.<b>.shortcut.norm.<rest>', 'layer<s-1>.<b>.downsample.1.<rest>'),
)
#: Of all else in Faster, Mask and Cascade R-CNN.
HEAD_ROWS: Rows = (
    ('backbone.fpn_lateral<l>.<rest>', 'neck.lateral_convs.<l-2>.conv.<rest>'),
    ('backbone.fpn_output<l>.<rest>', 'neck.fpn_convs.<l-2>.conv.<rest>'),
    ('proposal_generator.rpn_head.conv.<rest>', 'rpn_head.rpn_conv.<rest>'),
    ('proposal_generator.rpn_head.objectness_logits.<rest>', 'rpn_head.rpn_cls.<rest>'),
    ('proposal_generator.rpn_head.anchor_deltas.<rest>', 'rpn_head.rpn_reg.<rest>'),
    ('roi_heads.box_head.fc<f>.<rest>', 'roi_head.bbox_head.shared_fcs.<f-1>.<rest>'),
    ('roi_heads.box_predictor.cls_score.<rest>', 'roi_head.bbox_head.fc_cls.<rest>'),
    ('roi_heads.box_predictor.bbox_pred.<rest>', 'roi_head.bbox_head.fc_reg.<rest>'),
    # Cascade R-CNN has a head for each of its stages.
    ('roi_heads.box_head.<h>.fc<f>.<rest>', 'roi_head.bbox_head.<h>.shared_fcs.<f-1>.<rest>'),
    ('roi_heads.box_predictor.<h>.cls_score.<rest>', 'roi_head.bbox_head.<h>.fc_cls.<rest>'),
    ('roi_heads.box_predictor.<h>.bbox_pred.<rest>', 'roi_head.bbox_head.<h>.fc_reg.<rest>'),
    ('roi_heads.mask_head.mask_fcn<m>.<rest>', 'roi_head.mask_head.convs.<m-1>.conv.<rest>'),
    ('roi_heads.mask_head.deconv.<rest>', 'roi_head.mask_head.upsample.<rest>'),
    ('roi_heads.mask_head.predictor.<rest>', 'roi_head.mask_head.conv_logits.<rest>'),
)
#: Of dynamic detectors: what both sides share under the same name.
_SAME = (
    'backbone.connections.<rest>',
    'router.<rest>',
    *(name for name in SETTINGS if not name.endswith('.')),
)


def prefixed(rows: Rows, theirs: str, ours: str) -> Rows:
    """The same rows with something in front of the names of each side."""
    return [(theirs + left, ours + right) for left, right in rows]


def dynamic_rows() -> Rows:
    """Rows of a dynamic detector."""
    rows = [(name, name) for name in _SAME]
    for name in ORDINALS:
        rows += prefixed(BACKBONE_ROWS, f'backbone.{name}.', f'backbone.{name}.')
    return rows + prefixed(HEAD_ROWS, 'branches.<branch>.', 'branches.<branch>.')


_TOKEN = re.compile(r'<(\w+?)([+-]\d+)?>')


def rules_of(rows: Rows, to: str = 'mmdet') -> list[Rule]:
    """Rows as rules that rename, from Detectron2 to mmdet or back.

    Args:
        rows (Sequence[tuple]): Names on Detectron2's side and on mmdet's.
        to (str): 'mmdet' or 'detectron2'. Defaults to 'mmdet'.
    """
    rules = []
    for row in rows:
        source, target = row if to == 'mmdet' else row[::-1]
        tokens = list(_TOKEN.finditer(source))
        numbers = {token[1]: number for number, token in enumerate(tokens, 1)}
        shifts = {token[1]: int(token[2] or 0) for token in tokens}
        pattern, at = '', 0
        for token in tokens:
            pattern += re.escape(source[at : token.start()])
            pattern += '(.*)' if token[1] == 'rest' else r'(\d+)'
            at = token.end()
        pattern += re.escape(source[at:])

        def referred(token: 're.Match[str]') -> str:
            shift = int(token[2] or 0) - shifts[token[1]]
            return f'<{numbers[token[1]]}{f"{shift:+d}" if shift else ""}>'

        rules.append(rename(pattern, _TOKEN.sub(referred, target)))
    return rules


def convert_dynamic(state: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """A trained dynamic detector's entries under the names of the other framework. Lossless: the
    same rows the other way give the same entries.

    Args:
        state (Mapping[str, Tensor]): Entries; ``module.`` in front is ignored.
        to (str): 'mmdet' or 'detectron2'.

    Raises:
        UsageError: If they are of that framework already, of a plain detector, or of one that the
            table does not know.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    if framework_of(state) == to:
        raise UsageError(f'this checkpoint is of {to} already')
    if is_plain(state):
        raise UsageError(
            'this checkpoint is of a plain detector: only dynamic detectors are converted here; '
            'either side takes its own model zoo as it is'
        )
    try:
        return apply_rules(rules_of(dynamic_rows(), to), state)[0]
    except UsageError as error:
        raise UsageError(
            f'{error}; Faster, Mask and Cascade R-CNN with ResNet and FPN are converted'
        ) from None


def convert_checkpoint(content: Mapping[str, Any], to: str) -> dict[str, Any]:
    """A checkpoint of a trained dynamic detector in the form of the other framework.

    What lies beside the weights and is no training's own, ``meta``, ``calibration``, goes with
    them; optimizers and counters do not.

    Args:
        content (Mapping): Of the file, as `reading.read_content` gives it.
        to (str): 'mmdet' or 'detectron2'.

    Raises:
        UsageError: As `convert_dynamic`.
    """
    if content.get('removed_channels'):
        raise UsageError(
            'some channels of this detector were removed, which the other side describes in '
            'another way: convert it as it was, and remove channels there'
        )
    held = content.get('model', content.get('state_dict', content))
    state = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    converted = convert_dynamic(state, to)
    meta = dict(content.get('meta') or {})
    if 'calibration' in content:
        meta['calibration'] = content['calibration']
    if to == 'mmdet':
        return dict(state_dict=converted, meta=meta)
    return dict(model=converted, meta=meta)
