"""Thresholds for a wish, by hand and on random records; learned gates fitted to a record."""

import copy

import numpy as np
import pytest
import torch
from video_cases import BOX, detection, make_video_record, random_case, truth

from conftest import SEED
from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget
from dynamicdet.video.budgets import resolve_budget
from dynamicdet.video.calibration import (
    GateBudgetController,
    calibrate_gate,
    operating_points,
    put_calibration,
)
from dynamicdet.video.curves import gate_curve, settings_of
from dynamicdet.video.gate_fitting import (
    fit_gate_parts,
    fit_gumbel_gate,
    fit_halting_gate,
    fit_presence,
    oracle_targets,
    shows_objects,
)
from dynamicdet.video.gate_simulation import (
    Replays,
    evidence_by_exit,
    gate_difficulties,
    nothing_seen,
    simulate_gate,
)
from mmdet.registry import MODELS


def build(name, **settings):
    return MODELS.build(dict(type=name, **settings))


@pytest.fixture
def two_kinds():
    """Six frames that do not change: the first exit is right and sure on three, wrong and unsure on
    three."""
    wrong = detection([50, 50, 20, 20], score=0.5)
    right, last = detection(), detection(score=0.95)
    frames = [(1.0 + at, [[right if at % 2 else wrong]] * 2 + [[last]]) for at in range(6)]
    record = make_video_record([frames])
    return record, truth(record, [[BOX]] * 6)


def test_least_cost_for_a_loss_by_hand(two_kinds):
    found = calibrate_gate(*two_kinds, build('ScoreGate'), dict(max_drop=0))
    # Half leave at the first exit, the other half at the last, all heads paid.
    assert found.row['shares'] == [0, 0.5, 0, 0.5] and found.row['ap'] == pytest.approx(100)
    assert found.row['gflops'] == (2 + 13) / 2
    assert found.thresholds[0] == -1 and len(set(found.thresholds[1:])) == 1
    assert 0.469 < found.thresholds[1] < 1
    assert found.gflops == [1, 2, 5, 13] and found.latencies == [0.01, 0.02, 0.05, 0.13]
    assert found.last['gflops'] == 10 and found.last['ap'] == pytest.approx(100)


def test_best_ap_for_a_cost_by_hand(two_kinds):
    gate = build('ScoreGate')
    for wish in (dict(target_gflops=8), dict(target_latency=0.08)):
        assert calibrate_gate(*two_kinds, gate, wish).row['shares'] == [0, 0.5, 0, 0.5]
    assert calibrate_gate(*two_kinds, gate, dict(target_gflops=3)).row['shares'] == [0, 1, 0, 0]
    with pytest.raises(UsageError, match='at least 2'):
        calibrate_gate(*two_kinds, gate, dict(target_gflops=1.9))


def test_a_gate_that_costs_too_much_is_paid_in_full(two_kinds):
    # Half a second per decision: an exit at once is the only one below a second.
    found = calibrate_gate(
        *two_kinds, build('ScoreGate'), dict(target_latency=0.6), seconds=(0.0, 0.5)
    )
    assert found.row['shares'] == [0, 1, 0, 0] and found.row['latency'] == pytest.approx(0.52)


@pytest.mark.parametrize(
    'wish',
    [
        {},
        dict(max_drop=1, target_gflops=2),
        dict(speed=1),
        dict(max_drop=-1),
        dict(max_drop=float('nan')),
        dict(target_gflops='much'),
    ],
)
def test_bad_wishes(two_kinds, wish):
    with pytest.raises(UsageError):
        calibrate_gate(*two_kinds, build('ScoreGate'), wish)


def test_any_gate_can_reach_the_last_exit():
    record = make_video_record([[(1.0, [[], [], [detection()]])]])
    coco = truth(record, [[BOX]])
    # At thresholds of -1 all frames go on.
    assert calibrate_gate(record, coco, build('FixedExit', exit=0), dict(max_drop=0)).row[
        'shares'
    ] == [0, 0, 0, 1]


def test_change_and_level_are_searched_together():
    record, coco = random_case(videos=3, length=10)
    gate = build('TemporalGate', gate=dict(type='ScoreGate', kind='confidence'))
    found = calibrate_gate(record, coco, gate, dict(max_drop=1), count=11)
    assert 0 < found.thresholds[0] < 1 and found.row['shares'][0] > 0
    # Still frames are free: much cheaper than exits alone.
    alone = calibrate_gate(record, coco, gate.gate, dict(max_drop=1), count=11)
    assert found.row['gflops'] < 0.75 * alone.row['gflops']
    assert found.row['ap'] >= found.last['ap'] - 1
    # What it says is what its thresholds do.
    run = simulate_gate(
        record, gate, gate_difficulties(gate, evidence_by_exit(record)), found.thresholds
    )
    assert run.gflops.mean() == pytest.approx(found.row['gflops'])
    assert Replays(record, coco).ap(run) == pytest.approx(found.row['ap'])


