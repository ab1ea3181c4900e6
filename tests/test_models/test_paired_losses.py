"""What step 2 compares: losses as in training, under the same random draw for both exits."""
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.runner.checkpoint import load_state_dict

from dynamicdet.models.paired_losses import View, paired_losses
from dynamicdet.testing import randomise, shrink, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS


def dino():
    return shrink(Config.fromfile(ROOT / 'configs/dy_dino_r50.py').model)


def fcos():
    model = tiny_dynamic('fcos')
    model.detector.bbox_head.norm_on_bbox = True
    return model


@pytest.mark.parametrize('config', [dino, fcos])
def test_equal_exits_have_equal_losses(config):
    """Those of training mode, though all is in eval mode: DINO's denoising queries, which are noise, and
    FCOS's boxes in units of a stride. No norm or dropout of these two makes a difference."""
    cfg = config()
    model = randomise(MODELS.build({**cfg, 'train_router': True})).train()
    plain = randomise(MODELS.build(cfg.detector), seed=1)
    load_state_dict(model, plain.state_dict())
    for connection in model.backbone.connections:
        for _, norm in connection.projections:
            norm.weight.data.zero_()
            norm.bias.data.zero_()
    data = model.data_preprocessor(tiny_batch((2, )))
    state = torch.get_rng_state()
    losses, _ = model.exit_losses(data['inputs'], data['data_samples'])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for key, module in model.named_modules()
                   if key.startswith(('backbone', 'branches')))
    branch, maps = model.branch(0), model.backbone.select(model.backbone.first_maps(data['inputs']))
    in_eval, = paired_losses([View(branch, maps, data['data_samples'][0], (1.0, 1.0))])
    branch.train()
    torch.manual_seed(0)
    expected = branch.loss(maps, data['data_samples'])
    assert in_eval.keys() == expected.keys()
    for key in expected:
        pairs = zip(_flat(in_eval[key]), _flat(expected[key]))
        assert all(torch.equal(one, two) for one, two in pairs), key


def _flat(value):
    return value if isinstance(value, list) else [value]
