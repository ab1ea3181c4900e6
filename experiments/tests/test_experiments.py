"""The experiment on routing: its table of runs, and the arithmetic of its page."""

import sys

import numpy as np
import pytest
from mmengine.config import Config

from conftest import ROOT
from dynamicdet.measuring import recording
from dynamicdet.routing.record import RoutingRecord
from mmdet.registry import MODELS

sys.path.insert(0, str(ROOT / 'experiments'))
import routing_clock  # noqa: E402
import routing_hook  # noqa: E402
import routing_page  # noqa: E402
from routing_results import over_all_exits, together, with_losses_of  # noqa: E402
from routing_runs import AUGMENTED, DATA, HELD_OUT, all_runs  # noqa: E402
from steps import do_all, run, wait_for  # noqa: E402


def config_of(run):
    cfg = Config.fromfile(ROOT / run.config)
    before = set(flat(cfg.to_dict()))
    cfg.merge_from_dict(run.options)
    return cfg, before


def flat(node, prefix=''):
    """Paths of all values of a nested config."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, (list, tuple))
        else ()
    )
    for key, value in items:
        yield f'{prefix}{key}'
        yield from flat(value, f'{prefix}{key}.')


def test_runs_are_named_once_and_start_from_runs_before_them():
    names = [run.name for run in all_runs()]
    assert len(set(names)) == len(names)
    for place, one in enumerate(all_runs()):
        assert one.start is None or one.start in names[:place]


@pytest.mark.parametrize('run', all_runs(), ids=lambda run: run.name)
def test_a_runs_options_are_those_of_its_config(run):
    """A misspelt option would change nothing, and the run be called what it is not."""
    cfg, before = config_of(run)
    new = (
        'model.data_preprocessor.batch_augments',
        'model.router',
        'model.backbones',
        'model.shared',
        'train_dataloader.dataset.data_root',
    )
    for option in run.options:
        assert option in before or option in new, option
    images = cfg.train_dataloader.dataset.indices
    assert (max(images) if isinstance(images, list) else images) < DATA['train'] - HELD_OUT + 1


def test_what_one_half_is_asked_about_the_other_was_trained_on():
    runs = {run.variant: run for run in all_runs()}
    seen = 'train_dataloader.dataset.indices'
    for own, other in (('half_a', 'half_b'), ('half_b', 'half_a')):
        assert runs[own].records['other_half'][seen] == runs[other].options[seen]
        assert not set(runs[own].options[seen]) & set(runs[other].options[seen])
    assert sorted(runs['half_a'].options[seen] + runs['half_b'].options[seen]) == list(
        range(runs['few'].options[seen])
    )


def test_cross_fitted_losses_are_those_of_the_other_half():
    def record(losses, features):
        return RoutingRecord.from_images(
            [
                dict(
                    id=identity,
                    file='',
                    difficulty=0.5,
                    detections=[[], []],
                    losses=own,
                    features=np.full(2, features, np.float32),
                )
                for identity, own in losses.items()
            ]
        )

    own = record({1: [9, 9], 2: [9, 9]}, features=5)
    found = with_losses_of(own, [record({2: [3, 4]}, 6), record({1: [1, 2]}, 7)])
    assert found.ids.tolist() == [1, 2] and found.losses.tolist() == [[1, 2], [3, 4]]
    assert (found.features == 5).all()
    both = together(own, found)
    assert both.ids.tolist() == [1, 2, 1, 2] and both.losses[:2].tolist() == [[9, 9], [9, 9]]


@pytest.mark.parametrize(
    'run', [run for run in all_runs() if run.seed == 0], ids=lambda run: run.name
)
def test_a_runs_detector_builds(run):
    cfg, _ = config_of(run)
    model = MODELS.build(cfg.model)
    if run.is_dynamic:
        assert model.num_exits == (3 if run.variant == 'triple' else 2)
        assert model.router.pools == ('mean', 'max', 'std')


def test_augmented_images_are_recorded_augmented():
    """A record of training images takes the pipeline of the validation's."""
    (run,) = (run for run in all_runs(root='data/digits_routing') if run.variant == 'few')
    cfg, _ = config_of(run)
    cfg.merge_from_dict(run.records['augmented'])
    seen = {}

    def keep(dataloader):
        seen.update(dataloader.dataset)
        return dataloader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, 'build_loader', keep)
        recording.build_record_loader(cfg, 'train')
    assert [step['type'] for step in seen['pipeline']] == [step['type'] for step in AUGMENTED]
    assert 'RandomShift' in [step['type'] for step in AUGMENTED]


