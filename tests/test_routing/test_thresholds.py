import math

import numpy as np
import pytest

from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.thresholds import (
    hard_share,
    mean_cost,
    quantile_map,
    require_exits,
    resolve_threshold,
    share_for_gflops,
    share_for_latency,
    shares_beyond,
    threshold_for_share,
    thresholds_for_share,
)

SCORES = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    'share, threshold', [(0, 1), (0.25, 0.35), (0.5, 0.25), (0.75, 0.15), (1, -1)]
)
def test_quantiles_by_hand(share, threshold):
    got = threshold_for_share(SCORES, share)
    assert got == pytest.approx(threshold)
    assert hard_share(SCORES, got) == share


def test_every_share_of_a_large_set():
    scores = np.random.default_rng(0).random(1000)
    for share in np.linspace(0, 1, 101):
        assert hard_share(scores, threshold_for_share(scores, share)) == pytest.approx(
            share, abs=5e-4
        )


def test_order_does_not_matter():
    assert threshold_for_share(SCORES[::-1], 0.5) == threshold_for_share(SCORES, 0.5)


@pytest.mark.parametrize('share, got', [(0.1, 0.0), (0.4, 0.5), (0.6, 0.5), (0.9, 1.0)])
def test_images_that_share_a_score_stay_together(share, got):
    scores = [0.5] * 50 + [0.7] * 50
    assert hard_share(scores, threshold_for_share(scores, share)) == got


def test_all_equal_scores_and_single_images():
    assert hard_share([0.5] * 9, threshold_for_share([0.5] * 9, 0.3)) == 0
    assert hard_share([0.5], threshold_for_share([0.5], 1)) == 1
    # A difficulty that saturates at 1 can still be easy or hard.
    assert hard_share([0.0, 1.0], threshold_for_share([0.0, 1.0], 0)) == 0
    assert hard_share([0.0, 1.0], threshold_for_share([0.0, 1.0], 0.5)) == 0.5
    assert hard_share([0.0, 1.0], threshold_for_share([0.0, 1.0], 1)) == 1


def test_neighboring_floats_are_told_apart():
    low = np.float32(0.3)
    scores = [low, np.nextafter(low, np.float32(1))]
    assert hard_share(scores, threshold_for_share(scores, 0.5)) == 0.5


def test_noise_in_the_last_digits_moves_no_image():
    scores = np.random.default_rng(1).random(100).astype(np.float32)
    threshold = threshold_for_share(scores, 0.5)
    assert hard_share(scores + 1e-6, threshold) == hard_share(scores - 1e-6, threshold) == 0.5


@pytest.mark.parametrize('share', [-0.1, 1.1, math.nan])
def test_share_out_of_range(share):
    with pytest.raises(UsageError, match='hard share'):
        threshold_for_share(SCORES, share)


def test_no_or_bad_difficulties():
    with pytest.raises(UsageError, match='empty'):
        threshold_for_share([], 0.5)
    with pytest.raises(UsageError, match='not finite'):
        threshold_for_share([0.1, math.nan], 0.5)


def test_latency_by_hand():
    assert share_for_latency(0.030, 0.020, 0.040) == pytest.approx(0.5)
    assert share_for_latency(0.020, 0.020, 0.040) == 0
    assert share_for_latency(0.040, 0.020, 0.040) == 1
    # A hard path that is not slower than the easy one: everything may take it.
    assert share_for_latency(0.020, 0.020, 0.020) == 1


def test_latency_out_of_range_names_both_ends():
    with pytest.raises(UsageError, match=r'lat1 = 0\.02 s \(exit 0\) to lat2 = 0\.04 s \(exit 1\)'):
        share_for_latency(0.010, 0.020, 0.040)
    with pytest.raises(UsageError):
        share_for_latency(math.nan, 0.020, 0.040)
    with pytest.warns(UserWarning, match=r'lat1 = 0\.02 s \(exit 0\) to lat2 = 0\.04 s \(exit 1\)'):
        assert share_for_latency(0.050, 0.020, 0.040) == 1


