"""Whatever is handed to a detector from Python is taken as mmdet would, or refused in one line."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dynamicdet.apis.image_inputs import pictures_of
from dynamicdet.errors import UsageError

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for name in ('b.png', 'a.JPG'):
        cv2.imwrite(str(folder / name), IMAGE)
    (folder / 'notes.txt').touch()
    (folder / 'empty').mkdir()
    return folder


def test_one_many_and_folders(folder):
    a, b = str(folder / 'a.JPG'), str(folder / 'b.png')
    assert pictures_of(b) == pictures_of(Path(b)) == pictures_of([Path(b)]) == [b]
    assert pictures_of(folder) == pictures_of(str(folder)) == [a, b]
    for many in (
        [a, b],
        (a, b),
        iter([a, b]),
        (one for one in (a, b)),
        {a: 1, b: 2}.keys(),
        np.array([a, b]),
    ):
        assert pictures_of(many) == [a, b]
    assert pictures_of('https://x.org/a.png') == ['https://x.org/a.png']
    assert pictures_of([]) == []
    assert pictures_of(dict(img_path=b, text='cat')) == [dict(img_path=b, text='cat')]


def test_arrays(folder):
    for array in (IMAGE, IMAGE[:, :, ::-1], IMAGE[::2, ::3], np.asfortranarray(IMAGE), IMAGE[::-1]):
        (found,) = pictures_of(array)
        assert np.array_equal(found, array) and found.flags.c_contiguous
    assert len(pictures_of([IMAGE, str(folder / 'b.png')])) == 2


@pytest.mark.parametrize(
    'item, said',
    [
        (IMAGE[..., 0], 'COLOR_GRAY2BGR'),
        (IMAGE[..., :1], 'COLOR_GRAY2BGR'),
        (np.dstack([IMAGE, IMAGE[..., 0]]), 'COLOR_BGRA2BGR'),
        (IMAGE[..., :2], r'\(48, 64, 2\)$'),
        (IMAGE.transpose(2, 0, 1), r'uint8, \(3, 48, 64\)$'),
        (IMAGE[None], 'several pictures are a list'),
        (IMAGE / 255, r'float64.*astype\(numpy.uint8\)'),
        (IMAGE.astype(np.float32), r'float32.*astype\(numpy.uint8\)'),
        (IMAGE.astype(np.uint16), r'uint16.*astype\(numpy.uint8\)'),
        (IMAGE > 99, 'bool'),
        (IMAGE[:0], 'has no pixels'),
        (np.zeros((4, 500, 3), np.uint8), 'more than 100 times'),
        (torch.from_numpy(IMAGE), 'got torch.Tensor, torch.uint8'),
        (Image.fromarray(IMAGE), 'got PIL.Image'),
        (b'\xff\xd8\xff', 'got bytes'),
        (None, 'got NoneType'),
        (7, 'got int'),
        (dict(image=IMAGE), 'got dict'),
        (dict(img='a.jpg'), 'got img of type str'),
        (dict(img_path=IMAGE), 'got img_path of type numpy.ndarray, uint8'),
        (np.array([b'a.jpg']), r'S5, \(1,\)$'),
        ([1, 2, 3], 'got int'),
        ([[IMAGE]], 'got list'),
        ('gone.png', "no picture at 'gone.png'"),
        ('', "no picture at ''"),
    ],
)
def test_what_is_no_picture(item, said):
    for inputs in (item, [IMAGE, item]) if not isinstance(item, list) else (item,):
        with pytest.raises(UsageError, match=said) as caught:
            pictures_of(inputs)
        assert '\n' not in str(caught.value)


def test_folders_are_given_alone(folder):
    with pytest.raises(UsageError, match='there is no picture in'):
        pictures_of(folder / 'empty')
    with pytest.raises(UsageError, match='alone, not in a list'):
        pictures_of([str(folder)])
    assert pictures_of(['gone.png'], skip_missing=True) == ['gone.png']
