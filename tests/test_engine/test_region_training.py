"""Step 2 with regions trains their router, and nothing else."""

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from conftest import load_small_router
from dynamicdet.building import load_dynamic_detector
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.engine.router_hook import count_labels
from dynamicdet.files import latest_checkpoint
from dynamicdet.routing import class_weights
from dynamicdet.routing.region_record import cell_gains_of_detections
from dynamicdet.testing import randomize, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS


class Losses(Hook):
    """Notes the loss of each iteration, and states before and after."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not hasattr(self, 'before'):
            self.before = {key: one.clone() for key, one in runner.model.state_dict().items()}
            self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs['loss_router']))


@pytest.mark.parametrize('router', [dict(), dict(hidden=4, in_channels=(8, 16, 32, 64))])
def test_the_map_learns_and_all_else_stays(router, digits, cascade, findable, tmp_path):
    cfg = load_small_router(
        digits,
        tmp_path,
        cascade,
        **{
            'model.regions': dict(router=router),
            'train_cfg.max_epochs': 6,
            'default_hooks.checkpoint.interval': 6,
            'train_dataloader.dataset.ann_file': str(findable),
            'model.detector.test_cfg.rcnn.score_thr': 0.0,
        },
    )
    runner = Runner.from_cfg(cfg)
    recorder = Losses()
    runner.register_hook(recorder)
    model = runner.train()
    router, changed = model.regions.router, set()
    for key, value in model.state_dict().items():
        # Costs are NaN: not measured.
        if not torch.equal(value.nan_to_num(), recorder.before[key].nan_to_num()):
            changed.add(key)
    # What the pass before training sets is set before the first iteration.
    assert changed == {f'regions.router.{name}' for name, _ in router.named_parameters()}
    assert router.trained and not torch.equal(router.std, torch.ones_like(router.std))
    third = len(recorder.losses) // 3
    assert np.mean(recorder.losses[-third:]) < np.mean(recorder.losses[:third])
    counts = count_labels(runner.train_dataloader.dataset, len(model.regions.class_weights))
    assert model.regions.class_weights.tolist() == pytest.approx(class_weights(counts).tolist())
    # It is used as a fitted one.
    saved = latest_checkpoint(tmp_path)
    assert read_checkpoint(saved)['state_dict']['regions.router.trained']
    loaded = load_dynamic_detector(cfg, saved, 'cpu')[0]
    assert not loaded.delta.isnan() and not len(loaded.regions.curve)


def test_gains_of_cells_are_those_of_a_record():
    """Found by exit 1 alone; by both; by exit 0 alone: at the cells of their centers."""
    small, other = [8.0, 8, 24, 24], [70.0, 40, 90, 60]

    def found(*boxes):
        count = len(boxes)
        return dict(
            bboxes=np.array(boxes).reshape(-1, 4),
            scores=np.full(count, 0.8),
            labels=np.zeros(count, np.int64),
        )

    truth = dict(
        bboxes=np.array([small, other]), labels=np.zeros(2, np.int64), crowds=np.zeros(2, bool)
    )
    exits = [[found(), found(small), found(other)], [found(small), found(small), found()]]
    nothing = dict(bboxes=np.zeros((0, 4)), labels=np.zeros(0, int), crowds=np.zeros(0, bool))
    gains = cell_gains_of_detections(exits, [truth] * 3, [(64, 96)] * 3, np.array([2.0]))
    expected = np.zeros((3, 2, 3))
    expected[0, 0, 0], expected[2, 1, 2] = 1.6, -1.6
    np.testing.assert_allclose(gains, expected, atol=1e-6)
    gains = cell_gains_of_detections(exits, [nothing] * 3, [(64, 96)] * 3, np.array([2.0]))
    assert not np.any(gains)


def test_exits_are_seen_in_the_delivered_frame():
    """Exit 0 sees half the size: what it finds lies in the cells of the image all the same."""
    model = MODELS.build(
        tiny_dynamic(
            'faster_rcnn',
            regions={},
            train_router=True,
            backbones=1,
            reuse_stages=0,
            first_scale=0.5,
        )
    )
    model = randomize(model).train()
    data = model.data_preprocessor(tiny_batch((2, 1), size=(160, 224)), True)
    inputs, gains = model.region_gains(data['inputs'], data['data_samples'])
    assert [tuple(gain.shape) for gain in gains] == [(5, 7)] * 2
    # The last plane counts detections.
    assert all(one[0, -1].sum() > 0 for one in inputs)
    assert all(one[0, -1, :, 4:].sum() + one[0, -1, 3:].sum() > 0 for one in inputs)
    losses = model.loss(data['inputs'], data['data_samples'])
    assert losses['loss_router'].requires_grad
    losses['loss_router'].backward()
    trained = {name for name, one in model.named_parameters() if one.grad is not None}
    assert trained == {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {'regions.router.layers.0.weight', 'regions.router.layers.0.bias'}