def test_budgets():
    assert resolve_threshold(dict(threshold=0.42)) == 0.42
    assert resolve_threshold(dict(hard_share=0.5), SCORES) == pytest.approx(0.25)
    assert resolve_threshold(dict(target_latency=0.030), SCORES, (0.020, 0.040)) == pytest.approx(
        0.25
    )


@pytest.mark.parametrize(
    'budget',
    [
        dict(),
        dict(threshold=2),
        dict(threshold=-1.5),
        dict(hard_share=1.01),
        dict(hard_share=math.nan),
        dict(hard_share='half'),
        dict(target_latency=-1),
        dict(speed=1),
        dict(threshold=0.5, hard_share=0.5),
        dict(target_latency=0),
        dict(target_gflops=0),
        dict(target_gflops=math.nan),
        dict(target_gflops=True),
        dict(threshold=[0.2, 0.4]),
        dict(hard_share=[]),
    ],
)
def test_bad_budgets(budget):
    with pytest.raises(UsageError):
        resolve_threshold(budget, SCORES, (0.02, 0.04))


def test_budget_without_calibration():
    with pytest.raises(UsageError, match='calibrate.py'):
        resolve_threshold(dict(hard_share=0.5), [])


def test_ties_that_miss_the_share_are_said():
    with pytest.warns(UserWarning, match='share a difficulty'):
        resolve_threshold(dict(hard_share=0.25), [0.5] * 50 + [0.7] * 50)


def test_gflops_by_hand():
    assert share_for_gflops(25, 20, 40) == 0.25
    assert share_for_gflops(20, 20, 40) == 0 and share_for_gflops(40, 20, 40) == 1
    assert resolve_threshold(
        dict(target_gflops=30), SCORES, (math.nan, math.nan), (20, 40)
    ) == pytest.approx(0.25)
    assert resolve_threshold(dict(target_gflops=30), SCORES, None, (20, 40)) == pytest.approx(0.25)


def test_gflops_out_of_range_name_both_ends():
    with pytest.raises(
        UsageError,
        match=r'10 GFLOPs is outside g0 = 20 \(exit 0\) to g1 = 40 \(exit 1\): it cannot be met',
    ):
        share_for_gflops(10, 20, 40)
    with pytest.warns(UserWarning, match=r'50 GFLOPs is outside g0 = 20 \(exit 0\) to g1 = 40'):
        assert share_for_gflops(50, 20, 40) == 1


@pytest.mark.parametrize('budget', [dict(target_gflops=3), dict(target_latency=3)])
@pytest.mark.parametrize('costs', [None, (math.nan, math.nan)])
def test_what_was_not_measured(budget, costs):
    with pytest.raises(UsageError, match='calibrate.py on it again'):
        resolve_threshold(budget, SCORES, costs, costs)


# More than two exits.


def test_shares_of_three_exits_by_hand():
    assert shares_beyond(0.5) == [0.5]
    # A quarter, a half, a quarter.
    assert shares_beyond(0.5, 3) == [0.75, 0.25]
    assert shares_beyond(0, 4) == [0, 0, 0] and shares_beyond(1, 4) == [1, 1, 1]
    assert mean_cost(0.5, (10, 20, 50)) == pytest.approx(25) and mean_cost(
        0.3, (10, 20)
    ) == pytest.approx(13)


@pytest.mark.parametrize('share', np.linspace(0, 1, 11))
def test_the_mean_exit_is_the_share_of_the_last(share):
    assert mean_cost(share, (0, 1, 2, 3)) == pytest.approx(3 * share)
    beyond = shares_beyond(share, 4)
    assert beyond == sorted(beyond, reverse=True) and all(0 <= one <= 1 for one in beyond)


@pytest.mark.parametrize('target', [10, 12, 25, 49.9, 50])
def test_a_cost_between_three_exits_is_met(target):
    share = share_for_latency(target, 10, 20, 50)
    assert mean_cost(share, (10, 20, 50)) == pytest.approx(target)


