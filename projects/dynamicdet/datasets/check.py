"""Look at a COCO-format data set before a run starts, so that nothing is skipped silently.

mmdet leaves out annotations without a word (``CocoDataset.parse_data_info``), and finds an image
that cannot be read when its turn comes, hours into a run. Both are said here, before.
"""
import os
import os.path as osp
import traceback
from types import SimpleNamespace
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..errors import UsageError
from .check_annotations import Place, check_annotations, some
from .check_images import Progress, find_unreadable

_SPLITS = dict(train='training', val='validation', test='test')


def check_coco(ann_file: str,
               image_root: str,
               classes: Optional[Sequence[str]] = None,
               progress: Optional[Progress] = None) -> List[str]:
    """Look through a COCO-format annotation file and the image files that it lists.

    Of each image file the head and the tail are read, not what is between: a full decode of COCO
    takes most of an hour.

    Args:
        ann_file (str): Annotation file, JSON.
        image_root (str): Folder to which the file's names of images are relative.
        classes (Sequence[str], optional): Classes of the detector. Defaults to None: all that
            the file has.
        progress (callable, optional): Called as ``progress(done, total)``, counts of image files.

    Returns:
        list[str]: Warnings, a line each: what is odd, how often, where first, and what becomes
            of it.

    Raises:
        UsageError: If a run on this data cannot go on to its end: files are missing, damaged or no
            COCO annotations, there are no images, or none of the classes is known.
    """
    return _check(ann_file, image_root, classes, progress, Place(f"'{ann_file}'"))


def check_dataloaders(cfg: Mapping,
                      splits: Sequence[str] = ('train', 'val'),
                      progress: Optional[Progress] = None) -> List[str]:
    """Look through the COCO-format data sets of a config, and for the files of its evaluators.

    Args:
        cfg (Config): mmengine's config; ``train_dataloader``, ``val_evaluator`` and so on are
            looked at where they are there.
        splits (Sequence[str]): Which, of 'train', 'val' and 'test'.
        progress (callable, optional): See `check_coco`; starts anew with each data set.

    Returns:
        list[str]: Warnings, a line each, and a line for each data set that was left alone.

    Raises:
        UsageError: See `check_coco`; the message names the key of the config to change.
    """
    lines: List[str] = []
    done = set()
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        files = []
        for key, dataset in _leaves(loader.get('dataset'), f'{split}_dataloader.dataset'):
            place = Place(f'the {_SPLITS[split]} set', key, split == 'train')
            found = _resolve(dataset, place)
            if isinstance(found, str):
                lines.append(found)
                continue
            files.append(osp.realpath(found[0]))
            # Validation and test are often the same files.
            if (*found, place.training) not in done:
                done.add((*found, place.training))
                lines += _check(*found, progress, place)
        lines += _check_evaluators(cfg.get(f'{split}_evaluator'), split, files)
    return lines


def is_of_empty_set(error: ValueError) -> bool:
    """Whether an error is mmengine's of a data set without images, which it packs by np.concatenate."""
    return any(frame.name == '_serialize_data' for frame in traceback.extract_tb(error.__traceback__))


def _leaves(dataset: Any, key: str) -> Iterator[Tuple[str, Any]]:
    """The data sets inside RepeatDataset, ConcatDataset and the like, and their keys."""
    if isinstance(dataset, Mapping) and 'datasets' in dataset:
        for index, inner in enumerate(dataset['datasets']):
            yield from _leaves(inner, f'{key}.datasets.{index}')
    elif isinstance(dataset, Mapping) and 'dataset' in dataset:
        yield from _leaves(dataset['dataset'], f'{key}.dataset')
    elif dataset is not None:
        yield key, dataset


