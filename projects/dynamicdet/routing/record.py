"""A record on disk: one pass over a data set, every image through every exit, in one file.

A record is a plain dictionary:

* ``images``: per image a dictionary of ``id`` (int), ``file`` (str), ``difficulty`` in [0, 1] and
  ``detections``: K lists, one per exit, of COCO results without ``image_id``, boxes x, y, w, h in
  the image's own frame. It may have ``losses``: K floats; ``features``: what the router saw, (d,)
  float32; ``objects``: annotated objects without crowds; ``entropy``: of the gray levels, in bits,
  in [0, 8]; ``gflops`` and ``latencies``: its own cost under each exit, K floats each, units as
  below; ``view``: detections of an augmented view, like ``detections``, boxes in the original
  frame. What one image has, all have.
* ``gflops``: mean per image of each exit, K floats, 2 x multiply-adds.
* ``latencies``: of each exit, K floats, seconds per image.
* ``provenance``: a dictionary of strings, numbers and lists of them.

The file is numpy's compressed ``.npz``, without pickles: detections of an exit lie one below the
other, with the index of their image.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UsageError

_FORMAT, _VERSION = 'dynamicdet record', 1
#: What every image has besides detections: name -> type. Text is of any length.
_REQUIRED = dict(id=np.int64, file=np.str_, difficulty=np.float64)
#: What images may have besides.
_OPTIONAL = dict(
    losses=np.float64,
    features=np.float32,
    objects=np.int64,
    entropy=np.float64,
    gflops=np.float64,
    latencies=np.float64,
)
#: Of these, what has a number for each exit.
_BY_EXIT = ('losses', 'gflops', 'latencies')
#: Keys of an image that hold a list of COCO results per exit; the second is optional.
_DETECTIONS = ('detections', 'view')
#: What else np.load raises on a file that is cut short or foreign.
_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    AttributeError,
    KeyError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def write_record(record: Mapping, path: str | Path) -> None:
    """Write a record, whole or not at all.

    Args:
        record (Mapping): See the top of this file. Numbers come back as they are, floats as
            doubles.
        path (str or Path): Where to; folders are made, a file that is there is replaced.

    Raises:
        UsageError: If the record is empty, if images differ in what they have, or if lengths do not
            fit or a number is not finite.
    """
    # Here, because it registers with mmengine, which reading does not need.
    from ..files import write_atomically

    arrays = _to_arrays(record)
    _check(arrays, 'the record')
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(buffer.getvalue(), path)


def read_record(path: str | Path) -> dict:
    """Read a record.

    Args:
        path (str or Path): A file that `write_record` made.

    Raises:
        UsageError: If there is no such file, or if it is no whole record of this version.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no record '{path}': make it with tools/record.py")
    try:
        # A foreign file may hold one bare array, not an archive: that has no `files`.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            provenance = json.loads(str(arrays.get('provenance', '{}')))
    except _BROKEN as error:
        raise UsageError(f"'{path}' is no record, or was cut short: record anew") from error
    if 'format' not in arrays or str(arrays['format']) != _FORMAT:
        raise UsageError(f"'{path}' is no record of a dynamic detector: record anew")
    if str(arrays.get('version')) != str(_VERSION):
        raise UsageError(
            f"'{path}' is a record of version {arrays.get('version')}, this package reads "
            f'version {_VERSION}: record anew'
        )
    _check(arrays, f"'{path}'")
    return _from_arrays(arrays, provenance)


def require(record: Mapping, *names: str, what: str = 'the record') -> None:
    """Raise a `UsageError` unless all images have, say, ``losses``, which old records may lack."""
    for name in names:
        if not all(name in image for image in record['images']):
            raise UsageError(
                f'{what} lacks {name} of its images: make it anew with tools/record.py'
            )


def _to_arrays(record: Mapping) -> dict[str, np.ndarray]:
    images, exits = record['images'], len(record['gflops'])
    if not images:
        raise UsageError('the record has no images: there is nothing to write')
    names = set(images[0])
    if any(set(image) != names for image in images):
        raise UsageError('images of the record differ in what they have: record all in one pass')
    required = {*_REQUIRED, _DETECTIONS[0]}
    odd = (required - names) | (names - required - {*_OPTIONAL, *_DETECTIONS})
    if odd:
        raise UsageError(
            f'images of a record lack, or have beyond its format: {", ".join(sorted(odd))}'
        )
    arrays = dict(
        format=np.array(_FORMAT),
        version=np.array(_VERSION),
        gflops=np.array(record['gflops'], np.float64),
        latencies=np.array(record['latencies'], np.float64),
        provenance=np.array(json.dumps(record['provenance'], default=str)),
    )
    for name, kind in {**_REQUIRED, **_OPTIONAL}.items():
        if name in names:
            arrays[f'image_{name}'] = _stack([image[name] for image in images], name, kind)
    for name in names.intersection(_DETECTIONS):
        if any(len(image[name]) != exits for image in images):
            raise UsageError(
                f'the record has costs of {exits} exits, but not {name} of so many for each image: '
                'record every image through every exit'
            )
        for exit in range(exits):
            arrays.update(_flatten([image[name][exit] for image in images], f'{name}{exit}'))
    return arrays


