"""Find what mmdet refuses in a COCO annotation file, and what it leaves out without a word."""

import os.path as osp
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError
from .check_masks import check_outlines

#: How many times as long as wide an image may be. `Resize` to common sizes leaves no pixel of those
#: beyond.
LONGEST = 100
#: Boxes of many tools, COCO's too, are off by rounding; less than this is not worth a line.
_ROUNDING = 0.5  # pixels
#: An area may be so many times that of its box, a pixel more on each side: it is counted in whole
#: pixels.
_SLACK = 1.01


class DataSetPlace(NamedTuple):
    """What messages call a data set, and where the config has it."""

    name: str
    key: str = ''  # such as 'train_dataloader.dataset'; empty: no config
    training: bool = False
    filter_cfg: Mapping = {}  # what a training leaves out
    masks: bool = False  # whether outlines of objects are learned or evaluated
    turned: bool = True  # whether pictures are loaded as EXIF's orientation wants


def check_annotations(
    data: dict[str, Any], classes: Sequence[str] | None, place: DataSetPlace
) -> list[str]:
    """Look through the content of an annotation file.

    Args:
        data (dict): As `read_annotations` gives it; with ``segmentation`` if the place learns
            masks.
        classes (Sequence[str], optional): Classes of the detector; None: all of the file.
        place (DataSetPlace): What the data are for.

    Returns:
        list[str]: Warnings.

    Raises:
        UsageError: If mmdet cannot use it.
    """
    images, annotations = data['images'], data['annotations']
    _require_thick(images, place)
    categories = _match_classes(data['categories'], classes, place)
    lines = _check_names(images)
    lines += _check_boxes(images, annotations, categories, data['categories'], place)
    if place.masks:
        lines += check_outlines(
            images,
            [annotation for annotation in annotations if annotation['category_id'] in categories],
            place.name,
        )
    return lines


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise UsageError(message)


def first_few(values: Sequence[Any], count: int = 3) -> str:
    """The first few of them, in words; in quotes where blanks or line ends would not be seen."""
    texts = (
        text if text.isprintable() and text == text.strip() else repr(text)
        for text in map(str, values[:count])
    )
    return ', '.join(texts) + (', ...' if len(values) > count else '')


def _require_thick(images: list[dict], place: DataSetPlace) -> None:
    sizes = np.array([(image['width'], image['height']) for image in images])
    thin = np.flatnonzero(sizes.max(1) > LONGEST * sizes.min(1))
    _require(
        not len(thin),
        f'{place.name}: {len(thin)} image(s) are more than {LONGEST} times as long as wide '
        f'({first_few([images[index]["file_name"] for index in thin])}), and resizing leaves '
        'nothing of them: crop them, or take them out of the annotation file',
    )


def _check_names(images: list[dict]) -> list[str]:
    """Say where entries share a file: exports that leave folders away do that."""
    counts = Counter(osp.normpath(image['file_name']) for image in images)
    if len(counts) == len(images):
        return []
    shared = [
        image['file_name'] for image in images if counts[osp.normpath(image['file_name'])] > 1
    ]
    named = first_few(list(dict.fromkeys(shared)))
    return [
        f'{len(shared)} of {len(images)} images have a file name of another entry ({named}): one'
        ' picture stands for all of them, each with other boxes'
    ]


def _require_unique(values: Iterator[Any], things: str, what: str, place: DataSetPlace) -> None:
    shared = [value for value, count in Counter(values).items() if count > 1]
    _require(
        not shared,
        f'{place.name}: {len(shared)} {what}(s) belong to several {things} (such as '
        f'{first_few(shared)}): each needs its own',
    )


def _match_classes(
    categories: list[dict], classes: Sequence[str] | None, place: DataSetPlace
) -> dict[int, str]:
    """Find the classes among a file's categories, as many and in the same order.

    Returns:
        dict: Id -> name of the categories that are used.
    """
    # ('cat') is a word, and mmdet would look for categories within it.
    _require(
        not isinstance(classes, str),
        f"{place.name}: classes must be a list of names, not '{classes}': ('{classes}', )",
    )
    names = [category['name'] for category in categories]
    wanted = names if classes is None else classes
    used = [category for category in categories if category['name'] in set(wanted)]
    _require(
        used,
        f'{place.name}: none of the classes of the config ({first_few(wanted)}) is among the '
        f'categories of the annotation file ({first_few(names)}): set metainfo=dict(classes=...)',
    )
    # Two labels for a class would be one label too many for the detector's head.
    for key in ('id', 'name'):
        _require_unique((category[key] for category in used), 'categories', key, place)
    # mmdet numbers labels over the categories that the file has, in the order of the file.
    absent = [name for name in wanted if name not in names]
    _require(
        not absent,
        f'{place.name}: {len(absent)} of the {len(wanted)} classes of the config are not among the '
        f'categories of the annotation file ({first_few(absent)}), and mmdet would give their '
        'labels to others: add them to the categories, or give those that it has, in its order, as '
        'metainfo=dict(classes=(...))',
    )
    order = [category['name'] for category in used]
    _require(
        order == list(wanted),
        f'{place.name}: the classes of the config are in another order than the categories of the '
        'annotation file, by which mmdet numbers labels: give them as metainfo=dict(classes=(...)) '
        f'with {first_few(order, 10)}',
    )
    return {category['id']: category['name'] for category in used}


