"""What a gate does on a record: by hand, at the limits, and against the oracle."""

import itertools

import numpy as np
import pytest
import torch
from video_cases import BOX, detection, make_video_record, random_case, truth

from dynamicdet.errors import UsageError
from dynamicdet.video.curves import (
    fixed_exits,
    gate_curve,
    line_at,
    pareto_front,
    quantile_thresholds,
    settings_of,
)
from dynamicdet.video.gate_simulation import (
    Replays,
    curve_point,
    detection_sources,
    evidence_by_exit,
    exit_costs,
    frame_changes,
    frames_by_video,
    gate_difficulties,
    nothing_seen,
    shown_exits,
    simulate_gate,
    take_exits,
)
from dynamicdet.video.oracle import oracle_rows, plan_with_reuse, plan_without_memory, values_by_age
from mmdet.registry import MODELS


def build(name, **settings):
    return MODELS.build(dict(type=name, **settings))


def still(levels, found=((), (), ())):
    """One video of frames with these early maps."""
    return make_video_record([[(level, found) for level in levels]])


def test_exit_is_the_first_whose_threshold_is_not_passed():
    difficulties = np.array([[0.2, 0.6, 0.6, 0.5], [0.9, 0.4, 0.9, 0.0]], np.float32)
    assert take_exits(difficulties, [9, 0.5, 0.5]).tolist() == [0, 1, 2, 0]
    # Not above the threshold leaves; -1 never, 1 always.
    assert take_exits(difficulties, [9, 0.2, 0.4]).tolist() == [0, 1, 2, 1]
    assert take_exits(difficulties, [9, -1, -1]).tolist() == [2] * 4
    assert take_exits(difficulties, [9, 1, 1]).tolist() == [0] * 4
    assert take_exits(difficulties, [9, -1, 1]).tolist() == [1] * 4


def test_streams_are_in_order_of_frames_whatever_the_record_s():
    record = make_video_record([[(1.0, [[], [], []])] * 3, [(1.0, [[], [], []])] * 2])
    record['images'] = [record['images'][at] for at in (4, 2, 0, 3, 1)]
    assert sorted(frames_by_video(record)) == [[2, 4, 1], [3, 0]]


def test_reuse_compares_with_the_last_computed_frame():
    # Changes from one to the next are 1/11 or less; from the first to the third it is more.
    record = still([1.0, 1.2, 1.44, 1.44])
    assert frame_changes(record).tolist() == pytest.approx([1 / 11, 1 / 11, 0])
    assert frame_changes(record, lag=2).tolist() == pytest.approx([0.44 / 2.44, 0.24 / 2.64])
    assert detection_sources(record, 0.1).tolist() == [0, 0, 2, 2]
    assert detection_sources(record, 0.2).tolist() == [0, 0, 0, 0]
    assert detection_sources(record, 0.0).tolist() == [0, 1, 2, 2]
    assert detection_sources(record, -1).tolist() == [0, 1, 2, 3]


def test_reuse_ends_with_the_video_and_never_begins_at_one():
    record = make_video_record([[(1.0, [[], [], []])] * 2, [(1.0, [[], [], []])] * 2])
    assert detection_sources(record, 0.5).tolist() == [0, 0, 2, 2]
    # Only at threshold 1 does a first frame leave: with nothing.
    assert detection_sources(record, 1).tolist() == [-1] * 4


def test_nothing_is_seen_and_shown_until_the_scene_changes():
    # Dark frames are empty: the second is told by its early map, the third is like it, the fourth
    # is not.
    found = [[], [], [detection()]]
    record = make_video_record([[(5.0, found), (1.0, found), (1.05, found), (5.0, found)]])
    nothing = np.array([False, True, True, False])
    assert detection_sources(record, 0.1, nothing).tolist() == [0, -1, -1, 3]
    assert detection_sources(record, 0.0, nothing).tolist() == [0, -1, -1, 3]
    assert detection_sources(record, 0.9, nothing).tolist() == [0, 0, 0, 0]
    assert detection_sources(record, -1, nothing).tolist() == [0, 1, 2, 3]
    gate = build('TemporalGate', nothing=dict(type='Presence', in_channels=2))
    sees_level(gate.nothing)
    assert nothing_seen(record, gate).tolist() == nothing.tolist()
    run = simulate_gate(record, gate, np.ones((2, 4), np.float32), [0.0, -1, -1])
    assert run.exits.tolist() == [2, -1, -1, 2] and run.source.tolist() == [0, -1, -1, 3]
    assert run.gflops.tolist() == [10, 1, 1, 10]
    coco = truth(record, [[BOX], [], [], [BOX]])
    assert Replays(record, coco).ap(run) == pytest.approx(100)
    # Without a threshold on change, too, there is such a setting.
    assert [0.0, -1, -1] in settings_of(record, gate, np.ones((2, 4), np.float32))
    assert not nothing_seen(record, build('TemporalGate')).any()


