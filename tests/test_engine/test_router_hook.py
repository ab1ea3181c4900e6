"""Step 2 starts from a cascade, and measures, keeps and logs delta."""

import contextlib
import copy
import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner, load_state_dict
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from conftest import load_small, load_small_router, train
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.cli import override
from dynamicdet.engine import RouterHook, router_hook
from dynamicdet.engine.frozen_parameters import count_frozen_parameters
from dynamicdet.engine.router_hook import inherits_load_from, leaves_load_from_unused
from dynamicdet.errors import UsageError
from dynamicdet.files import latest_checkpoint
from dynamicdet.routing import build_objective, class_weights
from dynamicdet.testing import randomize, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS


class Recorder(Hook):
    """Notes the gains of each iteration, in the order in which they were seen."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.extend(runner.model.last_gains.tolist())


def log_of(runner):
    """All that was logged in a run's work dir."""
    return ''.join(path.read_text() for path in Path(runner.work_dir).glob('*/*.log'))


def router_hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, RouterHook))


def train_recorded(cfg):
    """Train; also give the gains that were seen."""
    runner = Runner.from_cfg(cfg)
    recorder = Recorder()
    runner.register_hook(recorder)
    runner.train()
    return runner, recorder.seen


@pytest.fixture(scope='module')
def finished(digits, cascade, tmp_path_factory):
    """A step 2 of one epoch that has ended."""
    return train(load_small_router(digits, tmp_path_factory.mktemp('router'), cascade))


@pytest.fixture(scope='module')
def last(finished):
    return Path(latest_checkpoint(finished.work_dir))


@pytest.fixture(scope='module')
def differences(digits, cascade):
    """``L1 - L2`` of each training image, one by one, by the cascade as step 1 left it."""
    cfg = load_small('dy_faster_rcnn_digits_router', digits, cascade)
    model = MODELS.build(cfg.model).eval()
    load_state_dict(model, read_checkpoint(latest_checkpoint(cascade))['state_dict'])
    cfg.train_dataloader.update(batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))
    values = []
    for batch in Runner.build_dataloader(cfg.train_dataloader):
        data = model.data_preprocessor(batch, True)
        (first, second), _ = model.exit_losses(data['inputs'], data['data_samples'])
        values.append((first - second).item())
    return values


def test_delta_is_the_median_over_the_training_set(finished, differences):
    assert len(differences) == 12
    median, (below, above) = np.median(differences), np.sort(differences)[5:7]
    # Sums of losses, each rounded.
    missed = abs(finished.model.delta.item() - median)
    assert missed < 1e-5
    # No other middle is as near.
    assert all(
        abs(finished.model.delta.item() - other) > 10 * missed
        for other in (np.mean(differences), below, above)
    )


def test_delta_is_logged_with_progress_and_saved(finished, last):
    log, delta = log_of(finished), finished.model.delta
    said = 'the median of the loss at the first exit less that at the last over 12 training images'
    assert f'delta = {delta.item():.4f}, {said}' in log
    assert re.search(r'delta \[3/3\]  eta: 0 s', log)
    for name in ('delta', 'difficulty', 'difficulty_std', 'share_above_half', 'loss_router'):
        assert re.search(rf'Epoch\(train\).* {name}: -?[0-9.]+', log), name
    assert torch.equal(read_checkpoint(str(last))['state_dict']['delta'], delta)


def test_a_long_pass_says_how_long_it_will_take(finished):
    list(router_hook.with_progress(finished, range(4), 'long pass', every=0))
    said = re.findall(r'long pass \[(\d)/4\]  eta: \d+ s', log_of(finished))
    assert said == ['1', '2', '3', '4']


def test_a_resume_restores_delta_and_does_not_measure_again(digits, cascade, last, tmp_path):
    checkpoint = read_checkpoint(str(last))
    checkpoint['state_dict']['delta'].fill_(123.0)
    checkpoint['router_gains'][100] = 77.0
    write_checkpoint(checkpoint, str(tmp_path / 'epoch_1.pth'))
    cfg = load_small_router(digits, tmp_path, cascade, **{'train_cfg.max_epochs': 2})
    cfg.resume = True
    runner = train(cfg)
    assert runner.epoch == 2 and runner.iter == 6
    assert runner.model.delta == 123
    assert runner.model.gains.tolist() == pytest.approx(checkpoint['router_gains'])
    assert 'resumed epoch: 1' in log_of(runner) and 'the median of' not in log_of(runner)