def _check_boxes(
    images: list[dict],
    annotations: list[dict],
    used: dict[int, str],
    categories: list[dict],
    place: DataSetPlace,
) -> list[str]:
    """Say which annotations mmdet does not use, each by the first reason that holds.

    Follows ``CocoDataset.parse_data_info`` and ``filter_data`` of mmdet 3.3.0.
    """
    index_of = {image['id']: index for index, image in enumerate(images)}
    # -1: of no image. Its size is then the last image's, which is never looked at.
    image = np.array([index_of.get(entry['image_id'], -1) for entry in annotations], dtype=np.int64)
    known = {category['id'] for category in categories}
    category = [entry['category_id'] for entry in annotations]
    unknown = np.array([key not in known for key in category], dtype=bool)
    unused = np.array([key not in used for key in category], dtype=bool)
    ignored = np.array([bool(entry.get('ignore')) for entry in annotations], dtype=bool)
    boxes = np.array([entry['bbox'] for entry in annotations], dtype=np.float64).reshape(-1, 4)
    area = np.array([entry['area'] for entry in annotations], dtype=np.float64)
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
        (
            unknown,
            "annotation(s) with a category_id that is not in the file's categories: not used",
        ),
        (
            unused,
            f'annotation(s) of {len(names)} categories of the file that are not among the classes '
            f'of the config ({first_few(names)}): not used',
        ),
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
    text = (
        'box(es) partly outside their image: used, and clipped only where the pipeline does it '
        '(Resize does)'
    )
    lines += _line(np.flatnonzero(partly), text, images, annotations, image)
    larger = left & (area > _SLACK * (extent + 1).prod(1))
    text = "annotation(s) have an 'area' larger than their box: AP by size follows it"
    lines += _line(np.flatnonzero(larger), text, images, annotations, image)
    _require(
        left.any() or not place.training,
        f'{place.name} has no annotation that training can use: {"; ".join(lines) or "none"}',
    )
    # As filter_data: any annotation of a class counts, one that is not used too.
    full = np.zeros(len(images), dtype=bool)
    full[image[(image >= 0) & ~unused]] = True
    empty = len(images) - full.sum()
    if empty:
        lines.append(
            f'{empty} of {len(images)} images without an annotation of the classes: validation '
            'uses them, training leaves them out where filter_cfg has filter_empty_gt=True'
        )
    return lines + _check_filters(images, sizes, full, place)


def _check_filters(
    images: list[dict], sizes: np.ndarray, full: np.ndarray, place: DataSetPlace
) -> list[str]:
    """Say what a training leaves out for its size or for lack of a mark, as ``filter_data`` of
    `CocoDataset` and `VideoDataset` do."""
    kept = full | (not place.filter_cfg.get('filter_empty_gt', False))
    least, mark = place.filter_cfg.get('min_size', 0), place.filter_cfg.get('marked')
    small = sizes.min(1) < least
    lines = []
    if small.any():
        lines.append(
            f'{small.sum()} of {len(images)} images are smaller than filter_cfg.min_size={least}: '
            'training leaves them out'
        )
    unmarked = np.array([mark is not None and not image.get(mark) for image in images], dtype=bool)
    if unmarked.any():
        lines.append(
            f'{unmarked.sum()} of {len(images)} images have no mark {mark}, which filter_cfg '
            'wants: training leaves them out'
        )
    _require(
        (kept & ~small & ~unmarked).any(),
        f'{place.name}: filter_cfg={dict(place.filter_cfg)} leaves none of its '
        f'{len(images)} images',
    )
    return lines


def _line(
    indices: np.ndarray, text: str, images: list[dict], annotations: list[dict], image: np.ndarray
) -> list[str]:
    """A line about some annotations, by their indices; none if there are none."""
    if not len(indices):
        return []
    first = annotations[indices[0]]
    where = (
        f"'{images[image[indices[0]]]['file_name']}'"
        if image[indices[0]] >= 0
        else f'image_id {first["image_id"]}'
    )
    return [f'{len(indices)} {text} (first: {where}, annotation {first["id"]})']
