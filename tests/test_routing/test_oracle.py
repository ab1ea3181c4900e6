import itertools

import numpy as np
import pytest
from pycocotools.coco import COCO
from scipy.optimize import linprog

from dynamicdet.errors import UsageError
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.oracle import (
    allocate,
    honest_choices,
    object_count,
    oracle_choices,
    refine_choice,
)
from dynamicdet.routing.record import RoutingRecord

SHARES = (0, 0.25, 0.5, 0.75, 1)


def linear_programme(values, costs, budget):
    """The optimum where images may be split between exits, by HiGHS."""
    exits, n = values.shape
    costs = np.broadcast_to(costs[:, None] if costs.ndim == 1 else costs, values.shape)
    solution = linprog(
        -values.ravel(),
        A_ub=[costs.ravel()],
        b_ub=[budget * n],
        A_eq=np.tile(np.eye(n), exits),
        b_eq=np.ones(n),
        bounds=(0, 1),
    )
    assert solution.success
    return -solution.fun


def by_trying_all(values, costs, budget):
    n = values.shape[1]
    columns = np.arange(n)
    return max(
        values[list(choice), columns].sum()
        for choice in itertools.product(range(len(values)), repeat=n)
        if costs[list(choice)].sum() <= budget * n + 1e-9
    )


def random_values(generator, exits, n, kind):
    if kind == 'ties':
        return generator.integers(0, 3, (exits, n)) * 50.0
    if kind == 'skewed':
        return np.exp(generator.normal(0, 3, (exits, n)))
    return generator.uniform(-20, 100, (exits, n))


@pytest.mark.parametrize('kind', ['even', 'ties', 'skewed'])
@pytest.mark.parametrize('exits', [2, 3, 7])
@pytest.mark.parametrize('own_costs', [False, True])
def test_allocate_against_highs(kind, exits, own_costs):
    generator = np.random.default_rng(exits)
    for n in (1, 5, 60):
        values = random_values(generator, exits, n, kind)
        costs = generator.uniform(0, 10, (exits, n) if own_costs else exits)
        least = np.broadcast_to(costs.T, (n, exits)).min(1).mean()
        for budget in least + np.array([0, 0.05, 0.3, 0.7]) * (costs.max() - least):
            found = allocate(values, costs, budget)
            optimum = linear_programme(values, costs, budget)
            assert found.bound == pytest.approx(optimum, abs=1e-6 * np.abs(values).sum())
            assert found.value <= found.bound + 1e-6
            assert found.bound - found.value < np.ptp(values, axis=0).max() + 1e-6
            # The figures are those of the choice, and it is within the budget.
            columns = np.arange(n)
            assert found.value == pytest.approx(values[found.choice, columns].sum())
            paid = costs[found.choice, columns] if own_costs else costs[found.choice]
            assert found.cost == pytest.approx(paid.mean())
            assert found.cost <= budget + 1e-7


def test_gap_is_less_than_the_price_of_one_upgrade():
    generator = np.random.default_rng(0)
    values, costs = generator.uniform(0, 100, (4, 300)), np.array([1.0, 3.0, 4.5, 9.0])
    for budget in np.linspace(1, 8, 29):
        found = allocate(values, costs, budget)
        assert found.bound - found.value < found.price * (9 - 1) + 1e-6
        assert found.price == 0 or budget - found.cost < (9 - 1) / 300


@pytest.mark.parametrize('seed', range(5))
def test_allocate_two_exits_is_optimal(seed):
    generator = np.random.default_rng(seed)
    values, costs = (
        random_values(generator, 2, 8, 'ties' if seed % 2 else 'even'),
        np.array([2.0, 5.3]),
    )
    for hard in range(9):
        budget = 2.0 + 3.3 * hard / 8
        assert allocate(values, costs, budget).value == pytest.approx(
            by_trying_all(values, costs, budget)
        )


def test_allocate_fills_what_is_left():
    # 4 to spend. Image 0's upgrade to exit 2 gains most per cost (60 for 3), then image 1's (10 for
    # 1).
    values = np.array([[0, 0], [0, 10], [60, 15]])
    found = allocate(values, [0, 1, 3], budget=2)
    assert found.choice.tolist() == [2, 1] and found.value == 70 and found.cost == 2
    # 0.5 more buys nothing: image 1's next step costs 2.
    assert allocate(values, [0, 1, 3], budget=2.25).choice.tolist() == [2, 1]