def test_endless_samplers_do_not_make_an_endless_measurement(digits, cascade, finished, tmp_path):
    """Iteration-based loops come with samplers that never end; delta still is over each image."""
    cfg = load_small_router(digits, tmp_path, cascade)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
    runner = train(cfg)
    assert 'over 12 training images' in log_of(runner)
    assert runner.model.delta.item() == pytest.approx(finished.model.delta.item(), abs=1e-5)


def test_online_delta_is_the_median_of_a_bounded_window(digits, cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(router_hook, '_WINDOW', 20)
    cfg = load_small_router(digits, tmp_path / 'a', cascade, delta='online')
    runner, seen = train_recorded(cfg)
    assert len(seen) == 12 and list(router_hook_of(runner).window) == seen
    assert runner.model.delta.item() == pytest.approx(np.median(seen))
    saved = latest_checkpoint(tmp_path / 'a')
    assert read_checkpoint(saved)['router_differences'] == seen
    # Resumed, it goes on with what it had seen, and forgets the oldest.
    cfg = load_small_router(
        digits, tmp_path / 'a', cascade, delta='online', **{'train_cfg.max_epochs': 2}
    )
    cfg.resume = True
    runner, more = train_recorded(cfg)
    assert len(more) == 12
    assert list(router_hook_of(runner).window) == (seen + more)[-20:]
    assert runner.model.delta.item() == pytest.approx(np.median((seen + more)[-20:]))
    # A new run from that checkpoint begins anew.
    cfg = load_small_router(digits, tmp_path / 'b', None, delta='online')
    cfg.load_from = saved
    runner, own = train_recorded(cfg)
    assert list(router_hook_of(runner).window) == own and len(own) == 12


def test_an_unknown_way_to_delta_is_refused(digits, cascade, tmp_path):
    cfg = load_small_router(digits, tmp_path, cascade, delta='median')
    with pytest.raises(UsageError, match="'exact' or 'online', got 'median'"):
        Runner.from_cfg(cfg)


def refusal(cfg):
    """The message that a step 2 ends with, before it trained."""
    runner = Runner.from_cfg(cfg)
    with pytest.raises(UsageError) as caught:
        runner.train()
    assert runner.iter == 0 and '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('resume', [False, True])
def test_step_2_without_step_1_is_refused(digits, tmp_path, resume):
    cfg = load_small_router(digits, tmp_path / 'router', tmp_path / 'nothing')
    cfg.resume = resume
    message = refusal(cfg)
    assert 'run step 1 first' in message and str(tmp_path / 'nothing') in message
    assert '--cfg-options load_from=' in message


def test_step_2_with_no_cascade_named_is_refused(digits, tmp_path):
    assert 'run step 1 first, or name' in refusal(load_small_router(digits, tmp_path, None))


def test_step_2_on_a_plain_detector_is_refused(digits, tmp_path):
    """Its checkpoint fills both exits, but nobody trained the connections between them."""
    cfg = load_small_router(digits, tmp_path, None)
    stock = dict(cfg.model.detector, backbone=cfg.model.backbone)
    write_checkpoint(dict(state_dict=MODELS.build(stock).state_dict()), str(tmp_path / 'plain.pth'))
    cfg.load_from = str(tmp_path / 'plain.pth')
    message = refusal(cfg)
    assert 'missing (such as backbone.connections.' in message
    assert 'unknown' not in message and 'another shape' not in message


def test_step_2_on_another_architecture_is_refused(digits, tmp_path):
    other = MODELS.build(tiny_dynamic('retinanet'))
    write_checkpoint(dict(state_dict=other.state_dict()), str(tmp_path / 'other.pth'))
    cfg = load_small_router(digits, tmp_path, None)
    cfg.load_from = str(tmp_path / 'other.pth')
    message = refusal(cfg)
    for said in ('missing', 'unknown', 'of another shape'):
        assert re.search(rf'\d+ {said} \(such as (backbone|branches)\.', message), message
    assert 'branches.0.bbox_head.cls_convs.0.conv.weight' in message


def inherited(folder, own=''):
    """A config of step 2, as a file, on one of step 1 that starts from published weights."""
    (folder / 'step1.py').write_text("load_from = 'published.pth'\nmodel = dict()\n")
    (folder / 'step2.py').write_text(f"_base_ = './step1.py'\n{own}")
    return Config.fromfile(folder / 'step2.py')


def test_load_from_of_step_1_is_known_as_inherited(tmp_path):
    assert inherits_load_from(inherited(tmp_path))
    assert not inherits_load_from(inherited(tmp_path, "load_from = 'published.pth'\n"))
    assert not inherits_load_from(inherited(tmp_path, 'load_from = None\n'))
    overridden = inherited(tmp_path)
    overridden.merge_from_dict(dict(load_from='cascade.pth'))
    assert not inherits_load_from(overridden)
    assert not inherits_load_from(Config(dict(load_from='cascade.pth')))


def test_step_2_does_not_start_from_what_step_1_started_from(digits, cascade, tmp_path):
    cfg = load_small_router(digits, tmp_path / 'work', cascade, load_from='published.pth')
    runner = train(Config(cfg._cfg_dict, filename=inherited(tmp_path).filename))
    assert runner._load_from == latest_checkpoint(cascade)
    assert "step 2 does not start from load_from='published.pth'" in log_of(runner)
    # The config that the run leaves is of this run.
    assert Config.fromfile(tmp_path / 'work/step2.py').load_from is None


def test_load_from_of_the_command_line_counts_where_it_is_the_inherited_one(
    digits, cascade, tmp_path
):
    own, given = latest_checkpoint(cascade), str(tmp_path / 'given.pth')
    shutil.copy(own, given)
    (tmp_path / 'step1.py').write_text(f'load_from = {given!r}\nmodel = dict()\n')
    (tmp_path / 'step2.py').write_text("_base_ = './step1.py'\n")
    started = []
    for options in ({}, dict(load_from=given)):
        cfg = load_small_router(digits, tmp_path / 'work', cascade, load_from=given)
        cfg = Config(cfg._cfg_dict, filename=str(tmp_path / 'step2.py'))
        override(cfg, options, 'step2.py')
        assert leaves_load_from_unused(cfg) == (not options)
        started.append(train(cfg)._load_from)
    assert started == [own, given]


def test_one_backbone_starts_from_what_step_1_would_have_started_from(digits, tmp_path):
    """Nothing is left to train but the router; a step 1 that was run counts all the same."""
    plain = randomize(MODELS.build(small_plain(digits, tmp_path)))
    given = str(tmp_path / 'plain.pth')
    write_checkpoint(dict(state_dict=plain.state_dict()), given)
    (tmp_path / 'step1.py').write_text(f'load_from = {given!r}\nmodel = dict()\n')
    (tmp_path / 'step2.py').write_text("_base_ = './step1.py'\n")
    cfg = load_small_router(
        digits,
        tmp_path / 'work',
        str(tmp_path / 'none'),
        load_from=given,
        **{'model.backbones': 1, 'model.first_scale': 0.5},
    )
    cfg = Config(cfg._cfg_dict, filename=str(tmp_path / 'step2.py'))
    assert not leaves_load_from_unused(cfg)
    runner = train(cfg)
    assert runner._load_from == given and runner.model.delta.isfinite()
    assert torch.equal(
        runner.model.state_dict()['backbone.first.conv1.weight'],
        plain.state_dict()['backbone.conv1.weight'],
    )
    shutil.copytree(tmp_path / 'work', tmp_path / 'none')
    assert leaves_load_from_unused(cfg)


def small_plain(digits, folder):
    """The plain detector of the small configs."""
    model = load_small_router(digits, folder, None).model
    return dict(model.detector, backbone=model.backbone)


def test_one_line_says_which_parameters_are_frozen(digits, cascade, tmp_path):
    runner = Runner.from_cfg(load_small_router(digits, tmp_path, cascade))
    count_frozen_parameters(runner)
    runner.train()
    log, names = log_of(runner), [name for name, _ in runner.model.named_parameters()]
    frozen = [name for name in names if not name.startswith('router.')]
    assert f'{len(frozen)} of {len(names)} parameters are frozen (such as {frozen[0]})' in log
    assert 'is skipped since' not in log and 'Epoch(train)' in log


def test_weights_that_are_no_cascade_are_named(digits, cascade, tmp_path):
    write_checkpoint(
        dict(state_dict=MODELS.build(tiny_detector('fcos')).state_dict()),
        str(tmp_path / 'plain.pth'),
    )
    message = refusal(
        load_small_router(digits, tmp_path / 'work', cascade, load_from=str(tmp_path / 'plain.pth'))
    )
    assert "plain.pth': " in message and 'missing' in message and 'remove load_from' in message


@pytest.mark.parametrize('note', [None, '', '/nowhere/epoch_3.pth'])
def test_the_latest_checkpoint_is_found_whatever_the_note_says(cascade, tmp_path, note):
    """A kill may leave mmengine's note of the last one empty; in a moved folder it is wrong."""
    for index, name in enumerate(('epoch_9.pth', 'epoch_10.pth')):
        (tmp_path / name).write_bytes(b'')
        torch.os.utime(tmp_path / name, (index, index))
    (tmp_path / '.epoch_11.pth.abc').write_bytes(b'half')
    if note is not None:
        (tmp_path / 'last_checkpoint').write_text(note)
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    assert latest_checkpoint(tmp_path / 'none') is None
    assert latest_checkpoint(cascade) == (cascade / 'last_checkpoint').read_text()


def test_step_2_starts_from_a_cascade_whose_note_is_empty(digits, cascade, finished, tmp_path):
    (tmp_path / 'cascade').mkdir()
    shutil.copy(latest_checkpoint(cascade), tmp_path / 'cascade')
    (tmp_path / 'cascade' / 'last_checkpoint').write_text('')
    runner = train(load_small_router(digits, tmp_path / 'router', tmp_path / 'cascade'))
    assert torch.equal(runner.model.delta, finished.model.delta)
    for name, value in finished.model.state_dict().items():
        assert torch.equal(runner.model.state_dict()[name], value) or value.isnan().all(), name


def test_a_calibration_is_forgotten_when_a_router_is_trained(digits, finished, last, tmp_path):
    """A new router has other difficulties: thresholds, latencies and delta of the old are stale."""
    checkpoint = read_checkpoint(str(last))
    checkpoint['state_dict'].update(
        threshold=torch.tensor(0.1),
        delta=torch.tensor(5.0),
        latencies=torch.tensor([1.0, 2.0]),
        difficulties=torch.tensor([0.1, 0.2]),
    )
    write_checkpoint(checkpoint, str(tmp_path / 'calibrated.pth'))
    cfg = load_small_router(digits, tmp_path, None)
    cfg.load_from = str(tmp_path / 'calibrated.pth')
    train(cfg)
    state = read_checkpoint(str(tmp_path / 'epoch_1.pth'))['state_dict']
    assert state['threshold'] == 0.5 and state['latencies'].isnan().all()
    assert state['difficulties'].numel() == 0
    assert torch.equal(state['delta'], finished.model.delta)


def test_a_router_with_other_pools_starts_from_the_cascade(digits, cascade, tmp_path):
    """Step 1 leaves a router that sees means alone; trying another costs no step 1."""
    cfg = load_small_router(digits, tmp_path, cascade)
    cfg.model.router = dict(type='Router', pools=('mean', 'max'))
    runner = train(cfg)
    before = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    after = read_checkpoint(str(tmp_path / 'epoch_1.pth'))['state_dict']
    assert len(after['router.mean']) == 2 * len(before['router.mean'])
    assert 'it starts anew' in log_of(runner)
    rest = [key for key in before if key.startswith(('backbone', 'branches'))]
    assert rest and all(torch.equal(before[key], after[key]) for key in rest)


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('delta, level', [(float('nan'), logging.INFO), (0.3, logging.WARNING)])
def test_letting_go_of_a_trained_router_is_said_louder(prefix, delta, level):
    model = MODELS.build(tiny_dynamic('retinanet'))
    logged = []
    runner = SimpleNamespace(logger=SimpleNamespace(log=lambda *said: logged.append(said)))
    state = {f'{prefix}{key}': value for key, value in model.state_dict().items()}
    state[f'{prefix}delta'] = torch.tensor(delta)
    router_hook.drop_other_router(runner, model, state)
    assert not logged
    state[f'{prefix}router.fc3.weight'] = torch.zeros(1)
    router_hook.drop_other_router(runner, model, state)
    assert [said[0] for said in logged] == [level] and not any('router.' in key for key in state)


def test_a_router_of_the_same_shape_is_kept(digits, finished, last, tmp_path):
    cfg = load_small_router(digits, tmp_path, None)
    cfg.load_from, cfg.optim_wrapper.optimizer.lr = str(last), 0.0
    assert 'it starts anew' not in log_of(train(cfg))
    before, after = (
        read_checkpoint(str(path))['state_dict'] for path in (last, tmp_path / 'epoch_1.pth')
    )
    assert torch.equal(before['router.fc1.weight'], after['router.fc1.weight'])


def test_quantiles_of_the_gains_are_kept_in_the_checkpoint(finished, last, differences):
    gains = finished.model.gains
    assert gains.tolist() == pytest.approx(
        np.percentile(differences, range(101)), rel=1e-4, abs=1e-5
    )
    assert gains[50] == finished.model.delta
    checkpoint = read_checkpoint(str(last))
    assert checkpoint['router_gains'] == gains.tolist()
    # They matter to training alone: checkpoints have the entries that they always had.
    assert not [name for name in checkpoint['state_dict'] if 'gains' in name]


def test_a_run_of_before_there_were_quantiles_goes_on(digits, cascade, finished, last, tmp_path):
    checkpoint = read_checkpoint(str(last))
    del checkpoint['router_gains']
    write_checkpoint(checkpoint, str(tmp_path / 'epoch_1.pth'))
    cfg = load_small_router(digits, tmp_path, cascade, **{'train_cfg.max_epochs': 2})
    cfg.resume = True
    runner = train(cfg)
    assert runner.epoch == 2
    torch.testing.assert_close(runner.model.gains, finished.model.gains)


def test_delta_is_the_median_of_what_the_objective_counts(digits, cascade, tmp_path, differences):
    """`differences` are in the annotations' order, as the objects' numbers here."""
    annotations = json.loads((digits / 'annotations' / 'instances_train.json').read_text())
    objects = Counter(one['image_id'] for one in annotations['annotations'])
    expected = [
        difference * objects[image['id']]
        for difference, image in zip(differences, annotations['images'])
    ]
    assert len(set(objects.values())) > 1
    runner = train(load_small_router(digits, tmp_path, cascade, **{'model.objective': 'loss_sum'}))
    assert runner.model.delta.item() == pytest.approx(np.median(expected), rel=1e-4, abs=1e-4)
    assert 'at the last, times its objects over 12 training images' in log_of(runner)


@pytest.mark.parametrize('delta', ['exact', 'online'])
@pytest.mark.parametrize('objective', ['ap', 'pairwise'])
def test_other_objectives_train(digits, findable, cascade, tmp_path, objective, delta):
    """Chosen by one line; the router and nothing else changes."""
    runner = train(
        load_small_router(
            digits,
            tmp_path,
            cascade,
            delta=delta,
            **{
                'model.objective': objective,
                'train_dataloader.dataset.ann_file': str(findable),
                'model.detector.test_cfg.rcnn.score_thr': 0.0,
            },
        )
    )
    gains = runner.model.gains
    assert gains.shape == (101,) and gains.isfinite().all() and (gains.diff() >= 0).all()
    if objective == 'ap':
        # Percent: either exit finds more in some images.
        assert -100 <= gains[0] < 0 < gains[100] <= 100
    before = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    after = runner.model.state_dict()
    changed = {
        name
        for name in before
        if not torch.equal(before[name], after[name]) and not after[name].isnan().all()
    } - {'delta'}
    assert {name.split('.')[0] for name in changed} == {'router'} and 'router.fc1.weight' in changed


def test_a_held_out_part_is_what_is_measured(digits, cascade, tmp_path):
    cfg = load_small_router(digits, tmp_path, cascade)
    cfg.train_dataloader.dataset = dict(
        type='HoldOut', dataset=cfg.train_dataloader.dataset, share=0.4, part='router'
    )
    runner = train(cfg)
    held = len(runner.train_dataloader.dataset)
    assert 0 < held < 12
    assert f'over {held} training images' in log_of(runner)


@pytest.mark.parametrize(
    'name, settings',
    [
        ('faster_rcnn', dict(backbones=3)),
        ('faster_rcnn', dict(first_scale=0.5, reuse_stages=0)),
        ('fcos', dict(backbones=3)),
        ('yolox', dict(first_scale=0.5, reuse_stages=0)),
    ],
)
def test_gains_of_any_detector(name, settings):
    """Of the first against the last exit, in loss and in AP, and nothing is left in the samples."""
    cfg = tiny_dynamic(name, shared=name == 'faster_rcnn', train_router=True, **settings)
    model = randomize(MODELS.build(cfg)).train()
    data = model.data_preprocessor(tiny_batch((2, 0, 1)), True)
    inputs, samples = data['inputs'], data['data_samples']
    losses, features = model.exit_losses(inputs, samples)
    model.objective = build_objective('loss_sum')
    gains, same = model.exit_gains(inputs, samples)
    torch.testing.assert_close(gains, (losses[0] - losses[-1]) * torch.tensor([2.0, 0.0, 1.0]))
    assert torch.equal(same, features)
    model.objective = build_objective('ap')
    gains, same = model.exit_gains(inputs, samples)
    assert gains.shape == (3,) and gains[1] == 0 and gains.abs().max() <= 100
    torch.testing.assert_close(same, features)
    assert not any('pred_instances' in sample for sample in samples)


@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_gains_in_ap_by_hand(scale, monkeypatch):
    """The first exit finds nothing, the last all: 100 where there are objects, each exit in its
    frame."""
    cfg = tiny_dynamic(
        'fcos', shared=False, train_router=True, objective='ap', first_scale=scale, reuse_stages=0
    )
    model = randomize(MODELS.build(cfg))

    def finds(samples, truth):
        for sample in samples:
            boxes = sample.gt_instances.bboxes
            boxes = getattr(boxes, 'tensor', boxes)
            sample.pred_instances = InstanceData(
                bboxes=boxes if truth else boxes + 500,
                labels=sample.gt_instances.labels,
                scores=torch.full((len(boxes),), 0.5),
            )
        return samples

    for found in (0, 1):
        for exit in (0, 1):
            monkeypatch.setattr(
                model.branches[exit],
                'predict',
                lambda maps, samples, rescale, truth=exit == found: finds(samples, truth),
            )
        data = model.data_preprocessor(tiny_batch((2, 0, 1)), True)
        gains, _ = model.exit_gains(data['inputs'], data['data_samples'])
        sign = 1 if found else -1
        torch.testing.assert_close(gains, sign * torch.tensor([100.0, 0.0, 100.0]))


def test_a_resume_with_another_gain_is_refused():
    """Delta and ranks are of the gain that was measured."""
    model = MODELS.build(tiny_dynamic('fcos', train_router=True, objective='paper'))
    runner, hook = SimpleNamespace(model=model, _resume=True), RouterHook()
    hook.training = True
    saved = dict(
        state_dict=model.state_dict(),
        router_gains=[float(q) for q in range(101)],
        router_gain='loss',
    )
    hook.after_load_checkpoint(runner, dict(saved))
    assert model.gains.tolist() == saved['router_gains']
    with pytest.raises(UsageError, match="kind 'loss_sum'.*'loss'.*start step 2 anew"):
        hook.after_load_checkpoint(runner, dict(saved, router_gain='loss_sum'))


def test_gains_by_class_are_weighted_by_the_training_set(monkeypatch):
    """By the objects of all images, which are counted in the same pass; an image's loss is shared
    out among its objects."""
    model = MODELS.build(
        tiny_dynamic(
            'fcos', train_router=True, objective=dict(type='paper', gain='loss', by_class=True)
        )
    )
    images = []
    for index, labels in enumerate(([0, 0, 2], [2], [])):
        batch = tiny_batch((len(labels),), seed=index)
        sample = batch['data_samples'][0]
        sample.set_metainfo(dict(img_id=index))
        sample.gt_instances.labels = torch.tensor(labels, dtype=torch.long)
        images.append(dict(inputs=batch['inputs'][0], data_samples=sample))
    losses = {0: (3.0, 1.0), 1: (2.0, 2.5), 2: (0.5, 0.0)}
    monkeypatch.setattr(
        model,
        'exit_losses',
        lambda inputs, samples: (
            torch.tensor([losses[sample.img_id] for sample in samples]).T,
            torch.zeros(len(samples), len(model.router.mean)),
        ),
    )
    runner = SimpleNamespace(
        model=model,
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.router.parameters(), lr=0.1)),
        logger=logging.getLogger('delta'),
        train_dataloader=DataLoader(images, batch_size=2, collate_fn=pseudo_collate),
    )
    gains, _, _ = router_hook.measure_training_set(runner)
    assert model.class_counts.tolist() == [2, 0, 2]
    # Two classes with two objects each weigh the same, and an image without objects by 1.
    assert list(gains.values()) == pytest.approx([2, -0.5, 0.5])
    images[1]['data_samples'].gt_instances.labels = torch.tensor([1])
    gains, _, _ = router_hook.measure_training_set(runner)
    assert model.class_counts.tolist() == [2, 1, 1]
    zero, one, two = class_weights([2, 1, 1])
    expected = [2 * (2 * zero + two) / 3, -0.5 * one, 0.5]
    assert list(gains.values()) == pytest.approx(expected)
    # An iteration on the same images says the same.
    data = model.data_preprocessor(pseudo_collate(images), True)
    again, _ = model.exit_gains(data['inputs'], data['data_samples'])
    assert again.tolist() == pytest.approx(expected)


