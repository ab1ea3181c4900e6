import contextlib
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval
from routing_cases import BOX, found, ground_truth, make_record, random_case

from conftest import rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.curve import (
    RandomRouting,
    choose_exits,
    costs_of,
    gain_over_random,
    hardest_for_gflops,
    split_by_share,
    trade_off,
)
from dynamicdet.routing.evaluation import AREAS, Mixtures, check_record, evaluate, mixed_results
from dynamicdet.routing.record import RoutingRecord

#: Precision 1 up to a recall of one half: 51 of the 101 recalls that COCO looks at.
HALF_FOUND = 100 * 51 / 101


@pytest.fixture
def coco():
    return ground_truth([[BOX]] * 8)


def only_hard_gain(difficulties):
    """Exit 1 finds all objects, exit 0 those of images 1 to 4."""
    return make_record(difficulties, [found(BOX)] * 4 + [[]] * 4, [found(BOX)] * 8)


PERFECT = [0.1, 0.15, 0.2, 0.25, 0.6, 0.7, 0.8, 0.9]


def test_evaluate_by_hand(coco):
    hits = [dict(result, image_id=image) for image in range(1, 5) for result in found(BOX)]
    scores = evaluate(coco, hits)
    assert scores['ap'] == scores['ap50'] == scores['small'] == pytest.approx(HALF_FOUND)
    # A box of 400 square pixels is small: there is nothing of another size.
    assert scores['medium'] is None and scores['large'] is None
    # All that is there is found, if only those images are looked at.
    assert evaluate(coco, hits, image_ids=[1, 2, 3, 4])['ap'] == pytest.approx(100)


def test_evaluate_counts_overlap(coco):
    # 20 x 20 against 20 x 16: IoU 0.8, right at 0.5, 0.55, ... 0.8, seven of ten.
    close = [dict(found([10, 10, 20, 16])[0], image_id=image) for image in range(1, 9)]
    scores = evaluate(coco, close)
    assert scores['ap50'] == pytest.approx(100)
    assert scores['ap'] == pytest.approx(70)


def test_evaluate_agrees_with_pycocotools(capsys):
    coco, record = random_case()
    results = mixed_results(record, [True] * 30)
    before = copy.deepcopy(results)
    capsys.readouterr()
    scores = evaluate(coco, results)
    assert results == before
    assert capsys.readouterr().out == ''
    with contextlib.redirect_stdout(io.StringIO()):
        own = COCOeval(coco, coco.loadRes(results), 'bbox')
        own.evaluate()
        own.accumulate()
        own.summarize()
    expected = 100 * own.stats[[0, 1, 3, 4, 5]]
    keys = ('ap', 'ap50', 'small', 'medium', 'large')
    assert np.allclose([scores[key] for key in keys], expected)
    assert [list(area) for area in AREAS.values()] == own.params.areaRng


def test_evaluate_nothing(coco):
    assert evaluate(coco, [])['ap'] == 0
    assert evaluate(ground_truth([[]]), [])['ap'] is None
    false = [dict(found(BOX)[0], image_id=1)]
    assert evaluate(ground_truth([[]]), false)['ap'] is None


def test_mix_takes_the_exit_of_each_image():
    record = make_record(
        [0.1, 0.9, 0.5],
        [found([1, 1, 1, 1]), found([2, 2, 2, 2]), []],
        [found([3, 3, 3, 3]), found([4, 4, 4, 4]), found([5, 5, 5, 5])],
    )
    taken = mixed_results(record, [False, True, False])
    assert [(result['image_id'], result['bbox'][0]) for result in taken] == [(1, 1), (2, 4)]


