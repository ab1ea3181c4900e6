"""Pruning in real runs: schedules, fine-tuning, averages, resuming, two ranks."""

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from test_distributed import ranks, train_on_two

from conftest import load_small, load_small_static, train
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.compression.pruning import unpack_mask
from dynamicdet.compression.pruning_blocks import find_layers
from dynamicdet.engine import PruningHook
from dynamicdet.errors import UsageError
from mmdet.registry import HOOKS, MODELS

BACKBONE = dict(name='backbone', modules=['backbone', 'neck'], target=0.6)
HEADS = dict(name='heads', modules=['roi_head'], target=0.5)


def config(digits, work_dir, epochs=2, ema=False, options=None, **settings):
    """The shipped example, shrunk, with another hook."""
    cfg = load_small_static('faster_rcnn_digits_pruned', digits, work_dir, epochs, options or {})
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != 'PruningHook']
    cfg.custom_hooks.append(dict(type='PruningHook', **{'blocks': [BACKBONE], **settings}))
    if ema:
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.3))
    return cfg


@HOOKS.register_module(force=True)
class WatchPruning(Hook):
    """Notes the zeros of a block after each iteration and epoch, in the model and in its
    average."""

    priority = 'LOWEST'

    def __init__(self, modules):
        self.modules = tuple(modules)
        self.iterations, self.averages, self.epochs = [], [], []

    def zeros(self, model):
        return {
            name: layer.weight == 0
            for name, layer in find_layers(model).items()
            if name.startswith(self.modules)
        }

    def after_train_iter(self, runner, *_, **__):
        self.iterations.append(self.zeros(runner.model))
        self.averages += [
            self.zeros(hook.ema_model.module) for hook in runner.hooks if isinstance(hook, EMAHook)
        ]

    def after_train_epoch(self, runner):
        self.epochs.append(share(self.zeros(runner.model)))


@HOOKS.register_module(force=True)
class Shake(Hook):
    """Makes what survived so far small, before the last epoch."""

    def before_train_epoch(self, runner):
        if runner.epoch == runner.max_epochs - 1:
            for parameter in runner.model.backbone.layer3.parameters():
                parameter.data.mul_(1e-4 if parameter.dim() > 1 else 1)


def share(zeros):
    return sum(int(value.sum()) for value in zeros.values()) / sum(
        value.numel() for value in zeros.values()
    )


def watched(cfg, modules=('backbone', 'neck')):
    """Run a config; the runner and the `WatchPruning`."""
    cfg.custom_hooks.append(dict(type='WatchPruning', modules=modules))
    runner = train(cfg)
    return runner, next(hook for hook in runner.hooks if isinstance(hook, WatchPruning))


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, PruningHook))


@pytest.fixture(scope='module')
def one_shot(digits, tmp_path_factory):
    """Work dir, runner and watch of a run with two blocks, averages and weight decay."""
    folder = tmp_path_factory.mktemp('one_shot')
    return folder, *watched(config(digits, folder, ema=True, blocks=[BACKBONE, HEADS]))


def test_what_is_pruned_stays_zero_through_training(one_shot):
    """AdamW has momentum and decay; 6 iterations."""
    _, runner, watch = one_shot
    masks = hook_of(runner).masks
    assert len(watch.iterations) == len(watch.averages) == 6
    for zeros in watch.iterations + watch.averages:
        assert share(zeros) == pytest.approx(0.6, abs=1e-3)
        assert all(torch.equal(value, ~masks[name]) for name, value in zeros.items())
    optimizer = runner.optim_wrapper.optimizer
    name, layer = next(
        (name, layer) for name, layer in find_layers(runner.model).items() if name in masks
    )
    # It would have moved.
    assert optimizer.state[layer.weight]['exp_avg'][~masks[name]].any()


def test_a_checkpoint_is_a_plain_detectors(one_shot):
    folder, runner, _ = one_shot
    checkpoint = read_checkpoint(str(folder / 'epoch_2.pth'))
    # The averages are what is deployed; the trained weights are beside them.
    for state in (
        checkpoint['state_dict'],
        {key[7:]: value for key, value in checkpoint['ema_state_dict'].items() if key != 'steps'},
    ):
        model = MODELS.build(runner.cfg.model)
        assert state.keys() == model.state_dict().keys()
        model.load_state_dict(state)
        layers = find_layers(model)
        for name, packed in checkpoint['pruning']['masks'].items():
            weight = layers[name].weight
            assert torch.equal(weight == 0, ~unpack_mask(packed, weight.shape))
    assert {name.split('.')[0] for name in checkpoint['pruning']['masks']} == {
        'backbone',
        'neck',
        'roi_head',
    }


def test_blocks_have_targets_of_their_own(one_shot):
    _, runner, _ = one_shot
    layers = find_layers(runner.model)
    for modules, target in ((('backbone', 'neck'), 0.6), (('roi_head',), 0.5), (('rpn_head',), 0)):
        zeros = {
            name: layer.weight == 0 for name, layer in layers.items() if name.startswith(modules)
        }
        assert share(zeros) == pytest.approx(target, abs=1e-3)


def test_a_cubic_schedule_by_iterations(digits, tmp_path):
    """3 iterations an epoch; 0.6 (1 - (1 - k/4)^3) after 1 + k iterations."""
    _, watch = watched(config(digits, tmp_path, schedule='cubic', start=1, end=5, by_epoch=False))
    wanted = [0, 0] + [0.6 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3, 4)]
    assert [share(zeros) for zeros in watch.iterations] == pytest.approx(wanted, abs=1e-3)
    for before, after in zip(watch.iterations, watch.iterations[1:]):
        assert all((after[name] | ~before[name]).all() for name in before)


