"""The data sets of a config, built but not read: what they are, where their files are, what their
classes are."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmengine.dataset import BaseDataset
from mmengine.registry import DefaultScope

from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmdet.registry import DATASETS

from ..errors import UsageError
from .check_annotations import first_few
from .mot import MOTSequenceDataset
from .video import VideoDataset

SPLITS = dict(train='training', val='validation', test='test')
#: What to do with a list of annotation files, which MMDetection 2 took.
SEVERAL_FILES = ': several annotation files are several data sets, in a ConcatDataset'


class OpenedDataSet(NamedTuple):
    """A data set of a config.

    Attributes:
        key (str): Where the config has it, such as 'train_dataloader.dataset'.
        split (str): 'train', 'val' or 'test'.
        kind (str): Name of its class.
        dataset (BaseDataset, optional): It, without its annotations; None where it is no
            ``BaseDataset``.
        classes (tuple[str], optional): Those that boxes have; None where it does not say.
        named (bool): Whether its config names them, not its class.
    """

    key: str
    split: str
    kind: str
    dataset: BaseDataset | None = None
    classes: tuple[str, ...] | None = None
    named: bool = False

    @property
    def name(self) -> str:
        """What messages call it, such as 'the training set'."""
        return f'the {SPLITS[self.split]} set'


def open_data_sets(cfg: Mapping, split: str) -> list[OpenedDataSet]:
    """The data sets of a split, those inside RepeatDataset, ConcatDataset and the like; none if it
    is not there.

    Raises:
        UsageError: If one cannot be built, which takes none of its files.
    """
    loader, key = cfg.get(f'{split}_dataloader'), f'{split}_dataloader'
    if not loader:
        return []
    if not isinstance(loader, Mapping) or loader.get('dataset') is None:
        raise UsageError(f'{key} must be a dict with a dataset; got {str(loader)[:100]}')
    return [
        _open(inner, dataset, split)
        for inner, dataset in inner_datasets(loader['dataset'], f'{key}.dataset')
    ]


def inner_datasets(dataset: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The configs of the data sets inside RepeatDataset, ConcatDataset and the like, and their
    keys."""
    if isinstance(dataset, Mapping) and 'datasets' in dataset:
        if not isinstance(dataset['datasets'], (list, tuple)) or not dataset['datasets']:
            raise UsageError(
                f'{key}.datasets must be a list of data sets; got {dataset["datasets"]}'
            )
        for index, inner in enumerate(dataset['datasets']):
            yield from inner_datasets(inner, f'{key}.datasets.{index}')
    elif isinstance(dataset, Mapping) and 'dataset' in dataset:
        yield from inner_datasets(dataset['dataset'], f'{key}.dataset')
    else:
        yield key, dataset


def require_one_coco(cfg: Mapping, split: str, what: str, file: bool = True) -> dict:
    """Raise a `UsageError` unless a split is one data set in COCO format.

    Args:
        cfg (Config): mmengine's config.
        split (str): 'train', 'val' or 'test'.
        what (str): What it is asked for, such as 'a record is made'.
        file (bool): Whether its annotation file is read, too: MOT sequences have none. Defaults to
            True.

    Returns:
        dict: Config of the data set, outside any that repeats or mixes it.
    """
    opened = open_data_sets(cfg, split)
    if len(opened) != 1:
        has = (
            f'has {len(opened)} ({first_few([data_set.key for data_set in opened])})'
            if opened
            else 'is not in the config'
        )
        raise UsageError(
            f'{what} on one data set in COCO format, and {split}_dataloader {has}: name one by '
            '--cfg-options'
        )
    if not is_coco_format(opened[0].dataset) and (
        file or not isinstance(opened[0].dataset, MOTSequenceDataset)
    ):
        raise UsageError(
            f'{what} on one data set in COCO format, and {opened[0].key} is of type '
            f'{opened[0].kind}: convert its annotations to COCO format, and name them by a '
            'CocoDataset'
        )
    dataset = cfg[f'{split}_dataloader']['dataset']
    while 'dataset' in dataset and dataset['type'] != 'HoldOut':
        dataset = dataset['dataset']
    return dataset