@pytest.mark.parametrize('one', routing_hook.cascades()[2:4], ids=lambda one: one.name)
def test_step_2_of_the_experiment_has_the_cascades_model(one):
    """Of other shape it would not load; of another objective the numbers would be of something
    else."""
    cfg = routing_hook.router_config(one, 'rank')
    router, (cascade, _) = MODELS.build(cfg.model), config_of(one)
    shapes = {
        key: value.shape
        for key, value in MODELS.build(cascade.model).state_dict().items()
        if not key.startswith('router.')
    }
    assert shapes == {
        key: value.shape
        for key, value in router.state_dict().items()
        if not key.startswith('router.')
    }
    assert router.objective.gain == 'loss_sum' and router.first_scale == cascade.model.first_scale
    assert cfg.custom_hooks[-1].type == 'RouterHook' and cfg.custom_hooks[-1].cascade.endswith(
        one.name
    )
    assert cfg.train_dataloader.dataset.indices == 1000
    assert cfg.train_dataloader.dataset.data_root == f'{DATA["root"]}/'


def test_the_page_is_that_of_the_kept_numbers():
    """Also of variants that are no option any more."""
    runs = routing_page.read_runs()
    assert ('yolox', 'specialized') in runs
    assert routing_page.page(runs) == routing_page.PAGE.read_text()


def test_routers_are_compared_with_the_papers_of_the_same_images_and_seed():
    own = [
        dict(ap=[3.0, 5.0], resampled_mean=[4.0, 4.2]),
        dict(ap=[2.0, 2.0], resampled_mean=[2.0, 2.2]),
    ]
    paper = [
        dict(ap=[1.0, 4.0], resampled_mean=[3.0, 3.2]),
        dict(ap=[2.0, 1.0], resampled_mean=[1.0, 1.2]),
    ]
    assert routing_page.difference(own, paper, 0) == '+1.00 (+0.00 to +2.00)'
    assert (
        routing_page.difference(own, paper, None)
        == '+1.00 (+0.50 to +1.50); interval +1.00 to +1.00'
    )


def test_peers_pay_for_what_they_look_at():
    """Exits of 1 and 3 GFLOPs, 10 and 30 AP, a router on the straight line between them. At half
    hard, 2 GFLOPs; one that looks pays 1 for the hard half, and that buys 5 AP."""
    line = dict(ap=[12, 14, 16, 18, 20, 22, 24, 26, 28])
    run = dict(gflops=[1, 3], exits=[dict(ap=10), dict(ap=30)], routers={routing_page.ROUTER: line})
    assert routing_page.at_equal_cost(run, line) == 0
    assert routing_page.at_equal_cost(run, dict(line, charge=1.0)) == -5
    assert routing_page.at_equal_cost(run, dict(line, charge=9.0)) == -10


def test_images_go_over_three_exits_by_rank():
    """Of four images at half hard, a quarter stay at the first, a quarter go to the last; the
    hardest furthest."""
    seen = []

    class Mixtures:
        exits = 3

        def ap(self, choice):
            seen.append(choice.tolist())
            return float(sum(choice))

    found = over_all_exits(Mixtures(), np.array([0.1, 0.9, 0.5, 0.4]), [1.0, 2.0, 4.0])
    half = len(found['ap']) // 2
    assert seen[half] == [0, 2, 1, 1] and found['ap'][half] == 4
    assert found['gflops'][half] == (1 + 4 + 2 + 2) / 4 and len(found['gflops']) == 9


