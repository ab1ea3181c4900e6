"""YOLOv7 and Dy-YOLOv7, as their authors released them: layers by number, in the order in which
they run.

Letters: A anchors per level, C classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..exchange.rules import Rule, WeightSource, rename, skip
from ..models import DynamicDetector
from ..models.yolov7 import YOLOV7PAFPN, Elan, YOLOv7Architecture, YOLOV7Head
from .yolo import UNNEEDED, anchor_head_rows, kinds_apart

#: Their names inside SPPCSPC -> ours.
_SPP = dict(
    cv1='entry.0',
    cv2='shortcut',
    cv3='entry.1',
    cv4='entry.2',
    cv5='fused.0',
    cv6='fused.1',
    cv7='out',
)

# The numbering: our name of each of their layers, None for those without weights.


def _elan(name: str, row: Elan) -> list[str | None]:
    convs = [f'{name}.convs.{index}' for index in range(row.count)]
    return [f'{name}.shortcut', f'{name}.entry', *convs, None, f'{name}.out']


def _down(name: str, kind: str) -> list[str | None]:
    if kind == 'pool':
        return [None, f'{name}.pooled', f'{name}.entry', f'{name}.strided', None]
    return [name] if kind == 'conv' else []


def backbone_layers(
    table: YOLOv7Architecture, connected: int | None = None
) -> Iterator[str | None]:
    """Layers of a backbone; of a second one with the sums that begin at stage ``connected``."""
    # The second backbone begins behind the rearranged pixels of the first one.
    if table.pixel_unshuffle and connected is None:
        yield None
    yield 'stem'
    for index, row in enumerate(table.stages):
        yield from _down(f'downs.{index}', row.down)
        if connected is not None and index >= connected:
            yield None
        name = f'blocks.{index}'
        if row.block:
            yield from _elan(name, row.block) if isinstance(row.block, Elan) else [name]


def head_layers(table: YOLOv7Architecture) -> Iterator[str | None]:
    """Layers of neck and head; the last one is the head."""
    yield 'neck.spp'
    for index, (_, row) in enumerate(table.up):
        yield from (f'neck.reduces.{index}', None, f'neck.laterals.{index}', None)
        yield from _elan(f'neck.up_blocks.{index}', row)
    for index, (_, row) in enumerate(table.down):
        yield from _down(f'neck.downs.{index}', table.down_kind)
        if table.down_kind == 'conv':
            yield None
        yield from _elan(f'neck.down_blocks.{index}', row)
    yield from (f'neck.outs.{index}' for index in range(len(table.outputs)))
    yield 'bbox_head'


# The rows.


def _backbone_rows(
    theirs: str, first: int, layers: Iterator[str | None], ours: str, table: YOLOv7Architecture
) -> list[Rule]:
    rows = []
    for number, name in enumerate(layers, start=first):
        if name == 'stem' and table.pixel_unshuffle:
            rows.append(
                rename(
                    rf'{theirs}\.{number}\.conv\.weight',
                    f'{ours}.stem.conv.weight',
                    change=_pixels_by_color,
                )
            )
        if name:
            rows.append(rename(rf'{theirs}\.{number}\.((?:conv|bn)\..*)', f'{ours}.{name}.<1>'))
    return rows


def _head_rows(theirs: str, first: int, ours: str, model: nn.Module) -> list[Rule]:
    head: YOLOV7Head = model.bbox_head
    rows = []
    names = list(head_layers(model.neck.architecture))
    # With four levels there are files of training, whose head comes behind auxiliary outputs.
    spare = len(head.convs) if len(head.convs) == 4 else 0
    last = first + len(names) - 1
    rows += [
        skip(rf'{theirs}\.{number}\.(conv|bn)\..*', 'auxiliary outputs of training')
        for number in range(last, last + spare)
    ]
    for number, name in [*enumerate(names, start=first), (last + spare, names[-1])]:
        if name is None:
            continue
        layer, target = rf'{theirs}\.{number}\.', ours + name
        if name == 'neck.spp':
            rows += [
                rename(layer + rf'{key}\.(.*)', f'{target}.{value}.<1>')
                for key, value in _SPP.items()
            ]
        elif name == 'bbox_head':
            rows += [
                *anchor_head_rows(layer, target, head),
                rename(layer + r'ia\.(\d)\.implicit', f'{target}.added.<1>'),
                rename(
                    layer + r'im\.(\d)\.implicit',
                    f'{target}.multiplied.<1>',
                    change=lambda values: kinds_apart(values[0], head.num_anchors)[None],
                ),
                skip(layer + r'(m2|ia2|im2)\..*', 'auxiliary outputs of training'),
            ]
        else:
            rows += [
                rename(layer + r'((?:conv|bn)\..*)', f'{target}.<1>'),
                rename(layer + r'rbr_dense\.(.*)', f'{target}.dense.<1>'),
                rename(layer + r'rbr_1x1\.(.*)', f'{target}.point.<1>'),
            ]
    return rows


def _pixels_by_color(weight: Tensor) -> Tensor:
    """The first convolution behind rearranged pixels: theirs put (column, row, color), ours color,
    row, column, as torch does."""
    return weight.unflatten(1, (2, 2, 3)).permute(0, 3, 2, 1, 4, 5).flatten(1, 3)


def _connection_rows(model: DynamicDetector) -> list[Rule]:
    """Theirs has one convolution per map of the first backbone, for all stages that it goes to."""
    backbone, rows = model.backbone, []
    for source in range(len(backbone.connections)):
        stages = range(source + 1)
        widths = [backbone.connections[stage].projections[0].out_channels for stage in stages]
        rows.append(
            rename(
                rf'model_b2\.{source}\.conv\.(.*)',
                *[
                    f'backbone.connections.{stage}.projections.{source - stage}.<1>'
                    for stage in stages
                ],
                change=lambda values, widths=widths: values.split(widths),
            )
        )
    return rows


def dynamic_rules(model: nn.Module) -> list[Rule]:
    """The table for Dy-YOLOv7, of step 1 (no router) or 2. Their score is 1 - difficulty: the
    router's last layer changes its sign."""
    _require_yolov7(model, dynamic=True)
    branches, backbone = model.branches, model.backbone
    if len(branches) != 2:
        raise UsageError('Dy-YOLOv7 has a neck and a head for each exit: set model.shared=False')
    table = branches[0].neck.architecture
    rows = UNNEEDED + _connection_rows(model)
    rows += _backbone_rows('model_b', 0, backbone_layers(table), 'backbone.first', table)
    second = backbone_layers(table, backbone.connected)
    rows += _backbone_rows('model_b2', len(backbone.connections), second, 'backbone.second', table)
    for theirs, branch, index in zip(('model_h', 'model_h2'), branches, range(2)):
        rows += _head_rows(theirs, 0, f'branches.{index}.', branch)
    return rows + [
        rename(r'router\.layer1\.(.*)', 'router.fc1.<1>', change=lambda values: values.squeeze()),
        rename(
            r'router\.layer2\.weight', 'router.fc2.weight', change=lambda values: -values[..., 0, 0]
        ),
        rename(r'router\.layer2\.bias', 'router.fc2.bias', change=lambda values: -values),
    ]


