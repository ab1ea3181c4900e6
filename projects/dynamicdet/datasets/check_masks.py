"""Find outlines of objects that mmdet cannot learn masks from, or that pycocotools cannot
evaluate."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..annotations import LONGEST_SIDE, all_numbers
from ..errors import UsageError

#: Numbers of a polygon with an area: three points.
_LEAST = 6


def check_outlines(
    images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], name: str
) -> list[str]:
    """Look through the ``segmentation`` of annotations.

    Args:
        images (Sequence[dict]): Of an annotation file.
        annotations (Sequence[dict]): Those that count.
        name (str): What messages call the data set.

    Returns:
        list[str]: Warnings.

    Raises:
        UsageError: If one cannot be used: missing, no polygons or run lengths, or of another size
            than its image.
    """
    sizes = {image['id']: (image['height'], image['width']) for image in images}
    odd = []
    for entry in annotations:
        size = sizes.get(entry['image_id'])
        trouble = _trouble(entry.get('segmentation'), size) if size else ''
        if trouble:
            raise UsageError(
                f'{name}: annotation {entry["id"]} (image {entry["image_id"]}) {trouble}: the '
                'masks of this config need polygons [[x, y, x, y, x, y, ...], ...] or run lengths '
                'of the size of the image; correct it, or take a detector of boxes'
            )
        if (
            size
            and isinstance(entry['segmentation'], list)
            and not all(map(_has_area, entry['segmentation']))
        ):
            odd.append(entry)
    if not odd:
        return []
    return [
        f'{len(odd)} annotation(s) have a polygon of fewer than three points or of an odd count of '
        f'numbers beside others: training leaves it out (first: image {odd[0]["image_id"]}, '
        f'annotation {odd[0]["id"]})'
    ]


def _has_area(polygon: list) -> bool:
    return len(polygon) >= _LEAST and len(polygon) % 2 == 0


def _trouble(outline: Any, size: Sequence[int]) -> str:
    """What is wrong with a ``segmentation`` in an image of (height, width); empty: nothing."""
    if not outline:
        return "has no 'segmentation'"
    if isinstance(outline, dict):
        return _trouble_of_runs(outline, size)
    if not isinstance(outline, list) or not set(map(type, outline)) <= {list}:
        return "has a 'segmentation' that is no list of polygons"
    # By its first polygon pycocotools guesses what the others are.
    if not _has_area(outline[0]):
        return 'has a polygon of fewer than three points or of an odd count of numbers'
    # Where they are far away, pycocotools ends the process: it counts fifths of pixels in 32 bits.
    if not all_numbers(chain.from_iterable(outline), LONGEST_SIDE):
        return f'has a polygon with values that are no finite numbers, or beyond {LONGEST_SIDE}'
    return ''


def _trouble_of_runs(outline: dict, size: Sequence[int]) -> str:
    counts = outline.get('counts')
    if outline.get('size') != list(size):
        return (
            f'has run lengths of the size {outline.get("size")}, in an image of (height, width) '
            f'{list(size)}'
        )
    if not isinstance(counts, (list, str)):
        return 'has no run lengths'
    try:
        runs = counts if isinstance(counts, list) else _runs_from(counts)
    except ValueError:
        return 'has run lengths that cannot be decoded'
    # Of what shorter ones leave out, pycocotools makes a mask of whatever is in memory.
    whole = (
        set(map(type, runs)) <= {int}
        and min(runs, default=-1) >= 0
        and sum(runs) == size[0] * size[1]
    )
    return '' if whole else 'has run lengths that are not those of its image'


def _runs_from(counts: str) -> list[int]:
    """Run lengths from COCO's text (rleFrString of pycocotools' maskApi.c): five bits a character,
    the lowest first, a sixth where more follow; from the fourth number on, differences to the last
    but one."""
    runs, value, shift = [], 0, 0
    for code in counts.encode('ascii'):
        bits = code - ord('0')
        if not 0 <= bits < 64:
            raise ValueError(counts)
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        # Negative ones have the highest bit.
        value -= (bits & 16) << shift - 4
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(counts)
    return runs
