"""Read COCO annotation files as users have them: what all tools take, what none can, and what is
mended on the way.

pycocotools, mmdet and the tools of this package differ in what they stumble over: text where a
number belongs, an ``iscrowd`` that is missing, ids of 0. So there is one reader. What it returns
every one of them takes; what cannot be used it refuses, in one line. Files are never written to.
Where mmdet reads a file itself, it is given a copy (`mended_copy`).
"""

import contextlib
import gc
import hashlib
import json
import locale
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import UsageError

#: Sides of an image beyond this OpenCV does not read (its CV_IO_MAX_IMAGE_WIDTH).
LONGEST_SIDE = 2**20
#: No coordinate or area comes near it; sums and products of smaller ones are exact enough in
#: float64.
_LARGEST = 1e12
_NUMBER = re.compile(r'\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*', re.ASCII)
_WHOLE = re.compile(r'-?(0|[1-9][0-9]{0,19})', re.ASCII)
#: Changes with what `_mend` does, so that copies of an older version are not taken.
_VERSION = 1
_PLURALS = dict(image='images', annotation='annotations', category='categories')
#: Copy -> the file that it was made of.
_ORIGINALS: dict[str, str] = {}


class AnnotationFile(NamedTuple):
    """A COCO annotation file that every tool takes.

    Attributes:
        data (dict): ``images``, ``annotations`` and ``categories`` as in the file, but: all ids are
            whole numbers of 64 bits, those of images and annotations unique, of annotations never
            0; ``width`` and ``height`` whole numbers above 0; ``bbox`` four finite numbers;
            ``area`` a finite number; ``iscrowd`` 0 or 1; names text.
        mended (list[str]): What was changed for it, a line each: how often, and where first. Empty:
            nothing.
        renumbered (bool): Whether images have other ids than in the file. Defaults to False.
    """

    data: dict[str, Any]
    mended: list[str]
    renumbered: bool = False


def read_annotations(path: str | Path, outlines: bool = False) -> AnnotationFile:
    """Read a COCO annotation file, and mend what can be mended without a guess.

    Args:
        path (str or Path): JSON.
        outlines (bool): Whether to keep ``segmentation``, which of COCO is two thirds of the
            memory. Defaults to False.

    Raises:
        UsageError: If it cannot be used: the line names the file, the entry, and what it needs.
    """
    path = str(path)
    with _without_collection():
        data, mended = _parse(path, outlines)
        try:
            lines, renumbered = _mend(data)
            mended += lines
        except UsageError as error:
            raise UsageError(f"'{path}': {error}") from None
    return AnnotationFile(data, mended, renumbered)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage collection would look at millions of new lists again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def mended_copy(path: str, folder: str | Path) -> str:
    """Write a file as `read_annotations` reads it, for those who read for themselves.

    The copy is named by the content of the file, and appears whole or not at all: several processes
        may write it at
    once, and what a killed one leaves is never read.

    Args:
        path (str): A file that needs mending.
        folder (str or Path): Where the copy goes.

    Returns:
        str: The absolute path of the copy. `original_of` knows what it was made of.
    """
    from .files import write_atomically

    digest = hashlib.blake2b(
        Path(path).read_bytes(), digest_size=8, salt=b'%d' % _VERSION
    ).hexdigest()
    copy = Path(folder).absolute() / f'{Path(path).stem}.{digest}.json'
    if not copy.is_file():
        content = json.dumps(read_annotations(path, outlines=True).data)
        try:
            write_atomically(content.encode(), copy)
        except OSError as error:
            raise UsageError(
                f"'{path}' needs mending, and its copy cannot be written to '{folder}': "
                f'{error.strerror}'
            ) from None
    _ORIGINALS[str(copy)] = path
    return str(copy)


def original_of(path: str) -> str:
    """The file that a copy was made of in this process; any other path as it is."""
    return _ORIGINALS.get(path, path)


