"""Find image files that are missing, damaged, of a foreign format or of another size, without a
full decode."""

import functools
import io
import os
import os.path as osp
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from ..errors import UsageError
from ..progress import CountProgress
from .check_annotations import DataSetPlace, first_few
from .picture_formats import is_picture

#: Bytes at the end of an image file in which its end marker must be: the size of one page. As many
#: of its head are looked at first; most have their size in it.
_PAGE = 4096
#: Headers are shorter than this; those of phones hold a small picture of the picture.
_LONGEST_HEADER = 2**20
_JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'
_ENDS = {_JPEG: b'\xff\xd9', _PNG: b'IEND'}
#: EXIF's tag of the orientation; from 5 on, width and height change places.
_ORIENTATION, _TURNED = 0x0112, 5
#: Pictures that Pillow does not know either: how they begin, after how many bytes.
_FOREIGN = (
    (4, b'ftyphei', 'HEIC'),
    (4, b'ftypmif', 'HEIF'),
    (4, b'ftyphev', 'HEIC'),
    (0, b'<svg', 'SVG'),
    (0, b'%PDF', 'PDF'),
    (0, b'\xff\x0a', 'JPEG XL'),
    (4, b'JXL ', 'JPEG XL'),
)
#: Image files per task. One future per file would cost more than looking at it.
_CHUNK = 256


class Look(NamedTuple):
    """What an image file looks like from outside.

    Attributes:
        trouble (str): 'missing', what is damaged, or the name of a foreign format; empty: none.
        kind (str): 'missing', 'damaged' or 'foreign', of the trouble; empty: none.
        size (tuple, optional): Width and height as OpenCV gives them, its orientation applied;
            None: not known.
        orientation (int): EXIF's; 1 if it has none.
    """

    trouble: str = ''
    kind: str = ''
    size: tuple[int, int] | None = None
    orientation: int = 1


class Pictures(NamedTuple):
    """Image files with something odd, in words; see `Look`."""

    missing: list[str]
    damaged: list[str]
    foreign: list[str]
    resized: list[str]


def look_at_images(
    image_root: str,
    images: Sequence[Mapping[str, Any]],
    progress: CountProgress | None = None,
    turned: bool = True,
) -> Pictures:
    """Look at image files.

    Args:
        image_root (str): Folder to which the names are relative.
        images (Sequence[dict]): ``file_name``, ``width`` and ``height`` of each, as in an
            annotation file; None: not known.
        progress (callable, optional): Called as ``progress(done, total)``, counts of files.
        turned (bool): Whether they are loaded as EXIF's orientation wants, as mmcv does. Defaults
            to True.
    """
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    pictures = Pictures([], [], [], [])
    done = 0
    # Threads wait for the disk side by side; on a warm one they neither gain nor cost.
    with ThreadPoolExecutor(8) as pool:
        look = functools.partial(_look_at_all, image_root, turned, {})
        for chunk, looks in zip(chunks, pool.map(look, chunks)):
            for image, image_look in zip(chunk, looks):
                _sort_in(pictures, image, image_look)
            done += len(chunk)
            if progress:
                progress(done, len(images))
    return pictures


def _sort_in(pictures: Pictures, image: Mapping[str, Any], look: Look) -> None:
    name = image['file_name']
    if look.kind:
        getattr(pictures, look.kind).append(
            name if look.kind == 'missing' else f'{name}: {look.trouble}'
        )
    elif look.size and image['width'] and look.size != (image['width'], image['height']):
        exif = f'; EXIF orientation {look.orientation}' if look.orientation != 1 else ''
        pictures.resized.append(
            f'{name} is {look.size[0]} x {look.size[1]}, the file says {image["width"]} x '
            f'{image["height"]}{exif}'
        )


