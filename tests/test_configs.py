"""Every shipped config loads, is short, and builds the detector that it says."""
import os
import re
import socket

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from torch import nn

from dynamicdet.models import DynamicDetector
from mmdet.registry import MODELS

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
names = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


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


@names
def test_it_registers_itself_and_names_its_backbone(loaded, path):
    assert 'dynamicdet' in loaded.custom_imports.imports
    assert loaded.model.type == 'DynamicDetector'
    # mmdet's init_detector looks for it.
    assert loaded.model.backbone.type == loaded.model.detector.backbone.type
    kinds = [hook.type for hook in loaded.custom_hooks]
    assert {'ResumeHook', 'FiniteLossHook'} <= set(kinds)
    assert loaded.randomness.seed is not None


@names
def test_it_builds(loaded, path, offline):
    model = MODELS.build(loaded.model)
    assert isinstance(model, DynamicDetector)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    routers = {f'router.{name}' for name, _ in model.router.named_parameters()}
    assert model.train_router == path.stem.endswith('_router')
    if model.train_router:
        assert trained == routers
    else:
        assert trained and not trained & routers
        for part in ('backbone.first.', 'backbone.second.', 'branches.0.'):
            assert any(name.startswith(part) for name in trained), part


@names
def test_step_2_inherits_step_1(loaded, path):
    hooks = [hook for hook in loaded.custom_hooks if hook.type == 'RouterHook']
    if not path.stem.endswith('_router'):
        assert not hooks and not loaded.model.get('train_router')
        return
    first = path.with_name(path.name.replace('_router.py', '.py'))
    # Where train.py puts step 1's checkpoints.
    assert [hook.cascade for hook in hooks] == [f'work_dirs/{first.stem}']
    changed = {**loaded.model, 'train_router': Config.fromfile(first).model.get('train_router')}
    assert {key: value for key, value in changed.items() if value is not None} \
        == Config.fromfile(first).model.to_dict()


def test_pretrained_weights_are_for_both_backbones(offline):
    """They are read when a run starts; building alone downloads nothing."""
    cfg = Config.fromfile(ROOT / 'configs/dy_faster_rcnn.py')
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    model = MODELS.build(cfg.model)
    for backbone in (model.backbone.first, model.backbone.second):
        assert isinstance(backbone, nn.Module)
        assert backbone.init_cfg['checkpoint'] == 'torchvision://resnet50'
