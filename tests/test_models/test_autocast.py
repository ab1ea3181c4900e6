"""Detectors under AMP's mixed precision, in bfloat16, which a CPU has: both steps, and
detection."""

import copy

import mmcv._ext
import pytest
import torch
from mmengine.config import Config, ConfigDict
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from conftest import ROOT
from dynamicdet.compression.quantization import Int8Simulation
from dynamicdet.testing import STOCK, randomize, shrink, tiny_batch, tiny_dynamic
from dynamicdet.video.learned_gates import GumbelGate
from mmdet.registry import MODELS

NAMES = [*STOCK, 'dy_yolov7_nano_digits', 'dy_rtmdet-ins_s', 'dy_faster_rcnn_half']


@pytest.fixture
def operators_know_half(monkeypatch):
    """mmcv's do on a GPU, and on a CPU do not."""

    def in_float(own):

        def call(*args, **kwargs):
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            wide = {id(one): one.float() for one in given if one.dtype == torch.bfloat16}
            result = own(
                *tree_map(lambda one: wide.get(id(one), one), args),
                **tree_map(lambda one: wide.get(id(one), one), kwargs),
            )
            # Some write into what they are given.
            for one in given:
                if id(one) in wide:
                    one.data.copy_(wide[id(one)])
            return result

        return call

    for name in ('nms', 'roi_align_forward', 'roi_align_backward'):
        monkeypatch.setattr(mmcv._ext, name, in_float(getattr(mmcv._ext, name)))


def build(name):
    if name in STOCK:
        return MODELS.build(tiny_dynamic(name, shared=name != 'yolox'))
    return MODELS.build(shrink(ConfigDict(Config.fromfile(ROOT / f'configs/{name}.py').model)))


@pytest.mark.parametrize('name', NAMES)
def test_both_steps_and_detection(name, operators_know_half):
    model = randomize(build(name))
    # No map of one cell, from which oneDNN's convolutions in bfloat16 (AVX-512) give gradients
    # that are now finite and now not.
    batch = tiny_batch((2, 1), size=(128, 128))
    exact = model.eval().test_step(copy.deepcopy(batch))
    for step_2 in (False, True):
        model.train_router = step_2
        for key, parameter in model.named_parameters():
            parameter.requires_grad, parameter.grad = key.startswith('router.') == step_2, None
        model.train()
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        with torch.autocast('cpu', torch.bfloat16):
            loss, log = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
        loss.backward()
        assert all(value.isfinite() for value in log.values())
        trained = [value for value in model.parameters() if value.requires_grad]
        assert trained and all(value.grad.isfinite().all() for value in trained)
    assert model.last_gains.dtype == torch.float32
    model.eval()
    for exit in (0, 1):
        model.set_budget(threshold=1 - 2 * exit)
        with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
            found = model.test_step(copy.deepcopy(batch))
        for one, two in zip(found, exact):
            assert one.exit == exit and one.difficulty == pytest.approx(two.difficulty, abs=0.02)
            assert (
                one.pred_instances.scores.isfinite().all()
                and one.pred_instances.bboxes.isfinite().all()
            )


def test_a_step_in_eight_bits():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    simulation, x = Int8Simulation(layers, [layers]), torch.randn(2, 3, 6, 6)
    for learning in (False, True):
        simulation.ranges.observing, simulation.ranges.learning = not learning, learning
        with torch.autocast('cpu', torch.bfloat16):
            simulation(x)
            loss = simulation(x).float().square().mean()
        loss.backward()
        assert loss.isfinite() and layers[0].weight.grad.isfinite().all()
    assert all(
        value.dtype == torch.float32
        and value.grad.isfinite().all()
        and value.grad.dtype == torch.float32
        for value in simulation.ranges.values.values()
    )


def test_a_gate_counts_its_costs_in_float32():
    """Products of the drawn exits with their costs: bfloat16 has three digits."""
    costs = torch.tensor([1.001, 2.003, 3.007])
    pooled, losses = [torch.randn(64, 4), torch.randn(64, 4)], torch.rand(3, 64)
    gate = GumbelGate([4, 4], width=8)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            found.append(gate.loss(pooled, losses, costs))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
