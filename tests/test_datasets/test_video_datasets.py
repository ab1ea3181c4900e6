"""CocoVID and MOT sequences as frames: order, metainfo, filters, evaluation."""

import json
import random
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import ConcatDataset

from dynamicdet.datasets import mot, samplers, video  # noqa: F401  (they register)
from dynamicdet.errors import UsageError
from mmdet.datasets import BaseVideoDataset
from mmdet.registry import DATASETS, METRICS, TRANSFORMS

KEYS = ('img_id', 'img_path', 'ori_shape', 'video_id', 'frame_id', 'video_length', 'clip_step')
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=KEYS),
]
#: (video, frame) of the images, in an order of the file that is not that of time.
IMAGES = [(7, 3), (7, 1), (3, 0), (7, 2), (3, 4)]


@pytest.fixture
def root(tmp_path):
    """Two videos, of frames 1, 2, 3 and 0, 4, and a still; the last frame of each has no object."""
    images, annotations = [], []
    for number, (stream, frame) in enumerate(IMAGES, start=1):
        images.append(
            dict(
                id=number,
                file_name=f'{stream}/{frame}.png',
                height=40,
                width=60,
                video_id=stream,
                frame_id=frame,
                marked=frame != 2,
            )
        )
    images.append(dict(id=9, file_name='still.png', height=30, width=60))
    for number, image in enumerate(images, start=1):
        if image['file_name'] not in ('7/3.png', '3/4.png'):
            annotations.append(
                dict(
                    id=number,
                    image_id=image['id'],
                    category_id=5,
                    bbox=[3, 4, 20, 10],
                    area=200,
                    iscrowd=0,
                    instance_id=1,
                )
            )
        path = tmp_path / 'frames' / image['file_name']
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((image['height'], image['width'], 3), image['id'], np.uint8))
    (tmp_path / 'vid.json').write_text(
        json.dumps(
            dict(
                videos=[dict(id=7, name='7'), dict(id=3, name='3')],
                images=images,
                annotations=annotations,
                categories=[dict(id=4, name='cat'), dict(id=5, name='dog')],
            )
        )
    )
    return tmp_path


def build(root, **options):
    return DATASETS.build(
        {
            **dict(
                type='VideoDataset',
                data_root=str(root),
                ann_file='vid.json',
                data_prefix=dict(img='frames/'),
                metainfo=dict(classes=('dog', 'cat')),
                pipeline=PIPELINE,
            ),
            **options,
        }
    )


def times(dataset):
    return [
        (info['video_id'], info['frame_id'])
        for info in map(dataset.get_data_info, range(len(dataset)))
    ]


def test_frames_come_by_video_and_time(root):
    dataset = build(root)
    assert isinstance(dataset, BaseVideoDataset) and len(dataset) == dataset.num_all_imgs == 6
    still = 100001  # mmdet's number of the first image without a video
    # 0 starts a video, and gaps stay.
    assert times(dataset) == [(7, 0), (7, 1), (7, 2), (3, 0), (3, 4), (still, 0)]
    assert dataset.videos() == {7: [0, 1, 2], 3: [3, 4], still: [5]}
    assert [dataset.get_len_per_video(place) for place in range(3)] == [3, 2, 1]
    for row, length in enumerate([3, 3, 3, 2, 2, 1]):
        sample = dataset[row]['data_samples']
        info = dataset.get_data_info(row)
        assert (sample.video_id, sample.frame_id, sample.video_length) == (
            *times(dataset)[row],
            length,
        )
        assert 'clip_step' not in sample and sample.img_id == info['img_id']
        assert (dataset[row]['inputs'] == info['img_id']).all()  # the picture of that entry
        found = row not in (2, 4)
        assert sample.gt_instances.bboxes.tensor.tolist() == [[3, 4, 23, 14]] * found
        assert dataset.get_cat_ids(row) == [1] * found  # mmdet keeps the order of the file


def test_frame_ids_are_places_where_a_file_has_none(root):
    data = json.loads((root / 'vid.json').read_text())
    for image in data['images']:
        image.pop('frame_id', None)
    (root / 'vid.json').write_text(json.dumps(data))
    dataset = build(root)
    assert times(dataset)[:5] == [(7, 0), (7, 1), (7, 2), (3, 0), (3, 1)]
    assert [dataset.get_data_info(row)['img_id'] for row in range(5)] == [1, 2, 4, 3, 5]


