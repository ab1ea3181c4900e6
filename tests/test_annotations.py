"""One reader of annotation files: what it mends means the same, what it refuses is named, and the
others agree."""

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from mmengine.config import Config

from dynamicdet.annotations import mended_copy, original_of, read_annotations
from dynamicdet.datasets.annotation_repair import mend_annotations
from dynamicdet.errors import UsageError
from dynamicdet.routing.evaluation import evaluate, read_truth


def coco():
    """Three images, four boxes, two categories."""
    boxes = [(0, [8, 8, 20, 20]), (0, [30, 8, 9.5, 12]), (1, [4, 4, 8, 30]), (2, [1, 2, 40, 41])]
    return dict(
        images=[
            dict(id=number + 1, file_name=f'{number}.jpg', width=48, height=50)
            for number in range(3)
        ],
        annotations=[
            dict(
                id=number + 1,
                image_id=image + 1,
                category_id=5 + 2 * (number % 2),
                bbox=box,
                area=box[2] * box[3],
                iscrowd=0,
            )
            for number, (image, box) in enumerate(boxes)
        ],
        categories=[dict(id=5, name='cat'), dict(id=7, name='dog')],
    )


@pytest.fixture
def write(tmp_path):
    def write(content, name='a.json', encoding='utf-8'):
        path = tmp_path / name
        path.write_bytes(
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode(encoding)
        )
        return str(path)

    return write


def changed(change, group='annotations'):
    """A sound file after ``change(entry, index)`` of each entry of a group."""
    data = coco()
    for index, entry in enumerate(data[group]):
        change(entry, index)
    return data


def as_text(entry, *keys):
    entry.update(
        {
            key: list(map(str, entry[key])) if isinstance(entry[key], list) else str(entry[key])
            for key in keys
        }
    )


#: What a file becomes -> what is said of it. All mean what the sound one does.
MENDED = dict(
    iscrowd_missing=(
        changed(lambda one, _: one.pop('iscrowd')),
        '4 of 4 annotations have no iscrowd',
    ),
    iscrowd_null=(
        changed(lambda one, _: one.update(iscrowd=None)),
        '4 of 4 annotations have no iscrowd',
    ),
    iscrowd_text=(
        changed(lambda one, _: one.update(iscrowd='0')),
        'iscrowd as text: read as 0 or 1',
    ),
    ignore_text=(changed(lambda one, _: one.update(ignore='0')), 'ignore as text: read as 0 or 1'),
    size_text=(
        changed(lambda one, _: as_text(one, 'width', 'height'), 'images'),
        '3 of 3 images have width or height',
    ),
    size_float=(
        changed(lambda one, _: one.update(width=48.0), 'images'),
        '3 of 3 images have width or height',
    ),
    bbox_text=(
        changed(lambda one, _: as_text(one, 'bbox')),
        '4 of 4 annotations have numbers as text in bbox',
    ),
    area_text=(
        changed(lambda one, _: as_text(one, 'area')),
        '4 of 4 annotations have an area that is text',
    ),
    area_missing=(changed(lambda one, _: one.pop('area')), "4 of 4 annotations have no 'area'"),
    ids_from_0=(
        changed(lambda one, index: one.update(id=index)),
        '1 of 4 annotations have an id that is 0',
    ),
    ids_missing=(changed(lambda one, _: one.pop('id')), 'missing'),
    ids_repeated=(changed(lambda one, _: one.update(id=7)), '3 of 4 annotations have an id'),
    ids_text=(
        changed(lambda one, index: one.update(id=f'a{index}')),
        '4 of 4 annotations have an id',
    ),
    ids_huge=(
        changed(lambda one, index: one.update(id=10**30 + index)),
        '4 of 4 annotations have an id',
    ),
    annotation_names_image_as_text=(
        changed(lambda one, _: as_text(one, 'image_id')),
        '4 of 4 annotations have image_id',
    ),
    byte_order_mark=('\ufeff' + json.dumps(coco()), 'the file is in UTF-8-SIG'),
    name_of_a_number=(
        {**coco(), 'categories': [dict(id=5, name=0), dict(id=7, name='dog')]},
        '1 of 2 categories',
    ),
)


def renamed(of_image, of_category=lambda number: number):
    data = coco()
    for entry in data['images']:
        entry['id'] = of_image(entry['id'])
    for entry in data['categories']:
        entry['id'] = of_category(entry['id'])
    for entry in data['annotations']:
        entry.update(
            image_id=of_image(entry['image_id']), category_id=of_category(entry['category_id'])
        )
    return data


MENDED.update(
    image_ids_of_digits=(renamed(str), '3 of 3 images have id of text or with a point'),
    image_ids_with_a_point=(renamed(float), '3 of 3 images have id'),
    image_ids_of_text=(
        renamed('img_{:04d}'.format),
        'numbered from 1 in the order of the file, in results',
    ),
    image_ids_beyond_64_bits=(renamed((2**64).__add__), '3 of 3 images have id'),
    one_image_id_of_text=(
        renamed(lambda number: 'b' if number == 2 else number),
        '1 of 3 images have id',
    ),
    category_ids_of_text=(renamed(int, 'c{}'.format), '2 of 2 categories have id'),
)


