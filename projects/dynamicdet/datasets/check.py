"""Look at a COCO-format data set before a run starts, so that nothing is skipped silently.

mmdet leaves out annotations without a word (``CocoDataset.parse_data_info``), and finds an image
that cannot be read when its turn comes, hours into a run. Both are said here, before.
"""

import os
import os.path as osp
from collections.abc import Mapping, Sequence
from typing import Any

from ..annotations import AnnotationFile, original_of
from ..errors import UsageError
from ..private_mmengine import failed_to_serialize
from ..progress import CountProgress
from .annotation_repair import is_turned, learns_masks, read_for
from .check_annotations import DataSetPlace, check_annotations
from .check_classes import require_same_classes
from .check_images import check_image_files
from .check_others import check_built
from .config_datasets import OpenedDataSet, is_coco_format, open_data_sets
from .mot import MOTSequenceDataset
from .video import VideoDataset


def check_coco(
    ann_file: str,
    image_root: str,
    classes: Sequence[str] | None = None,
    progress: CountProgress | None = None,
) -> list[str]:
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
    return _check(ann_file, image_root, classes, progress, DataSetPlace(f"'{ann_file}'"))


def check_dataloaders(
    cfg: Mapping,
    splits: Sequence[str] = ('train', 'val'),
    progress: CountProgress | None = None,
    files: bool = True,
    read: Mapping[str, AnnotationFile] | None = None,
) -> list[str]:
    """Look through the data sets of a config, and for the files of its evaluators. What takes no
    time comes first: settings, and whether the detector's heads and all data sets have the same
        classes.

    Args:
        cfg (Config): mmengine's config; ``train_dataloader``, ``val_evaluator`` and so on are
            looked at where they are there.
        splits (Sequence[str]): Which, of 'train', 'val' and 'test'.
        progress (callable, optional): See `check_coco`; starts anew with each data set.
        files (bool): Whether to look into annotations and image files. Defaults to True.
        read (Mapping[str, AnnotationFile], optional): Annotation files by path, as
            `mend_annotations` has read them and has said what it mended.

    Returns:
        list[str]: Warnings, a line each, and a line for each data set that was left alone.

    Raises:
        UsageError: See `check_coco`; the message names the key of the config to change.
    """
    opened = {split: open_data_sets(cfg, split) for split in splits}
    require_same_classes(
        cfg.get('model'), [data_set for data_sets in opened.values() for data_set in data_sets]
    )
    lines: list[str] = []
    done: list[tuple] = []
    for split in splits if files else ():
        for data_set in opened[split]:
            # Validation and test are often the same files.
            if _identity(data_set) not in done:
                done.append(_identity(data_set))
                lines += _check_opened(data_set, progress, learns_masks(cfg), read or {})
        ann_files = [
            osp.realpath(data_set.dataset.ann_file)
            for data_set in opened[split]
            if is_coco_format(data_set.dataset)
        ]
        lines += _check_evaluators(cfg.get(f'{split}_evaluator'), split, ann_files)
    return lines


def is_of_empty_set(error: Exception) -> bool:
    """Whether an error is mmengine's of a data set without images, which it packs by
    np.concatenate."""
    return failed_to_serialize(error)


def _identity(opened: OpenedDataSet) -> tuple:
    """What is looked at, and what for."""
    dataset = opened.dataset
    return (opened.split == 'train', opened.classes) + (
        (opened.key,)
        if dataset is None
        else (type(dataset), dataset.ann_file, dataset.data_prefix, dataset.filter_cfg)
    )


