"""Frames with what was found, where it was found, and what that cost."""

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np

#: Pixels of the longer side below which a frame is enlarged, so that text can be read.
LEGIBLE = 360
_FONT, _LINE = cv2.FONT_HERSHEY_SIMPLEX, 16


def colors_of(classes: Sequence[str], palette: object = None) -> list[tuple[int, int, int]]:
    """A color, BGR, for each class: the data set's (RGB), where it has a list of them."""
    if isinstance(palette, (list, tuple)) and len(palette) >= len(classes):
        return [tuple(int(level) for level in color[::-1]) for color in palette[: len(classes)]]
    # Neighbors as unlike as can be: steps of the golden ratio around the circle.
    hues = [(number * 0.618034) % 1 for number in range(len(classes))]
    return [tuple(int(255 * level) for level in colorsys.hsv_to_rgb(hue, 0.8, 1.0)) for hue in hues]


def draw_frame(
    picture: np.ndarray,
    detections: Sequence[dict],
    classes: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    lines: Sequence[str],
    depth: float | None = None,
) -> np.ndarray:
    """Draw boxes on a frame, and lines of text above it.

    Args:
        picture (ndarray): (H, W, 3) uint8, BGR. It stays as it is.
        detections (Sequence[dict]): ``bbox`` [x1, y1, x2, y2], ``label`` and ``score`` of each.
        classes (Sequence[str]): Names of the labels.
        colors (Sequence[tuple]): Of the labels, BGR.
        lines (Sequence[str]): Text.
        depth (float, optional): Share of the network that ran, in [0, 1]: a bar below the text.

    Returns:
        ndarray: Larger: small frames are enlarged by a whole number, and the text has its own rows.
    """
    zoom = math.ceil(LEGIBLE / max(picture.shape[:2])) if max(picture.shape[:2]) < LEGIBLE else 1
    # For frames of 1000 pixels and more.
    scale = max(1.0, max(picture.shape[:2]) / 1000)
    drawn = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    for detection in detections:
        _draw_box(
            drawn,
            np.array(detection['bbox']) * zoom,
            colors[detection['label']],
            f'{classes[detection["label"]]} {detection["score"]:.2f}',
            scale,
        )
    high = int(_LINE * scale)
    banner = np.zeros((high * len(lines) + high // 2, drawn.shape[1], 3), np.uint8)
    for number, line in enumerate(lines):
        place = 4, int((number + 0.8) * high)
        cv2.putText(banner, line, place, _FONT, 0.4 * scale, (255, 255, 255), 1, cv2.LINE_AA)
    if depth is not None:
        end = int(drawn.shape[1] * min(max(depth, 0.0), 1.0))
        banner[-max(2, high // 4) :, :end] = (80, 200, 80)
    return np.vstack([banner, drawn])


def _draw_box(
    drawn: np.ndarray, box: np.ndarray, color: tuple[int, int, int], text: str, scale: float
) -> None:
    # Beyond what OpenCV's integers hold there is nothing to see.
    x1, y1, x2, y2 = np.rint(np.clip(np.nan_to_num(box), -1e4, 1e5)).astype(int).tolist()
    cv2.rectangle(drawn, (x1, y1), (x2, y2), color, max(1, round(scale)))
    (width, height), _ = cv2.getTextSize(text, _FONT, 0.4 * scale, 1)
    x, y = max(0, min(x1, drawn.shape[1] - width)), max(y1, height + 4)
    cv2.rectangle(drawn, (x, y - height - 4), (x + width, y), color, -1)
    cv2.putText(drawn, text, (x, y - 3), _FONT, 0.4 * scale, (0, 0, 0), 1, cv2.LINE_AA)