def test_allocate_upgrades_an_image_once():
    # Each step of each image is worth 10 per cost: one image takes both steps, the other what is
    # left.
    found = allocate([[0, 0], [10, 10], [20, 20]], [0, 1, 2], budget=1.5)
    assert sorted(found.choice) == [1, 2] and found.value == 30


def test_allocate_many_ties_use_the_whole_budget():
    values = np.array([[0.0] * 1000, [50.0] * 1000])
    for share in (0.1, 0.333, 0.5, 0.999):
        found = allocate(values, [1, 3], 1 + 2 * share)
        assert found.choice.sum() == round(share * 1000)
        assert found.price == pytest.approx(25)


def test_allocate_dearer_exit_may_be_worse_and_listed_first():
    values = np.array([[10, 90], [70, 40], [20, 20]])
    costs = np.array([4, 2, 8])
    found = allocate(values, costs, 3)
    assert found.choice.tolist() == [1, 0] and found.value == 160
    # Enough for all: the best of each image, at no price.
    free = allocate(values, costs, 100)
    assert free.choice.tolist() == [1, 0] and free[1:] == (160, 3, 0, 160)
    assert allocate(values, costs, 2).choice.tolist() == [1, 1]


def test_allocate_takes_the_cheaper_of_equals():
    values = np.full((3, 4), 30.0)
    for budget in (1, 2, 100):
        found = allocate(values, [5, 1, 3], budget)
        assert (found.choice == 1).all() and found.price == 0
    # And the better of those that cost the same.
    assert (allocate([[1.0], [2.0]], [1, 1], 1).choice == 1).all()


def test_allocate_no_detection():
    # Rows: no detection, small exit, large exit.
    values = np.array([[0, 0, 0], [30, 10, 50], [40, 10, 90]])
    assert allocate(values, [0, 6, 16], 0).choice.tolist() == [0, 0, 0]
    # 18 in all: image 2 to exit 2 (90 for 16) leaves nothing for others; 12 for two small exits,
    # 80.
    assert (
        allocate(values, [0, 6, 16], 6).value
        == by_trying_all(values, np.array([0, 6, 16]), 6)
        == 90
    )


@pytest.mark.parametrize(
    'values, costs, budget, message',
    [
        ([[1, 2], [3, 4]], [1, 2], 0.5, 'below the cheapest'),
        ([[1, 2], [3, 4]], [1, 2], float('nan'), 'below the cheapest'),
        ([[1, 2], [3, 4]], [1, 2, 3], 2, 'costs must be'),
        ([1, 2], [1, 2], 2, r'\(K, n\)'),
        ([[], []], [1, 2], 2, r'\(K, n\)'),
        ([[1, float('nan')], [3, 4]], [1, 2], 2, 'not finite'),
    ],
)
def test_allocate_wrong_input(values, costs, budget, message):
    with pytest.raises(UsageError, match=message):
        allocate(values, costs, budget)


def test_oracle_choices_by_hand():
    values = [[50, 50, 50, 50], [60, 40, 50, 90]]
    assert oracle_choices(values, [0, 0.25, 0.5, 0.75, 1]).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 0, 1, 1],
        [1, 1, 1, 1],
    ]
    # As a budget it is not spent on images 1 and 2, which gain nothing.
    assert oracle_choices(values, [0.25, 0.5, 1], exact=False).tolist() == [
        [0, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 0, 0, 1],
    ]


def test_exact_shares_are_the_best_of_their_size():
    values = random_values(np.random.default_rng(3), 2, 9, 'ties')
    columns = np.arange(9)
    for hard, choice in enumerate(oracle_choices(values, np.arange(10) / 9)):
        best = max(
            values[list(other), columns].sum()
            for other in itertools.product((0, 1), repeat=9)
            if sum(other) == hard
        )
        assert choice.sum() == hard and values[choice, columns].sum() == best


def test_ties_are_not_cut_in_the_records_order():
    choice = oracle_choices(np.zeros((2, 1000)), [0.5])[0]
    assert choice.sum() == 500 and 200 < choice[:500].sum() < 300


@pytest.mark.parametrize(
    'values, share',
    [(np.zeros((3, 4)), 0.5), (np.zeros((2, 4)), 1.5), (np.full((2, 4), np.nan), 0.5)],
)
def test_oracle_choices_wrong_input(values, share):
    with pytest.raises(UsageError):
        oracle_choices(values, [share])


