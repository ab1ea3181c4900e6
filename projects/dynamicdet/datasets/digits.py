"""`digits`: a detection data set that every machine can make in seconds, offline.

Real handwriting (scikit-learn's 1,797 digits of 8x8 pixels) drawn over real photographs (those
that scikit-image and scikit-learn ship in their wheels), with boxes and masks in COCO format.

Half of the images are easy: one or two large digits in full contrast on a blurred photo. Half are
hard: five to ten small, faint ones, some overlapping, on the sharp photo. Inside each half the
difficulty varies continuously. Each image's entry in the annotation file carries, **for analysis
only** (no model may read them):

    difficulty   float in [0, 1], below 0.5 in the easy half, above in the hard half
    recipe       the factors that made it: number, size, overlap, contrast, clutter (see `FACTORS`)
    photo, crop  where the background comes from: file name, [x1, y1, x2, y2] in its pixels

and each annotation carries `sample`, the row in scikit-learn's data. The splits share neither a
sample nor a pixel of a photo. (Who wrote a sample is not published, so writers may be shared.)
"""
import json
import operator
import os
import shutil
import uuid
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import cv2
import numpy as np
from pycocotools import mask as mask_utils

CLASSES = tuple('0123456789')
SPLITS = ('train', 'val', 'test')
SIZES = dict(train=3000, val=500, test=500)

# Raise it whenever the same arguments give other images or annotations.
VERSION = 1

# Photographs inside the wheels (scikit-image 0.18 to 0.26), read as files: `skimage.data` may
# download. Left out: drawings, text, microscopy, and the second view of the motorcycle.
PHOTOS = (
    ('skimage', 'data/astronaut.png'),
    ('skimage', 'data/brick.png'),
    ('skimage', 'data/camera.png'),
    ('skimage', 'data/chelsea.png'),
    ('skimage', 'data/coffee.png'),
    ('skimage', 'data/coins.png'),
    ('skimage', 'data/grass.png'),
    ('skimage', 'data/gravel.png'),
    ('skimage', 'data/hubble_deep_field.jpg'),
    ('skimage', 'data/moon.png'),
    ('skimage', 'data/motorcycle_left.png'),
    ('skimage', 'data/rocket.jpg'),
    ('sklearn', 'datasets/images/china.jpg'),
    ('sklearn', 'datasets/images/flower.jpg'),
)

# Each factor's (easiest, hardest) value in the easy half, then in the hard half. Chosen by eye on
# contact sheets: easy digits read at a glance, hard ones are found on a second look.
FACTORS = dict(
    number=((1, 2), (5, 10)),  # digits in the image
    size=((0.55, 0.32), (0.20, 0.11)),  # a digit's height / the image's
    overlap=((0.0, 0.0), (0.1, 0.4)),  # chance that a digit is put against an earlier one
    contrast=((1.0, 0.85), (0.65, 0.35)),  # opacity of the ink
    clutter=((0.0, 0.2), (0.7, 1.0)),  # 1 is the sharp photo, 0 the most blurred one
)

MIN_VISIBLE = 0.5  # no digit is hidden by more than half
MIN_IMAGE_SIZE = 64  # the smallest digits are then 7 pixels high, about their original size
CELL = 8  # pixels per original pixel in the enlarged handwriting; larger looks the same
MARGIN = 2  # original pixels of empty border, so that strokes end inside the picture
SMOOTH = 0.25  # blur of the enlarged raster, in original pixels; hides its steps
SHARPEN = 2.0, 1.5  # unsharp mask, share and reach in original pixels; opens small loops
STROKE = 0.55  # ink level at a stroke's edge; higher breaks thin strokes. These three by eye
BLUR = 0.04  # the strongest blur's sigma / image size; by eye
JPEG_QUALITY = 90
TRIES = 60  # places tried for a digit, each 2 % smaller, before it is left out


class Sources(NamedTuple):
    """What images are made from.

    Attributes:
        inks (ndarray): Enlarged handwriting, (1797, S, S) uint8.
        labels (ndarray): Digit of each, (1797,) in [0, 9].
        samples (dict): Split -> rows of `inks` that belong to it.
        photos (dict): File name -> (H, W, 3) uint8, BGR.
    """
    inks: np.ndarray
    labels: np.ndarray
    samples: dict
    photos: dict


