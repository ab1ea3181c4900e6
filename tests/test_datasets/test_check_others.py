"""The check of data sets that are not in COCO format: VOC's, and whatever else mmdet has."""

import cv2
import numpy as np
import pytest

from dynamicdet.datasets.check import check_dataloaders
from dynamicdet.datasets.config_datasets import require_one_coco
from dynamicdet.errors import UsageError
from mmdet.registry import DATASETS


def xml(*objects, size=(64, 48)):
    parts = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>'
        f'<ymax>{box[3]}</ymax></bndbox></object>'
        for name, box in objects
    )
    width, height = size
    sides = f'<width>{width}</width><height>{height}</height>'
    return f'<annotation><size>{sides}</size>{parts}</annotation>'


class Voc:
    """Three pictures with a cat each, as VOC lays them out."""

    def __init__(self, root):
        self.root = root
        for part in ('JPEGImages', 'Annotations'):
            (root / part).mkdir(parents=True)
        for name in 'abc':
            cv2.imwrite(str(root / f'JPEGImages/{name}.jpg'), np.full((48, 64, 3), 90, np.uint8))
            self.write(name, xml(('cat', (5, 5, 30, 30))))
        (root / 'list.txt').write_text('a\nb\nc\n')

    def write(self, name, text):
        (self.root / f'Annotations/{name}.xml').write_text(text)

    def config(self, split='train', **options):
        dataset = dict(
            type='VOCDataset',
            data_root=str(self.root),
            ann_file='list.txt',
            data_prefix=dict(sub_data_root=''),
            metainfo=dict(classes=('cat', 'dog')),
            pipeline=[],
            **options,
        )
        return {f'{split}_dataloader': dict(dataset=dataset)}

    def lines(self, split='train', **options):
        return check_dataloaders(self.config(split, **options), (split,))

    def refusal(self, split='train', **options):
        with pytest.raises(UsageError) as caught:
            self.lines(split, **options)
        assert '\n' not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def voc(tmp_path):
    return Voc(tmp_path / 'voc')


def test_a_sound_set(voc):
    assert voc.lines() == [] and voc.lines('test', test_mode=True) == []


def test_names_that_the_config_does_not_have(voc):
    voc.write('b', xml(('cat', (5, 5, 30, 30)), ('bird', (1, 1, 9, 9)), ('Cat', (1, 1, 9, 9))))
    (line,) = voc.lines()
    assert line == (
        'the training set: 2 object(s) of 2 names that are not among the classes of the config '
        '(bird, Cat): not used'
    )
    dataset = DATASETS.build(voc.config()['train_dataloader']['dataset'])
    assert [len(dataset.get_data_info(row)['instances']) for row in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    'text, said',
    [
        ('', 'no element found'),
        ('<annotation>', 'no element found'),
        ('<html>404</html', 'unclosed token'),
        (xml(('cat', ('one', 5, 30, 30))), "could not convert string to float: 'one'"),
        ('<annotation><object><name>cat</name></object></annotation>', 'AttributeError'),
        # Entities that grow, and those of other files, are not taken.
        (
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>',
            'undefined entity',
        ),
    ],
)
def test_files_that_are_no_annotations(voc, text, said):
    voc.write('b', text)
    message = voc.refusal()
    assert (
        said in message
        and f"'{voc.root}/Annotations/b.xml' is not as VOCDataset reads it" in message
    )


def test_files_that_are_missing(voc):
    (voc.root / 'JPEGImages/c.jpg').unlink()
    assert f'1 of 3 image files are missing ({voc.root}/JPEGImages/c.jpg)' in voc.refusal()
    (voc.root / 'Annotations/c.xml').unlink()
    assert f"'{voc.root}/Annotations/c.xml' cannot be read" in voc.refusal()
    (voc.root / 'list.txt').write_text('')
    assert 'the training set is empty' in voc.refusal()
    (voc.root / 'list.txt').unlink()
    assert f"'{voc.root}/list.txt' cannot be read" in voc.refusal()


def test_boxes_without_an_area(voc):
    voc.write('b', xml(('cat', (30, 5, 30, 30))))
    assert '1 box(es) without a width' in voc.refusal() and 'b.xml' in voc.refusal()
    (line,) = voc.lines('test', test_mode=True)
    assert '1 box(es) without a width' in line


def test_filters(voc):
    voc.write('a', xml())
    (line,) = voc.lines()
    assert '1 of 3 images without an object of the classes' in line
    left_out = voc.lines(filter_cfg=dict(filter_empty_gt=True))[-1]
    assert (
        left_out.startswith('the training set: 1 of 3 images are not as filter_cfg=')
        and 'leaves them out' in left_out
    )
    assert 'leaves none of 3 images' in voc.refusal(filter_cfg=dict(min_size=50))


