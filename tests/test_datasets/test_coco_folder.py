"""Folders of pictures as users have them."""

import json

import cv2
import numpy as np
import pytest

from dynamicdet.datasets.coco_folder import (
    PictureSet,
    annotations_for,
    confident_annotations,
    find_sets,
)
from dynamicdet.errors import UsageError


def write_set(ann_file, pictures, names=('a.png', 'b.png'), categories=('Cat', 'dog')):
    ann_file.parent.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    images = []
    for number, name in enumerate(names, 1):
        cv2.imwrite(str(pictures / name), np.zeros((20, 30, 3), np.uint8))
        images.append(dict(id=number, file_name=name, width=30, height=20))
    annotations = [
        dict(id=number, image_id=1, category_id=number, bbox=[1, 2, 3, 4], area=12, iscrowd=0)
        for number, _ in enumerate(categories, 1)
    ]
    own = [dict(id=number, name=name) for number, name in enumerate(categories, 1)]
    ann_file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=own)))


@pytest.mark.parametrize(
    'ann_file, pictures, split',
    [
        ('annotations/val.json', 'val', 'val'),
        ('annotations/instances_val2017.json', 'val2017', 'val'),
        ('valid/_annotations.coco.json', 'valid', 'val'),
        ('annotations/instances_test.json', 'images/test', 'test'),
        ('train.json', 'images', 'train'),
        ('labels.json', '.', 'val'),
    ],
)
def test_a_split_is_found(tmp_path, ann_file, pictures, split):
    write_set(tmp_path / ann_file, tmp_path / pictures)
    assert find_sets(tmp_path) == {split: PictureSet(tmp_path / pictures, tmp_path / ann_file)}


def test_all_splits_are_found_in_order(tmp_path):
    for name in ('train', 'test', 'val'):
        write_set(tmp_path / f'annotations/{name}.json', tmp_path / name)
    (tmp_path / 'annotations/captions_val.json').write_text(
        (tmp_path / 'annotations/val.json').read_text()
    )
    found = find_sets(tmp_path)
    assert list(found) == ['val', 'test', 'train']
    assert found['val'].pictures == tmp_path / 'val'
    named = find_sets(tmp_path, ann_file=str(tmp_path / 'annotations/test.json'))
    assert named['val'].ann_file.name == 'test.json' and named['val'].pictures == tmp_path / 'test'


def test_what_is_not_clear_is_refused(tmp_path):
    with pytest.raises(UsageError, match='there is no folder'):
        find_sets(tmp_path / 'gone')
    with pytest.raises(UsageError, match='there is no picture'):
        find_sets(tmp_path)
    for name in ('val_a', 'val_b'):
        write_set(tmp_path / f'annotations/{name}.json', tmp_path / 'val')
    with pytest.raises(UsageError, match='several annotation files of the val pictures'):
        find_sets(tmp_path)
    (tmp_path / 'val/a.png').unlink()
    with pytest.raises(UsageError, match='in no folder of'):
        find_sets(tmp_path, str(tmp_path / 'annotations/val_a.json'))


def test_categories_become_the_detectors(tmp_path):
    write_set(tmp_path / 'val.json', tmp_path, categories=('Cat', 'ufo', 'dog'))
    content, lines = annotations_for(PictureSet(tmp_path, tmp_path / 'val.json'), ('dog', 'cat'))
    assert content['categories'] == [dict(id=1, name='dog'), dict(id=2, name='cat')]
    assert [one['category_id'] for one in content['annotations']] == [2, 1]
    assert lines == [
        '1 of 3 annotations are left out, of categories that the detector does not know: ufo'
    ]
    with pytest.raises(UsageError, match='knows none of them'):
        annotations_for(PictureSet(tmp_path, tmp_path / 'val.json'), ('horse',))


def test_pictures_without_annotations(tmp_path):
    write_set(tmp_path / 'x.json', tmp_path / 'pictures')
    (tmp_path / 'pictures/c.png').write_bytes(b'no picture')
    content, lines = annotations_for(PictureSet(tmp_path / 'pictures'), ('cat',))
    assert [(one['file_name'], one['width'], one['height']) for one in content['images']] == [
        ('a.png', 30, 20),
        ('b.png', 30, 20),
    ]
    assert not content['annotations'] and lines == ['1 pictures cannot be read: c.png']
    found = {
        1: [dict(bbox=[1, 2, 3, 4], score=0.9, category_id=1)],
        2: [dict(bbox=[1, 2, 3, 5], score=0.2, category_id=1)],
    }
    made = confident_annotations(content, found, 0.5)['annotations']
    assert [(one['id'], one['image_id'], one['area']) for one in made] == [(1, 1, 12)]
    with pytest.raises(UsageError, match='detects nothing with a score of 0.95'):
        confident_annotations(content, found, 0.95)
