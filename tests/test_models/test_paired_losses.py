"""What step 2 compares: losses as in training, under the same random draw for both exits."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.runner.checkpoint import load_state_dict

from conftest import ROOT, run_tool
from dynamicdet.models.paired_losses import ExitView, paired_losses
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules


def dino():
    return shrink(Config.fromfile(ROOT / 'configs/dy_dino_r50.py').model)


def fcos():
    model = tiny_dynamic('fcos')
    model.detector.bbox_head.norm_on_bbox = True
    return model


@pytest.mark.parametrize('config', [dino, fcos])
def test_equal_exits_have_equal_losses(config):
    """Those of training mode, though all is in eval mode: DINO's denoising queries, which are
    noise, and FCOS's boxes in units of a stride. No norm or dropout of these two makes a
    difference."""
    cfg = config()
    model = randomize(MODELS.build({**cfg, 'train_router': True})).train()
    plain = randomize(MODELS.build(cfg.detector), seed=1)
    load_state_dict(model, plain.state_dict())
    for connection in model.backbone.connections:
        for _, norm in connection.projections:
            norm.weight.data.zero_()
            norm.bias.data.zero_()
    data = model.data_preprocessor(tiny_batch((2,)))
    state = torch.get_rng_state()
    losses, _ = model.exit_losses(data['inputs'], data['data_samples'])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(
        module.training
        for key, module in model.named_modules()
        if key.startswith(('backbone', 'branches'))
    )
    branch, maps = model.branch(0), model.backbone.select(model.backbone.first_maps(data['inputs']))
    (in_eval,) = paired_losses([ExitView(branch, maps, data['data_samples'][0], (1.0, 1.0))])
    branch.train()
    torch.manual_seed(0)
    expected = branch.loss(maps, data['data_samples'])
    assert in_eval.keys() == expected.keys()
    for key in expected:
        pairs = zip(_flat(in_eval[key]), _flat(expected[key]))
        assert all(torch.equal(one, two) for one, two in pairs), key


def atss_losses(objects, seed):
    """Losses of an image under both exits; ATSS divides by what all ranks have."""
    model = randomize(MODELS.build({**tiny_dynamic('atss'), 'train_router': True})).train()
    data = model.data_preprocessor(tiny_batch((objects,), seed=seed))
    return model.exit_losses(data['inputs'], data['data_samples'])[0]


def rank_losses(folder):
    """What each of two processes runs."""
    rank = int(os.environ['RANK'])
    register_all_modules(init_default_scope=True)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    # Ranks with images of their own, and a rank that has one more.
    losses = [atss_losses(1 + 3 * rank, seed) for seed in range(1 + rank)]
    torch.save(losses, f'{folder}/{rank}.pth')
    assert dist.get_world_size() == 2
    dist.barrier()
    dist.destroy_process_group()


def test_an_images_losses_do_not_depend_on_other_ranks(tmp_path):
    done = run_tool(__file__, tmp_path, ranks=2, PYTHONPATH=f'{ROOT}:{ROOT / "tests"}')
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        for seed, losses in enumerate(torch.load(tmp_path / f'{rank}.pth', weights_only=True)):
            torch.testing.assert_close(losses, atss_losses(1 + 3 * rank, seed))


def _flat(value):
    return value if isinstance(value, list) else [value]


if __name__ == '__main__':
    rank_losses(sys.argv[1])
