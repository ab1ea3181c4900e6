"""Every shipped config loads, is short, builds the detector that it says, trains and predicts."""

import ast
import copy
import os
import re
import socket

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from conftest import ROOT
from dynamicdet.models import DynamicDetector
from dynamicdet.models.pairs import each_exit
from dynamicdet.testing import randomize, shrink, tiny_batch
from mmdet.registry import DATASETS, MODELS

CONFIGS = sorted((ROOT / 'configs').glob('dy_*.py'))
#: What `CONFIGS` are made of twice, where mmdet has no config of it.
STATIC = sorted(set((ROOT / 'configs').glob('*.py')) - set(CONFIGS))
FIRST_STEPS = [path for path in CONFIGS if not path.stem.endswith('_router')]


def parametrize(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda path: path.stem)


names = parametrize(CONFIGS)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError('a config wants to download something')

    for way in ('connect', 'connect_ex'):
        monkeypatch.setattr(socket.socket, way, refuse)
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', refuse)


@pytest.fixture
def loaded(path, tmp_path, monkeypatch):
    """The config, read from a folder that is not the repository's."""
    monkeypatch.chdir(tmp_path)
    return Config.fromfile(os.path.relpath(path, tmp_path))


def test_there_are_configs():
    assert {'dy_faster_rcnn', 'dy_faster_rcnn_router'} <= {path.stem for path in CONFIGS}


@names
def test_a_variant_is_short(path):
    lines = [line for line in path.read_text().splitlines() if not re.match(r'\s*(#|$)', line)]
    assert 0 < len(lines) <= 25


@parametrize([path for path in CONFIGS if path.stem.endswith('_router')])
def test_step_2_is_four_lines(path):
    assert len(path.read_text().splitlines()) <= 4


@parametrize(sorted((ROOT / 'configs').rglob('*.py')))
def test_no_item_of_a_bases_list_is_taken_by_its_place(path):
    """It would be another one when the base changes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript):
            by_place = isinstance(node.slice, ast.Slice | ast.UnaryOp) or isinstance(
                getattr(node.slice, 'value', None), int
            )
            assert not by_place or ast.unparse(node.value) == 'img_scale', ast.unparse(node)


@names
def test_it_registers_itself_and_names_its_backbone(loaded, path):
    assert 'dynamicdet' in loaded.custom_imports.imports
    assert loaded.model.type == 'DynamicDetector'
    # mmdet's init_detector looks for it.
    detectors = each_exit(loaded.model.detector)
    for backbone, detector in zip(each_exit(loaded.model.backbone), detectors, strict=True):
        assert backbone.type == detector.backbone.type
    kinds = [hook.type for hook in loaded.custom_hooks]
    assert {'ResumeHook', 'FiniteLossHook'} <= set(kinds)
    assert loaded.randomness.seed is not None


@parametrize(FIRST_STEPS)
def test_it_builds(loaded, path, offline):
    """In full size; step 2 is the same model."""
    model = MODELS.build(loaded.model)
    assert isinstance(model, DynamicDetector)
    assert not model.train_router


@parametrize(STATIC)
def test_static_detectors_build(loaded, path, offline):
    assert not isinstance(MODELS.build(loaded.model), DynamicDetector)


@names
def test_it_trains_and_predicts(loaded, path, offline):
    """Shrunk: a step of its own optimizer moves its own part and nothing else; both exits
    detect."""
    model = randomize(MODELS.build(shrink(loaded.model))).train()
    step_2 = path.stem.endswith('_router')
    parts = (
        ['router.']
        if step_2
        else [
            *(f'backbone.{name}.' for name in model.backbone.names),
            *['backbone.connections.'] * model.needs_step_one,
            *(f'branches.{index}.' for index in range(len(model.branches))),
        ]
    )
    # Mixed precision needs a GPU; an update each step shows what moves.
    loaded.optim_wrapper.update(type='OptimWrapper', accumulative_counts=1)
    before = copy.deepcopy(model.state_dict())
    batch = tiny_batch((2, 1), masks='loss_mask' in str(loaded.model))
    optimizer = build_optim_wrapper(model, loaded.optim_wrapper)
    optimizer.zero_grad = lambda: None
    log = model.train_step(copy.deepcopy(batch), optimizer)
    # DDP waits for each.
    assert not [
        key for key, value in model.named_parameters() if value.requires_grad and value.grad is None
    ]
    kinds = {key.split('.')[0] for key in log if 'loss' in key and key != 'loss'}
    assert kinds == ({'loss_router'} if step_2 else {f'exit{k}' for k in range(model.num_exits)})
    assert all(torch.isfinite(value).all() for value in log.values())
    # Delta and latencies are NaN, which is not equal to itself.
    moved = {
        key
        for key, value in model.state_dict().items()
        if not torch.equal(value.nan_to_num(), before[key].nan_to_num())
    }
    assert all(any(key.startswith(part) for key in moved) for part in parts)
    assert all(key.startswith(tuple(parts)) for key in moved)
    model.load_state_dict(before)
    model.eval()
    for exit in range(model.num_exits):
        thresholds = [-1] * exit + [1] * (model.num_exits - 1 - exit)
        model.set_budget(threshold=thresholds[0] if model.num_exits == 2 else thresholds)
        results = model.test_step(copy.deepcopy(batch))
        assert [sample.exit for sample in results] == [exit] * 2
        assert any(len(sample.pred_instances) for sample in results)


#: One of each kind of detector and backbone.
KINDS = [
    'faster_rcnn',
    'mask_rcnn',
    'mask_rcnn_swin-t',
    'cascade_mask_rcnn_swin-s',
    'retinanet',
    'fcos',
    'atss',
    'gfl',
    'yolox_s',
    'rtmdet_s',
    'rtmdet-ins_s',
    'yolov7',
    'yolov7_w6',
    'dino_r50',
]


@pytest.mark.parametrize('name', KINDS)
def test_three_exits_learn_as_each_alone(name, offline):
    """Heads write into the samples that they are given: each exit has its own, and the batch stays
    as it was."""
    cfg = Config.fromfile(ROOT / 'configs' / f'dy_{name}.py')
    model = randomize(MODELS.build({**shrink(cfg.model), 'backbones': 3})).train()
    for branch in model.branches:
        branch.loss = seeded(branch.loss)
    data = model.data_preprocessor(tiny_batch((2, 1), masks='loss_mask' in str(cfg)), True)
    inputs, samples = data['inputs'], data['data_samples']
    before = copy.deepcopy(samples)
    torch.manual_seed(1)
    together = model.loss(inputs, samples)
    assert {key.split('.')[0] for key in together} == {'exit0', 'exit1', 'exit2'}
    for sample, own in zip(samples, before):
        # Their order follows the hashes of names.
        assert set(sample.keys()) == set(own.keys())
        assert set(sample.gt_instances.keys()) == set(own.gt_instances.keys())
        assert torch.equal(sample.gt_instances.bboxes, own.gt_instances.bboxes)
        if 'masks' in own.gt_instances:
            assert (sample.gt_instances.masks.masks == own.gt_instances.masks.masks).all()
    torch.manual_seed(1)
    for exit, (maps, given, _) in enumerate(model._all_exits(inputs, copy.deepcopy(before))):
        alone = model.branch(exit).loss(model.backbone.select(maps), given)
        torch.testing.assert_close(
            {f'exit{exit}.{key}': value for key, value in alone.items()},
            {key: value for key, value in together.items() if key.startswith(f'exit{exit}.')},
        )


def seeded(loss):
    """The same loss, always under the same draw."""

    def run(*arguments):
        torch.manual_seed(0)
        return loss(*arguments)

    return run


@names
def test_step_2_inherits_step_1(loaded, path):
    hooks = [hook for hook in loaded.custom_hooks if hook.type == 'RouterHook']
    if not path.stem.endswith('_router'):
        assert not hooks and not loaded.model.get('train_router')
        return
    first = path.with_name(path.name.replace('_router.py', '.py'))
    # Where train.py puts step 1's checkpoints.
    assert [hook.cascade for hook in hooks] == [f'work_dirs/{first.stem}']
    first = Config.fromfile(first).model
    # What step 2 alone looks at is its own.
    changed = {**loaded.model, **{key: first.get(key) for key in ('train_router', 'objective')}}
    assert {key: value for key, value in changed.items() if value is not None} == first.to_dict()


@parametrize(
    [path for path in CONFIGS if path.stem.endswith('_router') and 'digits' not in path.stem]
)
def test_step_2_sees_64_images_per_update_and_no_mixtures(loaded, path):
    """On the 8 GPUs that mmdet's configs are for; without what only makes sense in step 1."""
    assert 8 * loaded.train_dataloader.batch_size * loaded.optim_wrapper.accumulative_counts == 64
    assert not re.search('Mosaic|MixUp', str(loaded.train_dataloader))
    assert not re.search('EMAHook|SwitchHook|SyncNormHook', str(loaded.custom_hooks))


