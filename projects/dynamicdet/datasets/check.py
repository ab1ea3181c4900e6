"""Look at a COCO-format data set before a run starts, so that nothing is skipped silently.

mmdet leaves out annotations without a word (``CocoDataset.parse_data_info``), and finds an image
that cannot be read when its turn comes, hours into a run. Both are said here, before.
"""
import json
import os
import os.path as osp
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import (Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence,
                    Tuple)

import numpy as np
from PIL import Image

from ..errors import UsageError

Progress = Callable[[int, int], None]

#: Bytes at the end of an image file in which its end marker must be: the size of one page.
_TAIL = 4096
#: How the files that OpenCV reads begin, and how those that have an end marker end.
_IMAGES = (
    (b'\xff\xd8\xff', b'\xff\xd9'),  # JPEG
    (b'\x89PNG\r\n\x1a\n', b'IEND'),
    (b'BM', None),
    (b'II*\x00', None),  # TIFF, also big-endian
    (b'MM\x00*', None),
    (b'RIFF', None),  # WebP
    (b'GIF8', None),
    (b'\x00\x00\x00\x0cjP  ', None),  # JPEG 2000, as a file and as a bare stream
    (b'\xff\x4f\xff\x51', None),
    *((b'P%d' % kind, None) for kind in range(1, 8)),  # PBM, PGM, PPM, PAM
    (b'#?', None),  # Radiance
    (b'\x76\x2f\x31\x01', None),  # OpenEXR
)
_MISSING = 'missing'
#: Boxes of many tools, COCO's too, are off by rounding; less than this is not worth a line.
_ROUNDING = 0.5  # pixels
#: Image files per task. One future per file would cost more than looking at it.
_CHUNK = 256
_SPLITS = dict(train='training', val='validation', test='test')


class _Place(NamedTuple):
    """What messages call a data set, and where the config has it."""
    name: str
    key: str = ''  # such as 'train_dataloader.dataset'; empty: no config
    training: bool = False


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
    return _check(ann_file, image_root, classes, progress, _Place(f"'{ann_file}'"))


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
            place = _Place(f'the {_SPLITS[split]} set', key, split == 'train')
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


def _leaves(dataset: Any, key: str) -> Iterator[Tuple[str, Any]]:
    """The data sets inside RepeatDataset, ConcatDataset and the like, and their keys."""
    if isinstance(dataset, Mapping) and 'datasets' in dataset:
        for index, inner in enumerate(dataset['datasets']):
            yield from _leaves(inner, f'{key}.datasets.{index}')
    elif isinstance(dataset, Mapping) and 'dataset' in dataset:
        yield from _leaves(dataset['dataset'], f'{key}.dataset')
    elif dataset is not None:
        yield key, dataset


def _resolve(dataset: Any, place: _Place):
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
    _require('img' in prefix,
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
           progress: Optional[Progress], place: _Place) -> List[str]:
    if not osp.isfile(ann_file):
        raise UsageError(f"{place.name}: there is no annotation file at '{ann_file}': "
                         + _remedy(ann_file, place.key and f'{place.key}.data_root'))
    data = _read(ann_file, place)
    images, annotations = data['images'], data.get('annotations') or []
    _check_images(images, place)
    categories, lines = _match_classes(data.get('categories'), classes, place)
    lines += _check_annotations(images, annotations, categories, data['categories'], place)
    _check_folder(image_root, place)
    _check_files(image_root, [image['file_name'] for image in images], progress, place)
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


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _read(ann_file: str, place: _Place) -> Dict[str, Any]:
    try:
        with open(ann_file, encoding='utf-8') as file:
            data = json.load(file, object_hook=_without_outline)
    except ValueError as error:
        # Of text that is not UTF-8 too. The error of a binary file would quote all of it.
        reason = str(error) if isinstance(error, json.JSONDecodeError) else 'not text'
        raise UsageError(f"{place.name}: '{ann_file}' is not JSON, or was cut short ({reason}): "
                         'download or make it again') from None
    except OSError as error:
        raise UsageError(
            f"{place.name}: '{ann_file}' cannot be read: {error.strerror}") from None
    images = data.get('images') if isinstance(data, dict) else None
    _require(isinstance(images, list),
             f"{place.name}: '{ann_file}' is no COCO annotation file: it has no list of 'images'")
    _require(images, f"{place.name} is empty: there are no images in '{ann_file}'")
    return data


def _without_outline(entry: Dict[str, Any]) -> Dict[str, Any]:
    """Drop what is not looked at and is most of a file: of COCO, two thirds of the memory."""
    entry.pop('segmentation', None)
    return entry


def _check_images(images: List[dict], place: _Place) -> None:
    """Refuse entries that mmdet cannot read, and ids that two images share."""
    _require_keys(images, ('id', 'file_name', 'height', 'width'), 'image', place)
    sizes = _numbers(images, lambda image: (image['width'], image['height']), 2, 'image', place)
    for index in np.flatnonzero((sizes <= 0).any(1))[:1]:
        raise UsageError(f"{place.name}: image '{images[index]['file_name']}' has no width or "
                         'height above 0 in the annotation file')
    _require_unique((image['id'] for image in images), 'images', 'id', place)


