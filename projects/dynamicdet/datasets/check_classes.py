"""Compare the classes that a config's heads tell apart with those of its data sets.

Where they differ, mmdet ends in an IndexError: at the first image of a class that the head does not
have, or at the first detection of one that the data do not have, which may be an epoch later.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.registry import DefaultScope

from mmdet.registry import MODELS

from ..errors import UsageError
from .check_annotations import first_few
from .config_datasets import OpenedDataSet

#: Keys of heads that tell classes apart, in mmdet's detectors and in `EarlyExitDetector`. That of
#: proposals tells objects from background alone, and a semantic one has classes of its own.
HEADS = ('bbox_head', 'mask_head', 'mask_iou_head', 'point_head', 'heads')


def require_same_classes(model: Any, opened: Sequence[OpenedDataSet]) -> None:
    """Raise a `UsageError` unless all data sets name the same classes, and every head has as
    many."""
    known = [data_set for data_set in opened if data_set.classes]
    for data_set in known[1:]:
        if data_set.classes != known[0].classes:
            raise UsageError(
                f'{_said(known[0])}, {_said(data_set)}: '
                'give both the same metainfo=dict(classes=(...))'
            )
    if not known:
        return
    wrong = [(key, count) for key, count in class_counts(model) if count != len(known[0].classes)]
    if wrong:
        (_, count), wanted = wrong[0], len(known[0].classes)
        origin = (
            ''
            if known[0].named
            else f' (those of {known[0].kind}, as {known[0].key}.metainfo has no classes)'
        )
        raise UsageError(
            f"the config's head has {count} classes, the data set's metainfo {wanted}{origin}: set "
            + ' '.join(f'{key}={wanted}' for key, _ in wrong)
        )


def class_counts(model: Any, key: str = 'model') -> Iterator[tuple[str, int]]:
    """Keys and values of the numbers of classes in the heads of a model's config, also where they
    are a head's default."""
    inner = (
        enumerate(model)
        if isinstance(model, (list, tuple))
        else model.items()
        if isinstance(model, Mapping)
        else ()
    )
    for name, value in inner:
        if name in HEADS:
            yield from _counts_of_head(value, f'{key}.{name}')
        elif name not in ('train_cfg', 'test_cfg', 'init_cfg'):
            yield from class_counts(value, f'{key}.{name}')


def _counts_of_head(head: Any, key: str) -> Iterator[tuple[str, int]]:
    """Those of a head, or of a list of heads, and of its parts, such as a loss that weighs
    classes."""
    if isinstance(head, (list, tuple)):
        for index, part in enumerate(head):
            yield from _counts_of_head(part, f'{key}.{index}')
    if not isinstance(head, Mapping) or head.get('class_agnostic'):
        return
    count = head.get('num_classes', _default(head.get('type')))
    if isinstance(count, int):
        yield f'{key}.num_classes', count
    for name, value in head.items():
        if isinstance(value, Mapping) and 'num_classes' in value:
            yield f'{key}.{name}.num_classes', value['num_classes']


def _default(kind: Any) -> int | None:
    """The number of classes that a head has if its config does not say."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
    for base in getattr(kind, '__mro__', ()):
        parameter = inspect.signature(base.__init__).parameters.get('num_classes')
        if parameter is not None:
            return parameter.default if isinstance(parameter.default, int) else None
    return None


def _said(data_set: OpenedDataSet) -> str:
    classes = data_set.classes
    return f'{data_set.name} ({data_set.key}) has {len(classes)} classes ({first_few(classes)})'