@pytest.mark.parametrize(
    'options, left',
    [
        (dict(filter_empty_gt=True), [(7, 0), (7, 1), (3, 0), (100001, 0)]),
        (dict(min_size=32), [(7, 0), (7, 1), (7, 2), (3, 0), (3, 4)]),
        (dict(marked='marked'), [(7, 0), (7, 2), (3, 0), (3, 4)]),
        (dict(), [(7, 0), (7, 1), (7, 2), (3, 0), (3, 4), (100001, 0)]),
    ],
)
def test_filters_are_for_training(root, options, left):
    assert times(build(root, filter_cfg=options)) == left
    assert len(build(root, filter_cfg=options, test_mode=True)) == 6
    assert sum(map(len, build(root, filter_cfg=options).videos().values())) == len(left)


def test_subsets_and_mixtures(root):
    subset = build(root, indices=[1, 2, 4])
    assert subset.videos() == {7: [0, 1], 3: [2]}
    both = ConcatDataset([build(root), build(root)])
    assert len(both) == 12 and both[7]['data_samples'].frame_id == 1


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(metainfo=None), 'needs the classes'),
        (dict(metainfo=dict(classes=('dog', 'mouse'))), 'has 1 of the 2 classes'),
    ],
)
def test_classes_are_asked_for(root, options, words):
    with pytest.raises(UsageError, match=words):
        build(root, **options)


def test_imagenet_vid_has_30_classes(root):
    classes = DATASETS.get('ImageNetVIDDataset').METAINFO['classes']
    assert len(set(classes)) == 30 and list(classes) == sorted(classes)
    data = json.loads((root / 'vid.json').read_text())
    data['categories'] = [
        dict(id=number, name=name) for number, name in enumerate(classes, start=1)
    ]
    (root / 'vid.json').write_text(json.dumps(data))
    dataset = build(root, type='ImageNetVIDDataset', metainfo=None)
    assert dataset.get_cat_ids(0) == [classes.index('bird')]  # category 5


@TRANSFORMS.register_module()
class VideoTestShift:
    """Moves a box at random: by numpy, by random, to see whether frames of a clip are moved
    alike."""

    def __call__(self, results):
        results['gt_bboxes'].tensor[:] = np.random.randint(1000) + random.random()
        return results


def test_frames_of_a_clip_are_augmented_alike(root):
    dataset = build(root, pipeline=[*PIPELINE[:2], dict(type='VideoTestShift'), PIPELINE[2]])
    clip = [video.ClipFrame(0, 0, 11), video.ClipFrame(1, 1, 11)]
    np.random.seed(3)
    expected = np.random.get_state()[1].tolist()
    first, second = (dataset[frame]['data_samples'] for frame in clip)
    assert np.random.get_state()[1].tolist() == expected  # nothing was drawn outside
    assert (first.clip_step, second.clip_step) == (0, 1)
    assert (first.frame_id, second.frame_id) == (0, 1)
    boxes = [sample.gt_instances.bboxes.tensor.tolist() for sample in (first, second)]
    other = dataset[video.ClipFrame(0, 0, 12)]['data_samples'].gt_instances.bboxes.tensor.tolist()
    alone = [dataset[0]['data_samples'].gt_instances.bboxes.tensor.tolist() for _ in range(2)]
    assert boxes[0] == boxes[1] != other
    assert alone[0] != alone[1]


def test_no_frame_of_a_clip_is_left_out(root):
    dataset = build(
        root,
        pipeline=[
            *PIPELINE[:2],
            dict(type='FilterAnnotations', min_gt_bbox_wh=(50, 50)),
            PIPELINE[2],
        ],
    )
    with pytest.raises(UsageError, match='must not leave out'):
        dataset[video.ClipFrame(0, 0, 1)]


def perfect(sample):
    """A prediction that is the ground truth."""
    instances = sample.gt_instances
    return dict(
        img_id=sample.img_id,
        ori_shape=sample.ori_shape,
        instances=sample.get('instances'),
        pred_instances=dict(
            bboxes=instances.bboxes.tensor,
            labels=instances.labels,
            scores=torch.ones(len(instances.labels)),
        ),
    )


