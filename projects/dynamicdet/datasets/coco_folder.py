"""A folder of pictures as users have it: its annotation files, its splits, its classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..annotations import read_annotations
from ..errors import UsageError
from .check_annotations import first_few
from .picture_formats import pictures_in

#: Splits, in the order in which routers are fitted to them, and how files and folders are called.
#: A detector may have learned the training pictures by heart.
SPLITS = dict(val=('val', 'valid', 'validation'), test=('test',), train=('train',))
#: EXIF's tag of the orientation; from 5 on, width and height change places.
_ORIENTATION, _TURNED = 0x0112, 5


class PictureSet(NamedTuple):
    """Pictures of a split.

    Attributes:
        pictures (Path): Folder that names of files are relative to.
        ann_file (Path, optional): COCO annotations; None: there are none.
    """

    pictures: Path
    ann_file: Path | None = None


def find_sets(
    data: str | Path, ann_file: str | None = None, pictures: str | None = None
) -> dict[str, PictureSet]:
    """The picture sets of a folder.

    Annotation files are looked for in the folder, in ``annotations`` and in the folders of the
    splits; a split is told by a word of the file's name or of its folder's: ``train.json``,
    ``instances_val2017.json``, ``valid/_annotations.coco.json``. Pictures are beside the file, in
    the folder, in ``images``, or in one called as the split.

    Args:
        data (str or Path): The folder.
        ann_file (str, optional): The annotation file, where the folder has others.
        pictures (str, optional): The folder of its pictures, where it is another. Without
            ``ann_file`` the pictures have no annotations.

    Returns:
        dict[str, PictureSet]: 'val', 'test' and 'train', those that are there, in this order; a set
            whose split is not told is 'val'.

    Raises:
        UsageError: If there is nothing, or it is not clear which file is meant.
    """
    data = Path(data)
    if not data.is_dir():
        raise UsageError(f"there is no folder '{data}'")
    if ann_file is not None:
        split = _split_of(Path(ann_file), data) or 'val'
        return {'val': _set_of(data, Path(ann_file), split, pictures)}
    if pictures is not None:
        return {'val': PictureSet(Path(pictures))}
    by_split: dict[str, list[Path]] = {}
    for path in _annotation_files(data):
        by_split.setdefault(_split_of(path, data), []).append(path)
    if not by_split:
        pictures_in(data)
        return {'val': PictureSet(data)}
    if set(by_split) == {''}:
        by_split = {'val': by_split['']}
    sets = {}
    for split in (name for name in SPLITS if name in by_split):
        if len(by_split[split]) > 1:
            raise UsageError(
                f"'{data}' has several annotation files of the {split} pictures "
                f'({first_few([str(path) for path in by_split[split]])}): name one by --ann'
            )
        sets[split] = _set_of(data, by_split[split][0], split, None)
    return sets


def _annotation_files(data: Path) -> list[Path]:
    folders = [data, data / 'annotations']
    folders += [data / name for names in SPLITS.values() for name in names]
    files = [
        path for folder in folders if folder.is_dir() for path in sorted(folder.glob('*.json'))
    ]
    return [path for path in files if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    """Whether a file is one of boxes; captions and key points, say, have others beside it."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return False
    return (
        isinstance(content, dict)
        and {'images', 'annotations', 'categories'} <= content.keys()
        and not path.name.startswith(('captions', 'person_keypoints', 'panoptic'))
    )


def _split_of(path: Path, data: Path) -> str:
    """The split that a file's name tells, or else its folder's; '' if none does."""
    for name in (path.stem, path.parent.name if path.parent != data else ''):
        for split, words in SPLITS.items():
            if any(word in name.lower() for word in words):
                return split
    return ''


