"""Sharing in real runs: values are trained and stay few, zeros stay, averages, resuming, two ranks,
files."""

import pytest
import torch
from mmengine.hooks import Hook
from test_distributed import ranks, train_on_two

from conftest import load_small, load_small_static, train
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.compression.ddz import compress
from dynamicdet.compression.pruning import prune_weights
from dynamicdet.compression.pruning_blocks import PruningBlock, find_layers
from dynamicdet.engine import WeightSharingHook
from dynamicdet.engine.compression_hook import averaged_models
from dynamicdet.errors import UsageError
from dynamicdet.testing import randomize
from mmdet.registry import HOOKS, MODELS

BLOCKS = [
    dict(name='backbone', modules=['backbone'], bits=3),
    dict(name='heads', modules=['roi_head'], bits=2, exclude=['*.fc_cls']),
]
PRUNING = dict(type='PruningHook', blocks=[dict(name='all', modules=['*'], target=0.5)])


def config(digits, work_dir, epochs=2, hooks=(), options=None, **settings):
    """The shipped example, shrunk, with another hook."""
    cfg = load_small_static('faster_rcnn_digits_shared', digits, work_dir, epochs, options or {})
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != 'WeightSharingHook']
    cfg.custom_hooks += [*hooks, dict(type='WeightSharingHook', **{'blocks': BLOCKS, **settings})]
    return cfg


@HOOKS.register_module(force=True)
class WatchSharing(Hook):
    """Notes how many values each layer has after each iteration, in the model and in its
    averages."""

    priority = 'LOWEST'

    def __init__(self):
        self.models, self.averages = [], []

    def after_train_iter(self, runner, *_, **__):
        self.models.append(
            {
                name: layer.weight.detach().clone()
                for name, layer in find_layers(runner.model).items()
            }
        )
        self.averages += [
            {name: layer.weight.detach().clone() for name, layer in find_layers(model).items()}
            for model in averaged_models(runner)
        ]


def run(cfg):
    cfg.custom_hooks.append(dict(type='WatchSharing'))
    runner = train(cfg)
    return runner, next(hook for hook in runner.hooks if isinstance(hook, WatchSharing))


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, WeightSharingHook))


def most(name):
    """How many values a layer may have."""
    return None if name.endswith('fc_cls') else dict(backbone=8, roi_head=4).get(name.split('.')[0])