def evaluate(dataset, **options):
    metric = METRICS.build(dict(type='CocoMetric', metric='bbox', **options))
    metric.dataset_meta = dataset.metainfo
    for row in range(len(dataset)):
        metric.process({}, [perfect(dataset[row]['data_samples'])])
    return metric.evaluate(len(dataset))


def test_coco_metric_takes_it_as_it_is(root):
    dataset = build(root, test_mode=True)
    assert evaluate(dataset, ann_file=str(root / 'vid.json'))['coco/bbox_mAP'] == 1


@pytest.fixture
def sequences(tmp_path):
    """Two MOT sequences, one without ground truth; and a folder that is none."""
    truth = '2,4,11,21,30,10,1,1,0.5\n1,4,1,1,20,10,1,1,1\n1,5,5,5,9,9,0,3,0.2\n\n'
    for name, gt in (('B', truth), ('A', None)):
        folder = tmp_path / 'mot' / name
        (folder / 'img1').mkdir(parents=True)
        (folder / 'seqinfo.ini').write_text(
            f'[Sequence]\nname={name}\nimDir=img1\nframeRate=14\nseqLength=2\n'
            'imWidth=60\nimHeight=40\nimExt=.png\n'
        )
        for frame in (2, 1):
            cv2.imwrite(
                str(folder / 'img1' / f'{frame:06d}.png'), np.full((40, 60, 3), frame, np.uint8)
            )
        if gt:
            (folder / 'gt').mkdir()
            (folder / 'gt' / 'gt.txt').write_text(gt)
    (tmp_path / 'mot' / 'notes').mkdir()
    return tmp_path / 'mot'


def test_mot_sequences(sequences):
    pipeline = [*PIPELINE[:2], dict(type='PackDetInputs', meta_keys=(*KEYS, 'instances'))]
    dataset = DATASETS.build(
        dict(
            type='MOTSequenceDataset',
            data_root=str(sequences.parent),
            data_prefix=dict(img='mot'),
            pipeline=pipeline,
            test_mode=True,
        )
    )
    assert times(dataset) == [(1, 0), (1, 1), (2, 0), (2, 1)]  # A, then B
    assert [int(dataset[row]['inputs'][0, 0, 0]) for row in range(4)] == [1, 2, 1, 2]
    assert dataset.get_cat_ids(0) == []
    first, second = (dataset[row]['data_samples'] for row in (2, 3))
    # Pixels are counted from 1 in the file.
    assert first.gt_instances.bboxes.tensor.tolist() == [[0, 0, 20, 10]]
    assert first.ignored_instances.bboxes.tensor.tolist() == [[4, 4, 13, 13]]
    assert first.ignored_instances.labels.tolist() == [2]
    assert second.gt_instances.bboxes.tensor.tolist() == [[10, 20, 40, 30]]
    assert dataset.get_data_info(3)['instances'][0]['instance_id'] == 4
    # Without an annotation file, and with one that is made from the same.
    assert evaluate(dataset)['coco/bbox_mAP'] == 1
    mot.write_cocovid(sequences, sequences.parent / 'mot.json')
    assert evaluate(dataset, ann_file=str(sequences.parent / 'mot.json'))['coco/bbox_mAP'] == 1


def test_mot_15_has_pedestrians_alone(sequences):
    (sequences / 'B' / 'gt' / 'gt.txt').write_text('1,1,1,1,20,10,1,-1,-1,-1\n')
    (annotation,) = mot.read_mot(sequences)['annotations']
    assert annotation['category_id'] == 1 and annotation['iscrowd'] == 0


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda root: (root / 'B' / 'gt' / 'gt.txt').write_text('1,2,3\n'), 'line 1 of'),
        (
            lambda root: (root / 'B' / 'seqinfo.ini').write_text('[Sequence]\nname=B\n'),
            'no description',
        ),
        (lambda root: (root / 'B' / 'seqinfo.ini').write_text('name=B\n'), 'no description'),
        (lambda root: [file.unlink() for file in (root / 'A' / 'img1').iterdir()], 'has no frames'),
        (lambda root: (root / 'A' / 'seqinfo.ini').unlink(), 'has img1 and no seqinfo.ini'),
        (lambda root: [shutil.rmtree(root / name) for name in 'AB'], 'no MOT sequence'),
    ],
)
def test_mot_mistakes_are_said(sequences, spoil, words):
    spoil(sequences)
    with pytest.raises(UsageError, match=words):
        mot.read_mot(sequences)
