"""One image of `digits`: the handwriting and the photographs, the recipe, and the drawing.

Nothing is written here. What changes an image raises `VERSION` in digits.py.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

SPLITS = ('train', 'val', 'test')

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
CELL = 8  # pixels per original pixel in the enlarged handwriting; larger looks the same
MARGIN = 2  # original pixels of empty border, so that strokes end inside the picture
SMOOTH = 0.25  # blur of the enlarged raster, in original pixels; hides its steps
SHARPEN = 2.0, 1.5  # unsharp mask, share and reach in original pixels; opens small loops
STROKE = 0.55  # ink level at a stroke's edge; higher breaks thin strokes. These three by eye
BLUR = 0.04  # the strongest blur's sigma / image size; by eye
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


def load_sources() -> Sources:
    """Read handwriting and photographs from the installed packages; downloads nothing."""
    if not (find_spec('sklearn') and find_spec('skimage')):
        raise ImportError('digits needs: pip install scikit-learn scikit-image')
    from sklearn.datasets import load_digits

    digits = load_digits()
    inks = np.stack([enlarge(image) for image in digits.images])
    return Sources(inks, digits.target, split_samples(digits.target), _load_photos())


def _load_photos():
    photos = {}
    for package, path in PHOTOS:
        folder = find_spec(package).submodule_search_locations[0]
        photo = cv2.imread(str(Path(folder, path)))
        if photo is None:
            raise ImportError(f'{package} is installed without {path}: install its wheel again')
        photos[Path(path).name] = photo
    return photos


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
    crop = photo[y : y + side, x : x + side]
    if rng.uniform() < 0.5:
        crop = crop[:, ::-1]
    way = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    crop = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=way)
    return crop, dict(photo=name, crop=[x, y, x + side, y + side])


def _blur(photo, recipe):
    # Squared, so that all of the hard half (clutter from 0.7) is practically sharp.
    sigma = BLUR * photo.shape[0] * (1 - recipe['clutter']) ** 2
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
        window = np.s_[corner[0] : corner[0] + h, corner[1] : corner[1] + w]
        if _fits(owner, owner[window], alpha >= 0.5, areas, touch):
            return alpha, window
        height *= 0.98
    return None


def _beside(rng, owner, other, shape, room):
    """A corner (y, x) that puts a digit's center near an edge of an earlier digit."""
    ys, xs = np.nonzero(owner == other)
    center = np.array([ys.mean(), xs.mean()])
    angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(shape[0] * shape[1])
    # In shares of the digit's size: nearer hides too much, farther does not touch.
    shift = rng.uniform(0.5, 1.0) * reach * np.array([np.sin(angle), np.cos(angle)])
    return np.clip(center + shift - np.array(shape) / 2, 0, room).astype(int)


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
    turn = cv2.getRotationMatrix2D(((ink.shape[0] - 1) / 2,) * 2, angle, scale)
    turn[:, 2] += (side - ink.shape[0]) / 2
    level = cv2.warpAffine(ink, turn, (side, side)).astype(np.float32) / 255
    # Steep enough for an edge of one or two pixels at every size.
    alpha = np.clip((level - STROKE) * height / 6 + 0.5, 0, 1)
    ys, xs = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]


def _ink(rng, picture, photo, alpha, contrast):
    """Draw with a light or dark color, whichever is farther from what lies below."""
    mask = alpha >= 0.5
    shade = rng.integers(0, 100, 3)
    color = 255 - shade if picture[mask].mean() < 128 else shade
    # Faint ink lets the photo through, never an earlier digit: that one is hidden.
    stroke = photo * (1 - contrast) + color * contrast
    return np.rint(picture + alpha[..., None] * (stroke - picture)).astype(np.uint8)