def test_a_sound_file_stays_as_it_is(write):
    file = read_annotations(write(coco()))
    assert file.data == coco() and file.mended == [] and not file.renumbered


@pytest.mark.parametrize('kind', MENDED)
def test_what_is_mended_means_the_same(write, tmp_path, kind):
    """To our own reader, and in the copy to pycocotools, which fails on most of them as they
    are."""
    content, said = MENDED[kind]
    path = write(content)
    before = open(path, 'rb').read()
    file = read_annotations(path)
    assert any(said in line for line in file.mended), file.mended
    from pycocotools.coco import COCO

    for truth in (read_truth(path), COCO(mended_copy(path, tmp_path / 'copies'))):
        images = {entry['id']: entry['file_name'] for entry in truth.dataset['images']}
        assert all(type(number) is int for number in images)
        places = {entry['id']: place for place, entry in enumerate(truth.dataset['categories'])}
        found = [
            (
                images[one['image_id']],
                places[one['category_id']],
                one['bbox'],
                one['area'],
                one['iscrowd'],
            )
            for one in truth.dataset['annotations']
        ]
        assert found == [
            (f'{one["image_id"] - 1}.jpg', one['category_id'] // 7, one['bbox'], one['area'], 0)
            for one in coco()['annotations']
        ]
        perfect = [
            dict(
                image_id=one['image_id'],
                category_id=one['category_id'],
                bbox=one['bbox'],
                score=0.9,
            )
            for one in truth.dataset['annotations']
        ]
        assert evaluate(truth, perfect)['ap'] == pytest.approx(100)
    assert open(path, 'rb').read() == before


def test_utf_16(write):
    assert read_annotations(write(coco(), encoding='utf-16')).data == coco()


def test_annotations_of_no_image_keep_away_from_new_numbers(write):
    data = renamed('img_{}'.format)
    data['annotations'].append(dict(data['annotations'][0], image_id=2))
    found = read_annotations(write(data)).data
    assert [one['id'] for one in found['images']] == [1, 2, 3]
    assert [one['image_id'] for one in found['annotations']] == [1, 1, 2, 3, '2']


def set_one(group, key, value):
    return changed(lambda entry, index: entry.update({key: value}) if index == 1 else None, group)


@pytest.mark.parametrize(
    'content, said',
    [
        (
            set_one('annotations', 'bbox', [[1, 2, 3, 4]]),
            "annotation number 1 {'id': 2, 'image_id': 1} has bbox [[1, 2, 3, 4]]",
        ),
        (set_one('annotations', 'bbox', None), 'has bbox None'),
        (set_one('annotations', 'bbox', dict(x=1, y=2, w=3, h=4)), 'has bbox {'),
        (set_one('annotations', 'bbox', [1, 2, 3, True]), 'has bbox [1, 2, 3, True]'),
        (set_one('annotations', 'bbox', [1, 2, 3, '4px']), "'4px'"),
        (set_one('annotations', 'bbox', [1, 2, 3, float('inf')]), 'inf'),
        (set_one('annotations', 'bbox', [1, 2, 3, 10**400]), 'has bbox [1, 2, 3, 1000'),
        (set_one('annotations', 'bbox', [1, 2, 3, '1_0']), "'1_0'"),
        (set_one('annotations', 'area', [4]), 'has area [4]'),
        (set_one('annotations', 'area', float('nan')), 'has area nan'),
        (set_one('annotations', 'area', False), 'has area False'),
        (set_one('annotations', 'iscrowd', 2), 'has iscrowd 2, where 0 or 1'),
        (set_one('annotations', 'iscrowd', 'maybe'), "has iscrowd 'maybe'"),
        (set_one('annotations', 'ignore', [0]), 'has ignore [0]'),
        (set_one('annotations', 'image_id', None), 'has image_id None'),
        (set_one('annotations', 'image_id', [1]), 'has image_id [1]'),
        (set_one('annotations', 'category_id', True), 'has category_id True'),
        (set_one('images', 'id', True), 'has id True'),
        (set_one('images', 'id', None), 'has id None'),
        (set_one('images', 'id', '1'), '1 id(s) belong to several images (such as 1)'),
        (set_one('images', 'id', 1.0), '1 id(s) belong to several images (such as 1)'),
        (
            set_one('images', 'width', 48.5),
            "image number 1 {'id': 2, 'file_name': '1.jpg'} has width 48.5",
        ),
        (set_one('images', 'width', True), 'has width True'),
        (set_one('images', 'height', -50), "image '1.jpg' has no width or height above 0"),
        (
            set_one('images', 'height', 10**12),
            "image '1.jpg' has no width or height above 0 (or one above 1048576)",
        ),
        (set_one('images', 'height', 10**400), 'or one above 1048576'),
        (set_one('images', 'file_name', 7), 'has file_name 7, where text'),
        (set_one('categories', 'name', None), 'has name None, where text'),
        ({**coco(), 'categories': {'5': 'cat'}}, "no 'categories', a list"),
        ({**coco(), 'annotations': {}}, "'annotations' must be a list"),
        (
            {**coco(), 'annotations': ['x']},
            "annotation number 0 is 'x', where a dictionary is needed",
        ),
        ({**coco(), 'images': [None]}, 'image number 0 is None'),
        ([coco()], "no list of 'images'"),
        ('[' * 100_000, 'is not JSON'),
        (json.dumps(coco()) + '\n' + json.dumps(coco()), 'is not JSON'),
        (json.dumps(coco()).replace('0.jpg', 'é.jpg').encode('latin-1'), 'save it as UTF-8'),
        (b'\x1f\x8b\x08\x00', 'is compressed: unpack it'),
        ('{"images": [' + '1' * 5000 + ']}', 'is not JSON'),
    ],
)
def test_what_cannot_be_used_is_named(write, content, said):
    path = write(content)
    with pytest.raises(UsageError) as caught:
        read_annotations(path)
    message = str(caught.value)
    assert said in message and path in message and '\n' not in message and len(message) < 600


def test_null_annotations_are_none(write):
    file = read_annotations(write({**coco(), 'annotations': None}))
    assert file.data['annotations'] == [] and 'null' in file.mended[0]
    absent = coco()
    absent.pop('annotations')
    assert read_annotations(write(absent)).data['annotations'] == []


def test_outlines_are_kept_for_those_who_ask_and_in_copies(write, tmp_path):
    data = changed(
        lambda one, _: (one.update(segmentation=[[1, 1, 5, 1, 5, 5]]), one.pop('iscrowd'))
    )
    path = write(data)
    assert 'segmentation' not in read_annotations(path).data['annotations'][0]
    assert read_annotations(path, outlines=True).data['annotations'][0]['segmentation'] == [
        [1, 1, 5, 1, 5, 5]
    ]
    copied = json.load(open(mended_copy(path, tmp_path / 'copies')))
    assert copied['annotations'][3]['segmentation'] == [[1, 1, 5, 1, 5, 5]]


def test_copies_agree_and_follow_the_content(write, tmp_path):
    """Of several processes that write at once; a file of the same name with other content has its
    own."""
    folder = tmp_path / 'copies'
    path = write(MENDED['ids_from_0'][0])
    with ThreadPoolExecutor(4) as pool:
        names = set(pool.map(lambda _: mended_copy(path, folder), range(8)))
    (copy,) = names
    assert os.listdir(folder) == [os.path.basename(copy)] and original_of(copy) == path
    (folder / '.left.by.a.killed.run').write_text('{')
    assert mended_copy(write(MENDED['area_text'][0]), folder) != copy
    assert original_of('another.json') == 'another.json'


def test_a_folder_that_cannot_be_written(write, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match='its copy cannot be written'):
        mended_copy(write(MENDED['ids_from_0'][0]), tmp_path / 'file')


def config(tmp_path, val='a.json', evaluator='a.json'):
    return Config(
        dict(
            val_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset',
                    times=2,
                    dataset=dict(
                        type='CocoDataset',
                        data_root=str(tmp_path),
                        ann_file=val,
                        data_prefix=dict(img=''),
                    ),
                )
            ),
            val_evaluator=[
                dict(type='CocoMetric', ann_file=str(tmp_path / evaluator)),
                dict(type='VOCMetric'),
            ],
        )
    )


