"""What a detector is handed from Python: a picture, many, or a folder of them."""

import os
import os.path as osp
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..datasets.check_annotations import LONGEST
from ..datasets.picture_formats import pictures_in
from ..errors import UsageError

#: A path or URL, an array as OpenCV reads it, or mmdet's dict of either with more about it.
Picture = str | np.ndarray | dict

_WANTED = (
    'a picture is a path, a URL or an array as cv2.imread gives it: uint8, (height, width, 3), '
    'blue, green, red'
)


def pictures_of(inputs: Any, skip_missing: bool = False) -> list[Picture]:
    """All pictures that a user means, or a `UsageError` before any is looked at.

    Args:
        inputs (Any): A path, URL or array; a folder, whose pictures are taken by name; or any
            iterable of paths, URLs and arrays.
        skip_missing (bool): Whether paths without a file are let through. Defaults to False.
    """
    if isinstance(inputs, (str, os.PathLike)) and osp.isdir(inputs):
        return [str(path) for path in pictures_in(inputs)]
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in 'OU':
        # An array of paths, or of arrays.
        inputs = inputs.tolist()
    single = isinstance(inputs, (str, bytes, os.PathLike, np.ndarray, Mapping, Tensor))
    single = single or not isinstance(inputs, Iterable)
    pictures = [as_picture(picture) for picture in ([inputs] if single else inputs)]
    if not skip_missing:
        for picture in pictures:
            _require_file(picture)
    return pictures


def as_picture(item: Any) -> Picture:
    """A single picture as mmdet's inferencer takes it, or a `UsageError` that says what is
    wanted."""
    if isinstance(item, os.PathLike):
        item = os.fspath(item)
    if isinstance(item, np.ndarray):
        _require_image(item)
        # Views with steps backwards, such as image[:, :, ::-1], are none for OpenCV.
        return np.ascontiguousarray(item)
    if isinstance(item, dict) and ('img' in item or 'img_path' in item):
        key, kind = ('img', np.ndarray) if 'img' in item else ('img_path', str)
        inner = as_picture(item[key])
        if not isinstance(inner, kind):
            raise UsageError(
                f"{_WANTED}; of a picture's dict, 'img' is an array and 'img_path' a path or URL; "
                'got '
                f'{key} of type {_described(item[key])}'
            )
        return {**item, key: inner}
    if not isinstance(item, str):
        raise UsageError(f'{_WANTED}; got {_described(item)}')
    return item


def _require_image(array: np.ndarray) -> None:
    fits = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
    if not fits:
        raise UsageError(f'{_WANTED}; got {_described(array)}{_remedy(array)}')
    if not array.size:
        raise UsageError(f'the picture of shape {array.shape} has no pixels')
    if max(array.shape[:2]) > LONGEST * min(array.shape[:2]):
        raise UsageError(
            f'the picture of shape {array.shape} is more than {LONGEST} times as long as wide'
        )


def _remedy(array: np.ndarray) -> str:
    if array.ndim == 4:
        return ': several pictures are a list'
    if array.dtype.kind not in 'biuf':
        return ''
    if array.dtype != np.uint8:
        return ': scale it to 0 to 255, and .astype(numpy.uint8)'
    channels = array.shape[2] if array.ndim == 3 else 1
    kind = {1: 'GRAY', 4: 'BGRA'}.get(channels)
    return (
        f': cv2.cvtColor(image, cv2.COLOR_{kind}2BGR) makes one'
        if kind and array.ndim in (2, 3)
        else ''
    )


def _described(item: Any) -> str:
    name = f'{type(item).__module__.partition(".")[0]}.{type(item).__qualname__}'.removeprefix(
        'builtins.'
    )
    if hasattr(item, 'shape') and hasattr(item, 'dtype'):
        return f'{name}, {item.dtype}, {tuple(item.shape)}'
    return name


def _require_file(item: Picture) -> None:
    path = item.get('img_path') if isinstance(item, dict) else item
    if isinstance(path, str) and '://' not in path and not osp.isfile(path):
        why = 'a folder is given alone, not in a list' if osp.isdir(path) else 'correct the path'
        raise UsageError(f"there is no picture at '{path}': {why}")
