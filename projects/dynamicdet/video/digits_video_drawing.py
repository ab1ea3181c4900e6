"""One video of `digits-video`: what happens in it, and the drawing of its frames.

Nothing is written here. What changes a frame raises `VERSION` in digits_video.py.

A video is a row of **shots** with cuts between them. A shot is a **world**, a part of a photo
larger than the view, over which the camera pans; **items** stand or move in it: digits, and patches
of photos that hide them.

Letters: S the side of the view, T frames of a shot, W x H the world, all in pixels of the view.
"""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from ..datasets.digits_drawing import BLUR, CELL, SPLITS, STROKE, Sources, draw_recipe, split_region

# What kinds of videos there are, in turn. Easy and hard as in `digits`; mixed changes with each
# shot; calm is one shot by a camera that stands, and stands still most of the time.
FACES = ('easy', 'hard', 'mixed', 'calm')

# Chosen by eye on contact sheets. Speeds in shares of S per frame, (least, most) of the easy and
# the hard shots.
VIEW = 0.6, 0.8  # side of the view / shorter side of the split's part of a photo
LONGEST = 2.0  # the world's longer side / its shorter one, at most
CAMERA_SPEED = (0.004, 0.015), (0.008, 0.04)
ITEM_SPEED = (0.004, 0.012), (0.008, 0.03)
STRETCH = 8, 24  # frames from one change of motion to the next
MOTIONS = ('still', 'camera', 'items', 'both')
MOTION_SHARES = (0.35, 0.25, 0.25, 0.15)
CALM_SHARES = (0.7, 0.0, 0.3, 0.0)
EMPTY = 0.06  # chance that a shot has no digits
MOBILE = 0.7  # chance that an item moves at all
SHUTTER = 0.7  # share of the time of a frame that it is open: what a moving thing is smeared over
LIGHTS = ('even', 'drift', 'switch')
LIGHT_SHARES = (0.6, 0.3, 0.1), (0.4, 0.3, 0.3)
PATCHES = (0.75, 0.25, 0.0), (0.3, 0.5, 0.2)  # chances of 0, 1 and 2 patches
PATCH_SIZE = 0.2, 0.4  # side of a patch / S
NOISE = 1.0, 3.0  # of the sensor, standard deviation in gray levels
SHORTEST_SHOT = 12  # frames
STILL = 0.02  # pixels per frame that do not count as motion; and change of light


class Item(NamedTuple):
    """A digit or a patch in the world.

    Attributes:
        path (ndarray): (T, 2) float, its center x, y in the world.
        height (ndarray): (T,), of a digit's 8 original pixels; of a patch.
        angle (ndarray): (T,), degrees.
        row (int): Of the handwriting; -1: a patch.
        ink (ndarray): The enlarged handwriting (uint8), or the patch (h, w, 3).
        color (ndarray): (3,), of the ink. Of a patch: unused.
        contrast (float): Opacity, in [0, 1].
    """

    path: np.ndarray
    height: np.ndarray
    angle: np.ndarray
    row: int
    ink: np.ndarray
    color: np.ndarray
    contrast: float


class Shot(NamedTuple):
    """What happens between two cuts.

    Attributes:
        world (ndarray): (H, W, 3) uint8, BGR.
        camera (ndarray): (T, 2) float, the view's center x, y.
        light (ndarray): (T,), what gray levels are multiplied by.
        items (list[Item]): Those behind first.
        facts (dict): For the annotation file.
    """

    world: np.ndarray
    camera: np.ndarray
    light: np.ndarray
    items: list[Item]
    facts: dict


class DrawnFrame(NamedTuple):
    """A drawn frame.

    Attributes:
        picture (ndarray): (S, S, 3) uint8, BGR.
        owner (ndarray): (S, S) int, -1 for background and patches, else a place in ``digits``.
        digits (list): ``(instance, row, visible)`` of each digit of which something is seen: its
            number in the video, its row of the handwriting, the share of it that is seen.
        facts (dict): For the annotation file.
    """

    picture: np.ndarray
    owner: np.ndarray
    digits: list[tuple[int, int, float]]
    facts: dict