def sees_level(presence):
    """Let frames of a level below about 3 be empty."""
    for own in presence.parameters():
        torch.nn.init.zeros_(own)
    presence.hidden.weight[0, 0] = presence.output.weight[0, 0] = 1
    presence.output.bias.fill_(-3)
    presence.level.fill_(0.5)


def test_single_frame():
    record = still([1.0])
    gate = build('TemporalGate')
    run = simulate_gate(
        record, gate, gate_difficulties(gate, evidence_by_exit(record)), [0.9, 0.5, 0.5]
    )
    assert (
        run.exits.tolist() == [2]
        and run.source.tolist() == [0]
        and frame_changes(record).tolist() == []
    )
    assert settings_of(record, gate, np.zeros((2, 1), np.float32)) == [[-1, -1, -1], [-1, 1, 1]]


def test_costs_by_hand():
    record = still([1.0, 1.0, 3.0])
    assert exit_costs(record, 'gflops', looks=False).tolist() == [1, 2, 4, 10]
    assert exit_costs(record, 'gflops', looks=True).tolist() == [1, 2, 5, 13]
    difficulties = np.array([[0.9, 0.9, 0.1], [0.2, 0.9, 0.9]], np.float32)
    looking = build('TemporalGate', gate=dict(type='ScoreGate'))
    run = simulate_gate(record, looking, difficulties, [0.1, 0.5, 0.5], seconds=(0.0, 0.001))
    # Exit 1 after two decisions; reused; exit 0 after one.
    assert run.exits.tolist() == [1, -1, 0] and run.source.tolist() == [0, 0, 2]
    assert run.gflops.tolist() == [5, 1, 2]
    assert run.latencies.tolist() == pytest.approx([0.05 + 0.002, 0.01, 0.02 + 0.001])
    assert shown_exits(run).tolist() == [1, 1, 0]
    blind = build('TemporalGate', gate=dict(type='HaltingGate', in_channels=[4, 5]))
    assert simulate_gate(record, blind, difficulties, [0.1, 0.5, 0.5]).gflops.tolist() == [4, 1, 2]
    # A gate that does not decide early does not, whatever the first threshold.
    # Nobody is asked where nobody may leave.
    assert simulate_gate(
        record, blind, difficulties, [0.1, -1, -1], seconds=(0.0, 1.0)
    ).latencies.tolist() == pytest.approx([0.1, 0.01, 0.1])
    plain = build('ScoreGate')
    assert simulate_gate(record, plain, difficulties, [1, 0.5, 0.5]).exits.tolist() == [1, 2, 0]
    assert simulate_gate(record, plain, difficulties, [-1, -1, -1]).gflops.tolist() == [13] * 3
    row = curve_point(run, 12.5, 3)
    assert row['gflops'] == pytest.approx(8 / 3) and row['shares'] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0]
    )


def test_a_gate_stops_where_it_must():
    record = still([1.0, 2.0])
    for exit in range(3):
        gate = build('FixedExit', exit=exit)
        found = gate_difficulties(gate, evidence_by_exit(record))
        assert simulate_gate(record, gate, found, [-1, 0.5, 0.5]).exits.tolist() == [exit] * 2


def test_gates_see_the_record_as_the_detector_shows_it():
    one, other = detection(score=0.5), detection([10, 10, 10, 20], score=0.5)
    record = make_video_record([[(1.0, [[one], [other], []]), (1.0, [[], [], []])]])
    shown = evidence_by_exit(record)
    assert [one.exit for one in shown] == [0, 1] and shown[0].earlier is None
    assert shown[1].detections[0].bboxes.tolist() == [[10, 10, 20, 30]]
    assert [len(own.pooled) for own in shown] == [1, 2] and shown[1].pooled[1].shape == (2, 5)
    # Half of the box: IoU 1/2.
    assert gate_difficulties(build('AgreementGate'), shown).tolist() == [[1, 1], [0.5, 0]]
    assert gate_difficulties(build('ScoreGate'), shown).tolist() == [[1, 1], [1, 1]]


