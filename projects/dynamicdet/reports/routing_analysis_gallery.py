"""Which images the page shows, the easiest, the hardest, and those routed the wrong way; and what
is drawn of each: boxes of both exits, as vectors over one JPEG."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from ..routing.curve import split_by_share
from ..routing.evaluation import Mixtures, difficulties_of
from ..routing.record import RoutingRecord
from .figures import EXIT_COLORS

#: Images of each kind.
_COUNT = 4
#: Boxes below this score are not drawn.
MIN_SCORE = 0.3
#: Longest side of a picture that is kept in the page, pixels, and its JPEG quality: about 15 KB
#: each.
_SIDE, _QUALITY = 360, 72
#: Longest side of the frame that boxes are drawn in: letters stay legible on small images.
_FRAME = 320
#: Height of a label's letters in that frame.
LETTERS = 15


def choose_images(
    difficulties: np.ndarray, image_ap: np.ndarray, count: int = _COUNT
) -> Mapping[str, list[int]]:
    """Images to look at, by what the router says of them and what the exits find.

    Args:
        difficulties (np.ndarray): (n,), in [0, 1].
        image_ap (np.ndarray): AP of each image by itself under the cheap and the dear exit, (2, n),
            percent.
        count (int): Of each kind, at most. Defaults to 4.

    Returns:
        dict: ``easiest`` and ``hardest``; ``wrongly_easy``: those that lose most by leaving early
            where half of the images are hard, and ``wrongly_hard``: those that lose most by going
            on. Indices, the most extreme first; only images that lose something are wrongly routed.
    """
    _, is_hard = split_by_share(difficulties, 0.5)
    order = np.argsort(difficulties, kind='stable')
    gain = image_ap[1] - image_ap[0]
    losses = dict(wrongly_easy=np.where(is_hard, 0, gain), wrongly_hard=np.where(is_hard, -gain, 0))
    shown = min(count, max(1, len(order) // 2))
    chosen = dict(easiest=order[:shown].tolist(), hardest=order[::-1][:shown].tolist())
    for name, lost in losses.items():
        worst = np.argsort(-lost, kind='stable')[:count]
        chosen[name] = [int(index) for index in worst if lost[index] > 0]
    return chosen


_GROUPS = dict(
    easiest=('The easiest', 'Lowest difficulty: they leave at the cheap exit first.'),
    hardest=('The hardest', 'Highest difficulty: they go on to the dear exit first.'),
    wrongly_easy=(
        'Wrongly easy',
        'With half of the images hard, these leave at the cheap exit, and the dear one would have '
        'found most more.',
    ),
    wrongly_hard=(
        'Wrongly hard',
        'With half of the images hard, these go on to the dear exit, which finds less than the '
        'cheap one.',
    ),
)


def make_gallery(record: RoutingRecord, coco: COCO) -> list[dict]:
    """The gallery of a record of two exits.

    Args:
        record (RoutingRecord): See `routing.record`.
        coco (COCO): Its ground truth.

    Returns:
        list[dict]: Per kind of images ``title``, ``meaning`` and ``pictures``, as `show_image`
            gives them, with ``id``, unique in the page, and ``caption``.
    """
    image_ap = Mixtures(record, coco).image_ap()
    names = {category['id']: category['name'] for category in coco.cats.values()}
    numbers = str(record.provenance.get('exits', '0 and 1')).split(' and ')
    groups = []
    for kind, indices in choose_images(difficulties_of(record), image_ap).items():
        pictures = []
        for place, index in enumerate(indices):
            image, aps = record[int(index)], image_ap[:, index]
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image['id']], iscrowd=False))
            caption = (
                f'{Path(image["file"]).name}: difficulty {image["difficulty"]:.3f}; AP of this '
                f'image {aps[0]:.0f} by exit {numbers[0]}, {aps[1]:.0f} by exit {numbers[1]}'
            )
            shown = show_image(
                image, numbers, [annotation['bbox'] for annotation in annotations], names
            )
            pictures.append(dict(shown, id=f'{kind}{place}', caption=caption))
        title, meaning = _GROUPS[kind]
        groups.append(dict(title=title, meaning=meaning, pictures=pictures))
    return groups


def show_image(
    image: Mapping,
    exits: Sequence[str],
    objects: Sequence[Sequence[float]],
    names: Mapping[int, str],
) -> dict:
    """An image as it is drawn twice, side by side: with the boxes of a cheap and of a dear exit.

    Args:
        image (Mapping): Entry of a record of two exits.
        exits (Sequence[str]): What the two exits are called.
        objects (Sequence[Sequence[float]]): Annotated boxes, (x, y, w, h), pixels.
        names (Mapping[int, str]): Category id -> name.

    Returns:
        dict: ``source``, the pixels as a data URL, None where they cannot be read; ``width`` and
            ``height`` of the frame, ``objects`` in it, and ``sides``: per exit ``label``, ``color``
            and ``boxes`` of ``box``, ``label``, ``label_box`` and ``baseline`` of its letters.
    """
    pixels = _read(image['file'])
    if pixels is None:
        return dict(source=None)
    scale = _FRAME / max(pixels.size)
    width, height = (scale * side for side in pixels.size)
    sides = []
    for detections, exit, color in zip(image['detections'], exits, EXIT_COLORS):
        shown = [detection for detection in detections if detection['score'] >= MIN_SCORE]
        shown.sort(key=lambda detection: detection['score'])
        label = f'Exit {exit}: {len(shown)} {"box" if len(shown) == 1 else "boxes"}'
        boxes = [_labeled(detection, scale, width, names) for detection in shown]
        sides.append(dict(label=label, color=color, boxes=boxes))
    return dict(
        source=f'data:image/jpeg;base64,{base64.b64encode(_jpeg(pixels)).decode()}',
        width=width,
        height=height,
        objects=[_scaled(box, scale) for box in objects],
        sides=sides,
    )


def _read(path: str) -> Image.Image | None:
    try:
        # Boxes are in the frame that mmcv reads, turned as the camera says.
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert('RGB')
    except (OSError, SyntaxError):  # Pillow's word for some broken files is the latter.
        return None


def _jpeg(pixels: Image.Image) -> bytes:
    small = pixels.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, 'JPEG', quality=_QUALITY, optimize=True)
    return buffer.getvalue()


def _scaled(box: Sequence[float], scale: float) -> list[float]:
    return [scale * side for side in box]


def _labeled(detection: Mapping, scale: float, width: float, names: Mapping[int, str]) -> dict:
    """A box with its class and score: above it, or inside where that would leave the picture."""
    x, y, *_ = box = _scaled(detection['bbox'], scale)
    category = detection['category_id']
    label = f'{names.get(category, category)} {detection["score"]:.2f}'
    long = 0.56 * LETTERS * len(label) + 4
    left = max(0.0, min(x, width - long))
    top = y - LETTERS - 2 if y > LETTERS + 2 else max(0.0, y)
    label_box = (left, top, long, LETTERS + 2)
    return dict(box=box, label=label, label_box=label_box, baseline=top + LETTERS - 1)
