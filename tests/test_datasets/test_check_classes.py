"""Heads and data sets have the same classes, or it is said before anything runs."""

import pytest
from mmengine.config import Config

from conftest import ROOT
from dynamicdet.datasets.check import check_dataloaders
from dynamicdet.datasets.check_classes import class_counts
from dynamicdet.errors import UsageError

TEN = tuple('0123456789')


def config(model, **classes):
    """Data sets whose files nobody looks at; without classes, CocoDataset's own 80."""
    cfg = dict(model=model)
    for split, names in classes.items():
        dataset = dict(
            type='CocoDataset',
            ann_file='a.json',
            data_prefix=dict(img=''),
            **dict(metainfo=dict(classes=names)) if names else {},
        )
        cfg[f'{split}_dataloader'] = dict(dataset=dataset)
    return cfg


def refusal(cfg):
    with pytest.raises(UsageError) as caught:
        check_dataloaders(cfg, ('train', 'val'), files=False)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    'name, keys',
    [
        ('dy_faster_rcnn', ['detector.roi_head.bbox_head']),
        ('dy_mask_rcnn', ['detector.roi_head.bbox_head', 'detector.roi_head.mask_head']),
        (
            'dy_cascade_mask_rcnn_swin-s',
            [f'detector.roi_head.bbox_head.{stage}' for stage in range(3)]
            + ['detector.roi_head.mask_head'],
        ),
        ('dy_retinanet', ['detector.bbox_head']),
        ('dy_yolox_s', ['detector.bbox_head']),
        ('dy_rtmdet-ins_s', ['detector.bbox_head']),
        ('dy_dino_r50', ['detector.bbox_head']),
        ('dy_yolov7_w6', ['detector.bbox_head']),
        ('yolov5_s', ['bbox_head']),
        ('video/early_exit_yolov5_s', ['detector.bbox_head']),
    ],
)
def test_heads_of_all_kinds(name, keys):
    model = Config.fromfile(ROOT / 'configs' / f'{name}.py').model
    counts = dict(class_counts(model))
    assert sorted(counts) == sorted(f'model.{key}.num_classes' for key in keys)
    wanted = next(iter(counts.values()))
    assert set(counts.values()) == {wanted}
    names = [f'class {index}' for index in range(wanted)]
    check_dataloaders(config(model, train=names, val=names), files=False)
    for count in (wanted - 1, wanted + 1):
        message = refusal(config(model, train=[f'class {index}' for index in range(count)]))
        assert (
            f"the config's head has {wanted} classes, the data set's metainfo {count}: set "
            in message
        )
        for key in counts:
            assert f'{key}={count}' in message


def test_a_default_counts():
    """A head whose config says nothing has mmdet's 80."""
    model = dict(
        roi_head=dict(
            bbox_head=dict(type='Shared2FCBBoxHead', num_classes=10),
            mask_head=dict(type='FCNMaskHead'),
        )
    )
    assert refusal(config(model, train=TEN)).endswith('set model.roi_head.mask_head.num_classes=10')
    model['roi_head']['mask_head']['class_agnostic'] = True
    check_dataloaders(config(model, train=TEN), ('train',), files=False)


def test_a_loss_that_weighs_classes():
    model = dict(
        bbox_head=dict(
            type='RetinaHead', num_classes=10, loss_cls=dict(type='SeesawLoss', num_classes=1203)
        )
    )
    assert refusal(config(model, train=TEN)).endswith('set model.bbox_head.loss_cls.num_classes=10')


def test_heads_that_tell_no_classes_apart():
    model = dict(
        rpn_head=dict(type='RPNHead'), roi_head=dict(semantic_head=dict(type='FusedSemanticHead'))
    )
    assert list(class_counts(model)) == []


def test_data_sets_that_disagree():
    model = dict(bbox_head=dict(type='RetinaHead', num_classes=2))
    message = refusal(config(model, train=('cat', 'dog'), val=None))
    assert message.startswith(
        'the training set (train_dataloader.dataset) has 2 classes (cat, dog), the validation set '
        '(val_dataloader.dataset) has 80 classes (person, '
    )
    assert 'give both the same metainfo' in message
    assert 'give both the same metainfo' in refusal(
        config(model, train=('cat', 'dog'), val=('dog', 'cat'))
    )
    # A later split is not looked at.
    check_dataloaders(config(model, train=('cat', 'dog'), test=None), ('train', 'val'), files=False)


def test_classes_that_the_config_does_not_name():
    message = refusal(config(dict(bbox_head=dict(type='RetinaHead', num_classes=2)), train=None))
    assert (
        'has 2 classes' in message
        and '80 (those of CocoDataset, as train_dataloader.dataset.metainfo has no' in message
    )


@pytest.mark.parametrize(
    'wrap',
    [
        lambda one: dict(type='RepeatDataset', times=2, dataset=one),
        lambda one: dict(
            type='MultiImageMixDataset', pipeline=[], dataset=dict(type='HoldOut', dataset=one)
        ),
        lambda one: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=one),
        lambda one: dict(type='ConcatDataset', datasets=[one, one]),
    ],
)
def test_data_sets_within_others(wrap):
    cfg = config(dict(bbox_head=dict(type='RetinaHead', num_classes=5)), train=TEN)
    cfg['train_dataloader']['dataset'] = wrap(cfg['train_dataloader']['dataset'])
    assert 'set model.bbox_head.num_classes=10' in refusal(cfg)
