"""A routing record: one pass over a data set, every image through every exit, as flat arrays.

Letters: ``n`` images, ``K`` exits, ``D`` detections of one exit, ``d`` features.

In memory a detection takes 24 bytes. On disk a record is numpy's compressed ``.npz``, without
pickles: detections of an exit lie one below the other, with the index of their image.
"""

import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files import write_atomically

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
    frame=np.float64,
)
#: Of these, what has a number for each exit.
_BY_EXIT = ('losses', 'gflops', 'latencies')
#: What holds detections of each exit; the second is optional.
_DETECTIONS = ('detections', 'view')
#: The arrays of one exit's detections: name -> type in memory and on disk.
_PARTS = dict(boxes=np.float32, scores=np.float32, categories=np.int32, images=np.int32)
#: Keys of an image -> attributes of a record, where names differ.
_ATTRIBUTES = dict(id='ids', file='files', gflops='image_gflops', latencies='image_latencies')
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


@dataclass(eq=False)
class Detections(Sequence):
    """Detections of one exit on n images, image by image. As a sequence: COCO results of each
    image, without image ids, made on demand.

    Attributes:
        boxes (np.ndarray): (D, 4) float32: x, y, w, h in the image's own frame.
        scores (np.ndarray): (D,) float32.
        categories (np.ndarray): (D,) int32, category ids of the annotation file.
        offsets (np.ndarray): (n + 1,) int64: image i has the rows offsets[i] to offsets[i + 1].
    """

    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray
    offsets: np.ndarray

    @classmethod
    def join(cls, images: Sequence[tuple]) -> 'Detections':
        """From ``(boxes, scores, categories)`` of each image: (D_i, 4), (D_i,), (D_i,)."""
        columns = list(zip(*images)) or [[], [], []]
        boxes, scores, categories = (
            np.concatenate(
                [np.zeros(0, kind), *(np.asarray(values, kind).ravel() for values in column)]
            )
            for column, kind in zip(columns, _PARTS.values())
        )
        counts = [np.size(values) for values in columns[1]]
        return cls(
            boxes.reshape(-1, 4), scores, categories, np.cumsum([0, *counts], dtype=np.int64)
        )

    @classmethod
    def from_images(cls, images: Sequence) -> 'Detections':
        """From COCO results of each image, a list, or what `join` takes of each, a tuple."""
        return cls.join(
            [
                image
                if isinstance(image, tuple)
                else tuple(
                    [detection[name] for detection in image]
                    for name in ('bbox', 'score', 'category_id')
                )
                for image in images
            ]
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[dict]:
        rows = self.rows(row)
        return [
            dict(bbox=box, score=score, category_id=category)
            for box, score, category in zip(
                self.boxes[rows].tolist(),
                self.scores[rows].tolist(),
                self.categories[rows].tolist(),
            )
        ]

    def rows(self, image: int) -> slice:
        """Where the detections of an image lie."""
        image = range(len(self))[image]
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    @property
    def images(self) -> np.ndarray:
        """The image of each detection, (D,) int32, in [0, n)."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.offsets))

    def take(self, images: Sequence[int]) -> 'Detections':
        """Those of some images, in that order."""
        images = np.asarray(images, np.int64)
        counts = np.diff(self.offsets)[images]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(self.offsets[:-1][images] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Detections(self.boxes[rows], self.scores[rows], self.categories[rows], offsets)


@dataclass(eq=False)
class RoutingRecord(Sequence):
    """Every image of a data set through every exit. As a sequence: a dictionary of each image, made
    on demand, with ``id``, ``file``, ``difficulty``, ``detections`` (K lists of COCO results) and
    what else the record has of its images, under the names below; its own costs as ``gflops`` and
    ``latencies``.

    Attributes:
        ids (np.ndarray): (n,) int64, image ids of the annotation file.
        files (list[str]): n paths.
        difficulty (np.ndarray): (n,) float64 in [0, 1].
        detections (list[Detections]): K, one per exit.
        gflops (list[float]): Mean per image of each exit, K, 2 x multiply-adds.
        latencies (list[float]): Of each exit, K, seconds per image.
        provenance (dict): Of strings, numbers and lists of them.
        view (list[Detections], optional): K, of an augmented view; boxes in the original frame.
        losses (np.ndarray, optional): (n, K) float64.
        features (np.ndarray, optional): What the router saw, (n, d) float32.
        objects (np.ndarray, optional): Annotated objects without crowds, (n,) int64.
        entropy (np.ndarray, optional): Of the gray levels, in bits, (n,) float64 in [0, 8].
        image_gflops (np.ndarray, optional): Each image's own, (n, K) float64.
        image_latencies (np.ndarray, optional): Each image's own, (n, K) float64.
        frame (np.ndarray, optional): Each image as its network sees it, (n, 4) float64: height and
            width in pixels, and by how much the file was scaled across and down.
    """

    ids: np.ndarray
    files: list[str]
    difficulty: np.ndarray
    detections: list[Detections]
    gflops: list[float]
    latencies: list[float]
    provenance: dict = field(default_factory=dict)
    view: list[Detections] | None = None
    losses: np.ndarray | None = None
    features: np.ndarray | None = None
    objects: np.ndarray | None = None
    entropy: np.ndarray | None = None
    image_gflops: np.ndarray | None = None
    image_latencies: np.ndarray | None = None
    frame: np.ndarray | None = None

    @classmethod
    def from_images(
        cls,
        images: Sequence[Mapping],
        gflops: Sequence[float] | None = None,
        latencies: Sequence[float] | None = None,
        provenance: Mapping | None = None,
    ) -> 'RoutingRecord':
        """From dictionaries of images, as a record gives them back.

        Args:
            images (Sequence[Mapping]): What one has, all have. Detections of an exit may also be
                a tuple of arrays, see `Detections.join`.
            gflops (Sequence[float], optional): Of each exit. Defaults to NaN: not measured.
            latencies (Sequence[float], optional): Of each exit. Defaults to NaN.
            provenance (Mapping, optional): Defaults to nothing.

        Raises:
            UsageError: If images differ in what they have, or have what a record does not hold.
        """
        known = next((costs for costs in (gflops, latencies) if costs is not None), None)
        if known is None:
            known = images[0]['detections'] if len(images) else ()
        exits, names = len(known), set(images[0] if len(images) else {*_REQUIRED, _DETECTIONS[0]})
        if any(set(image) != names for image in images):
            raise UsageError(
                'images of the record differ in what they have: record all in one pass'
            )
        required = {*_REQUIRED, _DETECTIONS[0]}
        odd = (required - names) | (names - required - {*_OPTIONAL, *_DETECTIONS})
        if odd:
            raise UsageError(
                f'images of a record lack, or have beyond its format: {", ".join(sorted(odd))}'
            )
        columns = {
            _ATTRIBUTES.get(name, name): _stack([image[name] for image in images], name, kind)
            for name, kind in {**_REQUIRED, **_OPTIONAL}.items()
            if name in names and name != 'file'
        }
        for name in names.intersection(_DETECTIONS):
            if any(len(image[name]) != exits for image in images):
                raise UsageError(
                    f'the record has costs of {exits} exits, but not {name} of so many for each '
                    'image: record every image through every exit'
                )
            columns[name] = [
                Detections.from_images([image[name][exit] for image in images])
                for exit in range(exits)
            ]
        return cls(
            **columns,
            files=[str(image['file']) for image in images],
            gflops=[np.nan] * exits if gflops is None else list(gflops),
            latencies=[np.nan] * exits if latencies is None else list(latencies),
            provenance=dict(provenance or {}),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict:
        row = range(len(self))[row]
        image = dict(id=int(self.ids[row]), file=self.files[row])
        image.update(difficulty=float(self.difficulty[row]))
        for name in _OPTIONAL:
            values = self.column(name)
            if values is not None:
                image[name] = values[row] if name == 'features' else values[row].tolist()
        for name in _DETECTIONS:
            if getattr(self, name) is not None:
                image[name] = [detections[row] for detections in getattr(self, name)]
        return image

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingRecord):
            return NotImplemented
        ours, theirs = _to_arrays(self), _to_arrays(other)
        return ours.keys() == theirs.keys() and all(
            np.array_equal(ours[name], theirs[name], equal_nan=ours[name].dtype.kind == 'f')
            for name in ours
        )

    __hash__ = None

    @property
    def exits(self) -> int:
        """K."""
        return len(self.detections)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; without the paths."""
        arrays = [self.ids, self.difficulty, *(self.column(name) for name in _OPTIONAL)]
        for detections in (*self.detections, *(self.view or ())):
            arrays += [
                detections.boxes,
                detections.scores,
                detections.categories,
                detections.offsets,
            ]
        return sum(array.nbytes for array in arrays if array is not None)

    def column(self, name: str) -> np.ndarray | None:
        """What images have under a name, say ``losses`` or ``gflops``; None if they lack it."""
        return getattr(self, _ATTRIBUTES.get(name, name))

    def take(self, images: Sequence[int]) -> 'RoutingRecord':
        """A record of some images, in that order."""
        rows = np.asarray(images, np.int64)
        columns = {
            _ATTRIBUTES.get(name, name): values[rows]
            for name in ('id', 'difficulty', *_OPTIONAL)
            if (values := self.column(name)) is not None
        }
        for name in _DETECTIONS:
            if getattr(self, name) is not None:
                columns[name] = [detections.take(rows) for detections in getattr(self, name)]
        return replace(self, files=[self.files[row] for row in rows], **columns)

    def take_exits(self, exits: Sequence[int]) -> 'RoutingRecord':
        """A record of some exits, in that order."""
        exits = list(exits)
        columns = {
            _ATTRIBUTES.get(name, name): values[:, exits]
            for name in _BY_EXIT
            if (values := self.column(name)) is not None
        }
        for name in ('gflops', 'latencies', *_DETECTIONS):
            if getattr(self, name) is not None:
                columns[name] = [getattr(self, name)[exit] for exit in exits]
        return replace(self, **columns)


def join_records(records: Sequence[RoutingRecord]) -> RoutingRecord:
    """Records of different images as one, in order, with the first one's costs and provenance.

    Raises:
        UsageError: If there is none, or images differ in what they have.
    """
    names = [{name for name in _OPTIONAL if part.column(name) is not None} for part in records]
    if not names or any(columns != names[0] for columns in names):
        raise UsageError('records of different images can be joined if they have the same columns')
    columns = {
        _ATTRIBUTES.get(name, name): np.concatenate([part.column(name) for part in records])
        for name in ('id', 'difficulty', *names[0])
    }
    for name in _DETECTIONS:
        parts = [getattr(part, name) for part in records]
        if parts[0] is not None:
            columns[name] = [_join_detections(exit) for exit in zip(*parts)]
    files = [file for part in records for file in part.files]
    return replace(records[0], files=files, **columns)


def _join_detections(parts: Sequence[Detections]) -> Detections:
    offsets = np.cumsum([0, *(count for part in parts for count in np.diff(part.offsets))])
    arrays = [
        np.concatenate([getattr(part, name) for part in parts])
        for name in ('boxes', 'scores', 'categories')
    ]
    return Detections(*arrays, offsets.astype(np.int64))


def write_record(record: RoutingRecord, path: str | Path) -> None:
    """Write a record, whole or not at all.

    Args:
        record (RoutingRecord): Numbers come back as they are.
        path (str or Path): Where to; folders are made, a file that is there is replaced.

    Raises:
        UsageError: If the record is empty, if lengths do not fit or a number is not finite.
    """
    if not len(record):
        raise UsageError('the record has no images: there is nothing to write')
    arrays = _to_arrays(record)
    _check(arrays, 'the record')
    write_atomically(lambda file: np.savez_compressed(file, **arrays), path)


def read_record(path: str | Path) -> RoutingRecord:
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


def require_columns(record: RoutingRecord, *names: str, what: str = 'the record') -> None:
    """Raise a `UsageError` unless images have, say, ``losses``, which old records may lack."""
    for name in names:
        if record.column(name) is None:
            raise UsageError(
                f'{what} lacks {name} of its images: make it anew with tools/record.py'
            )


def _to_arrays(record: RoutingRecord) -> dict[str, np.ndarray]:
    arrays = dict(
        format=np.array(_FORMAT),
        version=np.array(_VERSION),
        gflops=np.array(record.gflops, np.float64),
        latencies=np.array(record.latencies, np.float64),
        provenance=np.array(json.dumps(record.provenance, default=str)),
    )
    for name, kind in {**_REQUIRED, **_OPTIONAL}.items():
        if record.column(name) is not None:
            arrays[f'image_{name}'] = np.asarray(record.column(name), kind)
    for name in _DETECTIONS:
        for exit, detections in enumerate(getattr(record, name) or ()):
            for part, kind in _PARTS.items():
                arrays[f'{name}{exit}_{part}'] = np.asarray(getattr(detections, part), kind)
    return arrays


def _stack(values: Sequence, name: str, kind: type) -> np.ndarray:
    try:
        return np.array(values, kind)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'{name} of the record are not numbers of one shape for all images'
        ) from error


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
    if 'image_frame' in names:
        shapes['image_frame'] = (images, 4)
    if 'image_features' in names:
        shapes['image_features'] = (images, arrays['image_features'].size // images)
    for name in _DETECTIONS[: 1 + (f'{_DETECTIONS[1]}0_boxes' in arrays)]:
        for exit in range(exits):
            count = np.size(arrays.get(f'{name}{exit}_scores', ()))
            shapes.update(
                {f'{name}{exit}_{part}': (count,) for part in ('scores', 'categories', 'images')}
            )
            shapes[f'{name}{exit}_boxes'] = (count, 4)
    return shapes


def _from_arrays(arrays: Mapping[str, np.ndarray], provenance: dict) -> RoutingRecord:
    columns = {
        _ATTRIBUTES.get(name, name): arrays[f'image_{name}'].astype(kind, copy=False)
        for name, kind in {**_REQUIRED, **_OPTIONAL}.items()
        if f'image_{name}' in arrays and name != 'file'
    }
    exits = len(arrays['gflops'])
    for name in _DETECTIONS:
        if f'{name}0_boxes' in arrays:
            columns[name] = [
                _unpack(arrays, f'{name}{exit}', len(columns['ids'])) for exit in range(exits)
            ]
    return RoutingRecord(
        **columns,
        files=arrays['image_file'].tolist(),
        gflops=arrays['gflops'].tolist(),
        latencies=arrays['latencies'].tolist(),
        provenance=provenance,
    )


def _unpack(arrays: Mapping[str, np.ndarray], prefix: str, images: int) -> Detections:
    """Detections of one exit. Files of earlier releases hold doubles."""
    boxes, scores, categories, image = (
        arrays[f'{prefix}_{part}'].astype(kind, copy=False) for part, kind in _PARTS.items()
    )
    if (np.diff(image) < 0).any():
        order = np.argsort(image, kind='stable')
        boxes, scores, categories = boxes[order], scores[order], categories[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(image, minlength=images))])
    return Detections(boxes, scores, categories, offsets.astype(np.int64))


def require_of_detector(
    provenance: Mapping, recorded_exits: int, exits: int, checkpoint: str, digest: str = ''
) -> None:
    """Refuse a record that cannot be of a detector, and warn of one that is of other weights.

    Args:
        provenance (Mapping): Of the record, also one of videos.
        recorded_exits (int): How many exits the record has.
        exits (int): How many the detector has.
        checkpoint (str): The detector's file, '' if that is not known.
        digest (str): Its `exits_digest`, '' if that is not known. A record that lacks its own goes
            by the name of the file. Defaults to ''.

    Raises:
        UsageError: If the record has another number of exits.
    """
    other = str(provenance.get('checkpoint', checkpoint))
    if recorded_exits != exits:
        raise UsageError(
            f"a record, of '{other}', has {recorded_exits} exits and this detector {exits}: record "
            'with this config and checkpoint'
        )
    recorded = provenance.get('exits_digest')
    if recorded and digest:
        if recorded != digest:
            warnings.warn(
                f"a record is of '{other}', whose exits have other weights than those of "
                f"'{checkpoint}'"
            )
    elif checkpoint and Path(other).name != Path(checkpoint).name:
        warnings.warn(f"a record is of '{other}', not of '{checkpoint}': is it the same detector?")