def test_other_forms(voc, tmp_path):
    """Any class of mmdet's is built and read; those that need a package that is not there are
    refused."""
    cfg = voc.config()
    cfg['train_dataloader']['dataset'].update(
        type='LVISV1Dataset', ann_file='list.txt', data_prefix=dict(img='')
    )
    with pytest.raises(UsageError, match="'.*list.txt' is not as LVISV1Dataset reads it"):
        check_dataloaders(cfg, ('train',))


def coco_config(*files):
    one = [dict(type='CocoDataset', ann_file=file, data_prefix=dict(img='')) for file in files]
    dataset = one[0] if len(one) == 1 else dict(type='ConcatDataset', datasets=one)
    return dict(test_dataloader=dict(dataset=dataset))


def test_what_tools_that_read_annotations_need(voc):
    dataset = coco_config('a.json')['test_dataloader']['dataset']
    assert require_one_coco(coco_config('a.json'), 'test', 'a report is made') == dataset
    repeated = dict(
        test_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset))
    )
    assert require_one_coco(repeated, 'test', 'a report is made') == dataset
    held_out = dict(test_dataloader=dict(dataset=dict(type='HoldOut', dataset=dataset)))
    assert (
        require_one_coco(held_out, 'test', 'a report is made')
        == held_out['test_dataloader']['dataset']
    )
    for cfg, said in (
        (voc.config('test'), r'test_dataloader.dataset is of type VOCDataset: convert'),
        (coco_config('a.json', 'b.json'), r'has 2 \(test_dataloader.dataset.datasets.0, '),
        ({}, 'is not in the config'),
    ):
        with pytest.raises(
            UsageError, match='a report is made on one data set in COCO format, and .*' + said
        ):
            require_one_coco(cfg, 'test', 'a report is made')


def test_mot_sequences_have_no_file_to_report_on(tmp_path):
    cfg = dict(
        test_dataloader=dict(
            dataset=dict(type='MOTSequenceDataset', data_prefix=dict(img=str(tmp_path)))
        )
    )
    require_one_coco(cfg, 'test', 'a record is made', file=False)
    with pytest.raises(UsageError, match='MOTSequenceDataset'):
        require_one_coco(cfg, 'test', 'a report is made')


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(type='NoSuchDataset'), "nothing registers a data set of type 'NoSuchDataset'"),
        (dict(type=None), "nothing registers a data set of type 'None'"),
        (dict(ann_file=['a', 'b']), 'ann_file must be one path.*in a ConcatDataset'),
        (dict(ann_file=5), 'ann_file must be one path; got 5'),
        (dict(data_root=3), 'data_root must be one path'),
        (dict(data_prefix='images'), 'data_prefix must be a dict'),
        (dict(data_prefix=None), 'data_prefix must be a dict; got None'),
        (dict(data_prefix=dict(img=3)), 'cannot be built: TypeError'),
        (dict(filter_cfg=32), 'filter_cfg must be a dict'),
        (dict(metainfo=('cat',)), 'metainfo must be a dict'),
        (dict(metainfo=dict(CLASSES=('cat',))), r'metainfo=dict\(classes'),
        (dict(metainfo=dict(classes='cat')), r"\('cat', \)"),
        (
            dict(metainfo=dict(classes=[0, 1, 2])),
            'must be text, and 0, 1, 2 are none.*metainfo.classes=\\["0","1","2"\\]',
        ),
        (dict(metainfo=dict(classes=('cat', 'cat'))), 'each once'),
        (dict(classes=('cat',)), r'metainfo=dict\(classes'),
        (dict(no_such_option=1), "cannot be built: TypeError: .*'no_such_option'"),
        (
            dict(pipeline=[dict(type='NoSuchTransform')]),
            'cannot be built: KeyError.*NoSuchTransform',
        ),
    ],
)
def test_settings_that_fit_no_data_set(change, said):
    dataset = {**coco_config('a.json')['test_dataloader']['dataset'], **change}
    with pytest.raises(UsageError, match=f'^test_dataloader.dataset.*{said}') as caught:
        check_dataloaders(dict(test_dataloader=dict(dataset=dataset)), ('test',), files=False)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'loader',
    [
        5,
        [1],
        dict(batch_size=1),
        dict(dataset=5),
        dict(dataset='coco'),
        dict(dataset={}),
        dict(dataset=dict(type='ConcatDataset', datasets=[])),
        dict(dataset=dict(type='ConcatDataset', datasets='a')),
    ],
)
def test_loaders_without_a_data_set(loader):
    with pytest.raises(UsageError, match='test_dataloader'):
        check_dataloaders(dict(test_dataloader=loader), ('test',))
