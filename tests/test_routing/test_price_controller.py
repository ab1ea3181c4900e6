"""Budgets of regions that are held while images come."""

import numpy as np
import pytest

from conftest import SEED
from dynamicdet.errors import UsageError
from dynamicdet.routing.price_controller import PriceController
from dynamicdet.routing.regions import PriceCurve

CURVE = PriceCurve(
    np.array([0.0, 0.2, 0.5, 0.8, 1.0]),
    np.array([1.0, 0.6, 0.3, 0.1, 0.0]),
    np.array([1.0, 1.5, 1.2, 0.5, 0.0]),
)
#: So much for an image, for each region and for all of its pixels.
COSTS = 2 + 0.5 * CURVE.counts + 4 * CURVE.shares


def served(threshold, factor=1.0):
    """Share of the pixels, and regions, at a price on images with so many times as much to look at
    as those of the calibration."""
    share = np.interp(threshold, CURVE.thresholds, CURVE.shares) * factor
    return min(share, 1.0), np.interp(threshold, CURVE.thresholds, CURVE.counts)


def test_it_starts_where_the_calibration_has_the_budget():
    assert PriceController(dict(hard_share=0.3), CURVE).threshold == pytest.approx(0.5)
    gflops = PriceController(dict(target_gflops=float(COSTS[2])), CURVE, COSTS)
    assert gflops.threshold == pytest.approx(0.5)
    seconds = PriceController(dict(target_latency=float(COSTS[3])), CURVE, COSTS)
    assert seconds.measures and seconds.threshold == pytest.approx(0.8)


@pytest.mark.parametrize('factor', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('kind', ['hard_share', 'target_gflops', 'target_latency'])
def test_it_holds_the_mean_on_images_unlike_those_of_the_calibration(kind, factor):
    """By the price alone: what images cost at a price is told, not known."""
    target = 0.25 if kind == 'hard_share' else 3.5
    controller = PriceController(
        {kind: target}, CURVE, None if kind == 'hard_share' else COSTS, gain=0.05
    )
    generator, costs = np.random.default_rng(SEED), []
    for _ in range(600):
        share, regions = served(controller.decide(), factor)
        share = min(1.0, share * generator.uniform(0.5, 1.5))
        cost = share if kind == 'hard_share' else 2 + 0.5 * regions + 4 * share
        controller.count([share], [regions])
        controller.measure(cost)
        costs.append(cost)
    assert np.mean(costs[200:]) == pytest.approx(target, rel=0.03)


def test_it_stops_at_its_ends_and_says_so():
    controller = PriceController(dict(target_latency=1.0), CURVE, COSTS)
    with pytest.warns(UserWarning, match='out of reach'):
        for _ in range(400):
            controller.decide()
            controller.measure(2.0)
    # Exit 0 alone.
    assert controller.share == 0 and controller.decide() == 1


def test_it_needs_costs_that_rise():
    with pytest.raises(UsageError, match='the last exit the dearest'):
        PriceController(dict(target_latency=1.0), CURVE, COSTS[::-1])
    with pytest.raises(UsageError, match='a controller holds one of'):
        PriceController(dict(threshold=0.5), CURVE)
    with pytest.raises(UsageError, match='GFLOPs of each exit'):
        PriceController(dict(target_gflops=1.0), CURVE)


def test_its_state_goes_on():
    one = PriceController(dict(hard_share=0.3), CURVE)
    one.count([0.9] * 20, [1] * 20)
    other = PriceController(dict(hard_share=0.3), CURVE)
    other.load_state_dict(one.state_dict())
    assert one.share < 0.3 and other.decide() == one.decide() > 0.5