def test_gains_in_ap_by_class(monkeypatch):
    """All is found by the last exit alone: each object gains the weight of its class."""
    model = randomize(
        MODELS.build(
            tiny_dynamic(
                'fcos', train_router=True, objective=dict(type='ap', by_class=True), shared=False
            )
        )
    )
    for exit in (0, 1):
        monkeypatch.setattr(
            model.branches[exit],
            'predict',
            lambda maps, samples, rescale, truth=exit: [
                sample.set_field(
                    InstanceData(
                        bboxes=getattr(sample.gt_instances.bboxes, 'tensor', None)
                        if hasattr(sample.gt_instances.bboxes, 'tensor')
                        else sample.gt_instances.bboxes + 500 * (1 - truth),
                        labels=sample.gt_instances.labels,
                        scores=torch.full((len(sample.gt_instances),), 0.5),
                    ),
                    'pred_instances',
                )
                or sample
                for sample in samples
            ],
        )
    data = model.data_preprocessor(tiny_batch((2, 0, 1)), True)
    model.class_counts = torch.tensor([5.0, 70.0, 5.0])
    weights = class_weights([5, 70, 5])
    gains, _ = model.exit_gains(data['inputs'], data['data_samples'])
    expected = [
        100 * sum(weights[label] for label in sample.gt_instances.labels.tolist())
        for sample in data['data_samples']
    ]
    assert gains.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('delta', ['exact', 'online'])