def test_thresholds_of_three_exits():
    scores = np.random.default_rng(0).random(1000)
    for budget in (dict(hard_share=0.5), dict(target_latency=25), dict(hard_share=[0.75, 0.25])):
        low, high = resolve_threshold(budget, scores, (10, 20, 50))
        assert hard_share(scores, low) == pytest.approx(0.75) and hard_share(
            scores, high
        ) == pytest.approx(0.25)
    assert thresholds_for_share(scores, 0.5, 3) == [low, high]
    assert resolve_threshold(dict(threshold=[0.2, 0.4]), latencies=(1, 2, 3)) == [0.2, 0.4]
    # One number forces all.
    assert resolve_threshold(dict(threshold=-1), latencies=(1, 2, 3)) == [-1, -1]


@pytest.mark.parametrize(
    'budget, said',
    [
        (dict(threshold=[0.4, 0.2]), 'must rise'),
        (dict(hard_share=[0.2, 0.4]), 'must fall'),
        (dict(threshold=[0.1, 2]), r'in \[-1, 1\]'),
        (dict(target_latency=[1, 2]), 'must be a number'),
    ],
)
def test_bad_budgets_by_exit(budget, said):
    with pytest.raises(UsageError, match=said):
        require_exits(Budget.parse(budget), 3)


def test_a_budget_is_read_from_what_is_given():
    share = Budget('hard_share', 0.5)
    assert Budget.parse(share) == Budget.parse(dict(hard_share=0.5)) == share
    assert Budget.parse(hard_share=0.5) == Budget.parse({}, hard_share=0.5, threshold=None) == share
    assert Budget.parse() is None and Budget.parse(dict(threshold=None)) is None
    assert Budget.parse(dict(throughput=50)) == Budget('target_latency', 0.02)
    assert Budget.parse(share.as_dict()) == share
    by_exit = Budget('threshold', [0.2, 0.4])
    assert by_exit.value == (0.2, 0.4) and by_exit.as_dict() == dict(threshold=[0.2, 0.4])


@pytest.mark.parametrize('named', [dict(threshold=0.5), dict(hard_share=0.5), dict(speed=1)])
def test_a_budget_is_one_number(named):
    with pytest.raises(UsageError, match='exactly one of .*, throughput; got hard_share=0.5, '):
        Budget.parse(dict(hard_share=0.5), **named)


def test_as_many_as_there_are_exits():
    with pytest.raises(UsageError, match='2 numbers for 3 exits'):
        resolve_threshold(dict(threshold=[0.1, 0.2, 0.3]), latencies=(1, 2, 3))


def test_difficulties_move_as_those_of_some_images():
    """By hand: 0.2 goes to 0.3 and 0.6 to 0.5; half way between them nothing moves."""
    before, after = np.array([0.6, 0.2]), np.array([0.3, 0.5])
    found = quantile_map(np.array([-1, 0, 0.1, 0.2, 0.4, 0.6, 0.8, 1]), before, after)
    assert found == pytest.approx([-1, 0, 0.15, 0.3, 0.4, 0.5, 0.75, 1])
    assert quantile_map(
        np.array([0.5]), np.array([0.5, 0.5]), np.array([0.4, 0.8])
    ) == pytest.approx(0.6)


def test_moving_difficulties_and_thresholds_keeps_hard_shares():
    rng = np.random.default_rng(0)
    scores, before, after = rng.random(500), rng.random(7), rng.random(7) ** 2
    for share in (0, 0.2, 0.5, 0.9, 1):
        threshold = threshold_for_share(scores, share)
        (found,) = quantile_map(np.array([threshold]), before, after)
        assert hard_share(quantile_map(scores, before, after), found) == pytest.approx(
            share, abs=1e-9
        )
    assert quantile_map(scores, before, before) == pytest.approx(scores, abs=1e-7)
