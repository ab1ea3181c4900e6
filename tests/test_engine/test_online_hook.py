"""A controller holds the budget of a test."""

import pytest
from mmengine.hooks import Hook
from mmengine.runner import Runner

from conftest import ROOT, load_small, run_tool, shrink_options
from dynamicdet.engine import OnlineHook
from dynamicdet.errors import UsageError
from mmdet.registry import HOOKS


@HOOKS.register_module()
class Exits(Hook):
    """Keeps the exits of a test."""

    found = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        type(self).found += [sample.exit for sample in outputs]


@pytest.mark.parametrize('share', [0, 1])
def test_it_holds_during_the_test_alone(digits, cascade, tmp_path, share):
    cfg = load_small(
        'dy_faster_rcnn_digits', digits, tmp_path, load_from=str(cascade / 'epoch_12.pth')
    )
    cfg.custom_hooks += [
        dict(type='FuseHook'),
        dict(type='OnlineHook', budget=dict(hard_share=share)),
        dict(type='Exits'),
    ]
    Exits.found = []
    runner = Runner.from_cfg(cfg)
    before = runner.model.threshold.clone()
    runner.test()
    assert Exits.found == [share] * 6 and runner.model.threshold == before
    assert not runner.model.router._forward_hooks


def test_a_plain_detector_has_no_exits(digits, tmp_path):
    cfg = load_small('dy_faster_rcnn_digits', digits, tmp_path)
    cfg.model = cfg.model.detector
    hook, runner = OnlineHook(dict(hard_share=0.5)), Runner.from_cfg(cfg)
    with pytest.raises(UsageError, match='not for FasterRCNN'):
        hook.before_test_epoch(runner)


def test_the_tool(digits, cascade, tmp_path):
    """Uncalibrated, and so fast that no image can be hard: an online budget starts from nothing."""
    options = [
        f'{key}={str(value).replace(" ", "")}'
        for key, value in shrink_options(digits).items()
        if value is not None and not key.startswith('train')
    ]
    done = run_tool(
        'test.py',
        ROOT / 'configs/dy_faster_rcnn_digits.py',
        cascade / 'epoch_12.pth',
        '--target-latency',
        1e-6,
        '--online',
        '--no-data-check',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *options,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "online budget: {'target': 1e-06" in done.stdout + done.stderr


@pytest.mark.parametrize(
    'arguments, said', [(['--online', '--threshold', 0.5], 'something to hold')]
)
def test_the_tool_says_what_is_missing(cascade, tmp_path, arguments, said):
    done = run_tool(
        'test.py',
        ROOT / 'configs/dy_faster_rcnn_digits.py',
        cascade / 'epoch_12.pth',
        '--work-dir',
        tmp_path,
        *arguments,
    )
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]
