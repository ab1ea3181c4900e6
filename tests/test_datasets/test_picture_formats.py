"""Which picture files are looked for: those that the installed OpenCV reads."""

import cv2
import numpy as np
import pytest

from dynamicdet.apis.image_inputs import pictures_of
from dynamicdet.datasets.picture_formats import (
    has_picture_suffix,
    is_picture,
    picture_suffixes,
    pictures_in,
)
from dynamicdet.errors import UsageError
from dynamicdet.video.sources import Folder
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


def test_hidden_files_of_a_folder_are_no_pictures(tmp_path):
    """macOS puts ``._a.jpg`` beside ``a.jpg`` on discs of other systems: no picture, by its name
    one."""
    for name in ('b.jpg', '._b.jpg', 'a.png', '._a.png', '.DS_Store'):
        (tmp_path / name).write_bytes(b'\0\5\x16\7')
    with pytest.warns(UserWarning, match=r'2 hidden files are left out \(such as \._a.png\)$'):
        assert pictures_of(tmp_path) == [str(tmp_path / name) for name in ('a.png', 'b.jpg')]
    with pytest.warns(UserWarning, match='2 hidden files'):
        assert Folder(tmp_path).length == 2
    for name in ('b.jpg', 'a.png'):
        (tmp_path / name).unlink()
    with pytest.raises(UsageError, match='there is no picture in'):
        pictures_in(tmp_path)