def test_a_router_by_class_trains_and_resumes(digits, cascade, tmp_path, delta):
    options = {'model.objective': dict(type='rank', by_class=True)}
    runner = train(load_small_router(digits, tmp_path, cascade, delta=delta, **options))
    annotations = json.loads((digits / 'annotations' / 'instances_train.json').read_text())
    objects = Counter(one['category_id'] for one in annotations['annotations'])
    first = min(one['id'] for one in annotations['categories'])
    counts = runner.model.class_counts.tolist()
    assert counts == [objects[first + label] for label in range(len(counts))]
    assert sum(counts) == sum(objects.values())
    saved = read_checkpoint(latest_checkpoint(tmp_path))
    assert saved['router_class_counts'] == counts and saved['router_gain'] == 'loss_sum by class'
    cfg = load_small_router(
        digits, tmp_path, cascade, delta=delta, **options, **{'train_cfg.max_epochs': 2}
    )
    cfg.resume = True
    resumed = train(cfg).model.class_counts.tolist()
    assert resumed == ([2 * count for count in counts] if delta == 'online' else counts)


class AutocastOptimWrapper(OptimWrapper):
    """As mmengine's ``AmpOptimWrapper``, which takes a GPU."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def test_gains_are_measured_in_the_precision_of_the_training():
    """Those measured before training are those of an iteration on the same images."""
    model = randomize(MODELS.build(tiny_dynamic('atss', shared=False, train_router=True)))
    batch = tiny_batch((2, 1, 3))
    images = [{key: value[index] for key, value in batch.items()} for index in range(3)]
    wrapper = AutocastOptimWrapper(torch.optim.SGD(model.router.parameters(), lr=0.1))
    gains, _, _ = router_hook.measure_training_set(
        SimpleNamespace(
            model=model,
            optim_wrapper=wrapper,
            logger=logging.getLogger('delta'),
            train_dataloader=DataLoader(images, batch_size=3, collate_fn=pseudo_collate),
        )
    )
    model.train_step(copy.deepcopy(batch), wrapper)
    assert list(gains.values()) == model.last_gains.tolist()
    data = model.data_preprocessor(batch, True)
    in_float32, _ = model.exit_gains(data['inputs'], data['data_samples'])
    assert list(gains.values()) != in_float32.tolist()
