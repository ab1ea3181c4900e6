"""A record of a video run on disk: every frame through every exit, in frame order, in one file.

In memory it is a dictionary of ``images``, as a `routing.record.RoutingRecord` of E exits gives
them one by one, ``gflops`` and ``latencies`` (of a frame that leaves at each exit when no other
head is run) and ``provenance``, and:

* each image also has ``video`` and ``frame`` (ints: its stream, and its place there), ``pooled`` (E
  - 1 arrays (C_l,), float32: what `Evidence.pooled` grows to), ``early``: the summary of its early
  map that changes are computed from, (d,) float32, and ``change`` in [0, 1], against the frame
  before; 1 where there is none;
* ``costs``: for 'gflops' and 'latencies' each a dictionary of ``early``: of a frame that leaves
  before the first exit, and ``looked``: E floats, of one that leaves at each exit when all heads on
  the way are run.

On disk it is a record of `routing.record`, so tools for those read it: ``change`` is the difficulty
there, ``pooled`` and ``early`` are the features, the rest is in the provenance.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..routing.record import RoutingRecord, read_record, write_record

#: Where a video record's own part is in the provenance; and its version.
_OWN, _VERSION = 'video_run', 1
#: What each image has beyond what is passed on as it is.
_PER_IMAGE = ('video', 'frame', 'pooled', 'early', 'change')


def write_video_record(record: Mapping, path: str | Path) -> None:
    """Write a record of a video run, whole or not at all.

    Args:
        record (Mapping): See the top of this file.
        path (str or Path): Where to; folders are made, a file that is there is replaced.

    Raises:
        UsageError: If there are no images, or they lack something, differ in what they have, or
            come twice.
    """
    images = record['images']
    if not images:
        raise UsageError('the record has no frames: there is nothing to write')
    missing = {name for image in images for name in _PER_IMAGE if name not in image}
    if missing:
        raise UsageError(f'frames of a video record lack {", ".join(sorted(missing))}')
    header = dict(
        version=_VERSION,
        videos=[int(image['video']) for image in images],
        frames=[int(image['frame']) for image in images],
        widths=[len(features) for features in images[0]['pooled']],
        costs=record['costs'],
    )
    _check(header, len(images), len(record['gflops']), 'the record')
    plain = [_to_plain(image, header['widths']) for image in images]
    provenance = {**record['provenance'], _OWN: header}
    packed = RoutingRecord.from_images(plain, record['gflops'], record['latencies'], provenance)
    write_record(packed, path)


def read_video_record(path: str | Path) -> dict:
    """Read a record of a video run.

    Raises:
        UsageError: If there is no such file, or it is no whole record of a video run, of this
            version.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no record '{path}': make it with tools/record_video.py")
    packed = read_record(path)
    header = packed.provenance.pop(_OWN, None)
    if not isinstance(header, dict) or packed.features is None:
        raise UsageError(
            f"'{path}' is a record of images, not of a video run: make one with "
            'tools/record_video.py'
        )
    if header.get('version') != _VERSION:
        raise UsageError(
            f"'{path}' is a video record of version {header.get('version')}, this package reads "
            'version '
            f'{_VERSION}: record anew'
        )
    _check(header, len(packed), packed.exits, f"'{path}'")
    if sum(header['widths']) >= packed.features.shape[1]:
        raise UsageError(f"'{path}' has fewer features than its heads need: record anew")
    ends = np.cumsum(header['widths']).tolist()
    images = list(packed)
    for image, video, frame in zip(images, header['videos'], header['frames']):
        *pooled, early = np.split(image.pop('features'), ends)
        image.update(
            video=video, frame=frame, pooled=pooled, early=early, change=image.pop('difficulty')
        )
    return dict(
        images=images,
        gflops=packed.gflops,
        latencies=packed.latencies,
        costs=header['costs'],
        provenance=packed.provenance,
    )


def detections_of(record: Mapping) -> RoutingRecord:
    """The detections of a video run alone, for AP. Nobody looks at the difficulties."""
    return RoutingRecord.from_images(
        [
            dict(id=image['id'], file=image['file'], difficulty=0.0, detections=image['detections'])
            for image in record['images']
        ]
    )


def _to_plain(image: Mapping, widths: list[int]) -> dict:
    """An image as `routing.record` knows it."""
    if [len(features) for features in image['pooled']] != widths:
        raise UsageError('frames of the record differ in their heads: record all in one pass')
    features = np.concatenate(
        [np.asarray(features, np.float32) for features in (*image['pooled'], image['early'])]
    )
    plain = {name: value for name, value in image.items() if name not in _PER_IMAGE}
    return dict(plain, difficulty=image['change'], features=features)


def _check(header: Mapping, images: int, exits: int, source: str) -> None:
    """Raise a `UsageError` unless a record's own part is whole and fits its images."""
    try:
        fits = (
            len(header['videos']) == len(header['frames']) == images
            and len(header['widths']) == exits - 1
            and all(
                isinstance(number, int)
                for name in ('videos', 'frames', 'widths')
                for number in header[name]
            )
            and all(width > 0 for width in header['widths'])
            and all(_is_cost(header['costs'][kind], exits) for kind in ('gflops', 'latencies'))
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f'{source} lacks parts of a video record: record anew') from error
    if not fits:
        raise UsageError(
            f'{source} has videos, frames, heads or costs that do not fit its {images} images and '
            f'{exits} exits: record anew'
        )
    if len(set(zip(header['videos'], header['frames']))) < images:
        raise UsageError(f'{source} has a frame of a video twice: record each once')


def _is_cost(cost: Mapping, exits: int) -> bool:
    return len(cost['looked']) == exits and all(
        math.isfinite(seconds) for seconds in (cost['early'], *cost['looked'])
    )