def test_perfect_router(coco):
    rows = trade_off(only_hard_gain(PERFECT), coco, shares=(0, 0.25, 0.5, 0.75, 1))
    first, quarter, half, three_quarters, last = rows
    assert first['ap'] == pytest.approx(HALF_FOUND) and half['ap'] == pytest.approx(100)
    for row in (quarter, half, three_quarters):
        assert row['ap'] > row['random_ap'] and row['random_std'] > 0
    for row in (first, last):
        assert row['ap'] == row['random_ap'] and row['random_std'] == 0
    assert [row['hard_share'] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert half['threshold'] == pytest.approx(0.425)
    assert half['gflops'] == pytest.approx(2) and quarter['latency'] == pytest.approx(0.0125)
    # At half hard, all that exit 1 gains is there: half of it is above the straight line.
    gain = gain_over_random(rows)
    assert gain['half'] == pytest.approx(0.5) and gain['mean'] > 0


def test_inverted_router(coco):
    rows = trade_off(only_hard_gain(PERFECT[::-1]), coco, shares=(0, 0.25, 0.5, 0.75, 1))
    assert rows[2]['ap'] == pytest.approx(HALF_FOUND)
    assert all(row['ap'] < row['random_ap'] for row in rows[1:-1])
    assert all(row['ap'] == row['random_ap'] for row in (rows[0], rows[-1]))
    gain = gain_over_random(rows)
    assert gain['half'] == pytest.approx(-0.5) and gain['mean'] < 0


def test_ties_go_together(coco):
    (same,) = trade_off(only_hard_gain([0.5] * 8), coco, shares=(0.4,))
    assert same['hard_share'] == 0 and same['ap'] == same['random_ap']
    assert gain_over_random([same]) == dict(mean=None, half=None)
    # Six share a score: at 0.5, the two easiest or the eight of them can be parted off, not four.
    (parted,) = trade_off(only_hard_gain([0.1] * 2 + [0.9] * 6), coco, shares=(0.5,))
    assert parted['hard_share'] == 0.75 and parted['gflops'] == pytest.approx(2.5)


def test_no_gain_where_the_ends_agree(coco):
    record = make_record(PERFECT, [found(BOX)] * 8, [found(BOX)] * 8)
    gain = gain_over_random(trade_off(record, coco, resamples=0))
    assert gain['half'] is None and gain['mean'] == pytest.approx(0)


def test_images_without_objects_or_detections():
    coco = ground_truth([[BOX], [], [BOX], []])
    # Image 2: exit 0 sees a thing that is not there, surer than of all others. Image 4: nothing.
    ghost = found(BOX, score=0.99)
    record = make_record(
        [0.1, 0.9, 0.2, 0.3], [found(BOX), ghost, found(BOX), []], [found(BOX), [], found(BOX), []]
    )
    first, quarter, last = trade_off(record, coco, shares=(0, 0.25, 1))
    # One wrong, two right: precision 2/3 at every recall.
    assert first['ap'] == pytest.approx(100 * 2 / 3)
    assert quarter['ap'] == last['ap'] == pytest.approx(100)


def test_nothing_detected_is_zero(coco):
    rows = trade_off(make_record(PERFECT, [[]] * 8, [[]] * 8), coco, shares=(0, 0.5, 1))
    assert [row['ap'] for row in rows] == [0, 0, 0]


def test_trade_off_agrees_with_evaluating_the_mixture():
    coco, record = random_case()
    for row in trade_off(record, coco, resamples=0):
        hard = [image['difficulty'] > row['threshold'] for image in record]
        scores = evaluate(coco, mixed_results(record, hard))
        assert row['hard_share'] == np.mean(hard)
        assert (row['ap'], row['ap50']) == pytest.approx((scores['ap'], scores['ap50']))


def test_part_of_the_data_set(coco):
    record = only_hard_gain(PERFECT)
    record = record.take(range(2, 6))
    first, last = trade_off(record, coco, shares=(0, 1))
    assert first['ap'] == pytest.approx(HALF_FOUND) and last['ap'] == pytest.approx(100)


def test_seed_progress_and_silence(capsys):
    coco, record = random_case()
    capsys.readouterr()
    calls = []
    rows = trade_off(record, coco, progress=lambda *done: calls.append(done), resamples=20)
    assert rows == trade_off(record, coco, resamples=20)
    other = trade_off(record, coco, seed=1, resamples=20)
    for name in ('random_ap', 'ap_low', 'random_low', 'gain_high'):
        assert rows[5][name] != other[5][name]
    assert rows[5]['ap'] == other[5]['ap']
    assert calls == [(count, 11) for count in range(1, 12)]
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -0.1, 1.1])
def test_bad_difficulty(coco, value):
    record = only_hard_gain(PERFECT[:-1] + [value])
    with pytest.raises(UsageError, match=r'image 8 \(8.jpg\) has difficulty'):
        trade_off(record, coco)


def test_bad_records(coco):
    record = only_hard_gain(PERFECT)
    with pytest.raises(UsageError, match='no images'):
        trade_off(record.take([]), coco)
    with pytest.raises(UsageError, match='image 1 .* twice'):
        check_record(record.take([0, 0]), coco)
    with pytest.raises(UsageError, match='image 99 .* not in the annotation file'):
        check_record(rebuilt(record, [dict(record[0], id=99)]), coco)
    with pytest.raises(UsageError, match='no objects'):
        trade_off(record, ground_truth([[]] * 8))
    with pytest.raises(UsageError, match='2 random draws'):
        trade_off(record, coco, random_draws=1)


