"""Pictures to show a detector: the built-in data, made by code."""

import tempfile
from pathlib import Path

from ..datasets.digits import CLASSES, make_digits
from ..datasets.picture_formats import pictures_in

#: How many are made: easy and hard ones by turns, see `datasets.digits`.
_EXAMPLES = 8


def knows_digits(classes: list[str]) -> bool:
    """Whether a detector's classes are those of the built-in data."""
    return tuple(classes) == CLASSES


def example_pictures(size: int = 128) -> dict[str, bytes]:
    """Name -> JPEG file, of the test set; ``size`` is their height and width in pixels."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_digits(Path(folder) / 'digits', dict(train=0, val=0, test=_EXAMPLES), size)
        return {f'digits_{path.name}': path.read_bytes() for path in pictures_in(root / 'test')}
