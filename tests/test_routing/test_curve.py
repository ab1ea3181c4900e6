import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dynamicdet.errors import UsageError
from dynamicdet.routing.curve import (AREAS, check_record, evaluate, gain_over_random, mix,
                                      trade_off)

BOX = [10, 10, 20, 20]
#: Precision 1 up to a recall of one half: 51 of the 101 recalls that COCO looks at.
HALF_FOUND = 100 * 51 / 101


def ground_truth(boxes):
    """COCO of one category; ``boxes`` holds a list of boxes per image, ids from 1."""
    coco = COCO()
    annotations = [dict(image_id=image, bbox=box, area=box[2] * box[3], category_id=7, iscrowd=0)
                   for image, own in enumerate(boxes, 1) for box in own]
    coco.dataset = dict(
        images=[dict(id=image, width=200, height=200) for image in range(1, len(boxes) + 1)],
        categories=[dict(id=7, name='thing')],
        annotations=[dict(annotation, id=index) for index, annotation in enumerate(annotations, 1)])
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def found(*boxes, score=0.9):
    return [dict(bbox=list(box), score=score, category_id=7) for box in boxes]


def make_record(difficulties, first, second):
    """Record of images 1, 2, ...; ``first``, ``second``: detections per image of each exit."""
    images = [dict(id=index, file=f'{index}.jpg', difficulty=difficulty, detections=[easy, hard])
              for index, (difficulty, easy, hard) in enumerate(zip(difficulties, first, second), 1)]
    return dict(images=images, gflops=[1.0, 3.0], latencies=[0.010, 0.020], provenance={})


@pytest.fixture
def coco():
    return ground_truth([[BOX]] * 8)


def only_hard_gain(difficulties):
    """Exit 1 finds all objects, exit 0 those of images 1 to 4."""
    return make_record(difficulties, [found(BOX)] * 4 + [[]] * 4, [found(BOX)] * 8)


PERFECT = [0.1, 0.15, 0.2, 0.25, 0.6, 0.7, 0.8, 0.9]


def random_case(images=30, seed=0):
    """Ground truth of several sizes and a record with errors of all kinds, in shuffled order."""
    generator = np.random.default_rng(seed)

    def boxes(count):
        return [[*generator.uniform(0, 60, 2), *generator.uniform(8, 130, 2)] for _ in range(count)]

    truth = [boxes(generator.integers(0, 4)) for _ in range(images)]

    def detect(own, noise):
        moved = [np.add(box, generator.normal(0, noise, 4)).clip(1) for box in own]
        return [found(box, score=generator.uniform())[0]
                for box in [*moved, *boxes(generator.integers(0, 3))]]

    record = make_record(generator.uniform(size=images), [detect(own, 6) for own in truth],
                         [detect(own, 2) for own in truth])
    generator.shuffle(record['images'])
    return ground_truth(truth), record


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
    results = mix(record, [True] * 30)
    before = copy.deepcopy(results)
    scores = evaluate(coco, results)
    assert results == before
    assert capsys.readouterr().out == ''
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
    record = make_record([0.1, 0.9, 0.5], [found([1, 1, 1, 1]), found([2, 2, 2, 2]), []],
                         [found([3, 3, 3, 3]), found([4, 4, 4, 4]), found([5, 5, 5, 5])])
    taken = mix(record, [False, True, False])
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
    same, = trade_off(only_hard_gain([0.5] * 8), coco, shares=(0.4, ))
    assert same['hard_share'] == 0 and same['ap'] == same['random_ap']
    assert gain_over_random([same]) == dict(mean=None, half=None)
    # Six share a score: at 0.5, the two easiest or the eight of them can be parted off, not four.
    parted, = trade_off(only_hard_gain([0.1] * 2 + [0.9] * 6), coco, shares=(0.5, ))
    assert parted['hard_share'] == 0.75 and parted['gflops'] == pytest.approx(2.5)


def test_no_gain_where_the_ends_agree(coco):
    record = make_record(PERFECT, [found(BOX)] * 8, [found(BOX)] * 8)
    gain = gain_over_random(trade_off(record, coco))
    assert gain['half'] is None and gain['mean'] == pytest.approx(0)


def test_images_without_objects_or_detections():
    coco = ground_truth([[BOX], [], [BOX], []])
    # Image 2: exit 0 sees a thing that is not there, surer than of all others. Image 4: nothing.
    ghost = found(BOX, score=0.99)
    record = make_record([0.1, 0.9, 0.2, 0.3], [found(BOX), ghost, found(BOX), []],
                         [found(BOX), [], found(BOX), []])
    first, quarter, last = trade_off(record, coco, shares=(0, 0.25, 1))
    # One wrong, two right: precision 2/3 at every recall.
    assert first['ap'] == pytest.approx(100 * 2 / 3)
    assert quarter['ap'] == last['ap'] == pytest.approx(100)


def test_nothing_detected_is_zero(coco):
    rows = trade_off(make_record(PERFECT, [[]] * 8, [[]] * 8), coco, shares=(0, 0.5, 1))
    assert [row['ap'] for row in rows] == [0, 0, 0]


def test_trade_off_agrees_with_evaluating_the_mixture():
    coco, record = random_case()
    for row in trade_off(record, coco):
        hard = [image['difficulty'] > row['threshold'] for image in record['images']]
        scores = evaluate(coco, mix(record, hard))
        assert row['hard_share'] == np.mean(hard)
        assert (row['ap'], row['ap50']) == pytest.approx((scores['ap'], scores['ap50']))


def test_part_of_the_data_set(coco):
    record = only_hard_gain(PERFECT)
    record['images'] = record['images'][2:6]
    first, last = trade_off(record, coco, shares=(0, 1))
    assert first['ap'] == pytest.approx(HALF_FOUND) and last['ap'] == pytest.approx(100)


def test_seed_progress_and_silence(capsys):
    coco, record = random_case()
    capsys.readouterr()
    calls = []
    rows = trade_off(record, coco, progress=lambda *done: calls.append(done))
    assert rows == trade_off(record, coco)
    assert rows != trade_off(record, coco, seed=1)
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
        trade_off(dict(record, images=[]), coco)
    with pytest.raises(UsageError, match='image 1 .* twice'):
        check_record(dict(record, images=record['images'][:1] * 2), coco)
    with pytest.raises(UsageError, match='image 99 .* not in the annotation file'):
        check_record(dict(record, images=[dict(record['images'][0], id=99)]), coco)
    with pytest.raises(UsageError, match='no objects'):
        trade_off(record, ground_truth([[]] * 8))
    with pytest.raises(UsageError, match='2 random draws'):
        trade_off(record, coco, random_draws=1)