# Honest oracle: values alone


def gains(values, choices):
    """Gain over random routing at each choice's share, and its standard error."""
    benefit = values[1] - values[0]
    shares = choices.mean(1, keepdims=True)
    each = (choices - shares) * benefit
    return each.mean(1), each.std(1) / each.shape[1] ** 0.5


def test_what_is_luck_in_one_view_is_not_in_the_other():
    generator = np.random.default_rng(0)
    scored, view = generator.normal(50, 10, (2, 2, 20_000))
    honest, error = gains(scored, oracle_choices(view, [0.25, 0.5, 0.75]))
    plain, _ = gains(scored, oracle_choices(scored, [0.25, 0.5, 0.75]))
    assert (np.abs(honest) < 2 * error).all()
    assert (plain > 40 * error).all()


def test_what_both_views_agree_on_is_found():
    generator = np.random.default_rng(0)
    true = np.stack([np.zeros(20_000), generator.normal(0, 10, 20_000)])
    scored, view = true + generator.normal(0, 1, (2, *true.shape))
    honest, error = gains(scored, oracle_choices(view, [0.5]))
    plain, _ = gains(scored, oracle_choices(scored, [0.5]))
    assert honest > 50 * error and 0.95 * plain < honest < plain


# On detections


def ground_truth(boxes):
    coco = COCO()
    flat = [(image, box) for image, own in enumerate(boxes, 1) for box in own]
    coco.dataset = dict(
        images=[dict(id=image, width=200, height=200) for image in range(1, len(boxes) + 1)],
        categories=[dict(id=7, name='thing')],
        annotations=[
            dict(
                id=index,
                image_id=image,
                bbox=list(box),
                area=box[2] * box[3],
                category_id=7,
                iscrowd=0,
            )
            for index, (image, box) in enumerate(flat, 1)
        ],
    )
    coco.createIndex()
    return coco


def found(boxes, score=0.9):
    return [dict(bbox=[float(side) for side in box], score=score, category_id=7) for box in boxes]


def make_record(detections, views=None):
    """Record of images 1, 2, ...; ``detections`` and ``views``: per image those of each exit."""
    images = [
        dict(id=index, file=f'{index}.jpg', difficulty=0.5, detections=own)
        for index, own in enumerate(detections, 1)
    ]
    for image, view in zip(images, views or []):
        image['view'] = view
    return RoutingRecord.from_images(images, [1.0, 3.0], [0.01, 0.02])


def noisy_case(n, deviations, seed=0):
    """Two objects per image; ``deviations``, (2, n): of each exit's corners, pixels; a draw for
    each view."""
    generator = np.random.default_rng(seed)
    truth = [[[*generator.uniform(0, 100, 2), 30, 30] for _ in range(2)] for _ in range(n)]

    def draw():
        return [
            [
                [
                    dict(
                        found(
                            [np.add(box, [*generator.normal(0, deviations[exit][image], 2), 0, 0])]
                        )[0],
                        score=generator.uniform(),
                    )
                    for box in own
                ]
                for exit in range(2)
            ]
            for image, own in enumerate(truth)
        ]

    return ground_truth(truth), make_record(draw(), draw())


def gain_at_half(mixtures, choice, weights=None):
    ends = [mixtures.ap(np.full(len(choice), exit), weights) for exit in (0, 1)]
    return mixtures.ap(choice, weights) - sum(ends) / 2


def bootstrap_error(mixtures, choice, draws=40):
    generator = np.random.default_rng(0)
    n = len(choice)
    return np.std(
        [
            gain_at_half(mixtures, choice, generator.multinomial(n, np.full(n, 1 / n)))
            for _ in range(draws)
        ]
    )


def test_honest_oracle_of_exits_that_differ_by_luck():
    coco, record = noisy_case(300, np.full((2, 300), 3.0))
    mixtures = Mixtures(record, coco)
    honest = honest_choices(record, coco, [0.5])[0]
    plain = oracle_choices(mixtures.image_ap(), [0.5])[0]
    assert honest.sum() == plain.sum() == 150
    error = bootstrap_error(mixtures, honest)
    assert abs(gain_at_half(mixtures, honest)) < 2 * error
    assert gain_at_half(mixtures, plain) > 5 * error


