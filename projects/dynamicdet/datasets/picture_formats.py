"""Which picture files the installed OpenCV reads: one answer for the data check, folders of
pictures and tools."""

import functools
import os
import warnings
from pathlib import Path

import cv2

from ..errors import UsageError

#: Endings of names, as OpenCV's documentation of ``imread`` lists them, the usual ones first.
#: Whether it reads a kind depends on how it was built.
_KNOWN = (
    '.jpg',
    '.jpeg',
    '.jpe',
    '.png',
    '.webp',
    '.bmp',
    '.dib',
    '.tif',
    '.tiff',
    '.avif',
    '.gif',
    '.jp2',
    '.apng',
    '.pbm',
    '.pgm',
    '.ppm',
    '.pnm',
    '.pam',
    '.pfm',
    '.sr',
    '.ras',
    '.hdr',
    '.pic',
    '.jxl',
)


@functools.cache
def picture_suffixes() -> tuple[str, ...]:
    """Endings, in small letters, of the picture files that the installed OpenCV reads."""
    # By names OpenCV says only what it writes. It is built with both directions of a format or with
    # none.
    return tuple(suffix for suffix in _KNOWN if cv2.haveImageWriter(f'x{suffix}'))


def has_picture_suffix(path: str | os.PathLike) -> bool:
    """Whether a file's name is that of a picture that OpenCV reads. Capital letters count as small
    ones."""
    return os.path.splitext(os.fspath(path))[1].lower() in picture_suffixes()


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a file begins like a picture that OpenCV reads, whatever its name. Only its head is
    looked at."""
    return cv2.haveImageReader(os.fspath(path))


def pictures_in(folder: str | os.PathLike) -> list[Path]:
    """Paths of a folder's pictures, by name. Hidden files, such as the ``._a.jpg`` that macOS puts
    beside ``a.jpg``, are none: a warning says how many there are.

    Raises:
        UsageError: If there is none.
    """
    named = sorted(path for path in Path(folder).iterdir() if has_picture_suffix(path))
    visible = [path for path in named if not path.name.startswith('.')]
    if not visible:
        raise UsageError(
            f"there is no picture in '{folder}': looked for {', '.join(picture_suffixes())}"
        )
    if len(visible) < len(named):
        hidden = next(path.name for path in named if path.name.startswith('.'))
        warnings.warn(
            f"'{folder}': {len(named) - len(visible)} hidden files are left out (such as {hidden})"
        )
    return visible
