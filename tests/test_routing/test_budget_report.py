"""What a budget served, against what was wanted."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from dynamicdet.routing.budget_report import (
    DOUBTED,
    exits_off_budget,
    report_budget,
    share_prediction_interval,
)
from dynamicdet.routing.thresholds import threshold_for_share, thresholds_for_share

#: 1,000 difficulties, evenly from 0 to 1.
EVEN = ((np.arange(1000) + 0.5) / 1000).tolist()


# What chance explains.


def test_of_one_new_image_all_is_possible():
    assert share_prediction_interval(5, 10, 1) == (0, 1)


def test_with_endless_images_in_the_calibration_the_number_is_binomial():
    low, high = share_prediction_interval(3_000_000, 10_000_000, 210)
    assert (low * 210, high * 210) == binom.interval(1 - DOUBTED, 210, 0.3)


def test_it_is_by_hand_what_it_should_be():
    """One image, none beyond the threshold: a new one is beyond it with chance 1/4, the mean of
    Beta(1/2, 3/2)."""
    assert share_prediction_interval(0, 1, 1, doubted=0.51) == (0, 0)
    assert share_prediction_interval(0, 1, 1, doubted=0.49) == (0, 1)


@pytest.mark.parametrize(
    'calibration, images, share', [(70, 210, 0.3), (500, 40, 0.1), (200, 3000, 0.02)]
)
def test_images_like_the_calibrations_are_seldom_doubted(calibration, images, share):
    """Whatever the difficulties' distribution: both sets are drawn anew each time, the threshold
    from the first."""
    generator, doubts, draws = np.random.default_rng(0), 0, 1000
    for _ in range(draws):
        known, new = (
            generator.beta(2, 5, count).astype(np.float32) for count in (calibration, images)
        )
        threshold = np.float32(threshold_for_share(known, share))
        hard, inside = (int((own > threshold).sum()) for own in (new, known))
        doubts += bool(exits_off_budget((images - hard, hard), (calibration - inside, inside)))
    # Three standard deviations above one in a hundred.
    assert doubts / draws <= DOUBTED + 3 * math.sqrt(DOUBTED / draws)


def test_other_images_are_doubted():
    """As many as were seen on pictures of animals: 8.6 % of 210 where 30 % were wanted, from
    210."""
    assert exits_off_budget((192, 18), (147, 63)) == {1: share_prediction_interval(63, 210, 210)}
    assert exits_off_budget((150, 60), (147, 63)) == {}


def test_each_of_three_exits_is_looked_at():
    """The last exit is as calibrated, and the first two are not."""
    assert set(exits_off_budget((700, 50, 250), (250, 500, 250))) == {0, 1}


# What is said.


def test_a_share_that_was_kept():
    report = report_budget(
        [147, 63],
        dict(hard_share=0.3),
        [threshold_for_share(EVEN, 0.3)],
        EVEN,
        [0.01, 0.03],
        [1, 2],
        0.0165,
    )
    assert report.lines() == [
        'hard: 30.0% wanted, 30.0% served (63 of 210 images)',
        "per image: 1.3 GFLOPs, 16.0 ms by the exits' own latencies, 16.5 ms by the clock",
    ]
    assert report.doubts() == []
    assert report.figures() == pytest.approx(
        dict(
            exit0_share=0.7,
            exit1_share=0.3,
            exit0_wanted=0.7,
            exit1_wanted=0.3,
            gflops=1.3,
            milliseconds=16,
            clock_milliseconds=16.5,
        )
    )


@pytest.mark.parametrize(
    'budget', [dict(hard_share=0.3), dict(target_latency=0.016), dict(target_gflops=1.3), {}]
)
def test_a_share_that_was_missed(budget):
    report = report_budget(
        [192, 18], budget, [threshold_for_share(EVEN, 0.3)], EVEN, [0.01, 0.03], [1, 2]
    )
    assert report.lines()[0] == 'hard: 30.0% wanted, 8.6% served (18 of 210 images)'
    (doubt,) = report.doubts()
    low, high = share_prediction_interval(300, 1000, 210)
    assert '8.6% of these 210 images are hard, and 30.0% were wanted' in doubt and 'online' in doubt
    assert f'{low:.1%} to {high:.1%}' in doubt


def test_the_wanted_cost_stands_beside_the_served_one():
    report = report_budget(
        [192, 18], dict(target_latency=0.016), [0.7], EVEN, [0.01, 0.03], [1, 2], 0.020
    )
    assert report.lines()[1] == (
        "per image: 1.09 GFLOPs, 16.0 ms wanted, 11.7 ms by the exits' own latencies, "
        '20.0 ms by the clock'
    )
    assert '20.0 ms, and 16.0 ms were wanted' in report.doubts()[1]


def test_three_exits():
    thresholds = thresholds_for_share(EVEN, 0.5, 3)
    report = report_budget(
        [25, 50, 25], dict(hard_share=0.5), thresholds, EVEN, [0.01, 0.02, 0.03], [1, 2, 3]
    )
    assert report.lines()[0] == (
        'exits 0 / 1 / 2: 25.0 / 50.0 / 25.0 % wanted, 25.0 / 50.0 / 25.0 % served (25 / 50 / 25 '
        'of 100 images)'
    )
    assert report.mean_gflops == pytest.approx(2) and report.doubts() == []
    (doubt,) = report_budget(
        [90, 5, 5], dict(hard_share=[0.75, 0.25]), thresholds, EVEN, [0.01, 0.02, 0.03]
    ).doubts()
    assert '90.0% of these 100 images left at exit 0, and 25.0% were wanted' in doubt


@pytest.mark.parametrize(
    'settings, line',
    [
        # A threshold has no share of its own; by the calibration it would be this one.
        (
            dict(budget=dict(threshold=0.7), thresholds=[0.7], difficulties=EVEN),
            "hard: 30.0% of the calibration's images, 10.0% served (2 of 20 images)",
        ),
        (
            dict(budget=dict(threshold=-1), thresholds=[-1], difficulties=EVEN),
            'hard: 10.0% served (2 of 20 images)',
        ),
        (dict(budget=dict(threshold=0.7), thresholds=[0.7]), 'hard: 10.0% served (2 of 20 images)'),
        # No calibration, no wish.
        (dict(thresholds=[0.5]), 'hard: 10.0% served (2 of 20 images)'),
        # A controller moves the thresholds.
        (
            dict(budget=dict(hard_share=0.9), difficulties=EVEN),
            'hard: 90.0% wanted, 10.0% served (2 of 20 images)',
        ),
        (
            dict(budget=dict(target_latency=0.9), difficulties=EVEN, latencies=[0.1, 1]),
            'hard: 10.0% served (2 of 20 images)',
        ),
    ],
)
def test_what_is_not_known_is_not_said(settings, line):
    report = report_budget([18, 2], seconds=1.5, **settings)
    assert report.lines()[0] == line and report.doubts() == []


def test_nothing_was_seen():
    report = report_budget([0, 0], dict(hard_share=0.5), [0.5], EVEN, [0.01, 0.03], [1, 2])
    assert report.lines() == report.doubts() == [] and report.figures() == {}


def test_a_target_above_the_last_exit_is_said_once(recwarn):
    report = report_budget([0, 9], dict(target_latency=1), [-1], EVEN, [0.01, 0.03])
    assert report.wanted == (0, 1) and not recwarn.list