def make_digits(root, sizes: dict = SIZES, image_size: int = 128, seed: int = 0,
                progress: Optional[Callable[[int, int], None]] = None) -> Path:
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
    stamp = _stamp(sizes, image_size, seed)
    home = Path(root).resolve()
    if _is_made(home, stamp):
        return Path(root)
    home.parent.mkdir(parents=True, exist_ok=True)
    with _lock(home.parent / f'.{home.name}.lock'):
        if not _is_made(home, stamp):
            _make(home, stamp, progress)
    return Path(root)


def load_sources() -> Sources:
    """Read handwriting and photographs from the installed packages; downloads nothing."""
    if not (find_spec('sklearn') and find_spec('skimage')):
        raise ImportError('digits needs: pip install scikit-learn scikit-image')
    from sklearn.datasets import load_digits
    digits = load_digits()
    inks = np.stack([enlarge(image) for image in digits.images])
    return Sources(inks, digits.target, split_samples(digits.target), _load_photos())


def split_samples(labels: np.ndarray) -> dict:
    """Share the handwriting out, the same way for every seed: 70 %, 15 %, 15 % of each class.

    Args:
        labels (ndarray): (N,) digits.

    Returns:
        dict: Split -> sorted rows.
    """
    # Rank among the samples of its class; 20 ranks in turn are 14 train, 3 val, 3 test.
    rank = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    turn = rank % 20
    split = (turn >= 14).astype(int) + (turn >= 17)
    return {name: np.flatnonzero(split == i) for i, name in enumerate(SPLITS)}


def split_region(shape: tuple, photo: int, split: str) -> tuple:
    """The part of a photo that belongs to a split: a third of its longer side.

    Which third changes from photo to photo, so that no split has all the skies.

    Args:
        shape (tuple): The photo's height, width, ...
        photo (int): Its place in `PHOTOS`.
        split (str): One of `SPLITS`.

    Returns:
        tuple: x1, y1, x2, y2 in pixels, ends excluded.
    """
    height, width = shape[:2]
    third = (SPLITS.index(split) + photo) % 3
    longer = max(height, width)
    start, end = longer * third // 3, longer * (third + 1) // 3
    return (start, 0, end, height) if width >= height else (0, start, width, end)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge an 8x8 sample with values in [0, 16] to a smooth uint8 map with a border."""
    padded = np.pad(image.astype(np.float32), MARGIN) * (255 / 16)
    side = padded.shape[0] * CELL
    large = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    large = cv2.GaussianBlur(large, (0, 0), SMOOTH * CELL)
    share, reach = SHARPEN
    large += share * (large - cv2.GaussianBlur(large, (0, 0), reach * CELL))
    return large.clip(0, 255).astype(np.uint8)


def make_image(sources: Sources, split: str, index: int, size: int, seed: int) -> tuple:
    """Make one image; odd indices are hard.

    Returns:
        tuple: The picture (size, size, 3) uint8 BGR; the map of visible digits (size, size) int,
        -1 for background, else a row of the list; the list of sample rows; the facts for its
        entry in the annotation file.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    difficulty, recipe = draw_recipe(rng, hard=index % 2 == 1)
    photo, origin = draw_background(rng, sources.photos, split, size)
    picture, owner, rows = _draw_digits(rng, sources, split, _blur(photo, recipe), recipe)
    recipe['number'] = len(rows)
    return picture, owner, rows, dict(difficulty=difficulty, recipe=recipe, **origin)


def draw_recipe(rng: np.random.Generator, hard: bool) -> tuple:
    """Draw difficulty (float in [0, 1]) and the value of each factor (dict)."""
    # One level for the image, and each factor near it: factors agree, but are not the same.
    levels = np.clip(rng.uniform() + rng.uniform(-0.25, 0.25, len(FACTORS)), 0, 1)
    recipe = {}
    for (name, halves), level in zip(FACTORS.items(), levels):
        easiest, hardest = halves[hard]
        recipe[name] = round(float(easiest + level * (hardest - easiest)), 4)
    recipe['number'] = round(recipe['number'])
    return round(float(hard + levels.mean()) / 2, 4), recipe