def test_soft_filters_are_chosen_anew_and_end_as_zeros(digits, tmp_path):
    block = dict(BACKBONE, modules=['backbone.layer3'], target=0.4, over='layer')
    cfg = config(digits, tmp_path, epochs=3, blocks=[block], soft=True, structured=True, ema=True)
    cfg.custom_hooks.append(dict(type='Shake'))
    runner, watch = watched(cfg, ('backbone.layer3',))
    # Whole channels at the end of each epoch: 13 of 32 in every layer.
    assert watch.epochs == pytest.approx([13 / 32] * 3)
    # They train on in between.
    assert share(watch.iterations[3]) == share(watch.iterations[4]) == 0
    masks = hook_of(runner).masks
    for model in (
        runner.model,
        next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module,
    ):
        for name, zeros in watch.zeros(model).items():
            assert torch.equal(zeros, ~masks[name])
            assert torch.equal(zeros.flatten(1).all(1), zeros.flatten(1).any(1))
    first, last = (
        read_checkpoint(str(tmp_path / f'epoch_{epoch}.pth'))['pruning']['masks']
        for epoch in (2, 3)
    )
    assert any(not torch.equal(first[name], last[name]) for name in last)


# A run that is killed and resumed.


def resumed(cfg, epoch):
    """The rest of a run that ended after an epoch; its last checkpoint."""
    last = f'{cfg.work_dir}/epoch_{cfg.train_cfg.max_epochs}.pth'
    whole = read_checkpoint(last)
    cfg.resume, cfg.load_from = True, f'{cfg.work_dir}/epoch_{epoch}.pth'
    cfg.work_dir = f'{cfg.work_dir}/again'
    train(cfg)
    return whole, read_checkpoint(f'{cfg.work_dir}/epoch_{cfg.train_cfg.max_epochs}.pth')


@pytest.mark.parametrize(
    'settings',
    [
        dict(schedule='iterative', end=2, blocks=[dict(BACKBONE, score='random')], ema=True),
        dict(
            schedule='cubic',
            start=2,
            end=8,
            interval=2,
            by_epoch=False,
            blocks=[dict(BACKBONE, score='gradient'), dict(HEADS, score='activation')],
        ),
        dict(soft=True, structured=True),
    ],
    ids=['random', 'scores', 'soft'],
)
def test_a_resumed_run_ends_as_one_that_was_not_killed(settings, digits, tmp_path):
    def again():
        return config(digits, tmp_path, epochs=3, **settings)

    train(again())
    # Epoch 1 is gone: two checkpoints are kept.
    whole, end = resumed(again(), 2)
    assert all(
        torch.equal(end['state_dict'][key], value) for key, value in whole['state_dict'].items()
    )
    assert end['pruning']['shares'] == whole['pruning']['shares'] != [0]
    masks = whole['pruning']['masks']
    assert masks and all(
        torch.equal(end['pruning']['masks'][key], value) for key, value in masks.items()
    )
    if settings.get('ema'):
        assert all(
            torch.equal(end['ema_state_dict'][key], value)
            for key, value in whole['ema_state_dict'].items()
        )


def test_two_ranks_have_the_same_masks(digits, tmp_path):
    """Each sees other images: activations differ until they are summed."""
    cfg = config(
        digits,
        tmp_path,
        schedule='one_shot',
        start=1,
        blocks=[dict(BACKBONE, score='activation'), dict(HEADS, score='gradient')],
    )
    train_on_two(cfg, tmp_path)
    first, second = ranks(tmp_path)
    zeros = {key: value == 0 for key, value in first.items() if value.dim() > 1}
    assert all(torch.equal(value, second[key] == 0) for key, value in zeros.items())
    assert all(
        torch.equal(value, second[key]) for key, value in first.items() if '.running_' not in key
    )
    for modules, target in ((('backbone', 'neck'), 0.6), (('roi_head',), 0.5)):
        part = {key: value for key, value in zeros.items() if key.startswith(modules)}
        assert share(part) == pytest.approx(target, abs=1e-3)


# What bad input gets.


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(blocks=[dict(BACKBONE, target=1.0)]), 'at least 0 and below 1'),
        (dict(blocks=[dict(name='a', target=0.5)]), 'missing in a block: modules'),
        (dict(blocks=[dict(BACKBONE, module='x')]), 'unknown in a block: module'),
        (dict(schedule='now'), 'none of one_shot'),
        (dict(interval=0), 'interval at least 1'),
        (dict(start=2, end=1), 'end not before start'),
        (dict(soft=True), 'set structured=True'),
        (dict(score='gradient'), 'set start to 1 or more'),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(UsageError, match=said) as caught:
        PruningHook(**{'blocks': [BACKBONE], **settings})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(blocks=[dict(BACKBONE, modules=['backbon'])]), "'backbon' matches no module"),
        (dict(blocks=[dict(BACKBONE, target=0.999999)]), 'would be pruned to nothing'),
        (dict(schedule='cubic', end=2), 'last pruning is after 2 epochs, but the run has 2'),
    ],
)
def test_settings_that_do_not_fit_the_run(settings, said, digits, tmp_path):
    with pytest.raises(UsageError, match=said):
        train(config(digits, tmp_path, **settings))


def test_a_router_alone_may_be_trained(digits, tmp_path):
    cfg = load_small('dy_faster_rcnn_digits_router', digits, tmp_path)
    cfg.custom_hooks = [dict(type='PruningHook', blocks=[dict(BACKBONE, modules=['backbone'])])]
    with pytest.raises(UsageError, match='prune in step 1'):
        train(cfg)