def make_video(
    sources: Sources, split: str, index: int, size: int, length: int, seed: int
) -> tuple[dict, Iterator[DrawnFrame]]:
    """Make one video.

    Returns:
        tuple: Facts of the video, and its frames, drawn as they are asked for.
    """
    # The 1 keeps its numbers apart from those of image `index` of `digits`.
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    face = FACES[index % len(FACES)]
    shots = [
        _draw_shot(rng, sources, split, size, frames, hard, face == 'calm')
        for frames, hard in _draw_plan(rng, face, length)
    ]
    facts = dict(face=face, shots=[shot.facts for shot in shots])
    return facts, _draw_frames(rng, shots, size)


def _draw_plan(rng: np.random.Generator, face: str, length: int) -> list[tuple[int, bool]]:
    """How many frames each shot has, and whether it is hard."""
    most = min(3, length // SHORTEST_SHOT)
    least = 2 if face == 'mixed' else 1
    count = 1 if face == 'calm' else max(1, int(rng.integers(min(least, most), most + 1)))
    spare = length - count * SHORTEST_SHOT if count > 1 else 0
    cuts = np.sort(rng.integers(0, spare + 1, count - 1)) + SHORTEST_SHOT * np.arange(1, count)
    frames = np.diff([0, *cuts, length]).tolist()
    first = face == 'hard' or (face != 'easy' and rng.uniform() < 0.5)
    return [
        (frames[place], bool(first) ^ (face == 'mixed' and place % 2 == 1))
        for place in range(count)
    ]


def _draw_shot(rng, sources, split, size, length, hard, calm) -> Shot:
    difficulty, recipe = draw_recipe(rng, hard)
    del recipe['overlap']  # digits meet as they move
    world, origin = _draw_world(rng, sources.photos, split, size, recipe['clutter'])
    moves = _draw_motions(rng, length, CALM_SHARES if calm else MOTION_SHARES)
    reach = np.array([[size / 2, size / 2], [world.shape[1] - size / 2, world.shape[0] - size / 2]])
    on = np.isin(moves, [1, 3])
    camera = _draw_path(rng, rng.uniform(*reach), on, CAMERA_SPEED[hard], size, reach)
    on = moves >= 2
    items = _draw_digits(rng, sources, split, world, camera[0], on, recipe, hard, size)
    patches, origins = _draw_patches(rng, sources.photos, split, world, on, hard, size)
    items += patches
    items = [items[place] for place in rng.permutation(len(items))]
    facts = dict(frames=length, difficulty=difficulty, recipe=recipe, sources=[origin, *origins])
    return Shot(world, camera, _draw_light(rng, length, hard), items, facts)


def _draw_region(rng, photos, split) -> tuple[str, np.ndarray, tuple[int, int]]:
    """A photo's name, the split's part of it and where that begins (x, y)."""
    number = int(rng.integers(len(photos)))
    name, photo = list(photos.items())[number]
    x1, y1, x2, y2 = split_region(photo.shape, number, split)
    return name, photo[y1:y2, x1:x2], (x1, y1)


def _draw_world(rng, photos, split, size, clutter) -> tuple[np.ndarray, dict]:
    """A part of a photo, enlarged and blurred; and where it comes from."""
    name, part, (x1, y1) = _draw_region(rng, photos, split)
    short = min(part.shape[:2])
    h, w = (min(side, int(short * LONGEST)) for side in part.shape[:2])
    y, x = int(rng.integers(part.shape[0] - h + 1)), int(rng.integers(part.shape[1] - w + 1))
    scale = size / (short * rng.uniform(*VIEW))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    cut = np.ascontiguousarray(part[y : y + h, x : x + w])
    world = cv2.resize(cut, None, fx=scale, fy=scale, interpolation=way)
    sigma = BLUR * size * (1 - clutter) ** 2
    world = cv2.GaussianBlur(world, (0, 0), sigma) if sigma > 0 else world
    return world, dict(photo=name, crop=[x1 + x, y1 + y, x1 + x + w, y1 + y + h])


def _draw_motions(rng, length, shares) -> np.ndarray:
    """(T,), the place in `MOTIONS` of what moves towards each frame."""
    moves = []
    while len(moves) < length:
        moves += [int(rng.choice(len(MOTIONS), p=shares))] * int(
            rng.integers(STRETCH[0], STRETCH[1] + 1)
        )
    return np.array(moves[:length])


def _draw_path(rng, start, on, speeds, size, reach) -> np.ndarray:
    """(T, 2), a way that goes on while ``on``, (T,) bool, in a new direction after each stop, and
    turns back at the ends of its ``reach``, ((x, y), (x, y))."""
    steps = np.zeros((len(on), 2))
    for t in range(1, len(on)):
        if on[t] and not on[t - 1] or t == 1:
            angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*speeds) * size
        if on[t]:
            steps[t] = speed * np.cos(angle), speed * np.sin(angle)
    return _fold(start + np.cumsum(steps, 0), *reach)


