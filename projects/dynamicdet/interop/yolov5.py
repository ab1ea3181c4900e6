"""YOLOv5, release 6.0 and later, as its authors released it: layers by number, as in their
description."""

from torch import Tensor, nn

from ..errors import UsageError
from ..exchange.rules import Rule, WeightSource, rename, skip
from ..models.yolov5 import YOLOV5PAFPN, YOLOv5Row
from .yolo import UNNEEDED, anchor_head_rows

#: The head comes behind all rows of the table.
_HEAD = 24


def _rows(row: YOLOv5Row) -> list[Rule]:
    layer, name = rf'model\.{row.number}\.', row.name
    if row.kind == 'conv':
        return [rename(layer + r'((?:conv|bn)\.\w+)', f'{name}.<1>')]
    if row.kind == 'spp':
        return [
            rename(layer + r'cv1\.(.*)', f'{name}.entry.<1>'),
            rename(layer + r'cv2\.(.*)', f'{name}.out.<1>'),
        ]
    names = dict(cv1='main_conv', cv2='short_conv', cv3='final_conv')
    return [
        *(
            rename(layer + rf'{theirs}\.(.*)', f'{name}.{ours}.<1>')
            for theirs, ours in names.items()
        ),
        rename(layer + r'm\.(\d+)\.cv(\d)\.(.*)', f'{name}.blocks.<1>.conv<2>.<3>'),
    ]


def _refuse(_: Tensor) -> str:
    raise UsageError(
        'it is of a release before 6.0, whose layers are others: take a file of 6.0 or later'
    )


def yolov5_rules(model: nn.Module) -> list[Rule]:
    """The table for YOLOv5."""
    neck = getattr(model, 'neck', None)
    if not isinstance(neck, YOLOV5PAFPN):
        raise UsageError('these weights are of YOLOv5: name a --config such as configs/yolov5_s.py')
    # Their stem put each 2 x 2 pixels into one.
    rows = [*UNNEEDED, skip(r'model\.0\.conv\.conv\.weight', _refuse)]
    for row in neck.architecture.rows:
        rows += _rows(row)
    return rows + anchor_head_rows(rf'model\.{_HEAD}\.', 'bbox_head', model.bbox_head)


YOLOV5 = WeightSource(yolov5_rules, kept=())
