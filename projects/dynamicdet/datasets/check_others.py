"""Look through a data set that is not in COCO format: what mmdet makes of its annotations.

Of VOC's class, mmdet leaves objects out whose names are unknown and says nothing; and where a file
is no such annotation, its trace does not name it.
"""

import xml.etree.ElementTree as ET
from collections import Counter
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from ..errors import UsageError
from ..progress import CountProgress
from .annotation_repair import is_turned
from .check_annotations import DataSetPlace, first_few
from .check_images import check_image_files


def check_built(
    dataset: BaseDataset, place: DataSetPlace, progress: CountProgress | None = None
) -> list[str]:
    """Let a data set read its annotations, and look for its image files.

    Args:
        dataset (BaseDataset): Built with ``lazy_init``; it is read by this.
        place (DataSetPlace): What messages call it.
        progress (callable, optional): Called as ``progress(done, total)``, counts of image files.

    Returns:
        list[str]: Warnings.

    Raises:
        UsageError: If it cannot be read, is empty, or image files are missing or damaged.
    """
    unknown: Counter = Counter()
    entries = _load(dataset, place, unknown)
    if not entries:
        raise UsageError(f"{place.name} is empty: there are no images in '{dataset.ann_file}'")
    lines = (
        [
            f'{sum(unknown.values())} object(s) of {len(unknown)} names that are not among the '
            f'classes of the config ({first_few(list(unknown))}): not used'
        ]
        if unknown
        else []
    )
    lines += _check_boxes(entries, place)
    lines += _check_filters(dataset, len(entries), place)
    pictures = [
        dict(file_name=path, width=entry.get('width'), height=entry.get('height'))
        for entry in entries
        if isinstance(path := entry.get('img_path'), str) and '://' not in path
    ]
    place = place._replace(turned=is_turned(dataset))
    return lines + check_image_files('', pictures, place, progress, f"'{dataset.ann_file}'")


def _load(dataset: BaseDataset, place: DataSetPlace, unknown: Counter) -> list[dict]:
    """Entries of the images, those of videos too. Fills ``data_list``."""
    parse = dataset.parse_data_info

    def parse_and_name(entry: Any) -> Any:
        try:
            if isinstance(entry, dict) and 'xml_path' in entry:
                unknown.update(_unknown_names(entry['xml_path'], dataset.metainfo['classes']))
            return parse(entry)
        except Exception as error:
            # Of the class, which users may have written: parsers raise anything.
            raise _refusal(dataset, place, error, _file_of(entry)) from error

    # Of this object alone, so that what fails has a name.
    dataset.parse_data_info = parse_and_name
    try:
        dataset.data_list = dataset.load_data_list()
    except UsageError:
        raise
    except Exception as error:
        # As above, of all that is no entry.
        raise _refusal(dataset, place, error, dataset.ann_file) from error
    return [image for entry in dataset.data_list for image in entry.get('images', [entry])]


def _refusal(dataset: BaseDataset, place: DataSetPlace, error: Exception, file: str) -> UsageError:
    kind = type(dataset).__name__
    if isinstance(error, OSError) and error.filename:
        # A file that is no list gives names without end.
        return UsageError(
            f"{place.name}: '{str(error.filename)[:200]}' cannot be read: {error.strerror}; it is "
            'named in '
            f"'{dataset.ann_file}', which {place.key} has as ann_file"
        )
    reason = (str(error).strip() or '?').splitlines()[0]
    return UsageError(
        f"{place.name}: '{file}' is not as {kind} reads it ({type(error).__name__}: {reason}): "
        'correct it, '
        f'or name another by {place.key}.ann_file'
    )


def _file_of(entry: Any) -> str:
    for name in ('xml_path', 'img_path', 'file_name'):
        if isinstance(entry, dict) and isinstance(entry.get(name), str):
            return entry[name]
    return str(entry)[:100]


def _unknown_names(path: str, classes: list[str]) -> Counter:
    names = (name.text for name in ET.parse(path).findall('object/name'))
    return Counter(str(name) for name in names if name not in classes)


def _check_boxes(entries: list[dict], place: DataSetPlace) -> list[str]:
    """Boxes without an area, of which mmdet makes losses that are not finite; and images without
    any."""
    owners = [entry for entry in entries for _ in entry.get('instances') or ()]
    boxes = [box.get('bbox') for entry in entries for box in entry.get('instances') or ()]
    if not boxes or any(box is None for box in boxes):
        return []
    array = np.array(boxes, dtype=np.float64).reshape(len(boxes), 4)
    bad = np.flatnonzero(~np.isfinite(array).all(1) | (array[:, 2:] <= array[:, :2]).any(1))
    lines = []
    if len(bad):
        first = owners[bad[0]]
        complaint = (
            f'{len(bad)} box(es) without a width or height above 0 (first: {boxes[bad[0]]}, '
            f"'{first.get('xml_path', first.get('img_path'))}')"
        )
        if place.training:
            raise UsageError(f'{place.name}: {complaint}: correct them, or take them out')
        lines.append(f'{complaint}: nothing can match them')
    empty = sum(not entry.get('instances') for entry in entries)
    if empty:
        lines.append(f'{empty} of {len(entries)} images without an object of the classes')
    return lines


def _check_filters(dataset: BaseDataset, count: int, place: DataSetPlace) -> list[str]:
    """What filter_cfg and indices leave out."""
    kept = dataset.filter_data()
    dataset.data_list = kept
    left = sum(len(entry.get('images', [entry])) for entry in kept)
    if not left:
        raise UsageError(
            f'{place.name}: {place.key}.filter_cfg={dict(dataset.filter_cfg or {})} leaves none of '
            f'{count} images'
        )
    return (
        []
        if left == count
        else [
            f'{count - left} of {count} images are not as '
            f'filter_cfg={dict(dataset.filter_cfg or {})} wants them: training leaves them out'
        ]
    )
