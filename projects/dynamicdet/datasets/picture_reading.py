"""Read a picture, and say why where it cannot be read."""

import contextlib
import http.client
import io
from collections.abc import Callable

import cv2
import mmcv
import mmengine
import numpy as np
from PIL import Image, UnidentifiedImageError

from .check_annotations import LONGEST


def read_picture(
    path: str, decode: Callable[[bytes], np.ndarray | None] = mmcv.imfrombytes
) -> tuple[np.ndarray | None, str | None]:
    """Decode a picture, by path or URL: once, where it ends as pictures of its kind do.

    Args:
        path (str): The picture's.
        decode (Callable): The bytes of a file -> a picture, None if it has none. Defaults to
            mmcv's, by OpenCV.

    Returns:
        tuple: The picture, (H, W, 3) uint8, BGR, and None; or None, and why it cannot be read.
    """
    try:
        data = mmengine.fileio.get(path)
    except (OSError, http.client.HTTPException) as error:
        # urllib's errors are OSErrors too.
        return None, f'cannot be read: {getattr(error, "strerror", None) or error}'
    return decode_picture(data, decode)


def decode_picture(
    data: bytes, decode: Callable[[bytes], np.ndarray | None] = mmcv.imfrombytes
) -> tuple[np.ndarray | None, str | None]:
    """`read_picture` of the bytes of a file."""
    picture = None
    with contextlib.suppress(cv2.error):
        picture = decode(data) if data else None
    # OpenCV fills what a truncated file lacks with gray; Pillow says that it is truncated.
    fault = None if picture is not None and _is_whole(data) else _fault(data, picture is not None)
    if fault is None and max(picture.shape[:2]) > LONGEST * min(picture.shape[:2]):
        fault = f'is more than {LONGEST} times as long as wide'
    return (None, fault) if fault else (picture, None)


def refuse_large(
    data: bytes, most_pixels: int, formats: tuple[str, ...] | None = None
) -> str | None:
    """Why the bytes of a file must not be decoded, None if they may be: a small file can hold a
    picture that fills the memory. Only its head is read, by Pillow.

    Args:
        data (bytes): Of a file.
        most_pixels (int): Width times height of the largest picture that may be decoded.
        formats (tuple[str], optional): What it may be, by Pillow's names. Defaults to what Pillow
            opens.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        # Pillow's own limit, twice 89 million pixels.
        return f'has more than {most_pixels:,} pixels: scale it down'
    except Exception:
        # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error and more.
        return f'is no {" or ".join(formats)} file, or damaged' if formats else None
    if width * height > most_pixels:
        return f'has {width:,} x {height:,} pixels, more than {most_pixels:,}: scale it down'
    return None


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG file, which most are, has its end."""
    if data.startswith(b'\xff\xd8'):
        # Behind the last scan: a preview in the head has scans and an end of its own.
        return data.rfind(b'\xff\xd9') > data.rfind(b'\xff\xda')
    return data.startswith(b'\x89PNG') and data.rfind(b'IEND') > len(data) - 64


def _fault(data: bytes, decoded: bool) -> str | None:
    """What is wrong with a file, by Pillow, whether OpenCV decodes it or not; None if nothing
    is."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except UnidentifiedImageError:
        return None if decoded else 'is no picture, or damaged'
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        return f'is damaged: {error}' if 'truncated' in str(error) else 'is no picture, or damaged'
    return None if decoded else 'is of a kind that OpenCV does not decode'
