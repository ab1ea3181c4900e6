"""Which picture files are looked for: those that the installed OpenCV reads."""

import cv2
import numpy as np
import pytest

from dynamicdet.datasets.picture_formats import has_picture_suffix, is_picture, picture_suffixes
from mmdet.apis.det_inferencer import IMG_EXTENSIONS


def test_mmdets_own_are_among_them():
    assert set(IMG_EXTENSIONS) <= set(picture_suffixes())


@pytest.mark.parametrize('suffix', picture_suffixes())
def test_what_is_named_is_read(tmp_path, suffix):
    """Written by OpenCV, told by its head, read back; whatever the capitals."""
    path = tmp_path / f'a{suffix}'
    deep = np.float32 if suffix == '.pfm' else np.uint8
    channels = (1,) if suffix in ('.pbm', '.pgm') else (3,)
    assert cv2.imwrite(str(path), np.full((64, 64, *channels), 200, deep))
    assert has_picture_suffix(path) and has_picture_suffix(tmp_path / f'A{suffix.upper()}')
    assert is_picture(path) and cv2.imread(str(path)).shape == (64, 64, 3)


def test_what_is_no_picture(tmp_path):
    for name, content in (
        ('a.jpg', b'text'),
        ('b.avif', b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'),
        ('c.webp', b''),
        ('d.webp', b'RIFF\0\0\0\0WAVEfmt ' + bytes(20)),
    ):
        (tmp_path / name).write_bytes(content)
        assert not is_picture(tmp_path / name)
    assert not is_picture(tmp_path / 'missing.png')
    assert (
        not has_picture_suffix('a.heic')
        and not has_picture_suffix('jpg')
        and not has_picture_suffix('a.mp4')
    )