@pytest.fixture(scope='module')
def pruned(digits, tmp_path_factory):
    """Path of a detector of which 60 % are zero."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('to_share')
    model = randomize(MODELS.build(config(digits, folder).model))
    prune_weights(model, [PruningBlock('all', ['*'], 0.6)])
    write_checkpoint(dict(state_dict=model.state_dict()), str(folder / 'pruned.pth'))
    return folder / 'pruned.pth'


@pytest.fixture(scope='module')
def shared(pruned, digits, tmp_path_factory):
    """Work dir, runner and watch of a run from it with averages, momentum and weight decay; 6
    iterations."""
    folder = tmp_path_factory.mktemp('shared')
    return folder, *run(
        config(
            digits,
            folder,
            hooks=[dict(type='EMAHook', momentum=0.3)],
            options={'load_from': str(pruned)},
        )
    )


def test_values_are_few_and_trained_and_zeros_stay(pruned, shared):
    _, runner, watch = shared
    before = read_checkpoint(str(pruned))['state_dict']
    assert len(watch.models) == len(watch.averages) == 6
    for weights in watch.models + watch.averages:
        for name, weight in weights.items():
            zeros = before[f'{name}.weight'] == 0
            if most(name):
                assert len(weight.unique()) <= most(name)
                assert torch.equal(weight == 0, zeros)
            elif zeros.any():
                # Others are not held.
                assert (weight[zeros] != 0).any()
    first, last = watch.models[0], watch.models[-1]
    moved = [name for name in hook_of(runner).shared if not torch.equal(first[name], last[name])]
    assert len(moved) == len(hook_of(runner).shared) > 20


def test_a_checkpoint_is_a_plain_detectors_and_its_tables_are_found(shared):
    folder, runner, _ = shared
    checkpoint = read_checkpoint(str(folder / 'epoch_2.pth'))
    states = [
        checkpoint['state_dict'],
        {key[7:]: value for key, value in checkpoint['ema_state_dict'].items() if key != 'steps'},
    ]
    for state in states:
        model = MODELS.build(runner.cfg.model)
        assert state.keys() == model.state_dict().keys()
        model.load_state_dict(state)
        encodings = {
            entry.row['key']: (entry.row['encoding'], entry.row.get('frames', {}).get('table', 0))
            for entry in compress(dict(state_dict=state)).entries
        }
        large = [name for name in hook_of(runner).shared if state[f'{name}.weight'].numel() >= 1024]
        found = [encodings[f'{name}.weight'] for name in large]
        # Of a layer pruning left so little that each channel has one magnitude, which is smaller
        # yet.
        assert len(found) > 10 and sum(encoding != 'codebook' for encoding, _ in found) <= 1
        assert all(size <= 4 * most(name) for name, (_, size) in zip(large, found))


def test_the_optimizer_moves_a_value_as_one_parameter_would(digits, tmp_path):
    """SGD: w - lr (sum of the gradients of its weights), also where gradients are accumulated."""
    options = {
        'optim_wrapper.optimizer': dict(type='SGD', lr=1e-3, _delete_=True),
        'optim_wrapper.clip_grad': None,
        'optim_wrapper.accumulative_counts': 3,
        'model.backbone.norm_eval': True,
    }
    cfg = config(digits, tmp_path, epochs=1, options=options, blocks=[BLOCKS[1]])
    cfg.custom_hooks.append(dict(type='NoteGradients'))
    runner, _ = run(cfg)
    note = next(hook for hook in runner.hooks if isinstance(hook, NoteGradients))
    name = 'roi_head.bbox_head.shared_fcs.1'
    one, (before, gradient, after) = hook_of(runner).shared[name], note.found[name]
    for index in range(len(one.members)):
        members = (one.indices == index).view(before.shape)
        wanted = before[members].double().mean() - 1e-3 * gradient[members].double().sum()
        torch.testing.assert_close(
            after[members], wanted.float().expand(int(members.sum())), rtol=1e-4, atol=1e-7
        )
    assert gradient.any()


@HOOKS.register_module(force=True)
class NoteGradients(Hook):
    """Weights before and after the run's one step, and its gradients as the backward pass gave
    them."""

    priority = 'VERY_HIGH'

    def before_train(self, runner):
        self.found, self._seen = {}, {}
        layers = find_layers(runner.model)
        for name, layer in layers.items():
            layer.weight.register_post_accumulate_grad_hook(
                lambda weight, name=name: self._seen.update({name: weight.grad.clone()})
            )

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 1:
            self._before = {
                name: layer.weight.detach().clone()
                for name, layer in find_layers(runner.model).items()
            }

    def after_train(self, runner):
        for name, layer in find_layers(runner.model).items():
            self.found[name] = (
                self._before[name],
                self._seen.get(name),
                layer.weight.detach().clone(),
            )


def test_pruned_first_then_shared_in_one_run(digits, tmp_path):
    pruning = dict(PRUNING, start=1)
    runner, watch = run(config(digits, tmp_path, hooks=[pruning], start=1, options={}))
    name = 'roi_head.bbox_head.shared_fcs.0'
    assert len(watch.models[2][name].unique()) > 1000
    for weights in watch.models[3:]:
        assert len(weights[name].unique()) == 4
        zeros = [weight == 0 for weight in weights.values()]
        assert sum(int(zero.sum()) for zero in zeros) / sum(
            zero.numel() for zero in zeros
        ) == pytest.approx(0.5, abs=1e-3)


# A run that is killed and resumed; one on two ranks.


@pytest.mark.parametrize(
    'settings', [dict(start=1), dict(start=4, by_epoch=False)], ids=['epochs', 'iterations']
)
def test_a_resumed_run_ends_as_one_that_was_not_killed(settings, digits, tmp_path):
    def again(folder):
        return config(
            digits, folder, epochs=3, hooks=[dict(type='EMAHook', momentum=0.3)], **settings
        )

    train(again(tmp_path))
    whole = read_checkpoint(f'{tmp_path}/epoch_3.pth')
    cfg = again(tmp_path / 'again')
    cfg.resume, cfg.load_from = True, f'{tmp_path}/epoch_2.pth'
    train(cfg)
    end = read_checkpoint(f'{tmp_path}/again/epoch_3.pth')
    for part in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(end[part][key], value) for key, value in whole[part].items())
    assert whole['weight_sharing'].keys() == end['weight_sharing'].keys() != set()
    for name, one in whole['weight_sharing'].items():
        assert torch.equal(end['weight_sharing'][name]['indices'], one['indices'])


def test_two_ranks_share_alike(digits, tmp_path):
    train_on_two(config(digits, tmp_path), tmp_path)
    first, second = ranks(tmp_path)
    assert all(
        torch.equal(value, second[key]) for key, value in first.items() if '.running_' not in key
    )
    shared = [
        key for key, value in first.items() if value.dim() > 1 and most(key.removesuffix('.weight'))
    ]
    assert len(shared) > 20 and all(len(first[key].unique()) <= most(key) for key in shared)


# What bad input gets.


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(blocks=[dict(BLOCKS[0], bits=1)]), 'has 2 to 8 bits, not 1'),
        (dict(blocks=[dict(BLOCKS[0], bits=9)]), 'not 9'),
        (dict(blocks=[dict(name='a')]), 'missing in a block: modules'),
        (dict(blocks=[dict(BLOCKS[0], target=0.5)]), 'unknown in a block: target'),
        (dict(blocks=[dict(BLOCKS[0], modules='backbone')]), 'a list of patterns'),
        (dict(start=-1), 'must not be negative'),
        (dict(reduction='max'), 'none of sum, mean'),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(UsageError, match=said) as caught:
        WeightSharingHook(**{'blocks': BLOCKS, **settings})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(blocks=[dict(BLOCKS[0], modules=['backbon'])]), "'backbon' matches no module"),
        (
            dict(blocks=[*BLOCKS, dict(name='all', modules=['*'])]),
            "in two blocks, 'backbone' and 'all'",
        ),
        (dict(start=2), 'begins after 2 epochs, but the run has 2'),
        (dict(hooks=[dict(PRUNING, start=1)]), 'PruningHook goes on after sharing begins'),
    ],
)
def test_settings_that_do_not_fit_the_run(settings, said, digits, tmp_path):
    with pytest.raises(UsageError, match=said):
        train(config(digits, tmp_path, **settings))


def test_other_layers_are_not_resumed(shared, digits, tmp_path):
    cfg = config(
        digits, tmp_path, epochs=3, hooks=[dict(type='EMAHook', momentum=0.3)], blocks=BLOCKS[:1]
    )
    cfg.resume, cfg.load_from = True, str(shared[0] / 'epoch_2.pth')
    with pytest.raises(UsageError, match='shares are other layers'):
        train(cfg)


def test_a_router_alone_may_be_trained(digits, tmp_path):
    cfg = load_small('dy_faster_rcnn_digits_router', digits, tmp_path)
    cfg.custom_hooks = [dict(type='WeightSharingHook', blocks=[dict(name='all', modules=['*'])])]
    with pytest.raises(UsageError, match='share weights in step 1'):
        train(cfg)
