"""Sequences as MOTChallenge lays them out, read as they are.

    ROOT/NAME/seqinfo.ini     [Sequence] name, frameRate, imWidth, imHeight, imDir (img1), imExt
    (.jpg) ROOT/NAME/img1/000001.jpg ...
    ROOT/NAME/gt/gt.txt       frame, id, left, top, width, height, flag, class, visibility; counted
    from 1 ROOT/NAME/gt/labels.txt   names of the classes, one a line, where they are not MOT16's
    (CVAT writes it)

Rows of MOT15 have ten numbers, of which the last three are coordinates in the world or -1: all are
pedestrians. mmdet's `MOTChallengeDataset` reads a file that one of its converters has made; this
one needs no such step.
"""

import configparser
import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import MOTChallengeDataset
from mmdet.registry import DATASETS

from ..errors import UsageError
from ..files import write_atomically
from .video import VideoDataset

#: Of MOT16, 17 and 20, in the order of their numbers, 1 first. MOT15 has pedestrians alone.
CLASSES = MOTChallengeDataset.METAINFO['classes']

_COLUMNS = 'frame, id, left, top, width, height, flag, class, visibility'


@DATASETS.register_module()
class MOTSequenceDataset(VideoDataset):
    """MOT sequences as a `VideoDataset`: all that lie in the folder ``data_prefix=dict(img=...)``.

    What the file flags 0 (not to be considered) is marked ``iscrowd``: neither right nor wrong to
    find. ``CocoMetric`` needs no annotation file if the pipeline's ``meta_keys`` have 'instances';
    or `write_cocovid` makes one.
    """

    METAINFO = dict(classes=CLASSES)

    def load_data_list(self) -> list[dict]:
        """As `VideoDataset`'s."""
        with self.as_cocovid() as self.ann_file:
            return super().load_data_list()

    @contextlib.contextmanager
    def as_cocovid(self) -> Iterator[str]:
        """Path of an annotation file, CocoVID, that is there for a while."""
        root = self.data_prefix.get('img', self.data_prefix.get('img_path', ''))
        data, wanted = read_mot(root, self.metainfo['classes']), self.metainfo['classes']
        names = [category['name'] for category in data['categories']]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UsageError(
                f"the MOT sequences in '{root}' have no class {', '.join(missing[:3])}: give those "
                'that they '
                f'have, metainfo=dict(classes={tuple(names)})'
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'cocovid.json')
            path.write_text(json.dumps(data))
            yield str(path)


def write_cocovid(root: str | Path, path: str | Path) -> None:
    """Write the annotation file, CocoVID, of MOT sequences. See `read_mot`."""
    write_atomically(json.dumps(read_mot(root)).encode(), path)


def read_mot(root: str | Path, classes: Sequence[str] = CLASSES) -> dict:
    """Read a folder of MOT sequences.

    Args:
        root (str or Path): Folder of the sequences; others in it, without frames or ground truth,
            are passed by.
        classes (Sequence[str]): The order of the categories, and what they are where no sequence
            has ground truth. Numbers in files without labels.txt are those of `CLASSES` in any
            case.

    Returns:
        dict: CocoVID. ``frame_id`` counts from 0; a sequence without gt/gt.txt, as those of test
            sets, has no annotations.

    Raises:
        UsageError: If there is no sequence, or one cannot be read.
    """
    folders = [path for path in sorted(Path(root).glob('*')) if _is_sequence(path)]
    if not folders:
        raise UsageError(f"there is no MOT sequence in '{root}': no folder in it has a seqinfo.ini")
    known = {
        name
        for folder in folders
        for name in _classes_of(folder)
        if (folder / 'gt' / 'gt.txt').is_file()
    }
    names = sorted(known, key=[*classes, *CLASSES, *sorted(known)].index) or list(classes)
    data = dict(
        categories=[dict(id=number, name=name) for number, name in enumerate(names, start=1)],
        videos=[],
        images=[],
        annotations=[],
    )
    for folder in folders:
        _add_sequence(data, folder, _read_info(folder / 'seqinfo.ini'))
    return data


def _is_sequence(folder: Path) -> bool:
    if (folder / 'seqinfo.ini').is_file():
        return True
    for part in ('img1', 'gt/gt.txt'):
        if (folder / part).exists():
            raise UsageError(
                f"'{folder}' has {part} and no seqinfo.ini: write one, or take the folder away"
            )
    return False


def _classes_of(folder: Path) -> Sequence[str]:
    """Names of a sequence's classes, in the order of their numbers, 1 first."""
    path = folder / 'gt' / 'labels.txt'
    if not path.is_file():
        return CLASSES
    names = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"'{path}' must name the classes, one a line, each once")
    return names


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from error