def static_rules(model: nn.Module) -> list[Rule]:
    """The table for YOLOv7, for a static model or for both halves of a dynamic one."""
    _require_yolov7(model)
    plain = model.branches[0] if isinstance(model, DynamicDetector) else model
    table = plain.neck.architecture
    layers = list(backbone_layers(table))
    rows = UNNEEDED + _backbone_rows('model', 0, iter(layers), 'backbone', table)
    return rows + _head_rows('model', len(layers), '', plain)


def _no_knowledge(model: nn.Module) -> dict[str, Tensor]:
    """Implicit knowledge that changes nothing: files for inference have theirs in the
    convolutions."""
    head = (model.branches[0] if isinstance(model, DynamicDetector) else model).bbox_head
    return {
        f'bbox_head.{name}.{index}': torch.full_like(parameter, value)
        for name, value in (('added', 0), ('multiplied', 1))
        for index, parameter in enumerate(getattr(head, name))
    }


def _require_yolov7(model: nn.Module, dynamic: bool = False) -> None:
    plain = model.branches[0] if isinstance(model, DynamicDetector) else model
    if dynamic and plain is model or not isinstance(getattr(plain, 'neck', None), YOLOV7PAFPN):
        raise UsageError(
            'these weights are of '
            f'{"Dy-YOLOv7" if dynamic else "YOLOv7"}: name a --config such as configs/'
            f'{"dy_" if dynamic else ""}yolov7.py'
        )


DYNAMICDET = WeightSource(dynamic_rules, kept=('router.',))
YOLOV7 = WeightSource(
    static_rules, kept=('router.', 'backbone.connections.'), defaults=_no_knowledge
)