def draw_background(rng: np.random.Generator, photos: dict, split: str, size: int) -> tuple:
    """Crop a square from the split's part of a photo.

    Returns:
        tuple: (size, size, 3) uint8; dict with the `photo`'s name and the `crop`.
    """
    number = int(rng.integers(len(photos)))
    name, photo = list(photos.items())[number]
    x1, y1, x2, y2 = split_region(photo.shape, number, split)
    # Close to the largest square: parts are small, and enlarging them more blurs the hard half.
    side = int(min(x2 - x1, y2 - y1) * rng.uniform(0.75, 1))
    x, y = int(rng.integers(x1, x2 - side + 1)), int(rng.integers(y1, y2 - side + 1))
    # Cut first, resize after, so that no pixel beyond the crop has a part in the result.
    crop = photo[y:y + side, x:x + side]
    if rng.uniform() < 0.5:
        crop = crop[:, ::-1]
    way = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    crop = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=way)
    return crop, dict(photo=name, crop=[x, y, x + side, y + side])


def _blur(photo, recipe):
    # Squared, so that all of the hard half (clutter from 0.7) is practically sharp.
    sigma = BLUR * photo.shape[0] * (1 - recipe['clutter'])**2
    return cv2.GaussianBlur(photo, (0, 0), sigma) if sigma > 0 else photo


def _draw_digits(rng, sources, split, photo, recipe):
    size = photo.shape[0]
    picture, owner, rows, areas = photo.copy(), np.full((size, size), -1), [], []
    for _ in range(recipe['number']):
        row = int(rng.choice(sources.samples[split]))
        touch = bool(rows) and rng.uniform() < recipe['overlap']
        placed = _place(rng, sources.inks[row], recipe['size'] * size, owner, areas, touch)
        if placed is None:
            continue
        alpha, window = placed
        picture[window] = _ink(rng, picture[window], photo[window], alpha, recipe['contrast'])
        owner[window][alpha >= 0.5] = len(rows)
        areas.append((alpha >= 0.5).sum())
        rows.append(row)
    return picture, owner, rows


def _place(rng, ink, height, owner, areas, touch):
    """Find a place: the digit's alpha (h, w) in [0, 1] and its window, or None."""
    angle, height = rng.uniform(-15, 15), height * rng.uniform(0.85, 1.15)
    for _ in range(TRIES):
        alpha = _stroke(ink, height, angle)
        (h, w), room = alpha.shape, np.array(owner.shape) - alpha.shape
        corner = rng.integers(0, room + 1)
        if touch:
            corner = _beside(rng, owner, int(rng.integers(len(areas))), alpha.shape, room)
        window = np.s_[corner[0]:corner[0] + h, corner[1]:corner[1] + w]
        if _fits(owner, owner[window], alpha >= 0.5, areas, touch):
            return alpha, window
        height *= 0.98
    return None


def _beside(rng, owner, other, shape, room):
    """A corner (y, x) that puts a digit's centre near an edge of an earlier digit."""
    ys, xs = np.nonzero(owner == other)
    centre = np.array([ys.mean(), xs.mean()])
    angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(shape[0] * shape[1])
    # In shares of the digit's size: nearer hides too much, farther does not touch.
    shift = rng.uniform(0.5, 1.0) * reach * np.array([np.sin(angle), np.cos(angle)])
    return np.clip(centre + shift - np.array(shape) / 2, 0, room).astype(int)


def _fits(owner, below, mask, areas, touch):
    """Whether a digit may be drawn over `below`, its window of `owner`."""
    if not touch:
        return (below < 0).all()
    hidden = np.bincount(below[mask] + 1, minlength=len(areas) + 1)[1:]
    visible = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:] - hidden
    return hidden.any() and (visible >= MIN_VISIBLE * np.array(areas)).all()


def _stroke(ink, height, angle):
    """Turn an enlarged sample into a pen stroke `height` pixels high: alpha in [0, 1], cut."""
    scale = height / (8 * CELL)
    side = int(np.ceil(ink.shape[0] * scale))
    turn = cv2.getRotationMatrix2D(((ink.shape[0] - 1) / 2, ) * 2, angle, scale)
    turn[:, 2] += (side - ink.shape[0]) / 2
    level = cv2.warpAffine(ink, turn, (side, side)).astype(np.float32) / 255
    # Steep enough for an edge of one or two pixels at every size.
    alpha = np.clip((level - STROKE) * height / 6 + 0.5, 0, 1)
    ys, xs = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[ys[0]:ys[-1] + 1, xs[0]:xs[-1] + 1]