@parametrize(
    [
        path
        for path in FIRST_STEPS
        if 'digits' not in path.stem and 'yolo' in path.stem or 'rtmdet' in path.stem
    ]
)
def test_step_1_keeps_the_baselines_hooks(loaded, path):
    kinds = {hook.type for hook in loaded.custom_hooks}
    switches = {'BranchModeSwitchHook', 'PipelineSwitchHook'}
    assert 'EMAHook' in kinds and ('yolov7' in path.stem or kinds & switches)


@pytest.mark.parametrize('name', ['dy_yolox_s_router', 'dy_rtmdet_s_router'])
def test_step_2s_pipeline_of_the_yolos(name, digits):
    """Images of one size; boxes, where any are left, within them."""
    dataset = Config.fromfile(ROOT / 'configs' / f'{name}.py').train_dataloader.dataset
    inner = dataset.get('dataset', dataset)
    inner.update(
        data_root=str(digits),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=None,
        metainfo=dict(classes=tuple('0123456789')),
    )
    dataset = DATASETS.build(dataset)
    boxes = []
    for index in range(6):
        item = dataset[index]
        assert item['inputs'].shape == (3, 640, 640)
        boxes.append(item['data_samples'].gt_instances.bboxes.tensor)
    boxes = torch.cat(boxes)
    assert len(boxes) and boxes.min() >= 0 and boxes.max() <= 640


def test_pretrained_weights_are_for_both_backbones(offline):
    """They are read when a run starts; building alone downloads nothing."""
    cfg = Config.fromfile(ROOT / 'configs/dy_faster_rcnn.py')
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    model = MODELS.build(cfg.model)
    for backbone in (model.backbone.first, model.backbone.second):
        assert isinstance(backbone, nn.Module)
        assert backbone.init_cfg['checkpoint'] == 'torchvision://resnet50'