def test_choose():
    difficulties = [0.1, 0.3, 0.30001, 0.9]
    assert choose_exits(difficulties, [0.3]).tolist() == [0, 0, 1, 1]
    assert choose_exits(difficulties, [0.2, 0.5]).tolist() == [0, 1, 1, 2]
    # Equal thresholds: nothing leaves in between. -1 sends all on, 1 none.
    assert choose_exits(difficulties, [0.3, 0.3, 1]).tolist() == [0, 0, 2, 2]
    assert choose_exits([0, 1], [-1, 1]).tolist() == [1, 1]
    # As in the model, in float32: this threshold is the difficulty.
    assert choose_exits(np.float32([0.1]), [np.float64(np.float32(0.1))]).tolist() == [0]
    for thresholds in ([0.5, 0.2], [float('nan')]):
        with pytest.raises(UsageError, match='must not fall'):
            choose_exits(difficulties, thresholds)


def test_split_takes_scores_of_any_range():
    threshold, is_hard = split_by_share([0.1, 0.2, 0.6, 0.9], 0.5)
    assert threshold == pytest.approx(0.4) and is_hard.tolist() == [False, False, True, True]
    threshold, is_hard = split_by_share([-40, 3, 900, 20], 0.5)
    assert threshold == pytest.approx(11.5, abs=1e-3) and is_hard.tolist() == [
        False,
        False,
        True,
        True,
    ]
    for share in (0, 1):
        threshold, is_hard = split_by_share([-40, 3, 900, 20], share)
        assert (is_hard == bool(share)).all()
        assert (np.array([-40, 3, 900, 20]) > threshold).tolist() == is_hard.tolist()
    with pytest.raises(UsageError, match='not finite'):
        split_by_share([0.1, float('inf')], 0.5)


def test_any_router_by_its_scores(coco):
    record = only_hard_gain(PERFECT)
    # Known by its losses, say: the same order, another range.
    rows = trade_off(record, coco, [-3, -2, -1, 0, 5, 7, 8, 200], shares=(0.5,))
    assert rows[0]['ap'] == pytest.approx(100) and 0 < rows[0]['threshold'] < 5
    against = trade_off(record, coco, -np.array(PERFECT), shares=(0.5,))
    assert against[0]['ap'] == pytest.approx(HALF_FOUND)
    with pytest.raises(UsageError, match='one score for each of 8'):
        trade_off(record, coco, [0.1] * 7)


def test_any_two_of_three_exits(coco):
    nothing = [[]] * 8
    record = make_record(PERFECT, [found(BOX)] * 4 + [[]] * 4, nothing, [found(BOX)] * 8)
    first, last = trade_off(record, coco, shares=(0, 1), resamples=0)
    assert last['ap'] == pytest.approx(100) and last['gflops'] == 5
    first, half, last = trade_off(record, coco, shares=(0, 0.5, 1), exits=(1, 2), resamples=20)
    assert (first['ap'], last['ap']) == pytest.approx((0, 100))
    assert half['ap'] == pytest.approx(HALF_FOUND) and half['gflops'] == 4
    assert half['latency'] == pytest.approx(0.025)
    with pytest.raises(UsageError, match='no exit 3'):
        trade_off(record, coco, exits=(0, 3))


def test_intervals():
    coco, record = random_case(images=60)
    rows = trade_off(record, coco, shares=(0, 0.5, 1))
    for row in rows:
        assert row['ap_low'] < row['ap'] < row['ap_high']
        assert row['random_low'] < row['random_ap'] < row['random_high']
        assert row['gain_low'] <= row['gain_high']
    # Where all take one exit, random routing is the router: paired, the gain is known to be
    # nothing.
    assert all(row['gain_low'] == row['gain_high'] == 0 for row in (rows[0], rows[2]))
    # Paired, the gain is known better than from two intervals that do not know of each other.
    middle = rows[1]
    spread = middle['ap_high'] - middle['ap_low'] + middle['random_high'] - middle['random_low']
    assert 0 < middle['gain_high'] - middle['gain_low'] < 0.8 * spread
    assert json.loads(json.dumps(rows)) == rows
    (none,) = trade_off(record, coco, shares=(0.5,), resamples=0)
    assert none['ap_low'] is None and none['gain_high'] is None
    assert none['ap'] == middle['ap'] and none['random_ap'] == middle['random_ap']


def test_intervals_cover_what_they_should():
    """Exit 1 finds each object with probability 0.6: the intervals hold the AP that it would have
    on images without number about nineteen times in twenty."""
    generator, held = np.random.default_rng(0), 0
    coco = ground_truth([[BOX]] * 60)
    for _ in range(40):
        hits = generator.uniform(size=60) < 0.6
        record = make_record([0.5] * 60, [[]] * 60, [found(BOX) if hit else [] for hit in hits])
        # Precision is 1 up to the recall, which is about 0.6: the first 61 of 101 recalls.
        low, high = confidence_interval(
            RandomRouting(Mixtures(record, coco), resamples=80).resampled([1] * 60)
        )
        held += low <= 100 * 61 / 101 <= high
    assert 34 <= held < 40