def _ink(rng, picture, photo, alpha, contrast):
    """Draw with a light or dark colour, whichever is farther from what lies below."""
    mask = alpha >= 0.5
    shade = rng.integers(0, 100, 3)
    colour = 255 - shade if picture[mask].mean() < 128 else shade
    # Faint ink lets the photo through, never an earlier digit: that one is hidden.
    stroke = photo * (1 - contrast) + colour * contrast
    return np.rint(picture + alpha[..., None] * (stroke - picture)).astype(np.uint8)


def _load_photos():
    photos = {}
    for package, path in PHOTOS:
        folder = find_spec(package).submodule_search_locations[0]
        photo = cv2.imread(str(Path(folder, path)))
        if photo is None:
            raise ImportError(f'{package} is installed without {path}: install its wheel again')
        photos[Path(path).name] = photo
    return photos


def _stamp(sizes, image_size, seed):
    """Check the arguments; what identifies the data set."""
    if set(sizes) != set(SPLITS):
        raise ValueError(f'sizes must give train, val and test, got {sorted(sizes)}')
    counts = {split: _whole(f'sizes[{split!r}]', sizes[split], 0) for split in SPLITS}
    return dict(
        version=VERSION, seed=_whole('seed', seed, 0),
        image_size=_whole('image_size', image_size, MIN_IMAGE_SIZE), sizes=counts)


def _whole(name, value, least):
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
    found = None
    try:
        found = [json.loads(_annotations(home, s).read_text())['info']['recipe'] for s in SPLITS]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not a data set of ours
    if found == [stamp] * len(SPLITS):
        return True
    what = f'a digits data set made with {found[0]}' if found else 'something else'
    raise FileExistsError(
        f'{home} holds {what}, and digits was asked for {stamp}: give another root, or move or '
        'remove that one')


def _annotations(home, split):
    return home / 'annotations' / f'instances_{split}.json'


@contextmanager
def _lock(path):
    """Hold a lock that the system frees when the process ends, however it ends."""
    import fcntl  # here, because it is POSIX only, and importing the package is not
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(home, stamp, progress):
    """Build beside `home`, then rename. Called under the lock."""
    prefix = f'.{home.name}.digits-part-'
    for left in home.parent.glob(f'{prefix}*'):  # of a killed run: under the lock, nobody's
        shutil.rmtree(left)
    part = home.parent / (prefix + uuid.uuid4().hex)
    try:
        _write(part, stamp, progress)
        os.rename(part, home)  # fails, changing nothing, if files came to `home` meanwhile
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(part, stamp, progress):
    sources = load_sources()
    done, total = 0, sum(stamp['sizes'].values())
    (part / 'annotations').mkdir(parents=True)
    for split, count in stamp['sizes'].items():
        (part / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            entry, objects = _write_image(part / split, sources, split, index, stamp)
            images.append(entry)
            annotations += [dict(id=len(annotations) + i + 1, **o) for i, o in enumerate(objects)]
            done += 1
            if progress is not None:
                progress(done, total)
        _annotations(part, split).write_text(json.dumps(dict(
            info=dict(description='handwritten digits over photographs', recipe=stamp),
            licenses=[],
            categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
            images=images, annotations=annotations)))


def _write_image(folder, sources, split, index, stamp):
    """Write one picture; its entry and its objects for the annotation file."""
    size = stamp['image_size']
    picture, owner, rows, facts = make_image(sources, split, index, size, stamp['seed'])
    entry = dict(id=index + 1, file_name=f'{index + 1:06d}.jpg', height=size, width=size, **facts)
    code = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    (folder / entry['file_name']).write_bytes(code.tobytes())
    objects = [
        dict(image_id=entry['id'], category_id=int(sources.labels[row]) + 1, iscrowd=0,
             sample=row, **_outline(owner == i)) for i, row in enumerate(rows)]
    return entry, objects


def _outline(mask):
    """Box [x, y, w, h], area and run lengths (which keep the holes) of a mask."""
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(
        bbox=mask_utils.toBbox(rle).tolist(), area=int(mask_utils.area(rle)),
        segmentation=dict(size=list(rle['size']), counts=rle['counts'].decode()))