def _require_keys(entries: Sequence[dict], keys: Sequence[str], what: str, place: _Place) -> None:
    for index, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            said = {key: entry[key] for key in ('id', 'image_id', 'name', 'file_name')
                    if isinstance(entry, dict) and key in entry}
            raise UsageError(f"{place.name}: {what} number {index} {said} has no '{missing[0]}', "
                             'which mmdet needs')


def _require_unique(values: Iterator[Any], things: str, what: str, place: _Place) -> None:
    shared = [value for value, count in Counter(values).items() if count > 1]
    _require(not shared, f'{place.name}: {len(shared)} {what}(s) belong to several {things} '
             f'(such as {_some(shared)}): each needs its own')


def _numbers(entries: Sequence[dict], values: Callable[[dict], Any], width: int, what: str,
             place: _Place) -> np.ndarray:
    """Values of all entries, (len(entries), width), refused where they are not finite numbers."""
    try:
        array = np.array([values(entry) for entry in entries], dtype=np.float64)
        array = array.reshape(len(entries), width)
        bad = ~np.isfinite(array).all(1)
    except (TypeError, ValueError):
        # Of unequal lengths, or no numbers: slowly, to find which.
        bad = np.array([not _are_finite(values(entry), width) for entry in entries])
    for index in np.flatnonzero(bad)[:1]:
        entry = entries[index]
        raise UsageError(f"{place.name}: {what} {entry['id']} (image "
                         f"{entry.get('file_name', entry.get('image_id'))}) has "
                         f'{values(entry)} where {width} finite number(s) are needed')
    return array


def _are_finite(values: Any, width: int) -> bool:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return array.size == width and bool(np.isfinite(array).all())


def _match_classes(categories: Any, classes: Optional[Sequence[str]],
                   place: _Place) -> Tuple[Dict[int, str], List[str]]:
    """Find the classes among a file's categories.

    Returns:
        tuple: Id -> name of the categories that are used, in the file's order; and warnings.
    """
    _require(isinstance(categories, list) and categories,
             f"{place.name}: the annotation file has no 'categories'")
    _require_keys(categories, ('id', 'name'), 'category', place)
    # ('cat') is a word, and mmdet would look for categories within it.
    _require(not isinstance(classes, str),
             f"{place.name}: classes must be a list of names, not '{classes}': ('{classes}', )")
    names = [category['name'] for category in categories]
    wanted = names if classes is None else classes
    used = [category for category in categories if category['name'] in set(wanted)]
    _require(used, f'{place.name}: none of the classes of the config ({_some(wanted)}) is among '
             f'the categories of the annotation file ({_some(names)}): '
             'set metainfo=dict(classes=...)')
    # Two labels for a class would be one label too many for the detector's head.
    for key in ('id', 'name'):
        _require_unique((category[key] for category in used), 'categories', key, place)
    lines = []
    absent = [name for name in wanted if name not in names]
    if absent:
        lines.append(f'{len(absent)} class(es) of the config are not among the categories of the '
                     f'file ({_some(absent)}): mmdet numbers labels over the categories that the '
                     'file has, so the classes after them carry the wrong names')
    order = [category['name'] for category in used]
    if order != [name for name in wanted if name in order]:
        lines.append('the classes of the config are in another order than the categories of the '
                     'file: mmdet numbers labels in the order of the file, so they carry the wrong '
                     f'names; give them as {_some(order, 10)}')
    return {category['id']: category['name'] for category in used}, lines


