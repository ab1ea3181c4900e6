"""Rectangles, prices and maps of regions, by hand and against every choice there is."""

import itertools
import time

import numpy as np
import pytest
import torch

from conftest import SEED
from dynamicdet.errors import UsageError
from dynamicdet.routing.region_cells import PLANES, cells_of, detection_planes, rule_map
from dynamicdet.routing.region_maps import RegionRouter
from dynamicdet.routing.regions import (
    choose_rectangles,
    grid_of,
    highest_price,
    price_curve,
    price_of_threshold,
    share_of_area,
    threshold_for_area,
    threshold_for_cost,
    threshold_of_price,
    tiles_of,
    with_halo,
)


def every_rectangle(height, width):
    rows = itertools.combinations(range(height + 1), 2)
    columns = list(itertools.combinations(range(width + 1), 2))
    return [(top, left, bottom, right) for top, bottom in rows for left, right in columns]


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def worth(rectangle, gains, price, halo, overhead):
    top, left, bottom, right = rectangle
    area = share_of_area([rectangle], gains.shape, halo) * gains.size
    return gains[top:bottom, left:right].sum() - price * (area + overhead)


@pytest.mark.parametrize('case', range(40))
def test_choice_is_the_best_there_is(case):
    """Among all rectangles, and all pairs that do not overlap."""
    generator = np.random.default_rng([SEED, case])
    height, width = generator.integers(1, 6, 2)
    gains = generator.normal(0.3, 1, (height, width)) * (generator.random((height, width)) < 0.6)
    price, overhead = generator.random() * 0.6, generator.random()
    halo, limit = case % 3, 1 + case % 2
    settings = gains, price, halo, overhead
    every = {one: worth(one, *settings) for one in every_rectangle(height, width)}
    best = max([0, *every.values()])
    if limit == 2:
        pairs = itertools.combinations(every, 2)
        best = max([best, *(every[a] + every[b] for a, b in pairs if apart(a, b))])
    chosen = choose_rectangles(gains, price, halo, limit, overhead)
    assert len(chosen) <= limit and all(apart(a, b) for a, b in itertools.combinations(chosen, 2))
    assert sum(every[one] for one in chosen) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize('case', range(20))
def test_something_is_chosen_up_to_the_highest_price(case):
    generator = np.random.default_rng([SEED, case])
    gains = generator.normal(0, 1, generator.integers(2, 8, 2))
    settings = dict(halo=case % 2, overhead=float(case % 3))
    highest = highest_price(gains, **settings)
    assert choose_rectangles(gains, 0.999 * highest, **settings)
    assert not choose_rectangles(gains, 1.001 * highest, **settings)


def test_no_price_is_the_whole_and_an_infinite_one_nothing():
    for gains in (np.zeros((3, 4)), -np.ones((3, 4)), np.eye(3, 4)):
        assert choose_rectangles(gains, 0) == [(0, 0, 3, 4)]
        assert choose_rectangles(gains, np.inf) == []
    assert highest_price(np.zeros((3, 4))) == 0 and highest_price(-np.ones((3, 4))) == 0
    assert not choose_rectangles(np.zeros((3, 4)), 1e-9)


def test_rectangles_by_hand():
    gains = np.zeros((8, 8))
    gains[1, 1] = gains[6, 6] = 1
    # Each with its halo is 3 x 3 cells.
    assert choose_rectangles(gains, 0.11) == [(1, 1, 2, 2), (6, 6, 7, 7)]
    assert choose_rectangles(gains, 0.12) == []
    assert choose_rectangles(gains, 0.11, limit=1) == [(1, 1, 2, 2)]
    # An overhead of a cell and a price that the larger area is not worth.
    assert choose_rectangles(gains, 0.105, overhead=1) == []
    assert highest_price(gains) == pytest.approx(1 / 9)
    assert share_of_area([(1, 1, 2, 2)], (8, 8)) == 9 / 64
    # At the edge there is less halo.
    assert with_halo((0, 0, 1, 8), (8, 8)) == (0, 0, 2, 8)
    # The third is sought in what the first two leave.
    gains[1, 6] = 1
    assert len(choose_rectangles(gains, 0.11, limit=3)) == 3


def test_large_grids_are_searched_along_fewer_lines_and_trimmed():
    gains = np.zeros((130, 70))
    gains[64:66, 33] = 1
    assert choose_rectangles(gains, 0.01, limit=1) == [(64, 33, 66, 34)]


def test_choice_takes_less_than_a_millisecond():
    gains = np.random.default_rng(SEED).exponential(0.1, (20, 20))
    gains[gains < 0.2] = 0
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        choose_rectangles(gains, 0.02)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