def _read_info(path: Path) -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(_text(path))
        info = dict(parser['Sequence'])
        return dict(
            width=int(info['imwidth']),
            height=int(info['imheight']),
            fps=float(info.get('framerate', 30)),
            folder=info.get('imdir', 'img1'),
            ending=info.get('imext', '.jpg'),
            length=int(info.get('seqlength', 0)),
        )
    except (configparser.Error, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"'{path}' is no description of a MOT sequence: {type(error).__name__}: {reason}"
        ) from error


def _add_sequence(data: dict, folder: Path, info: dict) -> None:
    """Append a sequence's video, images and annotations."""
    video = len(data['videos']) + 1
    size = dict(width=info['width'], height=info['height'])
    data['videos'].append(dict(id=video, name=folder.name, fps=info['fps'], **size))
    frames = _frames(folder / info['folder'], info['ending'])
    if not frames:
        raise UsageError(
            f"the MOT sequence '{folder}' has no frames {info['folder']}/*{info['ending']} that "
            'are '
            'named by their numbers'
        )
    if len(frames) < info['length']:
        raise UsageError(
            f"the MOT sequence '{folder}' has {len(frames)} frames "
            f'{info["folder"]}/*{info["ending"]}, and '
            f'its seqinfo.ini says seqLength={info["length"]}: get the others, or correct it'
        )
    ids = {}
    for frame, file in frames:
        ids[frame] = len(data['images']) + 1
        data['images'].append(
            dict(
                id=ids[frame],
                video_id=video,
                frame_id=frame - frames[0][0],
                file_name=f'{folder.name}/{info["folder"]}/{file.name}',
                **size,
            )
        )
    numbers = {category['name']: category['id'] for category in data['categories']}
    path = folder / 'gt' / 'gt.txt'
    for line, frame, name, entry in _objects(path, _classes_of(folder)):
        if frame not in ids:
            raise UsageError(
                f"line {line} of '{path}' is of frame {frame}, which has no picture: there are "
                f'{min(ids)} '
                f'to {max(ids)}'
            )
        data['annotations'].append(
            dict(
                id=len(data['annotations']) + 1,
                image_id=ids[frame],
                video_id=video,
                category_id=numbers[name],
                **entry,
            )
        )


def _frames(folder: Path, ending: str) -> list[tuple[int, Path]]:
    """Numbers and files of frames, in the order of time."""
    return sorted(
        (int(file.stem), file) for file in folder.glob(f'*{ending}') if file.stem.isdecimal()
    )


def _objects(path: Path, classes: Sequence[str]) -> Iterator[tuple[int, int, str, dict]]:
    """Line numbers, frames, names of classes and annotations of a gt.txt."""
    rows = list(_rows(path)) if path.is_file() else []
    alone = _are_pedestrians(rows, path, classes)
    for line, row in rows:
        # numpy writes whole numbers as 1.000e+00.
        if not (row[0].is_integer() and row[1].is_integer()) or row[4] <= 0 or row[5] <= 0:
            raise UsageError(
                f"line {line} of '{path}' must have whole numbers for frame and id, and a width "
                'and height '
                f'above 0; got {row[:6]}'
            )
        kind = 1 if alone else row[7]
        if kind not in range(1, len(classes) + 1):
            raise UsageError(
                f"line {line} of '{path}' has class {kind:g}, and there are 1 to {len(classes)} "
                f'({classes[0]} to {classes[-1]}): name others in {path.parent}/labels.txt, one a '
                'line'
            )
        left, top, width, height = row[2:6]
        # MOT15 has no visibility.
        yield (
            line,
            int(row[0]),
            'pedestrian' if alone else classes[int(kind) - 1],
            dict(
                instance_id=int(row[1]),
                bbox=[left - 1, top - 1, width, height],
                area=width * height,
                iscrowd=int(row[6] == 0),
                visibility=-1 if alone else row[8],
            ),
        )


def _rows(path: Path) -> Iterator[tuple[int, list[float]]]:
    """Line numbers and numbers of a gt.txt."""
    for line, text in enumerate(_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = [float(value) for value in text.rstrip(', ').split(',')]
        except ValueError:
            row = []
        if len(row) not in (9, 10) or not all(map(math.isfinite, row)):
            raise UsageError(f"line {line} of '{path}' is not: {_COLUMNS}")
        yield line, row


def _are_pedestrians(
    rows: list[tuple[int, list[float]]], path: Path, classes: Sequence[str]
) -> bool:
    """Whether a gt.txt is MOT15's, by its tenth column."""
    if not any(len(row) == 10 for _, row in rows):
        return False
    world = [row[7:] for _, row in rows if len(row) == 10]
    unknown = all(values == [-1, -1, -1] for values in world)
    whole = all(value.is_integer() for values in world for value in values)
    if len(world) < len(rows) or classes is not CLASSES or whole and not unknown:
        raise UsageError(
            f"'{path}' has ten columns, the last three either of classes or of MOT15's world "
            'coordinates: '
            f'write {_COLUMNS}'
        )
    return True
