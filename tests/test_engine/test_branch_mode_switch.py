"""YOLOX's last epochs: the L1 loss comes on in every branch, the mosaic goes."""

import logging
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop

from conftest import ROOT
from dynamicdet.engine.switches import check_switches
from dynamicdet.errors import UsageError
from dynamicdet.testing import tiny_dynamic
from mmdet.datasets import MultiImageMixDataset
from mmdet.registry import HOOKS, MODELS


@pytest.fixture
def dataset(digits):
    """Images of 64 pixels, or mosaics of twice that."""
    loading = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    single = dict(
        type='CocoDataset',
        data_root=str(digits),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=tuple('0123456789')),
        pipeline=loading,
    )
    return MultiImageMixDataset(
        single, pipeline=[dict(type='Mosaic', img_scale=(64, 64)), dict(type='PackDetInputs')]
    )


@pytest.mark.parametrize('epoch, switched', [(0, False), (283, False), (284, True), (299, True)])
@pytest.mark.parametrize('shared', [True, False])
def test_last_epochs(dataset, epoch, switched, shared):
    """Of 300 epochs the last 15, as mmdet's hook counts them; a resumed run enters anywhere."""
    hook = HOOKS.build(dict(type='BranchModeSwitchHook', num_last_epochs=15))
    model = MODELS.build(tiny_dynamic('yolox', shared=shared))
    hook.before_train_epoch(
        SimpleNamespace(
            epoch=epoch,
            max_epochs=300,
            model=model,
            train_dataloader=SimpleNamespace(dataset=dataset),
        )
    )
    assert [branch.bbox_head.use_l1 for branch in model.branches] == [switched] * len(
        model.branches
    )
    side = 64 if switched else 128
    assert dataset[0]['inputs'].shape == (3, side, side)


def start(caplog, dataset, max_epochs=300, name='yolox', **settings):
    """The model, after the first epoch's start; and what was said."""
    hook = HOOKS.build(dict(type='BranchModeSwitchHook', **settings))
    model = MODELS.build(tiny_dynamic(name))
    loader = SimpleNamespace(dataset=dataset, _iterator='workers')
    runner = SimpleNamespace(
        epoch=0,
        max_epochs=max_epochs,
        model=model,
        train_loop=None,
        train_dataloader=loader,
        logger=logging.getLogger('switch'),
    )
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    return model, loader, caplog.messages


def test_a_long_run_says_nothing(dataset, caplog):
    model, loader, said = start(caplog, dataset)
    assert not said and not model.branch(0).bbox_head.use_l1 and loader._iterator == 'workers'


def test_a_run_shorter_than_its_last_epochs(dataset, caplog):
    model, loader, (said,) = start(caplog, dataset, max_epochs=12)
    assert 'all of the 12 epochs' in said and 'num_last_epochs=15' in said
    # Workers that have the old pipeline are let go.
    assert model.branch(0).bbox_head.use_l1 and loader._iterator is None
    assert dataset[0]['inputs'].shape == (3, 64, 64)


def test_no_mosaic(dataset, caplog):
    """The loss comes on all the same."""
    model, loader, said = start(caplog, dataset.dataset, max_epochs=1, num_last_epochs=0)
    assert 'no mosaic to end' in said[-1]
    assert model.branch(0).bbox_head.use_l1 and loader._iterator == 'workers'


def test_a_wrapped_mosaic(dataset, caplog):
    start(caplog, SimpleNamespace(dataset=dataset), max_epochs=12)
    assert dataset[0]['inputs'].shape == (3, 64, 64)


def test_no_head_with_such_a_loss(dataset, caplog):
    _, _, said = start(caplog, dataset, name='faster_rcnn')
    assert len(said) == 1 and "for YOLOX's" in said[0]


def test_iterations_have_no_last_epochs():
    hook = HOOKS.build(dict(type='BranchModeSwitchHook'))
    with pytest.raises(UsageError, match='counts epochs'):
        hook.before_train(
            SimpleNamespace(train_loop=IterBasedTrainLoop.__new__(IterBasedTrainLoop))
        )


def switching(name, **options):
    """A shipped config and what `check_switches` says of it."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict(options)
    return cfg, lambda: check_switches(cfg)


@pytest.mark.parametrize(
    'name', ['dy_yolox_s', 'dy_rtmdet_s', 'dy_yolox_s_router', 'dy_faster_rcnn']
)
def test_shipped_configs_switch_as_they_should(name):
    _, check = switching(name)
    assert check() == []


def test_mmdets_switch_on_a_dynamic_detector():
    cfg, check = switching('dy_yolox_s')
    cfg.custom_hooks[0].type = 'YOLOXModeSwitchHook'
    with pytest.raises(UsageError, match='name BranchModeSwitchHook instead'):
        check()


def test_mmdets_switch_without_a_mosaic():
    cfg, check = switching('yolox_nano_digits')
    cfg.custom_hooks.append(dict(type='mmdet.YOLOXModeSwitchHook'))
    with pytest.raises(UsageError, match='are a CocoDataset: take the hook out'):
        check()


def test_a_pipeline_that_would_never_be_switched():
    _, check = switching('dy_rtmdet_s', **{'train_cfg.max_epochs': 20})
    (line,) = check()
    assert 'after 280 epochs, and this run has 20' in line


def test_a_wrapper_has_no_pipeline_to_switch():
    cfg, check = switching('dy_rtmdet_s')
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset
    )
    with pytest.raises(UsageError, match='RepeatDataset has no pipeline'):
        check()
