"""YOLOX's last epochs: the L1 loss comes on in every branch, the mosaic goes."""
from types import SimpleNamespace

import pytest

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
        pipeline=loading)
    return MultiImageMixDataset(
        single, pipeline=[dict(type='Mosaic', img_scale=(64, 64)), dict(type='PackDetInputs')])


@pytest.mark.parametrize('epoch, switched', [(0, False), (283, False), (284, True), (299, True)])
@pytest.mark.parametrize('shared', [True, False])
def test_last_epochs(dataset, epoch, switched, shared):
    """Of 300 epochs the last 15, as mmdet's hook counts them; a resumed run enters anywhere."""
    hook = HOOKS.build(dict(type='BranchModeSwitchHook', num_last_epochs=15))
    model = MODELS.build(tiny_dynamic('yolox', shared=shared))
    hook.before_train_epoch(
        SimpleNamespace(epoch=epoch, max_epochs=300, model=model,
                        train_dataloader=SimpleNamespace(dataset=dataset)))
    assert [branch.bbox_head.use_l1 for branch in model.branches] == [switched] * len(model.branches)
    side = 64 if switched else 128
    assert dataset[0]['inputs'].shape == (3, side, side)
