"""A test runs on a fused copy, also where moving averages come and go."""

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from conftest import ROOT, shrink_options
from dynamicdet.engine import QuantizationHook
from dynamicdet.models import can_fuse, fuse
from dynamicdet.testing import randomize, tiny_detector
from mmdet.registry import HOOKS, MODELS


@HOOKS.register_module()
class Watch(Hook):
    """Keeps what a test finds, and whether norms were left."""

    found = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        norms = any(isinstance(m, torch.nn.BatchNorm2d) for m in runner.model.modules())
        type(self).found += [(norms, sample.pred_instances) for sample in outputs]


def small(digits, folder, *hooks):
    cfg = Config.fromfile(ROOT / 'configs/dy_yolov7_nano_digits.py')
    options = {
        key: value for key, value in shrink_options(digits).items() if not key.startswith('model')
    }
    cfg.merge_from_dict({**options, 'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 9})
    for node in (
        cfg.model.backbone,
        cfg.model.detector.backbone,
        cfg.model.detector.neck,
        cfg.model.detector.bbox_head,
    ):
        node.width = 0.0625
    cfg.model.budget = dict(threshold=-1)
    # Nothing is suppressed: which of two nearly equal boxes would be is a matter of rounding.
    cfg.model.detector.test_cfg.nms.iou_threshold = 1.0
    cfg.work_dir = str(folder)
    cfg.custom_hooks += [dict(type=hook) for hook in hooks]
    return cfg


def all_among(few, many):
    """Whether each detection is one of many: label, 0.01 pixels, 1e-4 in score."""
    few, many = (
        torch.cat([one.bboxes, 100 * one.scores[:, None], one.labels[:, None]], 1)
        for one in (few, many)
    )
    return (few[:, None] - many).abs().amax(2).amin(1).max() < 1e-2


def test_a_fused_copy_finds_the_same(digits, tmp_path):
    cfg = small(digits, tmp_path)
    model = randomize(MODELS.build(cfg.model))
    # Or all scores would be alike.
    for conv in model.branches[1].bbox_head.convs:
        conv.weight.data *= 10
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'random.pth')
    cfg.load_from = str(tmp_path / 'random.pth')
    Runner.from_cfg(cfg).train()
    runs = []
    for hooks in (['Watch'], ['Watch', 'FuseHook']):
        cfg = small(digits, tmp_path, *hooks)
        cfg.load_from = str(tmp_path / 'epoch_1.pth')
        Watch.found = []
        runner = Runner.from_cfg(cfg)
        model, before = runner.model, len(runner.model.state_dict())
        runner.test()
        assert runner.model is model and len(model.state_dict()) == before
        runs.append(Watch.found)
    assert [norms for norms, _ in runs[0]] == [True] * 6 and [norms for norms, _ in runs[1]] == [
        False
    ] * 6
    for (_, one), (_, other) in zip(*runs):
        assert len(one) > 10 and one.scores[0] > one.scores[-1] + 0.01
        assert all_among(one[:10], other) and all_among(other[:10], one)


def test_a_part_with_something_called_fuse():
    """Such as the layer where a neck joins its maps: nothing to call, and no reason to refuse 8
    bits."""
    model = MODELS.build(tiny_detector('retinanet'))
    model.neck.fuse = torch.nn.Conv2d(64, 64, 1)
    assert not can_fuse(model)
    norms = [module for module in fuse(model).modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    hook = QuantizationHook()
    hook._install(model)
    assert hook.simulations
    hook.after_train(None)
