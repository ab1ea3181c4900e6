"""A loss that is not a number ends the run at once, says where, and spoils no checkpoint."""

import re

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner, load_state_dict

from conftest import load_small, load_small_router
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from mmdet.registry import MODELS


class Poison(Hook):
    """Puts a NaN into a weight before the second iteration of the second epoch, and notes the
    images that this iteration then sees."""

    def __init__(self, weight):
        self.weight, self.images = weight, []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (runner.epoch, batch_idx) == (1, 1):
            self.images = [sample.img_path for sample in data_batch['data_samples']]
            with torch.no_grad():
                runner.model.get_parameter(self.weight).view(-1)[0] = float('nan')


def run(cfg, *hooks):
    """Train until it is refused; the message."""
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    with pytest.raises(UsageError) as caught:
        runner.train()
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    'step, weight', [(1, 'branches.0.roi_head.bbox_head.fc_cls.bias'), (2, 'router.fc2.bias')]
)
def test_a_nan_names_epoch_iteration_and_images(digits, cascade, tmp_path, step, weight):
    options = {
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.indices': 6,
        'train_cfg.max_epochs': 3,
    }
    cfg = (
        load_small('dy_faster_rcnn_digits', digits, tmp_path, **options)
        if step == 1
        else load_small_router(digits, tmp_path, cascade, **options)
    )
    poison = Poison(weight)
    message = run(cfg, poison)
    assert 'not finite at epoch 2, iteration 5 ' in message
    assert len(poison.images) == 2
    assert re.search(r'\(images: (.*?)\)', message)[1] == ', '.join(poison.images)
    assert 'router' in message if step == 2 else 'exit0.loss_cls' in message
    assert str(tmp_path) in message and '--resume' in message
    # What was written before is whole, finite and loads; nothing came after.
    assert sorted(path.name for path in tmp_path.glob('epoch_*')) == ['epoch_1.pth']
    state = read_checkpoint(str(tmp_path / 'epoch_1.pth'))['state_dict']
    assert all(
        torch.isfinite(value).all()
        for name, value in state.items()
        if name not in ('delta', 'gflops', 'latencies')
    )
    load_state_dict(MODELS.build(cfg.model), state, strict=True)


def test_a_huge_learning_rate_ends_in_the_same_message(digits, tmp_path):
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        tmp_path,
        **{
            'param_scheduler': [],
            'optim_wrapper.optimizer.lr': 1e30,
            'train_cfg.max_epochs': 1,
            'train_dataloader.batch_size': 2,
        },
    )
    message = run(cfg)
    assert 'not finite at epoch 1, iteration 2 ' in message and '/train/' in message