def _resolve(dataset: Any, place: Place):
    """A data set's annotation file, image folder and classes; or a line that says why not."""
    kind = _coco_class(dataset)
    if kind is None:
        name = dataset.get('type') if isinstance(dataset, Mapping) else type(dataset).__name__
        return f'{place.key}: data sets of type {name} are not checked'
    prefix = dict(dataset.get('data_prefix') or {})
    paths = SimpleNamespace(
        ann_file=dataset.get('ann_file') or '',
        data_root=dataset.get('data_root') or '',
        data_prefix=prefix)
    if 'img' not in prefix:
        raise UsageError(
            f"{place.key}: CocoDataset needs data_prefix=dict(img='folder of the images')")
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local' or '://' in paths.data_root + paths.ann_file + prefix['img']:
        return f"{place.key}: '{paths.ann_file}' is not on this disk and is not checked"
    # mmdet's own rules, by its own methods: where paths begin, and whose classes count.
    kind._join_prefix(paths)
    classes = kind._load_metainfo(dataset.get('metainfo')).get('classes')
    if classes is not None and not isinstance(classes, str):
        classes = tuple(classes)
    return paths.ann_file, paths.data_prefix['img'], classes


def _coco_class(dataset: Any) -> Optional[type]:
    """The class of a config's data set, if it reads its file as CocoDataset does."""
    from mmdet.datasets import CocoDataset, CocoPanopticDataset, LVISV05Dataset
    from mmdet.registry import DATASETS
    kind = dataset.get('type') if isinstance(dataset, Mapping) else None
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    # Subclasses by name, but with annotations or file names of another form.
    others = (CocoPanopticDataset, LVISV05Dataset)
    if isinstance(kind, type) and issubclass(kind, CocoDataset) and not issubclass(kind, others):
        return kind
    return None


def _check_evaluators(evaluators: Any, split: str, files: Sequence[str]) -> List[str]:
    """Refuse missing files; a line where detections are compared with other images' annotations."""
    several = isinstance(evaluators, (list, tuple))
    lines = []
    for index, evaluator in enumerate(evaluators if several else [evaluators]):
        ann_file = evaluator.get('ann_file') if isinstance(evaluator, Mapping) else None
        if not isinstance(ann_file, str) or '://' in ann_file:
            continue
        key = f'{split}_evaluator.{index}' if several else f'{split}_evaluator'
        if not osp.isfile(ann_file):
            raise UsageError(f"{key}: there is no annotation file at '{ann_file}': "
                             + _remedy(ann_file, f'{key}.ann_file'))
        if str(evaluator.get('type')).endswith('CocoMetric') and files \
                and osp.realpath(ann_file) not in files:
            lines.append(f"{key}: compares with '{ann_file}', which is not the annotation file of "
                         f'{split}_dataloader: the ids of the images must be the same')
    return lines


def _check(ann_file: str, image_root: str, classes: Optional[Sequence[str]],
           progress: Optional[Progress], place: Place) -> List[str]:
    if not osp.isfile(ann_file):
        raise UsageError(f"{place.name}: there is no annotation file at '{ann_file}': "
                         + _remedy(ann_file, place.key and f'{place.key}.data_root'))
    names, lines = check_annotations(ann_file, classes, place)
    if not osp.isdir(image_root or '.'):
        raise UsageError(f"{place.name}: there is no image folder '{image_root}': "
                         + _remedy(image_root, place.key and f'{place.key}.data_prefix.img'))
    missing, damaged = find_unreadable(image_root, names, progress)
    said = [f'{len(files)} of {len(names)} image files {what} ({some(files)})'
            for files, what in ((missing, 'are missing'), (damaged, 'are damaged')) if files]
    if said:
        raise UsageError(f"{place.name}: {' and '.join(said)} in '{image_root}': get them again, "
                         'or take them out of the annotation file')
    return [f'{place.name}: {line}' for line in lines]


def _remedy(path: str, option: str) -> str:
    """What to do about a path that does not exist.

    Args:
        path (str): The path.
        option (str): Key of the config that leads to it; empty where there is none.
    """
    folder = f'/{osp.normpath(path)}/'.replace(os.sep, '/')
    ways = []
    if '/data/digits/' in folder:
        ways.append('`python tools/make_digits.py` makes it')
    elif '/data/coco/' in folder:
        ways.append('put COCO there (https://cocodataset.org/#download)')
    if option:
        ways.append(f'name another by `--cfg-options {option}=...`')
    return ', or '.join(ways) or 'correct the path'
