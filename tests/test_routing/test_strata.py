import dataclasses
import json

import numpy as np
import pytest
from routing_cases import BOX, found, ground_truth, make_record, random_case

from conftest import rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.routing.curve import RandomRouting, calibrated_trade_off, trade_off
from dynamicdet.routing.evaluation import Mixtures, evaluate, mixed_results
from dynamicdet.routing.strata import (
    OBJECTS,
    by_difficulty,
    by_objects,
    by_size,
    exit_benefits,
    rank_correlations,
)
from dynamicdet.routing.thresholds import hard_share

LARGE = [50, 50, 120, 120]


def grid(count):
    """So many boxes apart from each other."""
    return [[30 * (index % 5), 30 * (index // 5), 20, 20] for index in range(count)]


@pytest.fixture(scope='module')
def counted():
    """Images of 0, 1, 2, 3, 4, 8, 9 and 12 objects; exit 1 finds all, exit 0 those of up to
    three."""
    counts = [0, 1, 2, 3, 4, 8, 9, 12]
    truth = [grid(count) for count in counts]
    second = [found(*boxes) for boxes in truth]
    record = make_record(
        np.linspace(0, 1, 8), [own if len(own) <= 3 else [] for own in second], second
    )
    images = [
        dict(image, objects=count, losses=[float(count), 1.0])
        for image, count in zip(record, counts)
    ]
    return ground_truth(truth), rebuilt(record, images)


def test_by_size():
    coco = ground_truth([[BOX, LARGE]] * 2)
    record = make_record([0.1, 0.9], [found(BOX), []], [found(BOX, LARGE)] * 2, [[], found(LARGE)])
    half = pytest.approx(100 * 51 / 101)
    assert by_size(Mixtures(record, coco)) == dict(
        small=[half, pytest.approx(100), 0], medium=[None] * 3, large=[0, pytest.approx(100), half]
    )


def test_by_objects(counted):
    coco, record = counted
    rows = by_objects(record, Mixtures(record, coco))
    assert [row['objects'] for row in rows] == list(OBJECTS) == ['0', '1', '2', '3-4', '5-8', '9+']
    assert [row['images'] for row in rows] == [1, 1, 1, 2, 1, 2]
    assert rows[0]['ap'] == [None, None]
    # Three of seven objects: recall 0.428..., 43 of 101 recalls.
    firsts = [100, 100, 100 * 43 / 101, 0, 0]
    assert [row['ap'] for row in rows[1:]] == [pytest.approx([first, 100]) for first in firsts]
    assert json.loads(json.dumps(rows)) == rows
    record = dataclasses.replace(record, objects=None)
    with pytest.raises(UsageError, match='lacks objects'):
        by_objects(record, Mixtures(record, coco))


def test_strata_are_as_if_alone():
    coco, record = random_case()
    mixtures = Mixtures(record, coco)
    difficulties = np.array([image['difficulty'] for image in record])
    rows = by_difficulty(mixtures, difficulties, parts=4)
    assert [row['images'] for row in rows] == [8, 8, 7, 7]
    for row in rows:
        inside = (difficulties >= row['low']) & (difficulties <= row['high'])
        assert inside.sum() == row['images']
        ids = [image['id'] for image, own in zip(record, inside) if own]
        for exit in (0, 1):
            results = [own for own in mixed_results(record, [exit] * 30) if own['image_id'] in ids]
            assert row['ap'][exit] == pytest.approx(evaluate(coco, results, ids)['ap'])


def test_by_difficulty_of_few_or_equal_images(counted):
    coco, record = counted
    rows = by_difficulty(Mixtures(record, coco), [0.5] * 8)
    assert [row['images'] for row in rows] == [1] * 8
    assert all(row['low'] == row['high'] == 0.5 for row in rows)


def test_benefits(counted):
    coco, record = counted
    found = exit_benefits(record, Mixtures(record, coco))
    counts = np.array([0, 1, 2, 3, 4, 8, 9, 12])
    assert found['ap'] == pytest.approx(np.where(counts > 3, 100, 0))
    assert found['loss'].tolist() == (counts - 1).tolist()
    assert found['loss_objects'].tolist() == (counts * (counts - 1)).tolist()
    back = exit_benefits(record, Mixtures(record, coco), exits=(1, 0))
    assert back['ap'] == pytest.approx(-found['ap']) and (back['loss'] == -found['loss']).all()
    bare = dataclasses.replace(record, losses=None)
    assert set(exit_benefits(bare, Mixtures(bare, coco))) == {'ap'}


def test_rank_correlations():
    scores = np.linspace(0, 1, 50)
    noise = np.random.default_rng(0).uniform(size=50)
    found = rank_correlations(
        scores, dict(same=scores**3, against=-scores, noise=noise, none=0 * scores)
    )
    assert found['same']['correlation'] == pytest.approx(1) and found['same'][
        'low'
    ] == pytest.approx(1)
    assert found['against']['correlation'] == pytest.approx(-1)
    assert abs(found['noise']['correlation']) < 0.3
    assert found['noise']['low'] < found['noise']['correlation'] < found['noise']['high']
    assert found['none'] == dict(correlation=None, low=None, high=None)
    assert json.loads(json.dumps(found)) == found


def test_thresholds_of_other_images(counted):
    coco, record = counted
    test = np.array([image['difficulty'] for image in record])
    random_routing = RandomRouting(Mixtures(record, coco), resamples=0)
    # The calibration's images are easier: at its median, 1/4, six of the eight test images are
    # hard.
    rows = calibrated_trade_off(record, random_routing, test / 2, shares=(0, 0.5, 1))
    none, half, all_hard = rows
    for row, own, threshold in ((none, 0, 1), (all_hard, 1, -1)):
        assert (hard_share(test / 2, row['threshold']), row['hard_share']) == (own, own)
        assert row['threshold'] == threshold
        # Forced thresholds serve all or none: nothing is left to chance.
        assert (row['chance_low'], row['chance_high']) == (own, own)
    assert half['threshold'] == pytest.approx(1.75 / 7, abs=1e-6)
    assert (hard_share(test / 2, half['threshold']), half['hard_share']) == (0.5, 0.75)
    assert half['chance_low'] < 0.5 < half['chance_high']
    # All images with more than three objects are among either's hard ones.
    (own,) = trade_off(record, coco, shares=[0.5], random_routing=random_routing)
    assert half['ap'] == own['ap'] == pytest.approx(100)
    # Harder ones: threshold 0.9, only the image of 12 is hard. 18 of 39 objects: 47 of 101 recalls.
    (high,) = calibrated_trade_off(record, random_routing, [0.8, 1.0], [0.5])
    assert (hard_share([0.8, 1.0], high['threshold']), high['hard_share']) == (0.5, 0.125)
    assert (high['ap'], own['ap']) == pytest.approx((100 * 47 / 101, 100))
    assert json.loads(json.dumps(rows)) == rows