def check_image_files(
    image_root: str,
    images: Sequence[Mapping[str, Any]],
    place: DataSetPlace,
    progress: CountProgress | None = None,
    listed: str = 'the annotation file',
) -> list[str]:
    """Refuse image files that no run gets through; say where they have another size than the
    annotations.

    Args:
        image_root (str): As of `look_at_images`, like ``images`` and ``progress``.
        place (DataSetPlace): What messages call the data set, and how it loads pictures.
        listed (str): What names the files, in words.

    Returns:
        list[str]: Warnings.

    Raises:
        UsageError: If files are missing, damaged or of a format that OpenCV does not read.
    """
    faulty, count = look_at_images(image_root, images, progress, place.turned), len(images)
    inside = f" in '{image_root}'" if image_root else ''
    complaints = [
        f'{len(files)} of {count} image files {what} ({first_few(files)})'
        for files, what in ((faulty.missing, 'are missing'), (faulty.damaged, 'are damaged'))
        if files
    ]
    if complaints:
        similar = similar_file(image_root, faulty.missing[0]) if faulty.missing else ''
        raise UsageError(
            f'{place.name}: {" and ".join(complaints)}{inside}: '
            + (
                f"'{similar}' is there: correct the names in {listed}"
                if similar
                else f'get them again, or take them out of {listed}'
            )
        )
    if faulty.foreign:
        raise UsageError(
            f'{place.name}: {len(faulty.foreign)} of {count} image files are of a format that the '
            f'installed OpenCV does not read ({first_few(faulty.foreign)}){inside}: convert them '
            'to JPEG or PNG'
        )
    if not faulty.resized:
        return []
    return [
        f'{len(faulty.resized)} of {count} images have another size than their entry in {listed} '
        f'(first: {faulty.resized[0]}): their boxes are in another frame than what the detector '
        'sees'
    ]


def similar_file(image_root: str, name: str) -> str:
    """A file that a name which is none may mean: with slashes of the other kind, another case,
    another form of its accents, without its folders, or without blanks and line ends around it.
    Empty: none."""
    plain = name.replace('\\', '/').strip()
    for other in (
        plain,
        *(unicodedata.normalize(form, plain) for form in ('NFC', 'NFD')),
        osp.basename(plain),
    ):
        if other != name and osp.isfile(osp.join(image_root, other)):
            return other
    folder = osp.join(image_root, osp.dirname(plain))
    try:
        files = {file.lower(): file for file in os.listdir(folder)}
    except (OSError, ValueError):
        return ''
    similar = files.get(osp.basename(plain).lower(), '')
    return osp.join(osp.dirname(plain), similar) if similar else ''


def _look_at_all(
    image_root: str, turned: bool, kinds: dict[tuple, bool], images: Sequence[Mapping]
) -> list[Look]:
    return [_look_at(osp.join(image_root, image['file_name']), turned, kinds) for image in images]


def _look_at(path: str, turned: bool, kinds: dict[tuple, bool]) -> Look:
    """An image file by its head and tail.

    This does not see damage between the two: OpenCV then decodes wrong pixels (JPEG, with a note on
    stderr), or returns None, and mmcv's message names the file. Nor does it see a cut in formats
    without an end marker.
    """
    try:
        with open(path, 'rb', buffering=0) as file:
            head = file.read(_PAGE)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _PAGE))
            tail = file.read(_PAGE)
    except FileNotFoundError:
        return Look('missing', 'missing')
    except OSError as error:
        return Look(f'cannot be read ({error.strerror})', 'damaged')
    except ValueError:
        # A name that no file can have.
        return Look('missing', 'missing')
    if not size:
        return Look('has zero bytes', 'damaged')
    for start, end in _ENDS.items():
        if head.startswith(start):
            if end not in tail and not _is_whole(path, end):
                return Look('truncated', 'damaged')
            return (
                _look_at_jpeg(path, head, turned)
                if start == _JPEG
                else _look_at_png(path, head, turned)
            )
    if not is_picture(path):
        return _look_at_foreign(path, head)
    return _look_at_other(path, turned, kinds)


def _look_at_jpeg(path: str, head: bytes, turned: bool) -> Look:
    frame = _jpeg_frame(head)
    if frame is None and len(head) == _PAGE:
        with open(path, 'rb') as file:
            frame = _jpeg_frame(file.read(_LONGEST_HEADER))
    if frame is None:
        return Look()
    width, height, orientation = frame
    return Look(
        size=_turn((width, height), turned and orientation >= _TURNED), orientation=orientation
    )


def _jpeg_frame(head: bytes) -> tuple[int, int, int] | None:
    """Width, height and EXIF orientation from the segments of a JPEG file's head; None if they are
    not in it."""
    at, orientation = 2, 0
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # fills up
            at += 1
            continue
        (length,) = struct.unpack_from('>H', head, at + 2)
        # Start of frame, of any coding; the three others in this range are tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from('>HH', head, at + 5)
            return width, height, orientation or 1
        if marker == 0xE1 and head[at + 4 : at + 10] == b'Exif\0\0':
            if at + 2 + length > len(head):
                return None
            orientation = orientation or _orientation(head[at + 4 : at + 2 + length])
        at += 2 + length
    return None