def test_price_is_a_threshold():
    prices = [0, 1e-3, 0.1, 5, np.inf]
    thresholds = [threshold_of_price(price) for price in prices]
    assert thresholds == sorted(thresholds) and (thresholds[0], thresholds[-1]) == (0, 1)
    assert threshold_of_price(0.1) == 0.5
    assert [price_of_threshold(one) for one in thresholds] == pytest.approx(prices)
    assert price_of_threshold(-1) == 0


def test_prices_follow_from_shares_of_pixels():
    generator = np.random.default_rng(SEED)
    maps = [generator.exponential(1, (6, 7)) * (generator.random((6, 7)) < 0.2) for _ in range(50)]
    curve = price_curve(maps)
    assert (curve.shares[0], curve.shares[-1]) == (1, 0)
    assert (np.diff(curve.thresholds) > 0).all() and (np.diff(curve.shares) <= 1e-9).all()
    for share in (0.1, 0.3, 0.5):
        price = price_of_threshold(threshold_for_area(curve, share))
        got = np.mean([share_of_area(choose_rectangles(own, price), own.shape) for own in maps])
        assert abs(got - share) < 0.05
    assert (threshold_for_area(curve, 0), threshold_for_area(curve, 1)) == (1, 0)
    # A cost that is twice the share and 1.
    costs = 1 + 2 * curve.shares
    assert threshold_for_cost(curve, costs, 1.6) == pytest.approx(threshold_for_area(curve, 0.3))
    with pytest.raises(UsageError, match='in \\[0, 1\\]'):
        threshold_for_area(curve, 1.5)
    with pytest.raises(UsageError, match='validation set is empty'):
        price_curve([])


def test_cells_of_boxes():
    assert grid_of(64, 65) == (2, 3)
    boxes = [[0, 0, 10, 10], [40, 0, 60, 60], [0, 60, 500, 500], [-90, -90, 0, 0]]
    assert cells_of(boxes, (2, 3)).tolist() == [0, 1, 5, 0]


def test_planes_by_hand():
    boxes = np.array([[0, 0, 10, 10], [2, 2, 12, 12], [32, 0, 96, 64], [0, 0, 96, 96]], float)
    scores, labels = np.array([0.5, 0.25, 0.5, 1.0]), np.array([0, 1, 0, 0])
    planes = detection_planes(boxes, scores, labels, (3, 3), np.array([1.0, 2.0]))
    assert planes.shape == (PLANES, 3, 3)
    # Doubt and confidence of the small ones, of which the second counts twice.
    assert planes[:3, 0, 0].tolist() == [0.25 + 2 * 0.1875, 0.5 + 2 * 0.25, 0.75]
    assert planes[3:6, 1, 2].tolist() == [0.25, 0.5, 0.5]
    # A box of 96 x 96 is large.
    assert planes[6:9, 1, 1].tolist() == [0, 1, 1]
    assert planes[9].sum() == 4
    assert (rule_map(planes) == planes[0] + planes[3]).all()
    none = detection_planes(np.zeros((0, 4)), [], np.zeros(0, int), (3, 3), np.ones(2))
    assert none.shape == (PLANES, 3, 3) and not none.any()


def test_untrained_router_is_the_rule():
    planes = torch.rand(2, PLANES, 4, 5)
    assert torch.equal(RegionRouter()(planes), planes[:, 0] + planes[:, 3])
    router = RegionRouter(in_channels=(3,), hidden=4)
    router.trained.fill_(True)
    # Maps of any size are averaged over the cells.
    found = router(planes, [torch.rand(2, 3, 8, 10)])
    assert found.shape == (2, 4, 5) and found.dtype == torch.float32
    # It keeps its type.
    assert router.half().layers[0].weight.dtype == torch.float32
    with pytest.raises(UsageError, match='hidden'):
        RegionRouter(hidden=-1)


def test_tiles_cover_a_rectangle():
    for rectangle, most, count in (
        ((1, 2, 6, 9), 3, 6),
        ((0, 0, 5, 5), 5, 1),
        ((0, 0, 1, 7), 2, 4),
    ):
        covered = np.zeros((8, 10), int)
        tiles = tiles_of(rectangle, most)
        for top, left, bottom, right in tiles:
            assert 0 < bottom - top <= most and 0 < right - left <= most
            covered[top:bottom, left:right] += 1
        top, left, bottom, right = rectangle
        assert covered[top:bottom, left:right].min() == covered.max() == 1
        assert covered.sum() == (bottom - top) * (right - left) and len(tiles) == count


