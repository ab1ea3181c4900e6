"""The gallery of the routing page: one image under both exits, boxes drawn as vectors over one
JPEG."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from .figures import EXIT_COLORS, MIN_SCORE

#: Longest side of a picture that is kept in the page, pixels, and its JPEG quality: about 15 KB
#: each.
_SIDE, _QUALITY = 360, 72
#: Longest side of the frame that boxes are drawn in: letters stay legible on small images.
_FRAME = 320
#: Height of a label's letters in that frame.
_LETTERS = 15


def picture_pair(
    image: Mapping,
    exits: Sequence[str],
    objects: Sequence[Sequence[float]],
    names: Mapping[int, str],
    name: str,
    caption: str,
) -> str:
    """An image twice, side by side: with the boxes of a cheap and of a dear exit.

    Args:
        image (Mapping): Entry of a record of two exits.
        exits (Sequence[str]): What the two exits are called.
        objects (Sequence[Sequence[float]]): Annotated boxes, (x, y, w, h), pixels.
        names (Mapping[int, str]): Category id -> name.
        name (str): Of the picture, unique in the page.
        caption (str): Plain text.

    Returns:
        str: HTML. Where the picture cannot be read, it says so.
    """
    text = f'<figcaption>{html.escape(caption)}</figcaption>'
    pixels = _read(image['file'])
    if pixels is None:
        return f'<figure class="pair"><div class="gone">picture not found</div>{text}</figure>'
    width, height = pixels.size
    scale = _FRAME / max(width, height)
    frame = width * scale, height * scale
    source = f'data:image/jpeg;base64,{base64.b64encode(_jpeg(pixels)).decode()}'
    # The pixels are in the page once: the second drawing uses the first one's.
    backgrounds = (
        f'<image id="{name}" href="{source}" width="{frame[0]:.1f}" height="{frame[1]:.1f}"/>',
        f'<use href="#{name}"/>',
    )
    shown = ''.join(
        _drawing(background, frame, scale, found, objects, names, exit, color)
        for background, found, exit, color in zip(
            backgrounds, image['detections'], exits, EXIT_COLORS
        )
    )
    return f'<figure class="pair"><div class="sides">{shown}</div>{text}</figure>'


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


def _drawing(
    background: str,
    frame: tuple,
    scale: float,
    detections: Sequence[dict],
    objects: Sequence[Sequence[float]],
    names: Mapping[int, str],
    exit: str,
    color: str,
) -> str:
    found = sorted(
        (one for one in detections if one['score'] >= MIN_SCORE), key=lambda one: one['score']
    )
    boxes = ''.join(
        _rectangle(box, scale, 'stroke="#fff" stroke-width="3" stroke-opacity="0.75"')
        + _rectangle(box, scale, 'stroke="#000" stroke-width="1.4" stroke-dasharray="5 3"')
        for box in objects
    )
    boxes += ''.join(_labeled(one, scale, frame, names, color) for one in found)
    label = f'Exit {exit}: {len(found)} {"box" if len(found) == 1 else "boxes"}'
    return (
        f'<div><svg viewBox="0 0 {frame[0]:.1f} {frame[1]:.1f}" role="img" aria-label="{label}">'
        f'{background}{boxes}</svg><span class="exit" style="color:{color}">{label}</span></div>'
    )


def _rectangle(box: Sequence[float], scale: float, style: str) -> str:
    x, y, width, height = (scale * side for side in box)
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="none" {style}/>'


def _labeled(
    detection: dict, scale: float, frame: tuple, names: Mapping[int, str], color: str
) -> str:
    """A box with its class and score: above it, or inside where that would leave the picture."""
    x, y, width, _ = (scale * side for side in detection['bbox'])
    category = detection['category_id']
    text = f'{names.get(category, category)} {detection["score"]:.2f}'
    long = 0.56 * _LETTERS * len(text) + 4
    left = max(0.0, min(x, frame[0] - long))
    top = y - _LETTERS - 2 if y > _LETTERS + 2 else max(0.0, y)
    return (
        _rectangle(detection['bbox'], scale, f'stroke="{color}" stroke-width="2"')
        + f'<rect x="{left:.1f}" y="{top:.1f}" width="{long:.1f}" height="{_LETTERS + 2}" '
        f'fill="{color}"/>'
        f'<text x="{left + 2:.1f}" y="{top + _LETTERS - 1:.1f}" font-size="{_LETTERS}" fill="#fff">'
        f'{html.escape(text)}</text>'
    )


def picture_groups(groups: Sequence[tuple]) -> str:
    """The gallery.

    Args:
        groups (Sequence[tuple]): Heading, what it means, pictures as `picture_pair` gives them.
    """
    return ''.join(_group(*group) for group in groups)


def _group(heading: str, meaning: str, pictures: list[str]) -> str:
    shown = (
        f'<div class="gallery">{"".join(pictures)}</div>' if pictures else '<p>There are none.</p>'
    )
    return f'<h3>{html.escape(heading)}</h3><p>{html.escape(meaning)}</p>{shown}'


def file_name(image: Mapping) -> str:
    """Of an image of a record, without its folder."""
    return Path(image['file']).name