def _check_annotations(images: List[dict], annotations: List[dict], used: Dict[int, str],
                       categories: List[dict], place: _Place) -> List[str]:
    """Say which annotations mmdet does not use, each by the first reason that holds.

    Follows ``CocoDataset.parse_data_info`` and ``filter_data`` of mmdet 3.3.0.
    """
    keys = ('id', 'image_id', 'category_id', 'bbox', 'area')
    _require_keys(annotations, keys, 'annotation', place)
    # mmdet asserts this.
    _require_unique((entry['id'] for entry in annotations), 'annotations', 'id', place)
    index_of = {image['id']: index for index, image in enumerate(images)}
    # -1: of no image. Its size is then the last image's, which is never looked at.
    image = np.array([index_of.get(entry['image_id'], -1) for entry in annotations], dtype=np.int64)
    known = {category['id'] for category in categories}
    category = [entry['category_id'] for entry in annotations]
    unknown = np.array([key not in known for key in category], dtype=bool)
    unused = np.array([key not in used for key in category], dtype=bool)
    ignored = np.array([bool(entry.get('ignore')) for entry in annotations], dtype=bool)
    boxes = _numbers(annotations, lambda entry: entry['bbox'], 4, 'annotation', place)
    area = _numbers(annotations, lambda entry: entry['area'], 1, 'annotation', place)[:, 0]
    sizes = np.array([(entry['width'], entry['height']) for entry in images], dtype=np.float64)
    size = sizes[image]
    start, extent = boxes[:, :2], boxes[:, 2:]
    stop = start + extent
    inside = np.minimum(stop, size) - np.maximum(start, 0)
    beyond = np.maximum(-start, stop - size)
    names = [entry['name'] for entry in categories if entry['id'] not in used]
    not_used = 'training does not use them, evaluation counts them as missed'
    reasons = (
        (image < 0, 'annotation(s) of images that the file does not list: not used'),
        (ignored, "annotation(s) marked 'ignore': training does not use them"),
        (unknown, "annotation(s) with a category_id that is not in the file's categories: "
         'not used'),
        (unused, f'annotation(s) of {len(names)} categories of the file that are not among the '
         f'classes of the config ({_some(names)}): not used'),
        ((extent <= 0).any(1), f'box(es) of zero or negative size: {not_used}'),
        ((inside <= 0).any(1), f'box(es) wholly outside their image: {not_used}'),
        ((extent < 1).any(1), f'box(es) less than a pixel wide or high: {not_used}'),
        (area <= 0, f"annotation(s) with an 'area' of zero or less: {not_used}"),
    )
    left = np.ones(len(annotations), dtype=bool)
    lines = []
    for holds, text in reasons:
        lines += _line(np.flatnonzero(holds & left), text, images, annotations, image)
        left &= ~holds
    partly = left & (beyond > _ROUNDING).any(1)
    text = ('box(es) partly outside their image: used, and clipped only where the pipeline does it '
            '(Resize does)')
    lines += _line(np.flatnonzero(partly), text, images, annotations, image)
    _require(left.any() or not place.training,
             f'{place.name} has no annotation that training can use: {"; ".join(lines) or "none"}')
    # As filter_data: any annotation of a class counts, one that is not used too.
    empty = len(images) - len(np.unique(image[(image >= 0) & ~unused]))
    if empty:
        lines.append(f'{empty} of {len(images)} images without an annotation of the classes: '
                     'validation uses them, training leaves them out where filter_cfg has '
                     'filter_empty_gt=True')
    return lines


def _line(found: np.ndarray, text: str, images: List[dict], annotations: List[dict],
          image: np.ndarray) -> List[str]:
    """A line about some annotations, by their indices; none if there are none."""
    if not len(found):
        return []
    first = annotations[found[0]]
    where = (f"'{images[image[found[0]]]['file_name']}'" if image[found[0]] >= 0
             else f"image_id {first['image_id']}")
    return [f"{len(found)} {text} (first: {where}, annotation {first['id']})"]


def _check_folder(image_root: str, place: _Place) -> None:
    if not osp.isdir(image_root or '.'):
        raise UsageError(f"{place.name}: there is no image folder '{image_root}': "
                         + _remedy(image_root, place.key and f'{place.key}.data_prefix.img'))


def _check_files(image_root: str, names: Sequence[str], progress: Optional[Progress],
                 place: _Place) -> None:
    """Refuse missing and damaged image files."""
    chunks = [names[start:start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    missing, damaged = [], []
    done = 0
    # Threads wait for the disk side by side; on a warm one they neither gain nor cost.
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda chunk: _look_at_all(image_root, chunk), chunks):
            missing += [name for name, trouble in found if trouble == _MISSING]
            damaged += [f"{name}: {trouble}" for name, trouble in found
                        if trouble and trouble != _MISSING]
            done += len(found)
            if progress:
                progress(done, len(names))
    said = [f'{len(files)} of {len(names)} image files {what} ({_some(files)})'
            for files, what in ((missing, 'are missing'), (damaged, 'are damaged')) if files]
    if said:
        raise UsageError(f"{place.name}: {' and '.join(said)} in '{image_root}': get them again, "
                         'or take them out of the annotation file')


def _look_at_all(image_root: str, names: Sequence[str]) -> List[Tuple[str, Optional[str]]]:
    return [(name, _look_at(osp.join(image_root, name))) for name in names]


def _look_at(path: str) -> Optional[str]:
    """What is wrong with an image file, by its head and tail; None if nothing is.

    This does not see damage between the two: OpenCV then decodes wrong pixels (JPEG, with a note on
    stderr), or returns None, and mmcv's message names the file. Nor does it see a cut in formats
    without an end marker.
    """
    try:
        with open(path, 'rb', buffering=0) as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    if not size:
        return 'has zero bytes'
    for start, end in _IMAGES:
        if head.startswith(start):
            return None if end is None or end in tail or _is_whole(path, end) else 'truncated'
    return 'is no image'


def _is_whole(path: str, end: bytes) -> bool:
    """Decode a file that does not end as it should.

    Cameras put videos and padding behind a picture, which OpenCV reads all the same. The end marker
    alone proves nothing then: that of a preview in the head is there in a cut file too.
    """
    try:
        with open(path, 'rb') as file:
            marked = end in file.read()
        with Image.open(path) as image:
            image.load()
    except Exception:
        # Decoders raise OSError, SyntaxError, ValueError and struct.error, as the bytes have it.
        return False
    return marked


def _some(values: Sequence[Any], count: int = 3) -> str:
    """The first few of them, in words."""
    return ', '.join(map(str, values[:count])) + (', ...' if len(values) > count else '')