def test_a_config_names_the_copy_where_one_is_needed(write, tmp_path):
    cfg = config(tmp_path)
    write(coco())
    assert mend_annotations(cfg, ['val'], tmp_path / 'copies')[1] == []
    assert (
        cfg.val_dataloader.dataset.dataset.ann_file == 'a.json'
        and not (tmp_path / 'copies').exists()
    )
    path = write(MENDED['iscrowd_missing'][0])
    read, lines = mend_annotations(cfg, ['val', 'test'], tmp_path / 'copies')
    copy = cfg.val_dataloader.dataset.dataset.ann_file
    assert (
        cfg.val_evaluator[0].ann_file == copy and list(read) == [copy] and original_of(copy) == path
    )
    assert len(lines) == 1 and lines[0].startswith(
        'the validation set: 4 of 4 annotations have no iscrowd'
    )
    # A second time there is nothing to mend.
    assert mend_annotations(cfg, ['val'], tmp_path / 'copies')[1] == []


def test_new_numbers_of_two_files_are_not_compared(write, tmp_path):
    data = MENDED['image_ids_of_text'][0]
    write(data)
    write({**copy.deepcopy(data), 'images': data['images'][::-1]}, 'b.json')
    with pytest.raises(
        UsageError, match='val_evaluator: .*b.json. is not the annotation file of the data set'
    ):
        mend_annotations(config(tmp_path, evaluator='b.json'), ['val'], tmp_path / 'copies')
    # The same content elsewhere has the same numbers.
    write(data, 'b.json')
    mend_annotations(config(tmp_path, evaluator='b.json'), ['val'], tmp_path / 'copies')
