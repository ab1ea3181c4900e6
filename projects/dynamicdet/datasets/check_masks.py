"""Find outlines of objects that mmdet cannot learn masks from, or that pycocotools cannot evaluate."""
from itertools import chain
from typing import Any, List, Mapping, Sequence

import numpy as np
from pycocotools import mask as mask_utils

from ..errors import UsageError

#: Numbers of a polygon with an area: three points.
_LEAST = 6


def check_outlines(images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]],
                   name: str) -> List[str]:
    """Look through the ``segmentation`` of annotations.

    Args:
        images (Sequence[dict]): Of an annotation file.
        annotations (Sequence[dict]): Those that count.
        name (str): What messages call the data set.

    Returns:
        list[str]: Warnings.

    Raises:
        UsageError: If one cannot be used: missing, no polygons or run lengths, or of another size than its image.
    """
    sizes = {image['id']: (image['height'], image['width']) for image in images}
    odd = []
    for entry in annotations:
        size = sizes.get(entry['image_id'])
        trouble = _trouble(entry.get('segmentation'), size) if size else ''
        if trouble:
            raise UsageError(f"{name}: annotation {entry['id']} (image {entry['image_id']}) {trouble}: the masks of "
                             'this config need polygons [[x, y, x, y, x, y, ...], ...] or run lengths of the size of '
                             'the image; correct it, or take a detector of boxes')
        if size and isinstance(entry['segmentation'], list) and not all(map(_has_area, entry['segmentation'])):
            odd.append(entry)
    if not odd:
        return []
    return [f'{len(odd)} annotation(s) have a polygon of fewer than three points or of an odd count of numbers beside '
            f"others: training leaves it out (first: image {odd[0]['image_id']}, annotation {odd[0]['id']})"]


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
    if not set(map(type, chain.from_iterable(outline))) <= {int, float} or not np.isfinite(
            np.array(list(chain.from_iterable(outline)), np.float64)).all():
        return 'has a polygon with values that are no finite numbers'
    return ''


def _trouble_of_runs(outline: dict, size: Sequence[int]) -> str:
    counts = outline.get('counts')
    if outline.get('size') != list(size):
        return f"has run lengths of the size {outline.get('size')}, in an image of (height, width) {list(size)}"
    if isinstance(counts, list):
        whole = set(map(type, counts)) <= {int} and min(counts, default=-1) >= 0 and sum(counts) == size[0] * size[1]
        return '' if whole else 'has run lengths that are not those of its image'
    try:
        # pycocotools itself refuses what would reach beyond the image.
        found = isinstance(counts, str) and mask_utils.decode(outline).shape == tuple(size)
        return '' if found else 'has no run lengths'
    except (ValueError, TypeError):
        return 'has run lengths that cannot be decoded'
