"""Sequences as MOTChallenge lays them out, read as they are.

    ROOT/NAME/seqinfo.ini     [Sequence] name, frameRate, imWidth, imHeight, imDir (img1), imExt (.jpg)
    ROOT/NAME/img1/000001.jpg ...
    ROOT/NAME/gt/gt.txt       frame, id, left, top, width, height, flag, class, visibility; counted from 1

mmdet's `MOTChallengeDataset` reads a file that one of its converters has made; this one needs no such step.
"""
import configparser
import csv
import json
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, Tuple, Union

from mmdet.datasets import MOTChallengeDataset
from mmdet.registry import DATASETS

from ..engine.atomic_backend import write_atomically
from ..errors import UsageError
from .video import VideoDataset

#: Of MOT16, 17 and 20, in the order of their numbers, 1 first. MOT15 has pedestrians alone.
CLASSES = MOTChallengeDataset.METAINFO['classes']


@DATASETS.register_module()
class MOTSequenceDataset(VideoDataset):
    """MOT sequences as a `VideoDataset`: all that lie in the folder ``data_prefix=dict(img=...)``.

    What the file flags 0 (not to be considered) is marked ``iscrowd``: neither right nor wrong to find.
    ``CocoMetric`` needs no annotation file if the pipeline's ``meta_keys`` have 'instances'; or
    `write_cocovid` makes one.
    """

    METAINFO = dict(classes=CLASSES)

    def load_data_list(self) -> List[dict]:
        """As `VideoDataset`'s."""
        root = self.data_prefix.get('img', self.data_prefix.get('img_path', ''))
        with tempfile.TemporaryDirectory() as folder:
            self.ann_file = str(Path(folder, 'cocovid.json'))
            write_cocovid(root, self.ann_file)
            return super().load_data_list()


def write_cocovid(root: Union[str, Path], path: Union[str, Path]) -> None:
    """Write the annotation file, CocoVID, of MOT sequences. See `read_mot`."""
    write_atomically(json.dumps(read_mot(root)).encode(), path)


def read_mot(root: Union[str, Path]) -> dict:
    """Read a folder of MOT sequences.

    Args:
        root (str or Path): Folder of the sequences; others in it, without seqinfo.ini, are passed by.

    Returns:
        dict: CocoVID. ``frame_id`` counts from 0; a sequence without gt/gt.txt, as those of test sets, has no
        annotations.

    Raises:
        UsageError: If there is no sequence, or one cannot be read.
    """
    data = dict(
        categories=[dict(id=number, name=name) for number, name in enumerate(CLASSES, start=1)],
        videos=[], images=[], annotations=[])
    for info in sorted(Path(root).glob('*/seqinfo.ini')):
        _add_sequence(data, info.parent, _read_info(info))
    if not data['videos']:
        raise UsageError(f"there is no MOT sequence in '{root}': no folder in it has a seqinfo.ini")
    return data


def _read_info(path: Path) -> Dict[str, str]:
    parser = configparser.ConfigParser()
    try:
        parser.read(path, encoding='utf-8')
        info = dict(parser['Sequence'])
        return dict(
            width=int(info['imwidth']), height=int(info['imheight']), fps=float(info.get('framerate', 30)),
            folder=info.get('imdir', 'img1'), ending=info.get('imext', '.jpg'))
    except (configparser.Error, KeyError, ValueError) as error:
        raise UsageError(f"'{path}' is no description of a MOT sequence: {error!r}") from error


def _add_sequence(data: dict, folder: Path, info: dict) -> None:
    """Append a sequence's video, images and annotations."""
    video = len(data['videos']) + 1
    size = dict(width=info['width'], height=info['height'])
    data['videos'].append(dict(id=video, name=folder.name, fps=info['fps'], **size))
    ids = {}
    for frame, file in _frames(folder / info['folder'], info['ending']):
        ids[frame] = len(data['images']) + 1
        data['images'].append(dict(
            id=ids[frame], video_id=video, frame_id=frame - 1,
            file_name=f'{folder.name}/{info["folder"]}/{file.name}', **size))
    if not ids:
        raise UsageError(f"the MOT sequence '{folder}' has no frames {info['folder']}/*{info['ending']}")
    for frame, entry in _objects(folder / 'gt' / 'gt.txt'):
        if frame in ids:
            data['annotations'].append(dict(
                id=len(data['annotations']) + 1, image_id=ids[frame], video_id=video, **entry))


def _frames(folder: Path, ending: str) -> List[Tuple[int, Path]]:
    """Numbers and files of frames, in the order of time."""
    return sorted((int(file.stem), file) for file in folder.glob(f'*{ending}') if file.stem.isdigit())


def _objects(path: Path) -> Iterator[Tuple[int, dict]]:
    """Frames and annotations of a gt.txt."""
    if not path.is_file():
        return
    with open(path, encoding='utf-8', newline='') as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            try:
                frame, instance, (left, top, width, height) = int(row[0]), int(row[1]), map(float, row[2:6])
                flag, kind, visibility = float(row[6]), int(float(row[7])), float(row[8])
            except (ValueError, IndexError):
                raise UsageError(f"line {number} of '{path}' is not: frame, id, left, top, width, height, "
                                 'flag, class, visibility') from None
            # MOT15 has -1 for the class.
            yield frame, dict(
                category_id=max(kind, 1), instance_id=instance, bbox=[left - 1, top - 1, width, height],
                area=width * height, iscrowd=int(flag == 0), visibility=visibility)
