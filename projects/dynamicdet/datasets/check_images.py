"""Find image files that are missing or damaged, without a full decode."""
import os
import os.path as osp
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, Optional, Sequence, Tuple

from PIL import Image

Progress = Callable[[int, int], None]

#: Bytes at the end of an image file in which its end marker must be: the size of one page.
_TAIL = 4096
#: How the files that OpenCV reads begin, and how those that have an end marker end.
_IMAGES = (
    (b'\xff\xd8\xff', b'\xff\xd9'),  # JPEG
    (b'\x89PNG\r\n\x1a\n', b'IEND'),
    (b'BM', None),
    (b'II*\x00', None),  # TIFF, also big-endian
    (b'MM\x00*', None),
    (b'RIFF', None),  # WebP
    (b'GIF8', None),
    (b'\x00\x00\x00\x0cjP  ', None),  # JPEG 2000, as a file and as a bare stream
    (b'\xff\x4f\xff\x51', None),
    *((b'P%d' % kind, None) for kind in range(1, 8)),  # PBM, PGM, PPM, PAM
    (b'#?', None),  # Radiance
    (b'\x76\x2f\x31\x01', None),  # OpenEXR
)
_MISSING = 'missing'
#: Image files per task. One future per file would cost more than looking at it.
_CHUNK = 256


def find_unreadable(image_root: str, names: Sequence[str],
                    progress: Optional[Progress]) -> Tuple[List[str], List[str]]:
    """Look at image files.

    Args:
        image_root (str): Folder to which the names are relative.
        names (Sequence[str]): Image files.
        progress (callable, optional): Called as ``progress(done, total)``, counts of files.

    Returns:
        tuple: Names of those that are missing; name and trouble of those that are damaged.
    """
    chunks = [names[start:start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    missing, damaged = [], []
    done = 0
    # Threads wait for the disk side by side; on a warm one they neither gain nor cost.
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda chunk: _look_at_all(image_root, chunk), chunks):
            missing += [name for name, trouble in found if trouble == _MISSING]
            damaged += [f"{name}: {trouble}" for name, trouble in found
                        if trouble and trouble != _MISSING]
            done += len(found)
            if progress:
                progress(done, len(names))
    return missing, damaged


def _look_at_all(image_root: str, names: Sequence[str]) -> List[Tuple[str, Optional[str]]]:
    return [(name, _look_at(osp.join(image_root, name))) for name in names]


def _look_at(path: str) -> Optional[str]:
    """What is wrong with an image file, by its head and tail; None if nothing is.

    This does not see damage between the two: OpenCV then decodes wrong pixels (JPEG, with a note on
    stderr), or returns None, and mmcv's message names the file. Nor does it see a cut in formats
    without an end marker.
    """
    try:
        with open(path, 'rb', buffering=0) as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    if not size:
        return 'has zero bytes'
    for start, end in _IMAGES:
        if head.startswith(start):
            return None if end is None or end in tail or _is_whole(path, end) else 'truncated'
    return 'is no image'


def _is_whole(path: str, end: bytes) -> bool:
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
