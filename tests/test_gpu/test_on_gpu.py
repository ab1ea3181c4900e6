"""On a GPU: what it finds is what the CPU finds; training in mixed precision and under DDP; what
makes the CPU wait.

Left out where there is no GPU. tools/check_gpu.sh runs these, and the tools.
"""

import copy
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from test_video.exit_cases import tiny as tiny_early_exit

from conftest import ROOT, load_small, load_small_router, train
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.deploy.deployment import deploy
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.deploy.standalone_model import open_standalone
from dynamicdet.files import latest_checkpoint
from dynamicdet.measuring.benchmark import build_pair
from dynamicdet.measuring.calibration import coco_results
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.testing import (
    STOCK,
    agreement,
    count_waits,
    randomize,
    tiny_batch,
    tiny_detector,
    tiny_dynamic,
)
from mmdet.registry import MODELS

pytestmark = pytest.mark.gpu

#: float32 on both sides: sums in another order.
ROUNDING = dict(box=0.05, score=2e-3, unmatched=0.02)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def detect(model, batch, device):
    """Samples that a detector has found something in, on a device."""
    with torch.no_grad():
        return model.to(device).eval().test_step(copy.deepcopy(batch))


def require_same(samples, others):
    same = agreement(
        *([coco_results(sample, list(range(80))) for sample in side] for side in (samples, others))
    )
    assert same.detections > 10
    assert {
        name: getattr(same, name) for name in ROUNDING if getattr(same, name) > ROUNDING[name]
    } == {}


@pytest.mark.parametrize('name', STOCK)
def test_every_detector_finds_what_it_finds_on_the_cpu(name):
    batch = tiny_batch((2, 1, 3), masks=False)
    plain = randomize(MODELS.build(tiny_detector(name)))
    require_same(*(detect(plain, batch, device) for device in ('cpu', 'cuda')))
    model = randomize(MODELS.build(tiny_dynamic(name)))
    for exit in (0, 1):
        force_dynamic_exit(model, exit)
        found = [detect(model, batch, device) for device in ('cpu', 'cuda')]
        assert {sample.exit for side in found for sample in side} == {exit}
        assert [one.difficulty for one in found[0]] == pytest.approx(
            [one.difficulty for one in found[1]], abs=1e-4
        )
        require_same(*found)


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(reuse_stages=0, first_scale=0.5),
        dict(backbones=3),
        dict(backbones=1, reuse_stages=0, first_scale=0.5),
    ],
)
def test_mixed_batches_part_as_on_the_cpu(settings):
    batch = tiny_batch((2, 1, 3, 2), masks=False)
    model = randomize(MODELS.build(tiny_dynamic('faster_rcnn', **settings)))
    scores = sorted(sample.difficulty for sample in detect(model, batch, 'cpu'))
    middles = [(one + other) / 2 for one, other in zip(scores, scores[1:])]
    model.set_budget(
        threshold=middles[1] if model.num_exits == 2 else middles[: model.num_exits - 1]
    )
    found = [detect(model, batch, device) for device in ('cpu', 'cuda')]
    exits = [[sample.exit for sample in side] for side in found]
    assert exits[0] == exits[1] and len(set(exits[0])) == model.num_exits
    require_same(*found)


def test_frames_exit_early_as_on_the_cpu():
    model = tiny_early_exit(gate=dict(type='ScoreGate'))
    batch = tiny_batch((2, 1, 3, 2), (64, 64), masks=False)
    for index, sample in enumerate(batch['data_samples']):
        sample.set_metainfo(dict(video_id=index, frame_id=0))

    def leave_at_exit_0_below(difficulty):
        model.reset()
        model.set_budget(threshold=[-1, difficulty] + [-1] * (model.num_exits - 2))

    leave_at_exit_0_below(1)
    scores = sorted(sample.difficulty for sample in detect(model, batch, 'cpu'))
    leave_at_exit_0_below((scores[1] + scores[2]) / 2)
    found = []
    for device in ('cpu', 'cuda'):
        found.append(detect(model, batch, device))
        model.reset()
    exits = [[sample.exit for sample in side] for side in found]
    assert exits[0] == exits[1] and sorted(exits[0])[:3] == [0, 0, model.num_exits - 1]
    require_same(*found)


needs_cuda_provider = pytest.mark.skipif(
    'CUDAExecutionProvider' not in onnxruntime.get_available_providers(),
    reason='ONNX Runtime has no CUDA here: pip install onnxruntime-gpu in the place of onnxruntime',
)