def test_calibration_goes_into_a_checkpoint(two_kinds):
    gate = build('HaltingGate', in_channels=[4, 5], width=8)
    found = calibrate_gate(*two_kinds, gate, dict(target_gflops=8))
    before = dict(
        state_dict={'detector.a': torch.ones(2), 'gate.old': torch.ones(1)}, meta=dict(epoch=3)
    )
    kept = copy.deepcopy(before)
    after = put_calibration(before, found, gate, dict(record='val.npz'))
    assert before.keys() == kept.keys() and before['state_dict'].keys() == kept['state_dict'].keys()
    state = after['state_dict']
    assert 'gate.old' not in state and torch.equal(state['gate.go.0.weight'], gate.go[0].weight)
    assert state['thresholds'].tolist() == pytest.approx(found.thresholds)
    assert state['gflops'].shape == state['latencies'].shape == (4,)
    assert after['meta']['epoch'] == 3 and after['meta']['calibration']['record'] == 'val.npz'
    # Any speed from then on: the dearest setting that a target pays for.
    points = state['operating_points']
    for row in found.front:
        assert resolve_budget(Budget('target_gflops', row['gflops']), points, 3) == pytest.approx(
            row['thresholds']
        )


def test_a_long_front_is_thinned_out():
    rows = [
        dict(thresholds=[-1, at / 200, at / 200], gflops=float(at), latency=at / 1e3)
        for at in range(200)
    ]
    points = operating_points(rows, 3)
    assert points.shape == (64, 5) and points.isfinite().all()
    assert points[0, 3] == 0 and points[-1, 3] == 199
    assert operating_points(rows[:2], 3)[2:].isnan().all()


def test_online_thresholds_hold_a_mean():
    # A stream on which everything costs twice what the calibration says.
    rows = [
        dict(thresholds=[-1, level, level], latency=0.01 + 0.09 * (1 - level), gflops=1.0)
        for level in np.linspace(0, 1, 31)
    ]
    online, spent = GateBudgetController(rows, dict(target_latency=0.06), gain=0.05), []
    assert online.thresholds[1] == pytest.approx(1 - 0.05 / 0.09, abs=0.03)
    for _ in range(600):
        level = online.thresholds[1]
        spent.append(2 * (0.01 + 0.09 * (1 - level)))
        online.measure(spent[-1])
    assert np.mean(spent[-200:]) == pytest.approx(0.06, rel=0.05)
    assert online.status()['thresholds'] == online.thresholds and online.status()['ignored'] == 0
    for bad in (dict(), dict(hard_share=0.5), dict(target_latency=1, target_gflops=1)):
        with pytest.raises(UsageError):
            GateBudgetController(rows, bad)
    with pytest.raises(UsageError, match='two settings'):
        GateBudgetController(rows[:1], dict(target_latency=0.06))


# Fitting.


def test_targets_of_one_budget_are_the_oracle_s_choice():
    values = np.array([[0.0, 50, 90], [10, 90, 90], [80, 90, 90]])
    # 3 of 9 extra: the first image to the last exit gains 80 for 2, the second to the middle 40 for
    # 1.
    assert oracle_targets(values, [1, 2, 3], budgets=[2.0]).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert oracle_targets(values, [1, 2, 3], budgets=[1.0]).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert oracle_targets(values, [1, 2, 3], budgets=[1.0, 2.0]).tolist() == [
        [0.5, 0.5, 0],
        [0.5, 0, 0],
    ]


def test_targets_of_prices():
    values = np.array([[0.0, 50, 90], [10, 90, 90], [80, 90, 90]])
    assert oracle_targets(values, [1, 2, 3], prices=[39.0]).tolist() == [[1, 1, 0], [1, 0, 0]]
    # At 41 the second image stays; at price 0 the cheapest of equals.
    assert oracle_targets(values, [1, 2, 3], prices=[41.0]).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert oracle_targets(values, [1, 2, 3], prices=[0.0]).tolist() == [[1, 1, 0], [1, 0, 0]]
    # A later exit may be the cheaper one, where heads on the way are paid.
    assert oracle_targets(values, [3, 2, 1], prices=[100.0]).tolist() == [[1, 1, 1], [1, 1, 1]]
    for bad in (dict(prices=[1.0], budgets=[1.0]), dict(prices=[]), dict(budgets=[])):
        with pytest.raises(UsageError):
            oracle_targets(values, [1, 2, 3], **bad)


