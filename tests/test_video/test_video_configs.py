"""Every config of videos loads, is short, builds in full size, trains its own part, and
predicts."""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from conftest import ROOT
from dynamicdet.testing import shrink, tiny_batch
from dynamicdet.video import EarlyExitDetector
from dynamicdet.video.early_exit_detector import TRAINED
from mmdet.registry import MODELS

CONFIGS = sorted((ROOT / 'configs/video').glob('*.py'))
EXITS = [path for path in CONFIGS if path.stem.startswith('early_exit')]


def parametrize(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda path: path.stem)


def test_there_are_configs():
    names = {f'early_exit_yolov5_{name}' for name in ('n', 's', 'digits')}
    assert names <= {path.stem for path in EXITS}


@parametrize(CONFIGS)
def test_it_is_short_and_builds(path):
    lines = [line for line in path.read_text().splitlines() if not re.match(r'\s*(#|$)', line)]
    assert 0 < len(lines) <= 25
    cfg = Config.fromfile(path)
    assert 'dynamicdet' in cfg.custom_imports.imports and cfg.randomness.seed is not None
    model = MODELS.build(cfg.model)
    assert isinstance(model, EarlyExitDetector) == (path in EXITS)
    classes = 10 if 'digits' in path.stem else 30
    heads = [*model.heads, model.detector.bbox_head] if path in EXITS else [model.bbox_head]
    assert {head.num_classes for head in heads} == {classes}


@parametrize(EXITS)
def test_validation_is_of_all_exits(path):
    cfg = Config.fromfile(path)
    assert (cfg.val_cfg.type, cfg.test_cfg.type) == ('AllExitsValLoop', 'AllExitsTestLoop')
    for split, name in (
        (cfg.val_dataloader, cfg.val_evaluator),
        (cfg.test_dataloader, cfg.test_evaluator),
    ):
        assert name.type == 'ExitsMetric'
        assert name.ann_file == split.dataset.data_root + split.dataset.ann_file
        assert (
            split.sampler.type == 'VideoSampler'
            and split.batch_sampler.type == 'StreamBatchSampler'
        )
    clips = cfg.train_dataloader.sampler.type == 'ClipSampler'
    assert clips == bool(cfg.model.get('propagation'))
    if clips:
        # Batches of whole clips.
        assert cfg.train_dataloader.batch_size % cfg.train_dataloader.sampler.frames == 0
    pack = cfg.train_dataloader.dataset.pipeline[-1]
    assert {'video_id', 'frame_id', 'clip_step'} <= set(pack.meta_keys)
    assert [hook.type for hook in cfg.custom_hooks].count('ExitCurveHook') == 1


@parametrize(EXITS)
def test_it_trains_its_own_part_and_predicts(path):
    cfg = Config.fromfile(path)
    model = MODELS.build(cfg.model if 'digits' in path.stem else shrink(cfg.model)).train()
    parts = {
        name
        for name in ('detector', 'heads', 'propagation', 'gate')
        if f'{name}.' in TRAINED[model.mode] and getattr(model, name) is not None
    }
    before = copy.deepcopy(model.state_dict())
    batch = tiny_batch((2, 1), (64, 64), masks=False)
    # Two frames of a still clip: no cut.
    batch['inputs'][1] = batch['inputs'][0]
    for step, sample in enumerate(batch['data_samples']):
        sample.set_metainfo(dict(video_id=1, frame_id=step, clip_step=step))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    optimizer.zero_grad = lambda: None
    log = model.train_step(copy.deepcopy(batch), optimizer)
    assert all(torch.isfinite(value).all() for value in log.values())
    assert not [
        name for name, own in model.named_parameters() if own.requires_grad and own.grad is None
    ]
    moved = {
        name.split('.')[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value.nan_to_num(), before[name].nan_to_num())
    }
    assert moved == parts
    results = model.eval().test_step(copy.deepcopy(batch))
    exits = {model.num_exits - 1} if model.gate is None else set(range(model.num_exits))
    assert {one.exit for one in results} <= exits
