"""A resumed run sees the data that an uninterrupted one sees, in any number of processes, in both
kinds of loops."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from conftest import ROOT
from dynamicdet.checkpoints import read_checkpoint

#: Of three passes over 12 images, six at a time.
_ITERATIONS = 6
_LOOPS = {
    'epochs': dict(
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3, _delete_=True),
        sampler=dict(type='DefaultSampler', shuffle=True),
        checkpoint=dict(interval=1),
    ),
    # Resumed within a pass.
    'iterations': dict(
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=_ITERATIONS, _delete_=True),
        sampler=dict(type='InfiniteSampler', shuffle=True),
        checkpoint=dict(by_epoch=False, interval=3),
    ),
}


class Recorder(Hook):
    """Notes what each iteration trained on: images and where their boxes came to lie, and the size
    that was drawn for the next batch."""

    def __init__(self):
        self.images, self.sizes = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.images.append(
            [
                (sample.img_id, sample.gt_instances.bboxes.tensor.sum().item())
                for sample in data_batch['data_samples']
            ]
        )
        self.sizes.append(runner.model.data_preprocessor.batch_augments[0]._input_size)


def config(digits, work_dir, loop, workers, persistent):
    """A YOLOX of the built-in data, with all that shipped YOLOX draw: in the pipeline, and the
    batch's size."""
    cfg, way = Config.fromfile(ROOT / 'configs/yolox_nano_digits.py'), copy.deepcopy(_LOOPS[loop])
    size = (64, 64)
    mixture = dict(
        type='MultiImageMixDataset',
        dataset=dict(
            type='CocoDataset',
            data_root=str(digits),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            metainfo=cfg.metainfo,
            pipeline=cfg.train_pipeline[:2],
        ),
        pipeline=[
            dict(type='Mosaic', img_scale=size),
            dict(type='RandomAffine', border=(-32, -32)),
            dict(type='MixUp', img_scale=size),
            dict(type='YOLOXHSVRandomAug'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
    )
    sizes = dict(type='BatchSyncRandomResize', random_size_range=(32, 96), interval=2)
    cfg.merge_from_dict(
        dict(
            train_cfg=way['train_cfg'],
            train_dataloader=dict(
                batch_size=6,
                num_workers=workers,
                persistent_workers=persistent,
                sampler=way['sampler'],
                dataset=dict(mixture, _delete_=True),
            ),
            model=dict(
                data_preprocessor=dict(batch_augments=[sizes]), backbone=dict(deepen_factor=0.1)
            ),
            default_hooks=dict(checkpoint=dict(way['checkpoint'], max_keep_ckpts=-1)),
            param_scheduler=[],
            log_processor=dict(by_epoch=loop == 'epochs'),
        )
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.work_dir = str(work_dir)
    cfg.log_level = 'ERROR'
    cfg.experiment_name = work_dir.name
    return cfg


def run(cfg):
    """Train; what was seen, and the end."""
    runner, recorder = Runner.from_cfg(cfg), Recorder()
    runner.register_hook(recorder)
    runner.train()
    name = (Path(cfg.work_dir) / 'last_checkpoint').read_text()
    return recorder, read_checkpoint(name)


@pytest.fixture(scope='module', params=list(_LOOPS))
def whole(request, digits, tmp_path_factory):
    """An uninterrupted run without data workers: its loop, its checkpoint after a while, what it
    saw, its end."""
    work_dir = tmp_path_factory.mktemp('whole') / request.param
    seen, end = run(config(digits, work_dir, request.param, 0, False))
    early = work_dir / ('epoch_1.pth' if request.param == 'epochs' else 'iter_3.pth')
    return request.param, early, seen, end


def require_same_end(end, expected):
    assert end['meta']['iter'] == expected['meta']['iter'] == _ITERATIONS
    for part in ('state_dict', 'ema_state_dict'):
        for name, value in expected[part].items():
            assert torch.equal(end[part][name], value), (part, name)


def test_passes_differ(whole):
    """In more than the order of images; and batches are of more sizes than one."""
    seen = whole[2]
    passes = [
        {image for batch in seen.images[start : start + 2] for image in batch}
        for start in (0, 2, 4)
    ]
    assert [len(one) for one in passes] == [12] * 3
    assert not passes[0] & passes[1] and not passes[1] & passes[2]
    assert len(set(seen.sizes)) > 1


@pytest.mark.parametrize('workers, persistent', [(0, False), (1, False), (4, True)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(whole, digits, tmp_path, workers, persistent):
    loop, early, seen, end = whole
    cfg = config(digits, tmp_path / 'resumed', loop, workers, persistent)
    cfg.resume, cfg.load_from = True, str(early)
    seen_again, end_again = run(cfg)
    left = len(seen_again.images)
    assert 0 < left < len(seen.images) and seen_again.images == seen.images[-left:]
    assert seen_again.sizes == seen.sizes[-left:]
    require_same_end(end_again, end)


def test_workers_change_nothing(whole, digits, tmp_path):
    loop, _, seen, end = whole
    seen_again, end_again = run(config(digits, tmp_path / 'workers', loop, 1, True))
    assert seen_again.images == seen.images
    require_same_end(end_again, end)