def _set_of(data: Path, ann_file: Path, split: str, pictures: str | None) -> PictureSet:
    names = [image['file_name'] for image in read_annotations(ann_file).data['images']]
    if pictures is not None:
        return PictureSet(Path(pictures), ann_file)
    subfolders = [
        path for path in sorted(data.glob('*')) + sorted(data.glob('images/*')) if path.is_dir()
    ]
    words = SPLITS[split]
    folders = [
        *(path for path in subfolders if any(word in path.name.lower() for word in words)),
        ann_file.parent,
        data,
        *subfolders,
    ]
    for folder in folders:
        if all((folder / name).is_file() for name in names[:20]):
            return PictureSet(folder, ann_file)
    raise UsageError(
        f"the pictures of '{ann_file}' (such as {names[0]}) are in no folder of '{data}': name it "
        'by --img'
    )


def annotations_for(
    picture_set: PictureSet, classes: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What a set holds, with a detector's classes as categories, in their order.

    Args:
        picture_set (PictureSet): With or without annotations.
        classes (Sequence[str]): The detector's.

    Returns:
        tuple: A COCO file's content, of no annotations where there are none; and what a user should
            know, a line each.

    Raises:
        UsageError: If the set has none of the classes, or none of its pictures can be read.
    """
    categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
    if picture_set.ann_file is None:
        images, lines = _entries(picture_set.pictures)
        return dict(images=images, annotations=[], categories=categories), lines
    data = read_annotations(picture_set.ann_file).data
    known = {name.lower(): number for number, name in enumerate(classes, 1)}
    ids = {category['id']: known.get(category['name'].lower()) for category in data['categories']}
    if not any(ids.values()):
        names = first_few([category['name'] for category in data['categories']])
        raise UsageError(
            f"'{picture_set.ann_file}' has the categories {names}, and the detector knows none of "
            f'them (but {first_few(list(classes))}): take a detector that was trained on them'
        )
    kept = [
        dict(annotation, category_id=ids[annotation['category_id']])
        for annotation in data['annotations']
        if ids.get(annotation['category_id'])
    ]
    strange = [category['name'] for category in data['categories'] if not ids[category['id']]]
    lines = []
    if strange:
        lines.append(
            f'{len(data["annotations"]) - len(kept)} of {len(data["annotations"])} annotations are '
            f'left out, of categories that the detector does not know: {first_few(strange)}'
        )
    return dict(images=data['images'], annotations=kept, categories=categories), lines


def _entries(folder: Path) -> tuple[list[dict], list[str]]:
    """Entries of a folder's pictures."""
    entries: list[dict] = []
    unread = []
    for path in pictures_in(folder):
        try:
            with Image.open(path) as picture:
                size = picture.size
                turned = picture.getexif().get(_ORIENTATION, 1) >= _TURNED
        except (OSError, ValueError, SyntaxError):
            unread.append(path.name)
            continue
        width, height = size[::-1] if turned else size
        entries.append(dict(id=len(entries) + 1, file_name=path.name, width=width, height=height))
    if not entries:
        raise UsageError(f"none of the pictures in '{folder}' can be read")
    return entries, [f'{len(unread)} pictures cannot be read: {first_few(unread)}'] * bool(unread)


def confident_annotations(
    content: Mapping[str, Any], detections: Mapping[int, Sequence[Mapping]], score: float
) -> dict[str, Any]:
    """A COCO file's content in which confident detections stand for the truth.

    Args:
        content (Mapping): As `annotations_for` gives it.
        detections (Mapping): Image id -> COCO results of it.
        score (float): What a detection must have to be counted an object, in [0, 1].

    Raises:
        UsageError: If there is none.
    """
    annotations = [
        dict(
            id=0,
            image_id=image,
            category_id=detection['category_id'],
            bbox=list(detection['bbox']),
            area=detection['bbox'][2] * detection['bbox'][3],
            iscrowd=0,
        )
        for image, results in detections.items()
        for detection in results
        if detection['score'] >= score
    ]
    if not annotations:
        raise UsageError(
            f'the last exit detects nothing with a score of {score:g} or more in these pictures, '
            'so nothing can stand for the truth: annotate some'
        )
    for number, annotation in enumerate(annotations, 1):
        annotation['id'] = number
    return dict(content, annotations=annotations)