def _orientation(exif: bytes | None) -> int:
    """From EXIF's bytes alone: Pillow's own ``getexif`` looks into XMP as well, OpenCV does not."""
    tags = Image.Exif()
    try:
        tags.load(exif or b'')
        return int(tags.get(_ORIENTATION, 1)) if 1 <= int(tags.get(_ORIENTATION, 1)) <= 8 else 1
    except Exception:
        # Of broken EXIF, which decoders pass over: struct.error, SyntaxError, ValueError, as the
        # bytes have it.
        return 1


def _turn(size: tuple[int, int], turned: bool) -> tuple[int, int]:
    return size[::-1] if turned else size


def _look_at_png(path: str, head: bytes, turned: bool) -> Look:
    if len(head) < 24 or b'eXIf' in head or b'IDAT' not in head:
        # Its size is elsewhere, or not all of what is said about it.
        return _look_at_other(path, turned, {})
    return Look(size=struct.unpack('>II', head[16:24]))


def _look_at_other(path: str, turned: bool, kinds: dict[tuple, bool]) -> Look:
    """By Pillow, where it knows the format. The first file of each kind is decoded: formats have
    variants (TIFF of floats) that OpenCV does not read."""
    try:
        with Image.open(path) as image:
            size, kind, orientation = (
                image.size,
                (image.format, image.mode),
                _orientation(image.info.get('exif')),
            )
    except Exception:
        # Unknown to Pillow, or broken: decoders raise OSError, SyntaxError, ValueError and
        # struct.error.
        size = _decoded_size(path, turned)
        return Look(size=size) if size else Look('truncated or damaged', 'damaged')
    if kind not in kinds:
        if _decoded_size(path, turned) is None:
            if not _is_whole(path):
                return Look('truncated or damaged', 'damaged')
            kinds[kind] = False
        else:
            kinds[kind] = True
    if not kinds[kind]:
        return Look(f'{kind[0]} of mode {kind[1]}', 'foreign')
    turned = turned and orientation >= _TURNED and _turns(kind[0])
    return Look(size=_turn(size, turned), orientation=orientation)


def _decoded_size(path: str, turned: bool) -> tuple[int, int] | None:
    """Width and height by OpenCV; None if it cannot decode the file."""
    try:
        image = cv2.imdecode(
            np.fromfile(path, np.uint8),
            cv2.IMREAD_COLOR | (0 if turned else cv2.IMREAD_IGNORE_ORIENTATION),
        )
    except cv2.error:
        return None
    return None if image is None else (image.shape[1], image.shape[0])


@functools.cache
def _turns(kind: str) -> bool:
    """Whether the installed OpenCV applies EXIF's orientation to a format where Pillow has not:
    tried."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    file = io.BytesIO()
    Image.new('RGB', (32, 16)).save(file, kind, exif=exif)
    with Image.open(file) as image:
        size = image.size
    decoded = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    return decoded is not None and decoded.shape[1::-1] == size[::-1]


def _look_at_foreign(path: str, head: bytes) -> Look:
    for after, start, name in _FOREIGN:
        if (
            head[after:].lstrip().startswith(start)
            or name == 'SVG'
            and head.lstrip()[:1] == b'<'
            and start in head
        ):
            return Look(name, 'foreign')
    try:
        with Image.open(path) as image:
            return Look(str(image.format), 'foreign')
    except Exception:
        # Unknown to Pillow, or broken: see `_look_at_other`.
        return Look('is no image', 'damaged')


def _is_whole(path: str, end: bytes = b'') -> bool:
    """Decode a file that does not end as it should.

    Cameras put videos and padding behind a picture, which OpenCV reads all the same. The end marker
    alone proves nothing then: that of a preview in the head is there in a cut file too.
    """
    try:
        with open(path, 'rb') as file:
            marked = end in file.read()
        with Image.open(path) as image:
            image.load()
    except Exception:
        # Decoders raise OSError, SyntaxError, ValueError and struct.error, as the bytes have it.
        return False
    return marked
