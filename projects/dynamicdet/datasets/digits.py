"""`digits`: a detection data set that every machine can make in seconds, offline.

Real handwriting (scikit-learn's 1,797 digits of 8x8 pixels) drawn over real photographs (those
that scikit-image and scikit-learn ship in their wheels), with boxes and masks in COCO format.

Half of the images are easy: one or two large digits in full contrast on a blurred photo. Half are
hard: five to ten small, faint ones, some overlapping, on the sharp photo. Inside each half the
difficulty varies continuously. Each image's entry in the annotation file carries, **for analysis
only** (no model may read them):

    difficulty   float in [0, 1], below 0.5 in the easy half, above in the hard half
    recipe       its number, size, overlap, contrast, clutter (`FACTORS` in digits_drawing.py)
    photo, crop  where the background comes from: file name, [x1, y1, x2, y2] in its pixels

and each annotation carries `sample`, the row in scikit-learn's data. The splits share neither a
sample nor a pixel of a photo. (Who wrote a sample is not published, so writers may be shared.)
"""

import json
import operator
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from .digits_drawing import SPLITS, load_sources, make_image

CLASSES = tuple('0123456789')
SIZES = dict(train=3000, val=500, test=500)

# Raise it whenever the same arguments give other images or annotations.
VERSION = 1

MIN_IMAGE_SIZE = 64  # the smallest digits are then 7 pixels high, about their original size
JPEG_QUALITY = 90


def make_digits(
    root,
    sizes: dict = SIZES,
    image_size: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the data set at `root`, unless it is there already.

    Writes `{train,val,test}/000001.jpg ...` and `annotations/instances_{train,val,test}.json`.
    The set is built in a hidden sibling folder and renamed when complete, so `root` is never
    half made. A second process that wants the same set waits for the first one. An image depends
    on the seed, its split, its index and `image_size` alone, not on the counts.

    Args:
        root (str | Path): Folder to make; missing, empty, or made by this function before.
        sizes (dict): Images per split, all of train, val and test; 0 gives an empty split.
        image_size (int): Height and width of the images, at least 64.
        seed (int): At least 0. Same seed, same machine: identical bytes.
        progress (Callable, optional): Called with (images made, images in all) after each one.

    Returns:
        Path: `root`.

    Raises:
        ValueError: On bad arguments.
        FileExistsError: When `root` holds something else; nothing is ever removed there.
        ImportError: When scikit-learn or scikit-image is missing.
    """
    kind = Kind('digits', 'handwritten digits over photographs', ('images',), _write_image)
    return make_once(root, _stamp(sizes, image_size, seed), kind, progress)


class Kind(NamedTuple):
    """What sets are made of: a name, a description, the lists of an annotation file beside its
    annotations, and how one picture or video is written, see `_write_image`."""

    name: str
    description: str
    lists: tuple[str, ...]
    write: Callable


def make_once(root, stamp, kind, progress):
    """Make the set that a stamp identifies, unless it is there; `root`."""
    home = Path(root).resolve()
    if _is_made(home, stamp):
        return Path(root)
    home.parent.mkdir(parents=True, exist_ok=True)
    with _lock(home.parent / f'.{home.name}.lock'):
        if not _is_made(home, stamp):
            _make(home, stamp, kind, progress)
    return Path(root)


def _stamp(sizes, image_size, seed):
    """Check the arguments; what identifies the data set."""
    if set(sizes) != set(SPLITS):
        raise ValueError(f'sizes must give train, val and test, got {sorted(sizes)}')
    counts = {split: require_whole(f'sizes[{split!r}]', sizes[split], 0) for split in SPLITS}
    return dict(
        version=VERSION,
        seed=require_whole('seed', seed, 0),
        image_size=require_whole('image_size', image_size, MIN_IMAGE_SIZE),
        sizes=counts,
    )


def require_whole(name, value, least):
    """A whole number of at least ``least``, or a `ValueError`."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or whole < least:
        raise ValueError(f'{name} must be a whole number, at least {least}, got {value!r}')
    return whole


def _is_made(home, stamp):
    """True: made with this stamp; False: missing or empty; else FileExistsError."""
    if not home.exists() or (home.is_dir() and not any(home.iterdir())):
        return False
    stamps = None
    try:
        stamps = [json.loads(_annotations(home, s).read_text())['info']['recipe'] for s in SPLITS]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not a data set of ours
    if stamps == [stamp] * len(SPLITS):
        return True
    what = f'a digits data set made with {stamps[0]}' if stamps else 'something else'
    raise FileExistsError(
        f'{home} holds {what}, and digits was asked for {stamp}: give another root, or move or '
        'remove that one'
    )


def _annotations(home, split):
    return home / 'annotations' / f'instances_{split}.json'


@contextmanager
def _lock(path):
    """Hold a lock that the system frees when the process ends, however it ends."""
    import fcntl  # here, because it is POSIX only, and importing the package is not

    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(home, stamp, kind, progress):
    """Build beside `home`, then rename. Called under the lock."""
    prefix = f'.{home.name}.{kind.name}-part-'
    for left in home.parent.glob(f'{prefix}*'):  # of a killed run: under the lock, nobody's
        shutil.rmtree(left)
    part = home.parent / (prefix + uuid.uuid4().hex)
    try:
        _write(part, stamp, kind, progress)
        os.rename(part, home)  # fails, changing nothing, if files came to `home` meanwhile
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(part, stamp, kind, progress):
    sources = load_sources()
    done, total = 0, sum(stamp['sizes'].values())
    (part / 'annotations').mkdir(parents=True)
    for split, count in stamp['sizes'].items():
        (part / split).mkdir()
        content = {name: [] for name in (*kind.lists, 'annotations')}
        for index in range(count):
            kind.write(part / split, sources, split, index, stamp, content)
            done += 1
            if progress is not None:
                progress(done, total)
        _annotations(part, split).write_text(
            json.dumps(
                dict(
                    info=dict(description=kind.description, recipe=stamp),
                    licenses=[],
                    categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
                    **content,
                )
            )
        )


def _write_image(folder, sources, split, index, stamp, content):
    """Write one picture; add its entry and its objects to the content of the annotation file."""
    size = stamp['image_size']
    picture, owner, rows, facts = make_image(sources, split, index, size, stamp['seed'])
    entry = dict(id=index + 1, file_name=f'{index + 1:06d}.jpg', height=size, width=size, **facts)
    write_jpeg(folder / entry['file_name'], picture)
    content['images'].append(entry)
    for place, row in enumerate(rows):
        content['annotations'].append(
            dict(
                id=len(content['annotations']) + 1,
                image_id=entry['id'],
                category_id=int(sources.labels[row]) + 1,
                iscrowd=0,
                sample=row,
                **outline(owner == place),
            )
        )


def write_jpeg(path, picture):
    """Write a picture, (H, W, 3), blue, green, red."""
    code = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    path.write_bytes(code.tobytes())


def outline(mask):
    """Box [x, y, w, h], area and run lengths (which keep the holes) of a mask."""
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(
        bbox=mask_utils.toBbox(rle).tolist(),
        area=int(mask_utils.area(rle)),
        segmentation=dict(size=list(rle['size']), counts=rle['counts'].decode()),
    )