@needs_cuda_provider
@pytest.mark.parametrize('name', ['faster_rcnn', 'yolox'])
@pytest.mark.parametrize('place', ['cpu', 'cuda'])
def test_exported_detectors_run_on_the_gpu(place, name, tmp_path):
    """Graphs compute on the GPU; all else on the CPU, or, as a Runner has it, on the GPU, where
    tensors then stay."""
    cfg = Config(dict(model=tiny_dynamic(name), test_dataloader=None))
    model = randomize(MODELS.build(cfg.model))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    deploy(cfg, str(tmp_path / 'model.pth'), str(tmp_path / 'out'))
    batch = tiny_batch((2, 1, 3), masks=False)
    for exit in (0, 1):
        found = []
        for provider, device in (('CPUExecutionProvider', 'cpu'), ('CUDAExecutionProvider', place)):
            deployed = load_deployed(str(tmp_path / 'out'), providers=[provider])
            force_dynamic_exit(deployed, exit)
            found.append(detect(deployed, batch, device))
            assert found[-1][0].pred_instances.bboxes.device.type == device
        same = agreement(
            *([coco_results(sample, list(range(80))) for sample in side] for side in found)
        )
        # ONNX Runtime rounds to TF32.
        assert same.detections > 10 and same.unmatched < 0.1 and same.score < 0.03


@needs_cuda_provider
def test_a_standalone_folder_runs_on_the_gpu(tmp_path):
    dataset = dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])
    cfg = Config(dict(model=tiny_dynamic('yolox'), test_dataloader=dict(dataset=dataset)))
    model = randomize(MODELS.build(cfg.model))
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'model.pth')
    export_standalone(cfg, str(tmp_path / 'model.pth'), str(tmp_path / 'out'))
    picture = tiny_batch((2,), masks=False)['inputs'][0].numpy()
    for threshold in (1.0, -1.0):
        one, other = (
            open_standalone(str(tmp_path / 'out'), 1, [provider]).run(
                picture, (1, 1), picture.shape[1:], threshold
            )
            for provider in ('CPUExecutionProvider', 'CUDAExecutionProvider')
        )
        assert one.exit == other.exit and len(one.scores) > 5
        near = np.abs(one.scores[:, None] - other.scores) < 0.03
        near &= np.abs(one.boxes[:, None] - other.boxes).max(-1) < 2
        assert near.any(1).mean() > 0.8


def losses_of(runner):
    """All losses of a run, in order."""
    return runner.message_hub.get_scalar('train/loss').data[0].tolist()


MIXED = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.loss_scale': 'dynamic'}


def require_finite(losses):
    assert len(losses) >= 12 and torch.tensor(losses).isfinite().all()


def test_step_1_learns_in_mixed_precision(digits, tmp_path):
    runner = train(
        load_small(
            'dy_faster_rcnn_digits',
            digits,
            tmp_path,
            **{
                'param_scheduler': [],
                'optim_wrapper.optimizer.lr': 2e-3,
                'train_cfg.max_epochs': 8,
                **MIXED,
            },
        )
    )
    losses = losses_of(runner)
    require_finite(losses)
    assert sum(losses[-4:]) < sum(losses[:4])


def test_step_2_learns_in_mixed_precision(digits, cascade, tmp_path):
    runner = train(
        load_small_router(digits, tmp_path, cascade, **{'train_cfg.max_epochs': 12, **MIXED})
    )
    assert runner.model.delta.isfinite() and runner.model.delta.is_cuda
    require_finite(losses_of(runner))
    # Batches of four images differ more than a router learns in so few of them: that it moved is
    # what can be asked.
    before = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    moved = {
        name
        for name, value in runner.model.state_dict().items()
        if not torch.allclose(value.cpu(), before[name], 0, 0, equal_nan=True)
    }
    assert {'router.fc1.weight', 'router.fc2.weight'} <= moved
    assert all(name in ('delta', 'gains') or name.startswith('router.') for name in moved)


def test_a_process_group_of_one_gpu(digits, tmp_path):
    """By nccl, as tools/dist_train.sh starts it."""
    cfg = load_small(
        'dy_faster_rcnn_digits', digits, tmp_path / 'work', **{'train_cfg.max_epochs': 1}
    )
    cfg.dump(tmp_path / 'config.py')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=1',
            str(ROOT / 'tools/train.py'),
            str(tmp_path / 'config.py'),
            '--launcher',
            'pytorch',
            '--work-dir',
            str(tmp_path / 'work'),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Distributed training: True' in done.stdout + done.stderr
    (path,) = (tmp_path / 'work').glob('*/vis_data/scalars.json')
    losses = [json.loads(line)['loss'] for line in path.read_text().splitlines()]
    assert len(losses) == 3 and torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize('name', ['faster_rcnn', 'yolox', 'retinanet'])
def test_the_router_makes_the_cpu_wait_twice_at_most(name):
    """For difficulties, and for where images go."""
    model, stock = build_pair(Config(dict(model=tiny_dynamic(name))), device='cuda')
    force_dynamic_exit(model, 0)
    batch, waits = tiny_batch((2,), masks=False), []
    for detector in (stock, model):
        # First calls wait for more.
        detect(detector, batch, 'cuda')
        waits.append(sum(count_waits(lambda: detect(detector, batch, 'cuda')).values()))
    assert waits[0] > 0 and waits[1] <= waits[0] + 2
