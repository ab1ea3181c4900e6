"""What the data check says of image files, and what OpenCV then makes of them."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from dynamicdet.datasets.check import check_coco
from dynamicdet.datasets.check_images import look_at_images, similar_file
from dynamicdet.errors import UsageError

WIDTH, HEIGHT = 40, 24


def entry(name, width=WIDTH, height=HEIGHT):
    return dict(file_name=name, width=width, height=height)


def save(path, mode='RGB', orientation=None, **kwargs):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    ).convert(mode)
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        kwargs['exif'] = exif
    image.save(path, **kwargs)


def look(folder, *names, **kwargs):
    return look_at_images(str(folder), [entry(name, **kwargs) for name in names])


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tiff', 'avif'])
def test_sizes_are_those_that_opencv_gives(tmp_path, ending, orientation):
    """Whatever it makes of an orientation in this format."""
    name = f'a.{ending}'
    save(tmp_path / name, orientation=orientation)
    height, width = cv2.imdecode(np.fromfile(tmp_path / name, np.uint8), cv2.IMREAD_COLOR).shape[:2]
    assert look(tmp_path, name, width=width, height=height) == ([], [], [], [])
    (resized,) = look(tmp_path, name, width=width + 1, height=height).resized
    assert resized.startswith(f'{name} is {width} x {height}, the file says {width + 1} x {height}')
    if ending == 'jpg' and orientation == 6:
        assert (width, height) == (HEIGHT, WIDTH) and resized.endswith('; EXIF orientation 6')
        # As LoadImageFromFile(color_type='color_ignore_orientation') does.
        assert look_at_images(str(tmp_path), [entry(name)], turned=False) == ([], [], [], [])


def test_headers_longer_than_a_page(tmp_path):
    """The size of photographs of phones stands behind a small picture of the picture."""
    save(tmp_path / 'a.jpg', orientation=6)
    content = (tmp_path / 'a.jpg').read_bytes()
    # Segments of an application, as long as there may be.
    (tmp_path / 'a.jpg').write_bytes(
        content[:2] + 3 * (b'\xff\xe2\xff\xff' + bytes(65533)) + content[2:]
    )
    assert cv2.imread(str(tmp_path / 'a.jpg')).shape[:2] == (WIDTH, HEIGHT)
    assert len(look(tmp_path, 'a.jpg').resized) == 1
    assert look(tmp_path, 'a.jpg', width=HEIGHT, height=WIDTH).resized == []


@pytest.mark.parametrize(
    'name, mode',
    [
        ('gray.jpg', 'L'),
        ('cmyk.jpg', 'CMYK'),
        ('palette.png', 'P'),
        ('alpha.png', 'RGBA'),
        ('bit.png', '1'),
        ('deep.png', 'I;16'),
        ('gray.webp', 'L'),
        ('a.gif', 'P'),
        ('a.jp2', 'RGB'),
        ('a.bmp', 'RGB'),
        ('a.ppm', 'RGB'),
        ('a.avif', 'RGBA'),
        ('a.tiff', 'CMYK'),
    ],
)
def test_kinds_that_opencv_reads(tmp_path, name, mode):
    if mode == 'I;16':
        Image.fromarray(np.full((HEIGHT, WIDTH), 40000, np.uint16)).save(tmp_path / name)
    else:
        save(tmp_path / name, mode)
    assert cv2.imdecode(np.fromfile(tmp_path / name, np.uint8), cv2.IMREAD_COLOR) is not None
    assert look(tmp_path, name) == ([], [], [], [])


@pytest.mark.parametrize('name', ['a.hdr', 'a.pfm', 'a.pam'])
def test_kinds_that_opencv_alone_reads(tmp_path, name):
    kind = np.uint8 if name == 'a.pam' else np.float32
    cv2.imwrite(str(tmp_path / name), np.ones((HEIGHT, WIDTH, 3), kind))
    assert (
        look(tmp_path, name) == ([], [], [], []) and len(look(tmp_path, name, width=1).resized) == 1
    )


def test_pictures_in_motion(tmp_path):
    save(tmp_path / 'a.gif', save_all=True, append_images=[Image.new('RGB', (WIDTH, HEIGHT))])
    save(tmp_path / 'a.webp', save_all=True, append_images=[Image.new('RGB', (WIDTH, HEIGHT))])
    assert look(tmp_path, 'a.gif', 'a.webp') == ([], [], [], [])


def test_formats_that_opencv_does_not_read(tmp_path):
    (tmp_path / 'a.heic').write_bytes(b'\x00\x00\x00\x18ftypheic' + bytes(100))
    (tmp_path / 'a.svg').write_text('<?xml version="1.0"?><svg width="4"></svg>')
    save(tmp_path / 'a.ico')
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)).save(tmp_path / 'a.tiff')
    save(tmp_path / 'b.tiff')
    found = look(tmp_path, 'a.heic', 'a.svg', 'a.ico', 'a.tiff', 'b.tiff')
    assert (
        found.foreign == ['a.heic: HEIC', 'a.svg: SVG', 'a.ico: ICO', 'a.tiff: TIFF of mode F']
        and not found.damaged
    )
    with pytest.raises(UsageError, match='does not read .*: convert them to JPEG or PNG'):
        check(tmp_path, 'a.heic')


@pytest.mark.parametrize('ending', ['avif', 'webp', 'gif', 'jp2', 'tiff'])
def test_cut_files_of_other_formats(tmp_path, ending):
    save(tmp_path / f'a.{ending}')
    content = (tmp_path / f'a.{ending}').read_bytes()
    (tmp_path / f'a.{ending}').write_bytes(content[: len(content) // 2])
    assert look(tmp_path, f'a.{ending}').damaged == [f'a.{ending}: truncated or damaged']


def check(folder, *names, **kwargs):
    images = [dict(entry(name, **kwargs), id=index + 1) for index, name in enumerate(names)]
    boxes = [
        dict(id=one['id'], image_id=one['id'], category_id=1, bbox=[2, 2, 9, 9], area=81, iscrowd=0)
        for one in images
    ]
    content = dict(images=images, annotations=boxes, categories=[dict(id=1, name='a')])
    (folder / 'a.json').write_text(json.dumps(content))
    return check_coco(str(folder / 'a.json'), str(folder))


def test_lines_of_sizes_and_names(tmp_path):
    save(tmp_path / 'a.jpg')
    save(tmp_path / 'b.jpg')
    assert check(tmp_path, 'a.jpg', 'b.jpg') == []
    (line,) = check(tmp_path, 'a.jpg', 'b.jpg', width=2 * WIDTH, height=2 * HEIGHT)
    assert (
        '2 of 2 images have another size than their entry in the annotation file (first: a.jpg is '
        '40 x 24, the file says 80 x 48)'
    ) in line
    (line,) = check(tmp_path, 'a.jpg', './a.jpg', 'b.jpg')
    assert '2 of 3 images have a file name of another entry (a.jpg, ./a.jpg)' in line


@pytest.mark.parametrize(
    'name, there',
    [
        ('A.JPG', 'a.jpg'),
        ('sub\\b.jpg', 'sub/b.jpg'),
        ('gone/a.jpg', 'a.jpg'),
        ('cafe\u0301.jpg', 'caf\xe9.jpg'),
        ('SUB/c.png', ''),
        ('a.jpg\n', 'a.jpg'),
        (' sub/b.jpg ', 'sub/b.jpg'),
        ('\0.jpg', ''),
        ('\ud800', ''),
        ('\n', ''),
    ],
)
def test_names_that_are_nearly_right(tmp_path, name, there):
    (tmp_path / 'sub').mkdir()
    for own in ('a.jpg', 'sub/b.jpg', 'caf\xe9.jpg'):
        save(tmp_path / own)
    assert similar_file(str(tmp_path), name) == there
    with pytest.raises(UsageError, match='1 of 1 image files are missing') as error:
        check(tmp_path, name)
    assert (f"'{there}' is there: correct the names" in str(error.value)) == bool(there)
    assert '\n' not in str(error.value) and (name.isprintable() or repr(name) in str(error.value))
