"""A detector that has lost channels, pruned on, averaged and trained for 8 bits, at once, on two
ranks."""

import pytest
import torch
from test_distributed import differing, ranks, train_on_two
from test_pruning_hook import BACKBONE, config

from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.deploy.pruned_config import parse_blocks, prune_detector
from dynamicdet.files import latest_checkpoint
from dynamicdet.testing import randomize
from mmdet.registry import MODELS


@pytest.mark.parametrize('kind', ('running', 'learned'))
def test_all_hooks_on_a_smaller_detector(kind, digits, tmp_path):
    cfg = config(digits, tmp_path, ema=True, schedule='one_shot', start=1, blocks=[BACKBONE])
    cfg.custom_hooks.append(dict(type='QuantizationHook', ranges=kind, start=1))
    made = prune_detector(
        cfg, randomize(MODELS.build(cfg.model)), parse_blocks(['backbone=0.5']), round_to=4
    )
    write_checkpoint(dict(state_dict=made.model.state_dict(), meta={}), str(tmp_path / 'small.pth'))
    made.cfg.load_from = str(tmp_path / 'small.pth')
    train_on_two(made.cfg, tmp_path)
    first, second = ranks(tmp_path)
    # Norms stay as they are: not even their statistics differ.
    assert not differing(first, second)
    assert (
        first['backbone.layer4.0.conv1.weight'].shape
        == made.model.backbone.layer4[0].conv1.weight.shape
    )
    saved = read_checkpoint(latest_checkpoint(tmp_path / 'work'))
    for state in (first, saved['state_dict'], saved['ema_state_dict']):
        weights = [
            value
            for key, value in state.items()
            if value.dim() > 1 and key.removeprefix('module.').startswith(('backbone', 'neck'))
        ]
        zeros, total = (
            sum(int((one == 0).sum()) for one in weights),
            sum(one.numel() for one in weights),
        )
        assert zeros / total == pytest.approx(0.6, abs=2e-3)
    ranges = saved['quantization']['ranges']
    assert {key.split('/')[0] for key in ranges} == {'first', 'branch0', 'branch0.bbox_head0'}
    assert all(value.isfinite().all() and value[0] <= value[1] for value in ranges.values())
    assert not any(
        torch.equal(first[key], value)
        for key, value in made.model.state_dict().items()
        if key.startswith('roi_head') and value.dim() > 1
    )
