"""Channels that go for good: of every kind of detector, while training, resumed, on two ranks."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from test_hooks import PRUNING, on_two, run
from test_training import config, weights_of

from conftest import build, images, wake
from dynamicdet.compression.channel_removal import plan_removal, remove_channels
from dynamicdet.compression.coupling import raw_outputs
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.errors import UsageError
from dynamicdet_detectron2.checkpointer import DynamicCheckpointer
from dynamicdet_detectron2.measuring import at_exit

BLOCK = dict(name='all', modules=['backbone', 'branches'], target=0.5)
REMOVAL = ('SOLVER.REMOVAL.BLOCKS', [BLOCK], 'SOLVER.REMOVAL.ROUND_TO', 2)
REMOVAL = (*REMOVAL, 'SOLVER.REMOVAL.START', 1)
KINDS = ['faster', 'mask', 'cascade', 'keypoint', 'retinanet', 'fcos', 'panoptic']


@pytest.mark.parametrize('kind', KINDS)
def test_a_smaller_detector(kind):
    model = build(kind).eval()
    wake(model)
    before = sum(value.numel() for value in model.parameters())
    norms = sum(m.num_features for m in model.modules() if isinstance(m, FrozenBatchNorm2d))
    block = PruningBlock(**BLOCK, structured=True)
    plan = plan_removal(model, [block], round_to=2)
    noise = torch.randn(1, 3, 64, 64)
    shapes = [output.shape for output in raw_outputs(model, noise)]
    remove_channels(model, plan)
    assert plan.rows[0].removed > 0.3
    assert sum(value.numel() for value in model.parameters()) < 0.6 * before
    assert sum(m.num_features for m in model.modules() if isinstance(m, FrozenBatchNorm2d)) < norms
    assert [output.shape for output in raw_outputs(model, noise)] == shapes
    for exit in (0, 1):
        with torch.no_grad(), at_exit(model, exit):
            results = model(images())
        assert [result['exit'] for result in results] == [exit] * 3


def test_a_plain_detector():
    model = build('faster', dynamic=False).eval()
    block = PruningBlock('all', ['backbone', 'roi_heads'], 0.5, structured=True)
    before = sum(value.numel() for value in model.parameters())
    remove_channels(model, plan_removal(model, [block], round_to=2))
    assert sum(value.numel() for value in model.parameters()) < 0.7 * before
    with torch.no_grad():
        assert len(model(images())) == 3


def test_while_training_resumed_and_used(data, tmp_path):
    options = (*REMOVAL, 'SOLVER.EXACT_RESUME', True)
    trainer = run(config(tmp_path, *options))
    full = build_model(config(tmp_path))
    count = lambda model: sum(value.numel() for value in model.parameters())
    assert count(trainer.model) < 0.6 * count(full)
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups for p in group['params']} == {
        id(p) for p in trainer.model.parameters() if p.requires_grad
    }
    whole = weights_of(tmp_path / 'model_final.pth')
    # Killed after the second iteration, when they had gone.
    (tmp_path / 'last_checkpoint').write_text('model_0000001.pth')
    (tmp_path / 'model_final.pth').unlink()
    again = run(config(tmp_path, *options), resume=True)
    assert again.start_iter == 2 and count(again.model) == count(trainer.model)
    for key, value in weights_of(tmp_path / 'model_final.pth').items():
        assert torch.equal(value.nan_to_num(), whole[key].nan_to_num()), key
    # The same config builds it, and step 2 trains its router, and removes no more.
    DynamicCheckpointer(full).load(str(tmp_path / 'model_final.pth'))
    assert count(full) == count(trainer.model)
    weights = str(tmp_path / 'model_final.pth')
    routed = run(config(tmp_path, *REMOVAL, step='router', weights=weights))
    assert routed.model.delta.isfinite() and count(routed.model) == count(trainer.model)
    saved = torch.load(tmp_path / 'router/model_final.pth', weights_only=True)
    assert saved['removed_channels'] == trainer.model.removed_channels


def test_two_processes_agree(data, tmp_path, monkeypatch):
    first, second = on_two(monkeypatch, data, tmp_path, REMOVAL)
    assert first['model']['backbone.first.res2.0.conv1.weight'].shape[0] == 4
    for key, value in first['model'].items():
        if not key.endswith(('running_mean', 'running_var', 'num_batches_tracked')):
            assert torch.equal(value.nan_to_num(), second['model'][key].nan_to_num()), key


def test_what_cannot_be(data, tmp_path):
    for options, said in (
        ((*REMOVAL, *PRUNING), 'count on the same layers: one run for each'),
        ((*REMOVAL, 'SOLVER.REMOVAL.START', 4), 'after 4 iterations, but the run has 4'),
        ((*REMOVAL, 'SOLVER.REMOVAL.ROUND_TO', 0), 'round_to at least 1'),
    ):
        with pytest.raises(UsageError, match=said):
            run(config(tmp_path, *options))