def _parse(path: str, outlines: bool) -> tuple[dict[str, Any], list[str]]:
    try:
        with open(path, 'rb') as file:
            encoding = json.detect_encoding(start := file.read(4))
        if start.startswith((b'\x1f\x8b', b'PK\x03\x04')):
            raise UsageError(f"'{path}' is compressed: unpack it")
        with open(path, encoding=encoding) as file:
            text = file.read()
        data = json.loads(text, object_hook=None if outlines else _without_outline)
    except UnicodeDecodeError:
        raise UsageError(
            f"'{path}' is not JSON, or was cut short (not text in UTF-8): save it as UTF-8, or "
            'download '
            'or make it again'
        ) from None
    except (ValueError, RecursionError) as error:
        # Python's own words, to their first stop: the rest is advice to programmers.
        raise UsageError(
            f"'{path}' is not JSON, or was cut short ({str(error).partition(';')[0]}): download or "
            'make '
            'it again'
        ) from None
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from None
    if not isinstance(data, dict) or not isinstance(data.get('images'), list):
        raise UsageError(f"'{path}' is no COCO annotation file: it has no list of 'images'")
    # pycocotools opens files in the machine's encoding, whatever that is.
    odd = (
        encoding not in ('utf-8',)
        or not text.isascii()
        and locale.getpreferredencoding(False).lower() != 'utf-8'
    )
    return data, [f'the file is in {encoding.upper()}: read as such'] if odd else []


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop('segmentation', None)
    return entry


def _mend(data: dict[str, Any]) -> tuple[list[str], bool]:
    """Change what can be changed, and say so; refuse what cannot. Fast where nothing is odd.

    Returns:
        tuple: A line for each kind of change; and whether images have other ids.
    """
    lines: list[str] = []
    images = data['images']
    if not images:
        raise UsageError('there are no images: the set is empty')
    if 'annotations' in data and data['annotations'] is None:
        lines.append("'annotations' is null: read as none")
        data['annotations'] = []
    annotations = data.setdefault('annotations', [])
    categories = data.get('categories')
    if not isinstance(annotations, list):
        raise UsageError("'annotations' must be a list")
    if not isinstance(categories, list) or not categories:
        raise UsageError("the annotation file has no 'categories', a list of id and name each")
    _require_keys(images, ('id', 'file_name', 'height', 'width'), 'image')
    _require_keys(categories, ('id', 'name'), 'category')
    _require_keys(annotations, ('image_id', 'category_id', 'bbox'), 'annotation')
    lines += _mend_names(images, categories)
    lines += _mend_sizes(images)
    said, renumbered = _mend_ids(images, annotations, 'image')
    lines += said + _mend_ids(categories, annotations, 'category')[0]
    lines += _number_annotations(annotations)
    lines += _mend_boxes(annotations)
    lines += _mend_areas(annotations)
    lines += _mend_flags(annotations, 'iscrowd', default=0)
    lines += _mend_flags(annotations, 'ignore')
    return lines, renumbered


def _require_keys(entries: Sequence[Any], keys: Sequence[str], what: str) -> None:
    try:
        list(map(itemgetter(*keys), entries))
        if set(map(type, entries)) <= {dict}:
            return
    except (TypeError, KeyError, IndexError):
        pass
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UsageError(
                f'{what} number {index} is {_shown(entry)}, where a dictionary is needed'
            )
        for key in keys:
            if key not in entry:
                raise UsageError(f"{_place(what, index, entry)} has no '{key}', which mmdet needs")


def _place(what: str, index: int, entry: dict[str, Any]) -> str:
    """An entry in words, by its place in the file and by what it calls itself."""
    identity = {key: entry[key] for key in ('id', 'image_id', 'name', 'file_name') if key in entry}
    return f'{what} number {index} {_shown(identity)}'