@pytest.mark.parametrize('case', range(10))
def test_many_rectangles_are_apart_and_worth_no_less_than_two(case):
    """On grids of clusters, as large images have them."""
    generator = np.random.default_rng([SEED, case])
    gains = np.zeros((40, 50))
    for center in generator.uniform([0, 0], gains.shape, (5, 2)):
        places = np.clip(generator.normal(center, 2, (6, 2)), 0, [39, 49]).astype(int)
        gains[tuple(places.T)] += generator.uniform(0.05, 0.3, 6)
    halo, limit, price, overhead = case % 3, 3 + case, 0.005, 2.0 * (case % 2)
    settings = gains, price, halo, overhead
    many = choose_rectangles(gains, price, halo, limit, overhead)
    assert 0 < len(many) <= limit
    assert all(apart(*pair) for pair in itertools.combinations(many, 2))
    assert all(worth(rectangle, *settings) > 0 for rectangle in many)
    two = choose_rectangles(gains, price, halo, 2, overhead)
    # Lines between clusters: little is lost that the exact pair has, and much is gained.
    assert sum(worth(rectangle, *settings) for rectangle in many) > 0.95 * sum(
        worth(rectangle, *settings) for rectangle in two
    )
    highest = highest_price(gains, halo, overhead, limit=limit)
    assert choose_rectangles(gains, 0.999 * highest, halo, limit, overhead)
    assert not choose_rectangles(gains, 1.001 * highest, halo, limit, overhead)


def test_many_rectangles_by_hand():
    gains = np.zeros((200, 170))
    corners = [(10, 10), (10, 150), (180, 20), (100, 90)]
    for row, column in corners:
        gains[row, column] = 1
    single = [(row, column, row + 1, column + 1) for row, column in corners]
    assert choose_rectangles(gains, 0.01, limit=16) == sorted(single)
    assert highest_price(gains, limit=16) == pytest.approx(1 / 9)
    # Where the limit says so, one is left: two together are not worth what lies between.
    three = choose_rectangles(gains, 0.01, limit=3)
    assert len(three) == 3 and set(three) < set(single)


def test_choice_on_a_huge_grid_is_fast():
    """40 megapixels, 60 cells that gain something: milliseconds of the processor."""
    generator = np.random.default_rng(SEED)
    gains = np.zeros((170, 200))
    gains[generator.integers(170, size=60), generator.integers(200, size=60)] = 0.2
    seconds = []
    for _ in range(5):
        start = time.process_time()
        choose_rectangles(gains, 0.005, 2, 16)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


@pytest.mark.parametrize('case', range(30))
def test_steps_leave_few_sizes_inside_the_image(case):
    generator = np.random.default_rng([SEED, case])
    grid, step = tuple(generator.integers(3, 9, 2).tolist()), 2 + case % 2
    for rectangle in every_rectangle(*grid):
        plain, grown = with_halo(rectangle, grid), with_halo(rectangle, grid, step=step)
        assert grown[0] <= plain[0] and grown[1] <= plain[1]
        assert grown[2] >= plain[2] and grown[3] >= plain[3]
        for start, end, count, least in zip(
            grown[:2], grown[2:], grid, (plain[2] - plain[0], plain[3] - plain[1])
        ):
            assert 0 <= start < end <= count
            # No longer than the next multiple, or the image.
            assert end - start == min(-(-least // step) * step, count)


@pytest.mark.parametrize('case', range(20))
def test_choice_counts_what_steps_add(case):
    """As without steps the best there is, by areas as large as they really are."""
    generator = np.random.default_rng([SEED, case])
    gains = generator.normal(0.3, 1, generator.integers(2, 6, 2))
    price, step = generator.random() * 0.6, 2 + case % 2
    every = {
        one: gains[one[0] : one[2], one[1] : one[3]].sum()
        - price * share_of_area([one], gains.shape, 1, step) * gains.size
        for one in every_rectangle(*gains.shape)
    }
    chosen = choose_rectangles(gains, price, limit=1, step=step)
    assert sum(every[one] for one in chosen) == pytest.approx(max(0, *every.values()), abs=1e-9)
    highest = highest_price(gains, step=step)
    assert bool(choose_rectangles(gains, 0.999 * highest, step=step)) == (highest > 0)
    assert not choose_rectangles(gains, 1.001 * highest + 1e-9, step=step)


def test_a_router_starts_its_training_at_the_rule():
    generator = torch.Generator().manual_seed(SEED)
    planes = torch.rand(2, PLANES, 4, 5, generator=generator)
    router = RegionRouter()
    router.mean.copy_(planes.mean((0, 2, 3)))
    router.std.copy_(planes.std((0, 2, 3)))
    router.start_training()
    assert router.trained
    torch.testing.assert_close(router(planes).detach(), rule_map(planes))
    hidden = RegionRouter(hidden=4)
    hidden.start_training()
    assert not hidden(planes).any()