def test_chance_expects_what_draws_give():
    coco, record = random_case(images=80, crowds=False)
    mixtures = Mixtures(record, coco)
    random_routing = RandomRouting(mixtures, draws=200, resamples=150)
    mean, deviation, resampled = random_routing.at(40)
    ends = mixtures.ap([0] * 80), mixtures.ap([1] * 80)
    assert min(ends) < mean < max(ends) and deviation > 0
    # On a resample, too: against draws by brute force on the first few.
    generator = np.random.default_rng(1)
    halves = np.arange(80) % 2
    brute = [
        np.mean([mixtures.ap(generator.permutation(halves), own) for _ in range(60)])
        for own in random_routing.weights[:8]
    ]
    error = np.array(brute) - resampled[:8]
    assert abs(error.mean()) < 0.5 and error.std() < np.std(brute)
    assert random_routing.at(40)[2] is resampled


def test_bootstrap_weights():
    weights = bootstrap_weights(50, 30, seed=3)
    assert weights.shape == (30, 50) and (weights.sum(axis=1) == 50).all()
    assert (weights == bootstrap_weights(50, 30, seed=3)).all()
    assert (weights != bootstrap_weights(50, 30, seed=4)).any()


def test_interval():
    assert confidence_interval(np.arange(1001)) == (25, 975)
    assert confidence_interval([1.0, float('nan'), 1.0]) == (1, 1)
    assert confidence_interval([]) == confidence_interval([float('nan')]) == (None, None)


def test_hard_images_that_are_dearer_cost_more():
    """Two of four images are hard, and twice as large: the mean is of what was run, not of
    means."""
    coco, record = random_case(images=4)
    record = rebuilt(record, gflops=[1.5, 3.0], latencies=[0.015, 0.03])
    scores = np.array([image['difficulty'] for image in record])
    hard = scores > np.sort(scores)[1]
    plain = trade_off(record, coco, shares=[0.5])[0]
    assert (plain['gflops'], plain['latency']) == pytest.approx((2.25, 0.0225))
    images = [
        dict(
            image,
            gflops=[2.0, 4.0] if large else [1.0, 2.0],
            latencies=[0.02, 0.04] if large else [0.01, 0.02],
        )
        for image, large in zip(record, hard)
    ]
    record = rebuilt(record, images)
    row = trade_off(record, coco, shares=[0.5])[0]
    assert (row['gflops'], row['latency']) == pytest.approx((2.5, 0.025))


@pytest.mark.parametrize(
    'scores', [1e9 + np.arange(10), -3.0 + np.arange(10), np.arange(10) / 10, np.arange(10) - 1e6]
)
def test_scores_of_any_scale_are_parted(scores):
    for hard in range(11):
        threshold, is_hard = split_by_share(scores, hard / 10)
        assert is_hard.tolist() == [place >= 10 - hard for place in range(10)]
        if 0 < hard < 10:
            assert ((scores > threshold) == is_hard).all()


def of_two_sizes():
    """Four images; the two with the higher score are four times as dear."""
    scores = [0.1, 0.2, 0.8, 0.9]
    images = [
        dict(image, gflops=[cost, 2 * cost], latencies=[cost / 10, cost / 5])
        for image, cost in zip(make_record(scores, [[]] * 4, [[]] * 4), (1.0, 1.0, 4.0, 4.0))
    ]
    return RoutingRecord.from_images(images, [2.5, 5.0], [0.25, 0.5]), np.array(scores)


def test_a_choice_costs_what_its_images_cost():
    record, scores = of_two_sizes()
    assert costs_of(record, scores > 0.5) == pytest.approx(dict(gflops=4.5, latency=0.45))
    assert costs_of(record, scores < 0.5) == pytest.approx(dict(gflops=3.0, latency=0.30))
    # Half of them drawn at random.
    assert costs_of(record, 0.5) == pytest.approx(dict(gflops=3.75, latency=0.375))
    alike = dataclasses.replace(record, image_gflops=None, image_latencies=None)
    assert costs_of(alike, scores > 0.5)['gflops'] == pytest.approx(3.75)


@pytest.mark.parametrize(
    'gflops, hard',
    [(2.0, 0), (2.5, 0), (3.4, 0), (3.5, 1), (4.5, 2), (4.7, 2), (4.75, 3), (5.0, 4), (9.0, 4)],
)
def test_what_a_router_can_afford(gflops, hard):
    record, scores = of_two_sizes()
    assert hardest_for_gflops(record, scores, gflops).tolist() == [
        place >= 4 - hard for place in range(4)
    ]