@pytest.mark.parametrize(
    'kind, fit', [('HaltingGate', fit_halting_gate), ('GumbelGate', fit_gumbel_gate)]
)
def test_fitted_gate_beats_chance_on_other_videos(kind, fit):
    record, coco = random_case(videos=24, length=8)
    gate = build(kind, in_channels=[4, 5], width=8)
    calls = []
    found = fit(
        gate,
        record,
        coco,
        seed=1 + SEED,
        steps=(30,),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (7, 7) and found.loss < found.untrained
    again = build(kind, in_channels=[4, 5], width=8)
    assert fit(again, record, coco, seed=1 + SEED, steps=(30,)) == found
    assert all(
        torch.equal(one, other)
        for one, other in zip(gate.state_dict().values(), again.state_dict().values())
    )
    # Others, and what the features say: skilled frames leave first.
    other, truths = random_case(videos=8, length=10, seed=5)
    difficulty = gate_difficulties(gate, evidence_by_exit(other))[0]
    skill = np.array([image['pooled'][0][0] for image in other['images']])
    assert np.corrcoef(difficulty, skill)[0, 1] < -0.3


def test_fitted_gate_may_look_at_detections():
    record, coco = random_case(videos=9, length=8)
    gate = build('HaltingGate', in_channels=[4, 5], width=8, looks_at_detections=True)
    found = fit_halting_gate(gate, record, coco, prices=[3.0], steps=(5, 15), seed=SEED)
    assert found.loss < found.untrained
    rows = gate_curve(
        record,
        Replays(record, coco),
        gate,
        gate_difficulties(gate, evidence_by_exit(record)),
        settings_of(record, gate, gate_difficulties(gate, evidence_by_exit(record)), count=3),
    )
    assert rows[0]['gflops'] == 13


def test_fit_refuses_what_does_not_fit():
    record, coco = random_case(videos=6, length=5)
    with pytest.raises(UsageError, match=r'\[4, 5\]'):
        fit_halting_gate(build('HaltingGate', in_channels=[4, 7]), record, coco)
    few, coco = random_case(videos=1, length=10)
    with pytest.raises(UsageError, match='too few'):
        fit_halting_gate(build('HaltingGate', in_channels=[4, 5]), few, coco)


def test_a_long_video_is_cut_into_folds():
    record, coco = random_case(videos=1, length=80)
    found = fit_halting_gate(
        build('HaltingGate', in_channels=[4, 5], width=8), record, coco, steps=(15,), seed=SEED
    )
    assert found.loss < found.untrained


# Whether a frame shows anything.


def empty_case(videos=6, length=10, told=True):
    """Frames with an object have a bright part in their early map, if it can be told; the first
    half of each video shows none."""
    generator, found, boxes = np.random.default_rng(0), [], []
    for _ in range(videos):
        found.append([(1.0, [[], [], []])] * length)
        boxes += [[]] * (length // 2) + [[BOX]] * (length - length // 2)
    record = make_video_record(found)
    for image, own in zip(record['images'], boxes):
        image['early'] = generator.uniform(0.5, 1.5, len(image['early'])).astype(np.float32)
        if own and told:
            image['early'][generator.integers(64)] = 5
    return record, truth(record, boxes)


def test_presence_is_learned():
    record, coco = empty_case()
    assert shows_objects(record, coco).sum() == 30
    gate = build('TemporalGate', nothing=dict(type='Presence', in_channels=2))
    fit = fit_gate_parts(gate, record, coco, seed=SEED)['nothing']
    assert fit.missed == 0 and fit.spared > 0.9 and 0 < fit.level < 1
    assert not any(own.requires_grad for own in gate.parameters())
    other, coco = empty_case(videos=3)
    assert (nothing_seen(other, gate) == ~shows_objects(other, coco)).mean() > 0.9
    again = build('TemporalGate', nothing=dict(type='Presence', in_channels=2))
    assert fit_gate_parts(again, record, empty_case()[1], seed=SEED)['nothing'] == fit
    assert all(
        torch.equal(one, again.state_dict()[name]) for name, one in gate.state_dict().items()
    )


def test_presence_that_cannot_tell_spares_little():
    record, coco = empty_case(told=False)
    fit = fit_presence(build('Presence', in_channels=2), record, coco, SEED, missed=0.1)
    assert fit.missed <= 0.1 and fit.spared < 0.5


def test_presence_needs_both_kinds_of_frames():
    record, _ = empty_case()
    presence = build('Presence', in_channels=2)
    for boxes in ([], [BOX]):
        with pytest.raises(UsageError, match='frames with objects and frames without'):
            fit_presence(presence, record, truth(record, [boxes] * 60))
    assert presence.level == -1
    # Crowds are no objects.
    coco = truth(record, [[BOX]] * 60)
    for one in coco.dataset['annotations'][:5]:
        one['iscrowd'] = 1
    assert shows_objects(record, coco).sum() == 55
    with pytest.raises(UsageError, match='too few'):
        fit_presence(presence, *empty_case(videos=1))


def test_nothing_to_fit():
    assert fit_gate_parts(build('TemporalGate', gate=dict(type='ScoreGate')), *empty_case()) == {}