def _stack(values: Sequence, name: str, kind: type) -> np.ndarray:
    try:
        return np.array(values, kind)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'{name} of the record are not numbers of one shape for all images'
        ) from error


def _flatten(lists: Sequence[Sequence[Mapping]], prefix: str) -> dict[str, np.ndarray]:
    """COCO results of one exit, per image -> one array per part."""
    found = [detection for own in lists for detection in own]
    return {
        f'{prefix}_boxes': np.array([detection['bbox'] for detection in found], float).reshape(
            -1, 4
        ),
        f'{prefix}_scores': np.array([detection['score'] for detection in found], float),
        f'{prefix}_categories': np.array(
            [detection['category_id'] for detection in found], np.int64
        ),
        f'{prefix}_images': np.repeat(np.arange(len(lists)), [len(own) for own in lists]),
    }


def _check(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise a `UsageError` unless a record's arrays are all there, fit together and are finite."""
    images, exits = (np.size(arrays.get(name, ())) for name in ('image_id', 'gflops'))
    if not images or exits < 2:
        raise UsageError(
            f'{source} is of {images} images and {exits} exits: record some images through two '
            'exits or more'
        )
    for name, shape in _shapes(arrays, images, exits).items():
        if name not in arrays:
            raise UsageError(f'{source} lacks {name}: record anew')
        values = arrays[name]
        if values.shape != shape:
            raise UsageError(
                f'{source} has {name} of shape {values.shape}, where {images} images and {exits} '
                f'exits need {shape}: record anew'
            )
        if values.dtype.kind == 'f' and not np.isfinite(values).all():
            raise UsageError(f'{source} has {name} that are not finite: was the detector trained?')
        if (
            name.endswith('_images')
            and values.size
            and not 0 <= values.min() <= values.max() < images
        ):
            raise UsageError(f'{source} has detections of images that it lacks: record anew')


def _shapes(
    arrays: Mapping[str, np.ndarray], images: int, exits: int
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what must be there, by what is there of the optional."""
    names = [f'image_{name}' for name in _OPTIONAL if f'image_{name}' in arrays]
    shapes = {name: (images,) for name in [*names, *(f'image_{name}' for name in _REQUIRED)]}
    shapes.update(gflops=(exits,), latencies=(exits,), provenance=())
    shapes.update(
        {f'image_{name}': (images, exits) for name in _BY_EXIT if f'image_{name}' in names}
    )
    if 'image_features' in names:
        shapes['image_features'] = (images, arrays['image_features'].size // images)
    for name in _DETECTIONS[: 1 + (f'{_DETECTIONS[1]}0_boxes' in arrays)]:
        for exit in range(exits):
            found = np.size(arrays.get(f'{name}{exit}_scores', ()))
            shapes.update(
                {f'{name}{exit}_{part}': (found,) for part in ('scores', 'categories', 'images')}
            )
            shapes[f'{name}{exit}_boxes'] = (found, 4)
    return shapes


def _from_arrays(arrays: Mapping[str, np.ndarray], provenance: dict) -> dict:
    names = [name for name in (*_REQUIRED, *_OPTIONAL) if f'image_{name}' in arrays]
    values = [arrays[f'image_{name}'] for name in names]
    # Features stay arrays; all else becomes Python's own numbers.
    columns = [own if name == 'features' else own.tolist() for name, own in zip(names, values)]
    images = [dict(zip(names, values)) for values in zip(*columns)]
    exits = len(arrays['gflops'])
    for name in _DETECTIONS:
        if f'{name}0_boxes' in arrays:
            per_exit = [_unflatten(arrays, f'{name}{exit}', len(images)) for exit in range(exits)]
            for image, *own in zip(images, *per_exit):
                image[name] = own
    return dict(
        images=images,
        gflops=arrays['gflops'].tolist(),
        latencies=arrays['latencies'].tolist(),
        provenance=provenance,
    )


def _unflatten(arrays: Mapping[str, np.ndarray], prefix: str, images: int) -> list[list[dict]]:
    lists: list[list[dict]] = [[] for _ in range(images)]
    columns = [
        arrays[f'{prefix}_{part}'].tolist() for part in ('boxes', 'scores', 'categories', 'images')
    ]
    for box, score, category, image in zip(*columns):
        lists[image].append(dict(bbox=box, score=score, category_id=category))
    return lists
