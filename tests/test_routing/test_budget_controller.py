import json
import math
import warnings

import numpy as np
import pytest

from dynamicdet.errors import UsageError
from dynamicdet.routing.budget_controller import BudgetController
from dynamicdet.routing.budget_simulation import (
    drifting_difficulties,
    drifting_order,
    loaded_latencies,
    running_mean,
    simulate_controller,
    stepping_difficulties,
)
from dynamicdet.routing.thresholds import hard_share

LATENCIES = (0.010, 0.030)
TARGET = 0.020
N, BATCH = 16000, 8
#: Images of the running mean that is held.
OVER = 1000


def held(trace, target, skip=0):
    """How far the running mean over `OVER` images is from the target, at most, in percent."""
    means = running_mean(trace['latency'], OVER // BATCH)[OVER // BATCH + skip // BATCH :]
    return 100 * float(np.abs(means / target - 1).max())


def build(budget=None, **settings):
    return BudgetController(budget or dict(target_latency=TARGET), **settings)


STATIONARY, FLAT = drifting_difficulties(N, 1, swing=0), loaded_latencies(N, LATENCIES)


@pytest.mark.parametrize('known', [dict(costs=LATENCIES), {}])
@pytest.mark.parametrize(
    'difficulties, percent',
    [
        (STATIONARY, 3),
        (drifting_difficulties(N, 10000), 3),
        (stepping_difficulties(N, 8000), 5),
        (np.full(N, 0.5, np.float32), 5),
    ],
)
def test_a_latency_is_held_from_a_cold_start(difficulties, percent, known):
    """Stationary, day and night, a sudden change, and difficulties that tell nothing apart."""
    assert held(simulate_controller(build(**known), difficulties, FLAT, BATCH), TARGET) < percent


def test_without_a_controller_the_same_drift_misses():
    """The check of the check: a fixed threshold is far off."""
    scores = drifting_difficulties(N, 10000)
    taken = FLAT[np.arange(N), (scores > 0.5).astype(int)].reshape(-1, BATCH).mean(1)
    assert held(dict(latency=taken), TARGET) > 25


def test_a_load_that_leaves_the_target_in_reach():
    slow = loaded_latencies(N, LATENCIES, [(5000, 7000), (12000, 13000)], 1.5)
    trace = simulate_controller(build(), drifting_difficulties(N, 10000), slow, BATCH)
    assert held(trace, TARGET) < 6
    inside = trace['hard'][6000 // BATCH : 7000 // BATCH].mean()
    # 15 ms to 45 ms: 20 ms is a sixth of the way.
    assert inside == pytest.approx(1 / 6, abs=0.03)


def test_the_integral_bounds_the_error_of_any_stretch():
    """sum(cost - target) = (share before - share after) * span / gain, away from the ends."""
    controller = build(costs=LATENCIES)
    trace = simulate_controller(controller, STATIONARY, FLAT, BATCH)
    assert 0 < trace['share'].min() and trace['share'].max() < 1
    extra = ((trace['latency'] - TARGET) * trace['images'])[1:].sum()
    # `share` is from before each batch's time is known.
    assert extra == pytest.approx(
        (trace['share'][1] - controller.share) * 0.020 / controller.gain, rel=1e-6
    )


@pytest.mark.parametrize('delay', [0, 3])
def test_no_limit_cycle(delay):
    """The share trembles by the noise of which images come, sqrt(gain / 8), and no more later than
    early."""
    shares = simulate_controller(build(costs=LATENCIES), STATIONARY, FLAT, BATCH, delay)['share']
    early, late = shares[len(shares) // 4 : len(shares) // 2], shares[len(shares) // 2 :]
    assert late.std() < 1.5 * math.sqrt(0.01 / 8) and late.std() < 1.5 * early.std()


def test_without_noise_the_share_settles():
    scores = np.tile((np.arange(64) * 27 % 64 + 0.5) / 64, 200).astype(np.float32)
    trace = simulate_controller(
        build(costs=LATENCIES), scores, loaded_latencies(len(scores), LATENCIES, noise=0), batch=64
    )
    assert np.ptp(trace['share'][50:]) == 0 and trace['hard'][50:].mean() == 0.5


def test_a_target_that_is_too_low_saturates_says_so_and_recovers():
    latencies = loaded_latencies(N, LATENCIES, [(4000, 8000)], 3)
    controller = build()
    with pytest.warns(UserWarning, match='0.02 s per image is out of reach.*first exit') as said:
        trace = simulate_controller(controller, STATIONARY, latencies, BATCH)
    # Once, not with every batch.
    assert len(said) == 1
    under_load = slice(4500 // BATCH, 8000 // BATCH)
    assert trace['hard'][under_load].max() == 0 and trace['threshold'][under_load].min() == 1
    # No wind-up: within 200 images of the end of the load half of them are hard again.
    assert trace['share'][8200 // BATCH] > 0.4
    assert controller.fault is None
    assert held(trace, TARGET, skip=8500) < 3


def test_a_target_that_is_too_high_takes_the_last_exit():
    controller = build(dict(target_latency=0.05), costs=LATENCIES)
    with pytest.warns(UserWarning, match='last exit'):
        trace = simulate_controller(controller, STATIONARY, FLAT, BATCH)
    assert trace['hard'].min() == 1 and controller.threshold == -1
    assert controller.status()['fault'] == controller.fault


def test_throughput_is_one_over_latency():
    one, other = BudgetController(dict(throughput=50)), BudgetController(dict(target_latency=0.02))
    first, second = (
        simulate_controller(each, STATIONARY, FLAT)['threshold'] for each in (one, other)
    )
    assert (first == second).all()


@pytest.mark.parametrize(
    'budget, settings',
    [
        (dict(hard_share=0.3), {}),
        (dict(target_gflops=23), dict(costs=(20, 30))),
        (dict(hard_share=0.3), dict(gain=0.02, window=64)),
    ],
)
def test_a_share_and_gflops_need_no_clock(budget, settings):
    controller = BudgetController(budget, **settings)
    trace = simulate_controller(
        controller,
        drifting_difficulties(N, 10000),
        loaded_latencies(N, LATENCIES, [(0, N)], 7),
        BATCH,
    )
    means = running_mean(trace['hard'], OVER // BATCH)[OVER // BATCH :]
    assert np.abs(means - 0.3).max() < 0.03


def test_three_exits():
    latencies = loaded_latencies(N, (0.01, 0.02, 0.04))
    controller = build(dict(target_latency=0.025), costs=(0.01, 0.02, 0.04))
    trace = simulate_controller(controller, drifting_difficulties(N, 10000), latencies, BATCH)
    assert held(trace, 0.025) < 4
    low, high = controller.threshold
    assert low < high


def test_the_first_batch_is_parted_by_its_own_median():
    controller = build()
    assert controller.decide([0.1, 0.2, 0.3, 0.4]) == pytest.approx(0.25)


def test_a_calibration_is_where_it_starts():
    controller = build(
        dict(target_latency=0.015), costs=LATENCIES, difficulties=np.linspace(0, 1, 1001)
    )
    assert controller.share == pytest.approx(0.25)
    assert controller.threshold == pytest.approx(0.75, abs=0.01)


def test_memory_is_bounded():
    controller = build(window=100)
    simulate_controller(controller, STATIONARY, FLAT)
    assert len(controller.state_dict()['recent']) == 100
    # The threshold is that of the last 100 alone.
    assert hard_share(STATIONARY[-100:], controller.threshold) == pytest.approx(
        controller.share, abs=0.1
    )


@pytest.mark.parametrize('seconds', [math.nan, math.inf, -math.inf, 0, -1, None, 'fast', True])
def test_times_that_are_none_are_ignored(seconds):
    controller = build()
    before = controller.state_dict()
    controller.measure(seconds, 8)
    assert controller.state_dict() == dict(before, ignored=1)
    controller.measure(0.1, 0)
    assert controller.ignored == 2


def test_difficulties_that_are_none_are_ignored():
    controller = build()
    assert controller.decide([]) == 0.5
    assert controller.decide([math.nan, math.inf, -0.1, 1.1]) == 0.5
    assert controller.ignored == 4
    assert controller.decide([math.nan, 0.2, 0.4]) == pytest.approx(0.3)


def test_one_very_long_call_moves_the_share_a_little():
    controller = build(costs=LATENCIES)
    controller.measure(1000, 8)
    assert controller.share == pytest.approx(0.5 - 8 * 0.01 * 3)


def test_saved_and_restored():
    whole, first = build(), build()
    whole_trace = simulate_controller(whole, STATIONARY, FLAT)
    simulate_controller(first, STATIONARY[:8000], FLAT[:8000])
    second = build()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.status() == first.status()
    rest = simulate_controller(second, STATIONARY[8000:], FLAT[8000:])
    assert (rest['threshold'] == whole_trace['threshold'][1000:]).all()


@pytest.mark.parametrize(
    'change',
    [
        dict(share=2),
        dict(share='x'),
        dict(recent=[math.nan]),
        dict(recent=3),
        dict(threshold=[0.1, 0.2]),
        dict(mean=math.nan),
        dict(threshold=math.nan),
    ],
)
def test_states_that_are_none(change):
    with pytest.raises(UsageError, match='no state of a controller'):
        build().load_state_dict(dict(build().state_dict(), **change))
    with pytest.raises(UsageError, match='no state of a controller'):
        build().load_state_dict({})


@pytest.mark.parametrize(
    'settings',
    [
        dict(budget={}),
        dict(budget=dict(target_latency=0.1, hard_share=0.5)),
        dict(budget=dict(target_latency=0)),
        dict(budget=dict(target_latency=math.nan)),
        dict(budget=dict(target_latency=math.inf)),
        dict(budget=dict(throughput=0)),
        dict(budget=dict(throughput=-1)),
        dict(budget=dict(hard_share=1.5)),
        dict(budget=dict(hard_share=[0.5, 0.1])),
        dict(budget=dict(threshold=0.5)),
        dict(budget=dict(target_gflops=3)),
        dict(costs=(2, 1)),
        dict(costs=(0, 1)),
        dict(costs=(1, math.nan)),
        dict(costs=(1,)),
        dict(window=0),
        dict(gain=0),
        dict(gain=1),
        dict(difficulties=[math.nan]),
        dict(exits=1),
    ],
)
def test_bad_settings(settings):
    with pytest.raises(UsageError):
        BudgetController(**{'budget': dict(target_latency=1), **settings})


@pytest.mark.parametrize('share', [0, 1])
def test_an_end_that_is_asked_for_is_no_fault(share):
    controller = BudgetController(dict(hard_share=share))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        trace = simulate_controller(controller, STATIONARY, FLAT)
    assert trace['hard'].mean() == share and controller.fault is None


# What it is tried on.


def test_drifting_streams():
    scores = drifting_difficulties(20000, 20000)
    assert scores[4000:6000].mean() > 0.7 and scores[14000:16000].mean() < 0.3
    before, after = np.split(stepping_difficulties(2000, 1000), 2)
    assert before.mean() < 0.3 and after.mean() > 0.7
    order = drifting_order(np.arange(100)[::-1], 4000, 4000)
    # Image 0 is the hardest of these.
    assert set(order) <= set(range(100)) and len(set(order)) > 95
    assert order[900:1100].mean() < 35 and order[2900:3100].mean() > 65


def test_the_machine_under_load():
    seconds = loaded_latencies(4000, LATENCIES, [(2000, 4000)], factor=2)
    assert seconds[:2000].mean(0) == pytest.approx(LATENCIES, rel=0.01)
    assert seconds[2000:].mean(0) == pytest.approx([0.02, 0.06], rel=0.01)


def test_running_mean_by_hand():
    assert running_mean([1, 3, 5, 7], 2).tolist() == [1, 2, 4, 6]


def test_a_state_of_what_numpy_measured_is_plain():
    controller = BudgetController(dict(target_latency=0.02))
    controller.decide(np.float32([0.1, 0.9]))
    controller.measure(np.float32(0.02), np.int64(1))
    assert json.loads(json.dumps(controller.state_dict())) == controller.state_dict()


@pytest.mark.parametrize('throughput', [0, -3, 1e-320, float('inf'), float('nan')])
def test_a_throughput_is_called_by_its_name(throughput):
    with pytest.raises(UsageError, match='throughput is in images per second'):
        BudgetController(dict(throughput=throughput))