def _fold(path: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Reflect what is beyond two ends, as often as needed; the middle where there is no room
    between them."""
    room = np.maximum(high - low, 1e-6)
    away = np.mod(path - low, 2 * room)
    return np.where(high > low, low + np.minimum(away, 2 * room - away), (low + high) / 2)


def _draw_digits(rng, sources, split, world, view, on, recipe, hard, size) -> list[Item]:
    """Digits all over the world, about the recipe's number in a view; the first one where the
    camera begins."""
    height, width = world.shape[:2]
    # Fewer than the world has room for: digits at the edge of a view count in two.
    number = max(1, round(recipe['number'] * (0.5 + 0.5 * height * width / size**2)))
    if rng.uniform() < EMPTY:
        number = recipe['number'] = 0
    gray = cv2.blur(cv2.cvtColor(world, cv2.COLOR_BGR2GRAY), (15, 15))
    items: list[Item] = []
    for count in range(number):
        row = int(rng.choice(sources.samples[split]))
        tall = recipe['size'] * size * rng.uniform(0.85, 1.15)
        reach = np.array([[tall / 2, tall / 2], [width - tall / 2, height - tall / 2]])
        start = (
            view + rng.uniform(-0.25, 0.25, 2) * size
            if count == 0
            else _free(rng, items, tall, reach)
        )
        moves = on & (rng.uniform() < MOBILE)
        path = _draw_path(rng, start, moves, ITEM_SPEED[hard], size, reach)
        # Size and angle change as it moves.
        phase = rng.uniform(0, 2 * np.pi) + np.cumsum(moves) * rng.uniform(0.02, 0.08)
        items.append(
            Item(
                path,
                tall * (1 + 0.2 * np.sin(phase)),
                rng.uniform(-15, 15) + 10 * np.cos(phase),
                row,
                sources.inks[row],
                _color(rng, gray, path),
                recipe['contrast'],
            )
        )
    return items


def _free(rng, items, tall, reach) -> np.ndarray:
    """A place that is not taken at the start, if one is found soon."""
    for _ in range(20):
        place = rng.uniform(*reach)
        if all(
            np.abs(place - item.path[0]).max() > 0.5 * (tall + item.height[0]) for item in items
        ):
            break
    return place


def _color(rng, gray, path) -> np.ndarray:
    """Light or dark, whichever is farther from what lies along the path."""
    shade = rng.integers(0, 100, 3)
    x, y = np.rint(path).astype(int).T
    along = gray[y.clip(0, gray.shape[0] - 1), x.clip(0, gray.shape[1] - 1)]
    return 255 - shade if along.mean() < 128 else shade


def _draw_patches(rng, photos, split, world, on, hard, size) -> tuple[list[Item], list[dict]]:
    """Pieces of photos, which hide what is behind them; and where they come from."""
    items, origins = [], []
    for _ in range(int(rng.choice(3, p=PATCHES[hard]))):
        name, part, (x1, y1) = _draw_region(rng, photos, split)
        side = int(size * rng.uniform(*PATCH_SIZE))
        cut = min(side, *part.shape[:2])
        y, x = (int(rng.integers(room - cut + 1)) for room in part.shape[:2])
        patch = cv2.resize(np.ascontiguousarray(part[y : y + cut, x : x + cut]), (side, side))
        reach = np.array([[0, 0], [world.shape[1], world.shape[0]]])
        path = _draw_path(rng, rng.uniform(*reach), on, ITEM_SPEED[hard], size, reach)
        items.append(
            Item(path, np.full(len(on), side), np.zeros(len(on)), -1, patch, np.zeros(3), 1.0)
        )
        origins.append(dict(photo=name, crop=[x1 + x, y1 + y, x1 + x + cut, y1 + y + cut]))
    return items, origins


def _draw_light(rng, length, hard) -> np.ndarray:
    """(T,), by one of `LIGHTS`."""
    kind, time = rng.choice(LIGHTS, p=LIGHT_SHARES[hard]), np.arange(length)
    light = np.ones(length)
    if kind == 'drift':
        light += rng.uniform(0.1, 0.3) * np.sin(
            rng.uniform(0, 2 * np.pi) + time * rng.uniform(0.03, 0.12)
        )
    if kind == 'switch':
        light[int(rng.integers(length)) :] = rng.uniform(0.35, 0.6)
    return light


def _draw_frames(rng, shots, size) -> Iterator[DrawnFrame]:
    # One sheet of noise, seen through another window in each frame: drawing it anew costs more than
    # all else.
    sheet = rng.normal(0, rng.uniform(*NOISE), (size + 64, size + 64, 3)).astype(np.float32)
    instances = x = 0
    for number, shot in enumerate(shots):
        for t in range(len(shot.camera)):
            # Never the window of the frame before.
            y, x = int(rng.integers(65)), (x + int(rng.integers(1, 65))) % 65
            yield _draw_frame(
                shot, t, number > 0 and t == 0, instances, sheet[y : y + size, x : x + size]
            )
        instances += len(shot.items)


def _draw_frame(shot: Shot, t: int, cut: bool, instances: int, noise: np.ndarray) -> DrawnFrame:
    size = len(noise)
    before = max(t - 1, 0)
    pan = shot.camera[t] - shot.camera[before]
    # OpenCV counts from the center of a pixel.
    photo = cv2.getRectSubPix(
        shot.world, (size, size), tuple(shot.camera[t] - 0.5), patchType=cv2.CV_32F
    )
    photo = _smear(photo, pan)
    picture, owner, visible = photo.copy(), np.full((size, size), -1), []
    for number, item in enumerate(shot.items):
        step = item.path[t] - item.path[before]
        placed = _place(item, t, item.path[t] - shot.camera[t] + size / 2, step - pan, size)
        if placed is None:
            continue
        alpha, window, inside = placed
        mask = alpha[inside] >= 0.5
        layer = (
            item.ink[inside]
            if item.row < 0
            # Faint ink lets the photo through, never another digit: that one is hidden.
            else (photo[window] * (1 - item.contrast) + item.color * item.contrast)
        )
        picture[window] += alpha[inside][..., None] * (layer - picture[window])
        owner[window][mask] = number
        if item.row >= 0:
            visible.append((number, (alpha >= 0.5).sum(), mask.sum()))
    picture = np.rint(picture * shot.light[t] + noise).clip(0, 255).astype(np.uint8)
    owner, digits, hidden = _take_stock(shot.items, owner, visible, instances)
    camera, motion = _motion(shot, t, size)
    # Also the frame before must not have been smeared.
    changes = camera, motion, *_motion(shot, before, size), abs(shot.light[t] - shot.light[before])
    facts = dict(
        difficulty=shot.facts['difficulty'],
        still=bool(t > 0 and max(changes) < STILL),
        cut=cut,
        camera=_round(camera),
        motion=_round(motion),
        light=_round(shot.light[t]),
        occlusion=_round(hidden),
        number=len(digits),
    )
    return DrawnFrame(picture, owner, digits, facts)


def _motion(shot: Shot, t: int, size: int) -> tuple[float, float]:
    """Pixels since the frame before: of the camera, and of the fastest item that is or was in
    view."""
    before, fastest = max(t - 1, 0), 0.0
    for item in shot.items:
        if any(
            np.abs(item.path[at] - shot.camera[at]).max() < size / 2 + item.height[at]
            for at in (before, t)
        ):
            fastest = max(fastest, float(np.hypot(*(item.path[t] - item.path[before]))))
    return float(np.hypot(*(shot.camera[t] - shot.camera[before]))), fastest


def _place(item: Item, t: int, center: np.ndarray, step: np.ndarray, size: int) -> tuple | None:
    """Where an item is in the view, or None.

    Returns:
        tuple: Its alpha, (h, w) in [0, 1]; the window of the view that it is in; the part of it
            that is there.
    """
    reach = len(item.ink) // 2
    if item.row >= 0:
        # A sample of 8 x 8 pixels, its border, turned and smeared.
        reach = int(np.ceil(0.9 * item.height[t] + np.hypot(*step))) + 2
    corner = np.floor(center).astype(int) - reach
    low, high = np.maximum(corner, 0), np.minimum(corner + 2 * reach, size)
    if (low >= high).any():
        return None
    if item.row < 0:
        alpha = np.ones((2 * reach, 2 * reach), np.float32)
    else:
        alpha = _smear(_stroke(item, t, center - corner, 2 * reach), step)
    inside = np.s_[
        low[1] - corner[1] : high[1] - corner[1], low[0] - corner[0] : high[0] - corner[0]
    ]
    return alpha, np.s_[low[1] : high[1], low[0] : high[0]], inside


def _stroke(item: Item, t: int, center: np.ndarray, side: int) -> np.ndarray:
    """The pen stroke of a digit around a center, which may lie between pixels: (side, side) in [0,
    1]."""
    middle = (item.ink.shape[0] - 1) / 2
    turn = cv2.getRotationMatrix2D((middle, middle), item.angle[t], item.height[t] / (8 * CELL))
    turn[:, 2] += center - 0.5 - middle
    level = cv2.warpAffine(item.ink, turn, (side, side)).astype(np.float32) / 255
    # Steep enough for an edge of one or two pixels at every size, as in `digits`.
    return np.clip((level - STROKE) * item.height[t] / 6 + 0.5, 0, 1)


def _smear(picture: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Blur along the way that a thing goes in the time that the shutter is open."""
    length = float(np.hypot(*step)) * SHUTTER
    if length < 1:
        return picture
    side = 2 * int(np.ceil(length / 2)) + 1
    kernel, middle, half = np.zeros((side, side), np.float32), side // 2, step * SHUTTER / 2
    # In 16ths of a pixel.
    ends = [tuple(np.rint((middle + sign * half) * 16).astype(int).tolist()) for sign in (-1, 1)]
    cv2.line(kernel, *ends, 1.0, 1, cv2.LINE_8, 4)
    return cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _take_stock(items, owner, visible, instances) -> tuple[np.ndarray, list, float]:
    """Number what is seen of digits from 0; the largest share of a digit that others hide."""
    counts = np.bincount(owner.ravel() + 1, minlength=len(items) + 1)[1:]
    renumbered, digits, hidden = np.full_like(owner, -1), [], 0.0
    for number, full, inside in visible:
        if inside:
            hidden = max(hidden, 1 - counts[number] / inside)
        if counts[number]:
            renumbered[owner == number] = len(digits)
            digits.append((instances + number, items[number].row, _round(counts[number] / full)))
    return renumbered, digits, hidden


def _round(value: float) -> float:
    return round(float(value), 4)