def test_seeds_without_a_figure_are_named():
    found = [dict(gain=value, low=None, high=None) for value in (0.1, None, 0.3)]
    assert (
        routing_page.with_interval(found, 'gain')
        == '+0.20 (+0.10 to +0.30), 2 of 3 seeds; no interval'
    )


def test_intervals_of_several_seeds_are_the_widest():
    found = [dict(gain=0.1, low=-0.1, high=0.2), dict(gain=0.3, low=0.2, high=0.6)]
    assert routing_page.with_interval(found, 'gain') == '+0.20 (+0.10 to +0.30); -0.10 to +0.60'
    assert routing_page.with_interval(found[:1], 'gain') == '+0.10; -0.10 to +0.20'


def test_runs_of_another_machine_are_marked():
    """A seed comes to other weights there: such runs are not held against the plain detectors of
    this one."""
    here, there = ([dict(provenance=dict(device=device))] for device in ('here', 'there'))
    assert not routing_page.ran_elsewhere(here, {'96': here[0]})
    assert routing_page.ran_elsewhere(here + there, {'96': here[0]})
    assert not routing_page.ran_elsewhere(there, {})


def plain(*points):
    return [dict(gflops=cost, ap=ap, resampled=[ap - 1, ap + 1]) for cost, ap in points]


def test_the_static_front_is_the_upper_hull():
    detectors = plain((1, 10), (2, 12), (3, 30))
    assert routing_page.front(detectors, 1) == 10 and routing_page.front(detectors, 3) == 30
    # Running the first and the last at random beats the second.
    assert routing_page.front(detectors, 2) == 20
    assert routing_page.front(detectors, 2, resample=1) == 21
    assert np.isnan(routing_page.front(detectors, 0.5)) and np.isnan(
        routing_page.front(detectors, 3.5)
    )
    # A dearer detector that is worse counts for nothing.
    assert [routing_page.front(plain((1, 10), (2, 9), (3, 8)), cost) for cost in (1, 2, 3)] == [
        10
    ] * 3


def test_the_lead_is_paired():
    """On each resample both sides move together, so the interval is that of the difference."""
    router = dict(ap=[0] * 4 + [25] + [0] * 4, resampled_half=[24, 26])
    run = dict(gflops=[1, 3], routers={routing_page.ROUTER: router})
    assert routing_page.lead(run, plain((1, 10), (3, 30))) == (2, 5, 5, 5)


@pytest.mark.parametrize('script', [routing_clock, routing_page])
def test_help_begins_no_work(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [script.__name__, '--help'])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0 and f'{script.__name__}.py' in capsys.readouterr().out


def test_means_name_their_range():
    assert routing_page.several([1.0]) == '1.00'
    assert routing_page.several([1.0, 3.0], sign='+') == '+2.00 (+1.00 to +3.00)'


def test_a_step_waits_for_what_it_starts_from(capsys):
    order = []

    def do(name):
        wait_for({'second': 'first'}.get(name), 'of another call')
        order.append(name)

    do_all(['first', 'second'], do, jobs=2)
    assert order == ['first', 'second']
    said = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in said] == ['[1/2]', '[2/2]'] and said[-1].endswith('0 min left')


def test_a_tool_that_fails_ends_the_step_and_names_its_log(tmp_path):
    run('-c', 'print(1)', log=tmp_path / 'a' / 'good.log')
    assert (tmp_path / 'a' / 'good.log').read_text() == '1\n'
    with pytest.raises(RuntimeError, match='status 3.*bad.log'):
        run('-c', 'raise SystemExit(3)', log=tmp_path / 'bad.log')
    done = []
    with pytest.raises(RuntimeError, match='status 3'):
        do_all(
            ['breaks', 'later', 'last'],
            lambda name: (
                done.append(name)
                or run(
                    '-c', f'raise SystemExit({3 * (name == "breaks")})', log=tmp_path / 'bad.log'
                )
            ),
            jobs=1,
        )
    # What waits is not begun; one may have been, before the failure was seen.
    assert done in (['breaks'], ['breaks', 'later'])
