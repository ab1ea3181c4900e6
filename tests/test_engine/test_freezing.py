"""In step 2 nothing but the router can change: not a weight, not a running statistic."""

import hashlib

import pytest
import torch

from conftest import load_small, load_small_router, train
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import latest_checkpoint

#: Few images and batches of two; decay that would be felt; statistics that would move.
_OPTIONS = {
    'train_dataloader.dataset.indices': 4,
    'train_dataloader.batch_size': 2,
    'optim_wrapper.optimizer.weight_decay': 0.5,
    'model.backbone.norm_eval': False,
}


def iterations(cfg):
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=1)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=2)


def averaged(**settings):
    """With an average of the weights, which takes the weights' place while validating."""

    def change(cfg):
        cfg.custom_hooks.append(dict(type='EMAHook', **settings))

    return change


VARIANTS = {
    'epochs': lambda cfg: None,
    'iterations': iterations,
    'ema': averaged(ema_type='ExpMomentumEMA', momentum=0.3),
    'ema with buffers': averaged(ema_type='ExpMomentumEMA', momentum=0.3, update_buffers=True),
    'mean': averaged(ema_type='StochasticWeightAverage'),
}


def digests(state):
    """Entry -> hash of its bytes. Delta is measured in step 2; it is the hook's, no weight."""
    return {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for name, value in state.items()
        if name != 'delta'
    }


def split(state):
    """Digests of what must stay and of what must change."""
    both = ({}, {})
    for name, digest in digests(state).items():
        both[name.startswith('router.')][name] = digest
    return both


@pytest.mark.parametrize('name', VARIANTS)
def test_nothing_but_the_router_changes(digits, cascade, tmp_path, name):
    cfg = load_small_router(digits, tmp_path, cascade, val=name != 'epochs', **_OPTIONS)
    VARIANTS[name](cfg)
    runner = train(cfg)
    kept, router = split(read_checkpoint(latest_checkpoint(cascade))['state_dict'])
    assert any(entry.endswith('running_mean') for entry in kept) and len(router) == 6
    checkpoint = read_checkpoint(latest_checkpoint(tmp_path))
    averages = {
        entry[len('module.') :]: value
        for entry, value in checkpoint.get('ema_state_dict', {}).items()
        if entry.startswith('module.')
    }
    assert bool(averages) == ('mean' in name or 'ema' in name)
    for state in filter(None, (runner.model.state_dict(), checkpoint['state_dict'], averages)):
        after, trained = split(state)
        assert after == kept
        assert set(trained) == set(router)
        assert not set(trained.values()) & set(router.values())


def test_step_1_changes_weights_and_statistics(digits, cascade, tmp_path):
    """The test above can see a change: step 1 on the same data makes one in either."""
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        tmp_path,
        **{**_OPTIONS, 'train_cfg.max_epochs': 1, 'param_scheduler': []},
    )
    cfg.load_from = latest_checkpoint(cascade)
    after = train(cfg).model.state_dict()
    before = read_checkpoint(cfg.load_from)['state_dict']
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith('router.')} <= same
    # Norms of the connections keep their statistics in step 1 too (CBNetV2, section 4).
    own = {name for name in before if '.connections.' not in name}
    assert not [name for name in own & same if name.endswith(('running_mean', 'conv1.weight'))]