def test_honest_oracle_of_exits_that_differ():
    better = np.arange(300) % 3 == 0
    coco, record = noisy_case(300, np.stack([np.full(300, 4.0), np.where(better, 0.2, 9.0)]))
    mixtures = Mixtures(record, coco)
    honest = honest_choices(record, coco, [1 / 3])[0]
    assert honest[better].mean() > 0.9
    plain = oracle_choices(mixtures.image_ap(), [1 / 3])[0]
    start = mixtures.ap(np.zeros(300, int))
    assert mixtures.ap(honest) - start > 0.75 * (mixtures.ap(plain) - start) > 5


def test_honest_oracle_needs_views():
    record = make_record([[[], found([[10, 10, 20, 20]])]])
    with pytest.raises(UsageError, match='second view'):
        honest_choices(record, ground_truth([[[10, 10, 20, 20]]]), [0.5])


ROW = [[20 * index, 10, 15, 30] for index in range(5)]


def crowded_case():
    """Images of one object and of five. Exit 1 finds the one object; or all five where exit 0 finds
    two."""
    truth = [ROW[:1]] * 4 + [ROW] * 4
    detections = [[[], found(ROW[:1])]] * 4 + [[found(ROW[:2]), found(ROW)]] * 4
    return ground_truth(truth), make_record(detections, detections)


def test_refine_finds_what_the_sum_over_images_misses():
    coco, record = crowded_case()
    mixtures = Mixtures(record, coco)
    # By its own AP an image of one object gains more (100) than one of five (59), which holds more
    # objects.
    start = oracle_choices(mixtures.image_ap(), [0.5])[0]
    assert start.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    refined = refine_choice(mixtures, start, evaluations=100)
    assert refined.choice.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert refined.start_ap == mixtures.ap(start) < refined.ap == mixtures.ap(refined.choice)
    # Counting objects finds it at once.
    assert honest_choices(record, coco, [0.5])[0].tolist() == start.tolist()
    assert (
        honest_choices(record, coco, [0.5], by_objects=True)[0].tolist() == refined.choice.tolist()
    )


def test_refine_is_bounded_keeps_the_counts_and_repeats():
    coco, record = noisy_case(40, np.full((2, 40), 4.0))
    mixtures = Mixtures(record, coco)
    start = oracle_choices(mixtures.image_ap(), [0.5])[0]
    kept = start.copy()
    before = -1
    for evaluations in (1, 2, 40, 160):
        refined = refine_choice(mixtures, start, evaluations, seed=3)
        assert refined.evaluations <= evaluations and refined.choice.sum() == start.sum() == 20
        assert refined.ap >= max(before, refined.start_ap)
        assert refined.ap == mixtures.ap(refined.choice)
        before = refined.ap
    assert refined.ap > refined.start_ap + 0.3
    again = refine_choice(mixtures, start, 160, seed=3)
    assert (again.choice == refined.choice).all() and again.ap == refined.ap
    assert (start == kept).all()


def test_refine_ends_where_there_is_nothing_to_swap():
    coco, record = crowded_case()
    mixtures = Mixtures(record, coco)
    assert refine_choice(mixtures, np.ones(8, int)).evaluations == 1
    # The best: each of the 16 pairs is tried, none gains.
    best = refine_choice(mixtures, [0, 0, 0, 0, 1, 1, 1, 1], evaluations=1000)
    assert best.choice.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and best.evaluations < 200


def test_refine_three_exits():
    coco, record = crowded_case()
    images = [
        dict(id=one['id'], file='', difficulty=0.5, detections=[[], *one['detections']])
        for one in record
    ]
    record = RoutingRecord.from_images(images)
    mixtures = Mixtures(record, coco)
    start = np.array([2, 2, 1, 0, 0, 1, 1, 2])
    refined = refine_choice(mixtures, start, evaluations=300)
    assert np.bincount(refined.choice).tolist() == np.bincount(start).tolist()
    # Full detections and the two of five where there are five objects, none where there is one.
    assert np.bincount(refined.choice[4:], minlength=3).tolist() == [0, 1, 3]


def test_crowds_are_no_objects():
    coco = ground_truth([ROW, []])
    coco.dataset['annotations'][0]['iscrowd'] = 1
    assert object_count(coco, 1) == 4 and object_count(coco, 2) == 0
