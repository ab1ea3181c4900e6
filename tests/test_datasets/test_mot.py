"""MOT sequences as users have them: other columns, other classes, other ways to write numbers."""

import cv2
import numpy as np
import pytest

from dynamicdet.datasets import mot  # noqa: F401  (registers)
from dynamicdet.datasets.check import check_dataloaders
from dynamicdet.errors import UsageError
from mmdet.registry import DATASETS

INFO = (
    '[Sequence]\nname=a\nimDir=img1\nframeRate=30\nseqLength=2\nimWidth=64\nimHeight=48\n'
    'imExt=.png\n'
)


class Sequences:
    """A folder of MOT sequences, frames 1 and 2 of each."""

    def __init__(self, root):
        self.root = root

    def add(self, name='a', gt=None, labels=None, info=INFO, frames=(1, 2)):
        folder = self.root / name
        (folder / 'img1').mkdir(parents=True)
        for frame in frames:
            cv2.imwrite(
                str(folder / 'img1' / f'{frame:06d}.png'), np.full((48, 64, 3), 90, np.uint8)
            )
        if info:
            (folder / 'seqinfo.ini').write_bytes(info.encode())
        for file, text in (('gt.txt', gt), ('labels.txt', labels)):
            if text is not None:
                (folder / 'gt').mkdir(exist_ok=True)
                (folder / 'gt' / file).write_bytes(text.encode() if isinstance(text, str) else text)
        return self

    def config(self, **options):
        return dict(
            type='MOTSequenceDataset', data_prefix=dict(img=str(self.root)), pipeline=[], **options
        )

    def objects(self, classes=None):
        """Names and boxes of all objects."""
        dataset = DATASETS.build(
            self.config(**dict(metainfo=dict(classes=classes)) if classes else {})
        )
        names = dataset.metainfo['classes']
        return [
            (names[one['bbox_label']], *one['bbox'])
            for row in range(len(dataset))
            for one in dataset.get_data_info(row)['instances']
        ]

    def refusal(self, classes=None):
        options = dict(metainfo=dict(classes=classes)) if classes else {}
        with pytest.raises(UsageError) as caught:
            check_dataloaders(dict(test_dataloader=dict(dataset=self.config(**options))), ('test',))
        assert '\n' not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def sequences(tmp_path):
    return Sequences(tmp_path / 'mot')


BOX = (10, 20, 40, 45)


@pytest.mark.parametrize(
    'row, name',
    [
        ('1,1,11,21,30,25,1,1,1', 'pedestrian'),
        ('1,1,11,21,30,25,1,13,1', 'crowd'),
        ('1, 1, 11, 21, 30, 25, 1, 3, 0.5\r', 'car'),
        ('1.000e+00,1.0,1.1e1,21,30,25,1,3.0,1', 'car'),
        ('1,1,11,21,30,25,1,3,1,', 'car'),
        ('1,1,11,21,30,25,1,-1,-1,-1', 'pedestrian'),
        ('1,1,11,21,30,25,1,5.3,-2.1,0', 'pedestrian'),
    ],
)
def test_rows(sequences, row, name):
    assert sequences.add(gt=f'{row}\n\n').objects() == [(name, *BOX)]


def test_a_byte_order_mark(sequences):
    sequences.add(gt='\ufeff1,1,11,21,30,25,1,3,1\n', info='\ufeff' + INFO.replace('\n', '\r\n'))
    assert sequences.objects() == [('car', *BOX)]


def test_labels_name_the_classes(sequences):
    sequences.add(gt='1,1,11,21,30,25,1,3,1\n', labels='car\nbus\ntruck\n')
    # Those of another sequence may have another order; one without ground truth has none.
    sequences.add('b', gt='1,1,11,21,30,25,1,1,1\n', labels='truck\r\ncar\r\n').add('c')
    for classes in (('car', 'bus', 'truck'), ('truck', 'bus', 'car')):
        assert sequences.objects(classes) == [('truck', *BOX)] * 2
    message = sequences.refusal()
    assert (
        'have no class pedestrian' in message
        and "metainfo=dict(classes=('car', 'bus', 'truck'))" in message
    )