def _refusal(what: str, index: int, entry: dict[str, Any], key: str, wanted: str) -> UsageError:
    return UsageError(
        f'{_place(what, index, entry)} has {key} {_shown(entry[key])}, where {wanted} is needed'
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f'{text[:200]} ...'


def _line(entries: Sequence[dict], what: str, odd: Sequence[int], text: str) -> list[str]:
    """A line about entries by their indices; none if there are none."""
    if not odd:
        return []
    return [
        f'{len(odd)} of {len(entries)} {_PLURALS[what]} {text} (first: '
        f'{_place(what, odd[0], entries[odd[0]])})'
    ]


def _number_from(value: Any) -> int | float | None:
    """A number that is one, or is written as text; None for all else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if _WHOLE.fullmatch(value) else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        return None
    return value


def all_numbers(values: Iterable[Any], largest: float = _LARGEST) -> bool:
    """Whether these are numbers from -largest to largest; without a loop in Python."""
    values = list(values)
    if not set(map(type, values)) <= {int, float}:
        return False
    try:
        return bool((np.abs(np.array(values, np.float64)) <= largest).all())
    except OverflowError:
        return False


def _mend_names(images: list[dict], categories: list[dict]) -> list[str]:
    for index, entry in enumerate(images):
        if not isinstance(entry['file_name'], str) or not entry['file_name']:
            raise _refusal(
                'image', index, entry, 'file_name', 'text, relative to the folder of images,'
            )
    odd = []
    for index, entry in enumerate(categories):
        if not isinstance(entry['name'], str):
            if _number_from(entry['name']) is None:
                raise _refusal('category', index, entry, 'name', 'text')
            entry['name'] = str(entry['name'])
            odd.append(index)
    return _line(categories, 'category', odd, 'have a number as name: read as text')


def _mend_sizes(images: list[dict]) -> list[str]:
    if set(map(type, chain.from_iterable(map(itemgetter('width', 'height'), images)))) == {int}:
        odd = []
    else:
        odd = [
            index
            for index, entry in enumerate(images)
            if not all(type(entry[key]) is int for key in ('width', 'height'))
        ]
    for index in odd:
        for key in ('width', 'height'):
            number = _number_from(images[index][key])
            if number is None or number != int(number):
                raise _refusal('image', index, images[index], key, 'a whole number of pixels')
            images[index][key] = int(number)
    for index, entry in enumerate(images):
        if not (0 < entry['width'] <= LONGEST_SIDE and 0 < entry['height'] <= LONGEST_SIDE):
            raise UsageError(
                f"image '{entry['file_name']}' has no width or height above 0 (or one above "
                f'{LONGEST_SIDE}) in the annotation file'
            )
    return _line(
        images, 'image', odd, 'have width or height as text or with a point: read as whole numbers'
    )


def _id_from(value: Any) -> int | str | None:
    """What an id stands for, whatever its type: 1, 1.0 and '1' are one id. A number if 64 bits hold
    it, else text; None for what is no id."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else str(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if -(2**63) <= value < 2**63 else str(value)


def _are_plain(ids: Sequence[Any]) -> bool:
    """Whether ids are whole numbers of 64 bits already."""
    return set(map(type, ids)) <= {int} and np.array(ids or [0]).dtype == np.int64


def _mend_ids(entries: list[dict], annotations: list[dict], what: str) -> tuple[list[str], bool]:
    """Make the ids of images or categories whole numbers, there and where annotations name them.

    Returns:
        tuple: Lines about it; and whether entries have other ids than before.
    """
    key = f'{what}_id'
    entry_ids, annotation_ids = (
        [entry['id'] for entry in entries],
        [entry[key] for entry in annotations],
    )
    if _are_plain(entry_ids) and _are_plain(annotation_ids):
        _require_unique(entry_ids, what)
        return [], False
    entry_ids, annotation_ids = (
        _ids_of(entries, 'id', what),
        _ids_of(annotations, key, 'annotation'),
    )
    _require_unique(entry_ids, what)
    renumbered = not all(isinstance(entry_id, int) for entry_id in entry_ids)
    new = {
        entry_id: number if renumbered else entry_id
        for number, entry_id in enumerate(dict.fromkeys(entry_ids), 1)
    }
    lines = []
    for some, ids, own_key, kind in (
        (entries, entry_ids, 'id', what),
        (annotations, annotation_ids, key, 'annotation'),
    ):
        odd = [
            index
            for index, (entry, entry_id) in enumerate(zip(some, ids))
            if type(entry[own_key]) is not type(entry_id)
            or renumbered
            and not isinstance(entry_id, int)
        ]
        text = (
            'of text or with a point: read as the whole number that it is'
            if not renumbered
            else 'that is no whole number of 64 bits: all are numbered from 1 in the order of the '
            'file, in results and records too'
        )
        if kind == what or not renumbered:
            lines += _line(some, kind, odd, f'have {own_key} {text}')
        for entry, entry_id in zip(some, ids):
            # Of nothing that the file has: not used, and must not be taken for a new number.
            entry[own_key] = (
                new[entry_id] if entry_id in new else str(entry_id) if renumbered else entry_id
            )
    return lines, renumbered


def _ids_of(entries: list[dict], key: str, what: str) -> list[int | str]:
    ids = [_id_from(entry[key]) for entry in entries]
    if None in ids:
        index = ids.index(None)
        raise _refusal(what, index, entries[index], key, 'a number or text')
    return ids


def _require_unique(ids: Sequence[Any], what: str) -> None:
    # Categories that the detector does not know may share an id: the check looks at those that it
    # does.
    if what == 'image' and len(set(ids)) < len(ids):
        shared = [entry_id for entry_id, count in Counter(ids).items() if count > 1]
        examples = ', '.join(map(str, shared[:3]))
        raise UsageError(
            f'{len(shared)} id(s) belong to several images (such as {examples}): each needs its own'
        )


def _number_annotations(annotations: list[dict]) -> list[str]:
    """Annotations need ids of their own, and COCO's evaluation takes one of 0 for "not matched". No
    other use is made of them."""
    ids = [entry.get('id') for entry in annotations]
    if _are_plain(ids) and len(unique := set(ids)) == len(ids) and 0 not in unique:
        return []
    taken: set = set()
    odd = []
    for index, annotation_id in enumerate(ids):
        if not _are_plain([annotation_id]) or annotation_id == 0 or annotation_id in taken:
            odd.append(index)
        else:
            taken.add(annotation_id)
    lines = _line(
        annotations,
        'annotation',
        odd,
        'have an id that is 0 ("not matched", to COCO), missing, repeated or no number: all are '
        'numbered from 1 in the order of the file',
    )
    for number, entry in enumerate(annotations, 1):
        entry['id'] = number
    return lines


def _mend_boxes(annotations: list[dict]) -> list[str]:
    boxes = list(map(itemgetter('bbox'), annotations))
    if (
        set(map(type, boxes)) <= {list}
        and set(map(len, boxes)) <= {4}
        and all_numbers(chain.from_iterable(boxes))
    ):
        return []
    odd = []
    for index, (entry, box) in enumerate(zip(annotations, boxes)):
        numbers = list(map(_number_from, box)) if isinstance(box, list) else [None]
        if len(numbers) != 4 or None in numbers:
            raise _refusal(
                'annotation',
                index,
                entry,
                'bbox',
                'a list of 4 finite numbers (x, y, width, height)',
            )
        if numbers != box:
            entry['bbox'] = numbers
            odd.append(index)
    return _line(annotations, 'annotation', odd, 'have numbers as text in bbox: read as numbers')


def _mend_areas(annotations: list[dict]) -> list[str]:
    areas = [entry.get('area') for entry in annotations]
    if all_numbers(areas):
        return []
    odd, absent = [], []
    for index, (entry, area) in enumerate(zip(annotations, areas)):
        if area is None:
            absent.append(index)
            entry['area'] = entry['bbox'][2] * entry['bbox'][3]
        elif (number := _number_from(area)) is None:
            raise _refusal('annotation', index, entry, 'area', 'a finite number')
        elif isinstance(area, str):
            entry['area'] = number
            odd.append(index)
    return _line(
        annotations, 'annotation', odd, 'have an area that is text: read as a number'
    ) + _line(annotations, 'annotation', absent, "have no 'area': that of their box is taken")


#: What means yes or no, as other tools write it.
_FLAGS = {'': 0, '0': 0, '1': 1, 'false': 0, 'true': 1}


def _mend_flags(annotations: list[dict], key: str, default: int | None = None) -> list[str]:
    """Make a mark 0 or 1; where it is missing, the default, if it must be there."""
    absent, odd = [], []
    for index, entry in enumerate(annotations):
        value = entry.get(key)
        # True is 1, and text is neither.
        if value == 0 or value == 1 or value is None and default is None and key not in entry:
            continue
        if value is None:
            entry[key] = 0
            absent.append(index)
        elif isinstance(value, str) and value.lower() in _FLAGS:
            entry[key] = _FLAGS[value.lower()]
            odd.append(index)
        else:
            raise _refusal('annotation', index, entry, key, '0 or 1')
    return _line(annotations, 'annotation', absent, f'have no {key}: taken as 0') + _line(
        annotations, 'annotation', odd, f'have {key} as text: read as 0 or 1'
    )
