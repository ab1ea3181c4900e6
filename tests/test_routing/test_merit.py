import json

import numpy as np
import pytest
from routing_cases import BOX, found, ground_truth, make_record

from dynamicdet.routing.curve import RandomRouting
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.merit import efficacy, normalized_gain

IMAGES = 40
FIFTHS = (0.2, 0.4, 0.6, 0.8)
#: Precision 1 up to a recall of one half: 51 of the 101 recalls that COCO looks at.
HALF_FOUND = 100 * 51 / 101


def make_chance(first, second, **options):
    """Images of one object each; ``first``, ``second``: whether an exit finds it."""
    detections = [[found(BOX) if hit else [] for hit in hits] for hits in (first, second)]
    record = make_record([0.5] * len(first), *detections)
    return RandomRouting(
        Mixtures(record, ground_truth([[BOX]] * len(first))),
        **dict(dict(draws=20, resamples=40), **options),
    )


@pytest.fixture(scope='module')
def random_routing():
    """Exit 1 finds all objects, exit 0 those of the first half."""
    return make_chance(np.arange(IMAGES) < IMAGES // 2, [True] * IMAGES)


def hardest(order, shares=FIFTHS):
    """Choices of a router that gives up images in this order, the hardest first."""
    ranks = np.empty(len(order))
    ranks[np.asarray(order)] = np.arange(len(order))
    return [ranks < round(share * len(order)) for share in shares]


PERFECT = np.arange(IMAGES)[::-1]


def test_gain_of_a_perfect_router(random_routing):
    (half,) = hardest(PERFECT, [0.5])
    found = normalized_gain(random_routing, half)
    # All that exit 1 gains at half the cost: half of it is above the chord.
    assert (found['hard_share'], found['ap']) == (0.5, pytest.approx(100))
    assert found['chord'] == pytest.approx((HALF_FOUND + 100) / 2)
    assert found['range'] == pytest.approx(100 - HALF_FOUND)
    assert found['gain'] == pytest.approx(0.5)
    assert found['low'] == pytest.approx(0.5) and found['high'] == pytest.approx(0.5)
    assert json.loads(json.dumps(found)) == found


def test_gain_of_an_inverted_router(random_routing):
    (half,) = hardest(PERFECT[::-1], [0.5])
    assert normalized_gain(random_routing, half)['gain'] == pytest.approx(-0.5)


def test_gain_of_an_interleaved_router(random_routing):
    # Half of what is hard is what gains: on the chord, but for the steps of recall.
    found = normalized_gain(random_routing, np.arange(IMAGES) % 2 == 1)
    assert found['gain'] == pytest.approx(0, abs=0.03)
    assert found['low'] < -0.1 and found['high'] > 0.1


def test_gain_goes_by_the_share_that_there_is(random_routing):
    (quarter,) = hardest(PERFECT, [0.25])
    found = normalized_gain(random_routing, quarter)
    # Ten of the twenty that gain: 30 of 40 found.
    assert found['hard_share'] == 0.25 and found['ap'] == pytest.approx(100 * 76 / 101)
    assert found['gain'] == pytest.approx((76 - 51 - 0.25 * 50) / 50)


def test_gain_at_the_ends_is_nothing(random_routing):
    for end in (False, True):
        found = normalized_gain(random_routing, [end] * IMAGES)
        assert found['gain'] == pytest.approx(0) and found['low'] == found['high'] == 0


def test_no_gain_between_equal_exits():
    same = make_chance([True, False] * 10, [True, False] * 10)
    found = normalized_gain(same, np.arange(20) < 10)
    assert (found['gain'], found['low'], found['high']) == (None, None, None)
    assert found['range'] == 0 and found['ap'] == pytest.approx(found['chord'])


def test_exits_that_are_not_told_apart_have_no_interval():
    # Either finds what the other does not, exit 1 one more.
    hits = np.arange(21) < 10
    found = normalized_gain(make_chance(hits, ~hits), ~hits)
    assert found['gain'] > 5
    assert found['low'] is None and found['high'] is None


def test_a_worse_exit_turns_the_sign(random_routing):
    (half,) = hardest(PERFECT, [0.5])
    swapped = make_chance([True] * IMAGES, np.arange(IMAGES) < IMAGES // 2)
    found = normalized_gain(swapped, ~half)
    assert found['ap'] == pytest.approx(100) and found['range'] < 0
    assert found['gain'] == pytest.approx(-0.5)


def test_efficacy_of_the_oracle_is_one(random_routing):
    oracle = hardest(PERFECT)
    found = efficacy(random_routing, oracle, oracle)
    assert found['efficacy'] == found['low'] == found['high'] == 1
    assert found['router_area'] == found['oracle_area'] > 0
    # Which share comes first does not matter, nor do the ends, nor a share that comes twice.
    more = [*oracle[::-1], *hardest(PERFECT, [0, 1, 0.4])]
    assert efficacy(random_routing, more, oracle)['efficacy'] == pytest.approx(1)
    assert json.loads(json.dumps(found)) == found


def test_efficacy_of_the_inverted_router(random_routing):
    found = efficacy(random_routing, hardest(PERFECT[::-1]), hardest(PERFECT))
    assert found['efficacy'] == pytest.approx(-1, abs=0.1)
    assert found['high'] < 0


def test_efficacy_of_random_routers_is_nothing(random_routing):
    shares, generator = [0.25, 0.5, 0.75], np.random.default_rng(0)
    found = [
        efficacy(
            random_routing, hardest(generator.permutation(IMAGES), shares), hardest(PERFECT, shares)
        )
        for _ in range(10)
    ]
    assert np.mean([each['efficacy'] for each in found]) == pytest.approx(0, abs=0.12)
    assert sum(each['low'] < 0 < each['high'] for each in found) >= 8


def test_efficacy_by_hand(random_routing):
    """At half hard alone, the area is a triangle. 15 of the 20 that gain: 35 of 40 found."""
    order = [*range(20, 35), *range(0, 5), *range(35, 40), *range(5, 20)]
    found = efficacy(random_routing, hardest(order, [0.5]), hardest(PERFECT, [0.5]))
    at_random, _, _ = random_routing.at(20)
    assert found['router_area'] == pytest.approx((100 * 88 / 101 - at_random) / 2)
    assert found['oracle_area'] == pytest.approx((100 - at_random) / 2)
    assert found['efficacy'] == pytest.approx((100 * 88 / 101 - at_random) / (100 - at_random))
    assert 0 < found['low'] < found['efficacy'] < found['high'] < 1


def test_no_efficacy_where_the_oracle_gains_nothing():
    same = make_chance([True, False] * 10, [True, False] * 10)
    choices = hardest(range(20))
    found = efficacy(same, choices, choices)
    assert (found['efficacy'], found['low'], found['high']) == (None, None, None)
    assert found['router_area'] == found['oracle_area'] == pytest.approx(0)


def test_no_interval_for_an_oracle_that_may_be_luck():
    # Exit 1 finds one object that exit 0 does not: half of the resamples are without it, or nearly
    # so.
    few = make_chance([False] + [True] * 11, [True] * 12)
    oracle = [np.arange(12) < 3]
    found = efficacy(few, oracle, oracle)
    assert found['efficacy'] == 1 and found['low'] is None


def test_without_resamples(random_routing):
    quick = make_chance([True, False] * 10, [True] * 20, resamples=0)
    choice = np.arange(20) % 2 == 1
    assert normalized_gain(quick, choice)['gain'] == pytest.approx(0.5)
    assert normalized_gain(quick, choice)['low'] is None
    found = efficacy(quick, [choice], [choice])
    assert found['efficacy'] == 1 and found['high'] is None
