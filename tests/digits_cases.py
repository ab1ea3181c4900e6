"""What tests of the built-in data sets share."""

import json

import numpy as np

from dynamicdet.datasets import digits_drawing


def load(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def content(root):
    """Every file's bytes, by relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def painted_photos(sources):
    """Every photo with its regions in the colors of their splits, 80, 160 and 240."""
    painted = {}
    for number, (name, photo) in enumerate(sources.photos.items()):
        painted[name] = np.zeros_like(photo)
        for color, owner in enumerate(digits_drawing.SPLITS):
            x1, y1, x2, y2 = digits_drawing.split_region(photo.shape, number, owner)
            assert not painted[name][y1:y2, x1:x2].any()
            painted[name][y1:y2, x1:x2] = 80 * (color + 1)
        assert painted[name].all()  # every pixel has an owner
    return painted