def is_coco_format(dataset: Any) -> bool:
    """Whether a data set has an annotation file in COCO format, as CocoDataset or as `VideoDataset`
    reads it."""
    return isinstance(dataset, (CocoDataset, VideoDataset)) and not isinstance(
        dataset, (CocoPanopticDataset, MOTSequenceDataset)
    )


def _open(key: str, dataset: Any, split: str) -> OpenedDataSet:
    if not isinstance(dataset, Mapping):
        if isinstance(dataset, (str, int, float, list, tuple)):
            raise UsageError(f'{key} must be a dict with the type of a data set; got {dataset}')
        # Built in the config.
        return OpenedDataSet(key, split, type(dataset).__name__)
    _require_settings(dataset, key)
    with DefaultScope.overwrite_default_scope('mmdet'):
        kind, name = dataset['type'], getattr(dataset['type'], '__name__', dataset['type'])
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        if kind is None:
            raise UsageError(
                f"{key}: nothing registers a data set of type '{name}': is a package missing in "
                'custom_imports?'
            )
        if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
            return OpenedDataSet(key, split, name)
        try:
            built = DATASETS.build({**copy.deepcopy(dataset), 'lazy_init': True})
        except UsageError:
            raise
        except Exception as error:
            # Of its constructor or its pipeline's, which may raise anything.
            raise UsageError(
                f'{key}: this {name} cannot be built: {type(error).__name__}: '
                f'{(str(error).strip() or "?").splitlines()[0]}'
            ) from error
    metainfo = built.metainfo
    classes = metainfo.get('thing_classes', metainfo.get('classes'))
    return OpenedDataSet(
        key,
        split,
        name,
        built,
        None if classes is None else _names(classes, key),
        'classes' in (dataset.get('metainfo') or {}),
    )


def _require_settings(dataset: Mapping, key: str) -> None:
    """Refuse what mmdet joins or looks up without a look at its type."""
    if 'type' not in dataset:
        raise UsageError(f'{key} has no type, such as CocoDataset')
    for name in ('metainfo', 'data_prefix', 'filter_cfg'):
        # mmengine looks into data_prefix, whatever it is, where it is given.
        setting = dataset.get(name, {} if name == 'data_prefix' else None)
        if not isinstance(setting, Mapping) and (setting is not None or name == 'data_prefix'):
            raise UsageError(f'{key}.{name} must be a dict; got {setting}')
    for name in ('ann_file', 'data_root'):
        value = dataset.get(name)
        if not isinstance(value, (str, type(None))):
            raise UsageError(
                f'{key}.{name} must be one path; got {value}'
                + SEVERAL_FILES * (name == 'ann_file' and isinstance(value, (list, tuple)))
            )
    if 'CLASSES' in (dataset.get('metainfo') or {}) or 'classes' in dataset:
        raise UsageError(
            f'{key}: the names of classes are metainfo=dict(classes=(...)) in MMDetection 3'
        )


def _names(classes: Any, key: str) -> tuple[str, ...]:
    # ('cat') is a word, and mmdet would look for categories within it.
    if isinstance(classes, str):
        raise UsageError(
            f"{key}: classes must be a list of names, not '{classes}': ('{classes}', )"
        )
    wrong = [name for name in classes if not isinstance(name, str)]
    if wrong:
        text = ','.join(f'"{name}"' for name in classes[:3])
        raise UsageError(
            f'{key}: the classes must be text, and {first_few(wrong)} are none; on the command '
            'line, give them as '
            f"'{key}.metainfo.classes=[{text}{', ...' if len(classes) > 3 else ''}]'"
        )
    if len(set(classes)) < len(classes) or not classes:
        raise UsageError(
            f'{key}: the classes must be names, one at least and each once; got '
            f'{first_few(classes, 10)}'
        )
    return tuple(classes)