def test_some_of_the_classes(sequences):
    sequences.add(gt='1,1,11,21,30,25,1,3,1\n1,1,1,1,9,9,1,1,1\n')
    assert sequences.objects(('car',)) == [('car', *BOX)]


def test_a_set_without_ground_truth_has_the_classes_of_the_config(sequences):
    assert sequences.add().objects(('cat',)) == []


@pytest.mark.parametrize(
    'gt, said',
    [
        (
            '1,1,11,21,30,25,1,20,1',
            "line 1 of '{gt}' has class 20, and there are 1 to 13 (pedestrian to crowd)",
        ),
        ('1,1,11,21,30,25,1,0,1', 'has class 0'),
        ('1,1,11,21,30,25,1,1.5,1', 'has class 1.5'),
        (
            '1,1,11,21,30,25,1,1,1\n7,1,11,21,30,25,1,1,1',
            "line 2 of '{gt}' is of frame 7, which has no picture",
        ),
        ('0,1,11,21,30,25,1,1,1', 'is of frame 0, which has no picture: there are 1 to 2'),
        ('1,1,11,21,0,25,1,1,1', 'a width and height above 0'),
        ('1.5,1,11,21,30,25,1,1,1', 'whole numbers for frame and id'),
        ('1,1,11,21,nan,25,1,1,1', "line 1 of '{gt}' is not: frame, id"),
        (
            'frame,id,left,top,width,height,flag,class,visibility',
            "line 1 of '{gt}' is not: frame, id",
        ),
        ('1 1 11 21 30 25 1 1 1', "line 1 of '{gt}' is not: frame, id"),
        ('1,1,11,21,30,25', "line 1 of '{gt}' is not: frame, id"),
        (b'\xff\xfe1', "'{gt}' cannot be read"),
        # VisDrone's: score, class, truncation, occlusion.
        ('1,1,11,21,30,25,1,4,0,1', 'ten columns'),
        ('1,1,11,21,30,25,1,-1,-1,-1\n1,1,11,21,30,25,1,1,1', 'ten columns'),
    ],
)
def test_mistakes_name_the_line(sequences, gt, said):
    assert said.format(gt=sequences.root / 'a/gt/gt.txt') in sequences.add(gt=gt).refusal()


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(info=None), 'has img1 and no seqinfo.ini'),
        (
            dict(info=INFO.replace('seqLength=2', 'seqLength=5')),
            'has 2 frames img1/*.png, and its seqinfo.ini says seqLength=5',
        ),
        (dict(info=INFO.replace('.png', '.jpg')), 'has no frames img1/*.jpg'),
        (dict(info=INFO.replace('=64', '=wide')), 'no description of a MOT sequence'),
        (dict(labels='car\ncar\n', gt=''), 'each once'),
        (dict(labels='\n', gt=''), 'must name the classes'),
        (dict(labels='car\n', gt='1,1,11,21,30,25,1,-1,-1,-1'), 'ten columns'),
        (dict(labels='car\n', gt='1,1,11,21,30,25,1,2,1'), 'has class 2, and there are 1 to 1'),
    ],
)
def test_mistakes_of_a_sequence(sequences, options, said):
    assert said in sequences.add(**options).refusal(('car',))


def test_the_check_looks_into_sequences(sequences):
    sequences.add(gt='1,1,11,21,30,25,1,1,1\n1,1,70,21,30,25,1,1,1\n')
    lines = check_dataloaders(dict(train_dataloader=dict(dataset=sequences.config())), ('train',))
    assert sum('wholly outside their image' in line for line in lines) == 1
    picture = sequences.root / 'a/img1/000002.png'
    picture.write_bytes(picture.read_bytes()[:60])
    assert 'a/img1/000002.png: truncated' in sequences.refusal()