def test_difficulties_out_of_range_are_refused():
    gate = build('HaltingGate', in_channels=[4, 5])
    torch.nn.init.constant_(gate.go[0].bias, float('nan'))
    with pytest.raises(UsageError, match='not in'):
        gate_difficulties(gate, evidence_by_exit(still([1.0])))


def test_ap_of_what_is_shown():
    # The object stays, moves away, and is gone; the last exit always finds it where it is.
    moved = [60.0, 10.0, 20.0, 20.0]
    here, there = [[], [], [detection()]], [[], [], [detection(moved)]]
    record = make_video_record([[(1.0, here), (1.0, here), (1.0, there), (1.0, [[], [], []])]])
    replays = Replays(record, truth(record, [[BOX], [BOX], [moved], []]))
    temporal, found = build('TemporalGate'), np.ones((2, 4), np.float32)

    def ap(thresholds):
        return replays.ap(simulate_gate(record, temporal, found, thresholds))

    assert ap([-1, -1, -1]) == pytest.approx(100)
    assert ap([-1, 1, 1]) == 0
    # The map does not tell: all frames show the first. Two of three objects, two false boxes that
    # are as sure; recalls up to 2/3 at precision 1, beyond it 0.
    reused = simulate_gate(record, temporal, found, [0.5, -1, -1])
    assert reused.source.tolist() == [0] * 4 and reused.exits.tolist() == [2, -1, -1, -1]
    assert replays.ap(reused) == pytest.approx(100 * 67 / 101, abs=0.01)
    # Nothing is ever computed, and nothing found.
    assert ap([1, -1, -1]) == 0


def test_thresholds_lie_between_values():
    assert quantile_thresholds([0.2, 0.4, 0.4, 0.8], 9) == pytest.approx([0.3, 0.6])
    assert quantile_thresholds([0.5], 9) == [] and quantile_thresholds([], 9) == []
    neighbors = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))
    assert all(neighbors[0] <= one < neighbors[1] for one in quantile_thresholds(neighbors, 9))
    many = quantile_thresholds(np.linspace(0, 1, 100), 5)
    assert len(many) == 5 and many == sorted(many)


def test_nothing_is_reused_beyond_a_cut():
    record, gate, found = (
        still([1.0, 1.2, 2.0, 9.0]),
        build('TemporalGate'),
        np.ones((2, 4), np.float32),
    )
    tried = {setting[0] for setting in settings_of(record, gate, found)}
    assert any(change > 0.2 for change in tried)
    record['provenance']['cut'] = 0.2
    assert {setting[0] for setting in settings_of(record, gate, found)} == {
        one for one in tried if one < 0.2
    }


def test_curve_goes_from_the_last_exit_to_the_first():
    record, coco = random_case()
    replays, gate = Replays(record, coco), build('ScoreGate', kind='confidence')
    found = gate_difficulties(gate, evidence_by_exit(record))
    rows = gate_curve(record, replays, gate, found, settings_of(record, gate, found))
    fixed = fixed_exits(record, replays)
    assert rows[0]['shares'] == [0, 0, 0, 1] and rows[-1]['shares'] == [0, 1, 0, 0]
    assert rows[0]['ap'] == fixed[-1]['ap'] and rows[-1]['ap'] == fixed[0]['ap']
    assert rows[0]['gflops'] == 13 and fixed[-1]['gflops'] == 10
    costs = [row['gflops'] for row in rows]
    assert costs == sorted(costs, reverse=True)


def test_front_and_line():
    rows = [dict(gflops=x, ap=y) for x, y in ((1, 10), (2, 11), (3, 30), (3, 29), (4, 20), (5, 40))]
    assert [row['ap'] for row in pareto_front(rows)] == [10, 11, 30, 40]
    # From 1 to 3 by a straight line, above the point at 2.
    assert [line_at(rows, x) for x in (1, 2, 3, 4, 9)] == [10, 20, 30, 35, 40]
    assert np.isnan(line_at(rows, 0.5))


# The oracle.


def test_oracle_without_memory_by_hand():
    # The first image is worth it, the second not, the third is as good at the first exit.
    values = [[0, 1, 8], [9, 1, 8]]
    plan = plan_without_memory(np.array(values), [0, 1, 2], 1.0)
    assert plan.exits.tolist() == [1, -1, 0] and plan.source.tolist() == [0, -1, 2]
    assert plan.value == 17 and plan.bound >= 17
    assert plan_without_memory(np.array(values), [0, 1, 2], 0).exits.tolist() == [-1] * 3