def _check_opened(
    opened: OpenedDataSet,
    progress: CountProgress | None,
    masks: bool,
    read: Mapping[str, AnnotationFile],
) -> list[str]:
    """Look through a data set by what its class reads."""
    from mmdet.datasets import CocoDataset, LVISV05Dataset, Objects365V1Dataset, Objects365V2Dataset

    dataset = opened.dataset
    if dataset is None:
        return [f'{opened.key}: data sets of type {opened.kind} are not checked']
    filters = {} if dataset.test_mode or opened.split != 'train' else dict(dataset.filter_cfg or {})
    place = DataSetPlace(
        opened.name, opened.key, opened.split == 'train', filters, masks, is_turned(dataset)
    )
    folder = dataset.data_prefix.get('img', dataset.data_prefix.get('img_path', ''))
    if (getattr(dataset, 'backend_args', None) or {}).get(
        'backend', 'local'
    ) != 'local' or '://' in ''.join([dataset.ann_file or '', dataset.data_root or '', folder]):
        return [f"{opened.key}: '{dataset.ann_file}' is not on this disk and is not checked"]
    if isinstance(dataset, VideoDataset) and not opened.classes:
        raise UsageError(
            f'{opened.key}: {opened.kind} needs the classes: metainfo=dict(classes=(...))'
        )
    if isinstance(dataset, MOTSequenceDataset):
        with dataset.as_cocovid() as ann_file:
            return _check(ann_file, folder, opened.classes, progress, place)
    others = (LVISV05Dataset, Objects365V1Dataset, Objects365V2Dataset)
    if not is_coco_format(dataset) or isinstance(dataset, others):
        # Some read another form, or sort the categories, and are a CocoDataset by name alone.
        return [f'{place.name}: {line}' for line in check_built(dataset, place, progress)]
    if isinstance(dataset, CocoDataset) and 'img' not in dataset.data_prefix:
        raise UsageError(
            f"{opened.key}: CocoDataset needs data_prefix=dict(img='folder of the images')"
        )
    if not dataset.ann_file:
        raise UsageError(f'{opened.key} has no ann_file: name its annotation file')
    return _check(
        dataset.ann_file, folder, opened.classes, progress, place, read.get(dataset.ann_file)
    )


def _check_evaluators(evaluators: Any, split: str, files: Sequence[str]) -> list[str]:
    """Refuse missing files; a line where detections are compared with other images' annotations."""
    several = isinstance(evaluators, (list, tuple))
    lines = []
    for index, evaluator in enumerate(evaluators if several else [evaluators]):
        ann_file = evaluator.get('ann_file') if isinstance(evaluator, Mapping) else None
        key = f'{split}_evaluator.{index}' if several else f'{split}_evaluator'
        if not isinstance(ann_file, (str, type(None))):
            raise UsageError(f'{key}.ann_file must be one path; got {ann_file}')
        if ann_file is None or '://' in ann_file:
            continue
        if not osp.isfile(ann_file):
            raise UsageError(
                f"{key}: there is no annotation file at '{ann_file}': "
                + _remedy(ann_file, f'{key}.ann_file')
            )
        if not str(evaluator.get('type')).endswith('CocoMetric') or not files:
            continue
        if osp.realpath(ann_file) not in files:
            lines.append(
                f"{key}: compares with '{original_of(ann_file)}', which is not the annotation file "
                'of '
                f'{split}_dataloader: the ids of the images must be the same'
            )
        elif len(files) > 1:
            lines.append(
                f"{key}: compares with '{original_of(ann_file)}' alone, one of {len(files)} "
                'annotation files '
                f'of {split}_dataloader: what is found in images of the others counts where ids '
                'are the same'
            )
    return lines


def _check(
    ann_file: str,
    image_root: str,
    classes: Sequence[str] | None,
    progress: CountProgress | None,
    place: DataSetPlace,
    file: AnnotationFile | None = None,
) -> list[str]:
    if not osp.isfile(ann_file):
        raise UsageError(
            f"{place.name}: there is no annotation file at '{ann_file}': "
            + _remedy(ann_file, place.key and f'{place.key}.data_root')
        )
    lines = []
    if file is None:
        file = read_for(place.name, ann_file, place.masks)
        lines += file.mended
    lines += check_annotations(file.data, classes, place)
    if not osp.isdir(image_root or '.'):
        raise UsageError(
            f"{place.name}: there is no image folder '{image_root}': "
            + _remedy(image_root, place.key and f'{place.key}.data_prefix.img')
        )
    lines += check_image_files(image_root, file.data['images'], place, progress)
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
    elif '/data/digits_video/' in folder:
        ways.append('`python tools/make_digits_video.py` makes it')
    elif '/data/coco/' in folder:
        ways.append('put COCO there (https://cocodataset.org/#download)')
    if option:
        ways.append(f'name another by `--cfg-options {option}=...`')
    return ', or '.join(ways) or 'correct the path'