def best_by_force(values, costs, budget, videos):
    """The best of all plans: at each frame an exit, the last again, or nothing."""
    frames, exits, best = values.shape[2], values.shape[1], -np.inf
    for actions in itertools.product(range(-2, exits), repeat=frames):
        cost, value = 0.0, 0.0
        for own in videos:
            last = None
            for frame in own:
                action = actions[frame]
                cost += costs[max(action, -1) + 1]
                if action >= 0:
                    last, age = action, 0
                elif action == -1 and last is not None:
                    age += 1
                else:
                    last = None
                if last is not None:
                    value += values[age, last, frame] if age < len(values) else -np.inf
        if cost <= budget * frames + 1e-9:
            best = max(best, value)
    return best


def test_oracle_with_reuse_against_all_plans():
    generator, videos = np.random.default_rng(0), [[0, 2, 3], [1, 4]]
    costs = [0.5, 1.0, 3.0]
    for _ in range(4):
        values = generator.uniform(-5, 100, (3, 2, 5))
        for age in (1, 2):
            for own in videos:
                values[age][:, own[:age]] = -np.inf
        for budget in (0.5, 0.9, 1.6, 4.0):
            plan = plan_with_reuse(values, costs, budget, videos)
            best = best_by_force(values, costs, budget, videos)
            assert np.asarray(costs)[plan.exits + 1].mean() <= budget + 1e-9
            assert plan.value <= best + 1e-6 and best <= plan.bound + 1e-6
            # No worse than the bound by more than what one frame can be worth.
            assert plan.bound - plan.value <= 3 * 105
        assert plan.value == pytest.approx(best)
    with pytest.raises(UsageError, match='below the cheapest'):
        plan_with_reuse(values, costs, 0.4, videos)


def test_value_of_a_plan_is_what_is_shown():
    generator, videos = np.random.default_rng(1), [list(range(6))]
    values = generator.uniform(0, 100, (4, 2, 6))
    for age in range(4):
        values[age][:, :age] = -np.inf
    plan = plan_with_reuse(values, [1.0, 2.0, 5.0], 2.2, videos)
    shown = 0.0
    for frame, source in enumerate(plan.source):
        if source >= 0:
            shown += values[frame - source, plan.exits[source], frame]
    assert plan.value == pytest.approx(shown)


def test_values_by_age():
    record, coco = random_case(videos=2, length=4)
    values = values_by_age(Replays(record, coco), frames_by_video(record), 8, longest=9)
    assert values.shape == (5, 3, 8)
    assert np.isinf(values[1][:, [0, 4]]).all() and np.isfinite(values[1][:, [1, 2, 3, 5]]).all()
    assert np.isinf(values[4]).all()
    assert values[0][2].mean() > values[0][0].mean()


def test_oracles_bound_what_gates_do():
    record, coco = random_case(videos=3, length=8)
    replays = Replays(record, coco)
    own, again = (
        oracle_rows(record, replays, [0.0, 2, 3, 5, 99], reuses=reuses) for reuses in (False, True)
    )
    assert own[0]['shares'][0] == again[0]['shares'][0] == 1 and own[0]['ap'] == 0
    for row in (*own, *again):
        assert (
            row['gflops'] <= max(row['budget'], 1.0) + 1e-9 and row['value'] <= row['bound'] + 1e-9
        )
    for rows in (own, again):
        assert all(one['bound'] <= two['bound'] + 1e-9 for one, two in zip(rows, rows[1:]))
    assert all(one['bound'] <= two['bound'] + 1e-6 for one, two in zip(own, again))
    # No gate's mean AP of frames is above the bound of its own cost.
    gate = build('TemporalGate', gate=dict(type='ScoreGate'))
    found = gate_difficulties(gate, evidence_by_exit(record))
    runs = [
        simulate_gate(record, gate, found, setting)
        for setting in settings_of(record, gate, found, 4, 3)
    ]
    bounds = oracle_rows(record, replays, [run.gflops.mean() for run in runs])
    for run, row in zip(runs, bounds):
        image_ap = replays.mixtures(run.source).image_ap()[shown_exits(run), np.arange(24)]
        assert image_ap.mean() <= row['bound'] + 1e-6
