"""Merged exits: by hand, against a slow way that follows the definition, and against the numbers of
another implementation."""

import numpy as np
import pytest
import torch

from conftest import SEED, rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.routing.box_merging import Merge, merge_boxes
from dynamicdet.routing.evaluation import true_positives
from dynamicdet.routing.merging import (
    fit_platt_scaling,
    merge_record,
    platt_scaling_of,
    scale_scores,
)
from dynamicdet.routing.peers import peer_gflops
from dynamicdet.routing.record import RoutingRecord

NMS, WBF = Merge('nms', 0.5), Merge('wbf', 0.5)
AVG = Merge('wbf', 0.5, 'avg')


def merged(detections, merge):
    """Detections as rows (exit, label, score, x1, y1, x2, y2); the merged ones as tuples of row,
    score and box."""
    table = np.array(detections, float).reshape(-1, 7)
    exits, labels = table[:, 0].astype(int), table[:, 1].astype(int)
    found = merge_boxes(table[:, 3:], table[:, 2], labels, exits, merge)
    return [
        (int(row), float(score), box.tolist())
        for row, score, box in zip(found.rows, found.scores, found.boxes)
    ]


#: IoU of the first two boxes is 0.8, of either with the third less than 0.1.
ONE, NEAR, FAR = (0, 0, 10, 10), (0, 0, 10, 8), (8, 8, 18, 18)


def test_nms_keeps_the_surer_one_as_it_is():
    found = merged([(0, 1, 0.6, *ONE), (0, 1, 0.2, *FAR), (1, 1, 0.8, *NEAR)], NMS)
    assert found == [(2, 0.8, [*NEAR]), (1, 0.2, [*FAR])]


def test_wbf_takes_the_mean_by_score():
    rows = [(0, 1, 0.6, *ONE), (0, 1, 0.2, *FAR), (1, 1, 0.2, *NEAR)]
    (row, score, box), other = merged(rows, WBF)
    assert (row, score) == (0, 0.6) and other == (1, 0.2, [*FAR])
    # (0.6 * 10 + 0.2 * 8) / 0.8
    assert box == pytest.approx([0, 0, 10, 9.5])
    # As published: (0.6 + 0.2) / 2, and half of what one of two exits found.
    (row, score, box), other = merged(rows, AVG)
    assert (row, score) == (0, pytest.approx(0.4)) and other[1] == pytest.approx(0.1)
    assert box == pytest.approx([0, 0, 10, 9.5])


@pytest.mark.parametrize('merge', [NMS, WBF])
def test_other_classes_and_the_exits_own_stay(merge):
    # Of other classes; of one exit, which has removed its duplicates.
    assert len(merged([(0, 1, 0.6, *ONE), (1, 2, 0.8, *ONE)], merge)) == 2
    assert len(merged([(0, 1, 0.6, *ONE), (0, 1, 0.8, *ONE), (1, 1, 0.1, *FAR)], merge)) == 3
    # Two of one exit over one of another: NMS drops the less sure of the two exits, WBF joins one.
    rows = [(0, 1, 0.6, *ONE), (0, 1, 0.5, *NEAR), (1, 1, 0.7, *ONE)]
    assert [row for row, *_ in merged(rows, merge)] == ([2] if merge is NMS else [2, 1])


@pytest.mark.parametrize('merge', [NMS, WBF, AVG])
def test_with_an_empty_exit_it_is_the_other(merge):
    rows = [(1, 1, 0.3, *NEAR), (1, 1, 0.6, *ONE), (1, 2, 0.4, *FAR)]
    found = merged(rows, merge)
    assert found == [(row, score, box) for row, (_, _, score, *box) in enumerate(rows)]
    assert merged([], merge) == []


def test_nothing_overlaps_a_box_that_is_none():
    none, infinite = (5, 5, 5, 5), (-np.inf, 0, np.inf, 4)
    rows = [(exit, 1, 0.5, *box) for exit in (0, 1) for box in (none, infinite)]
    for merge in (NMS, WBF):
        assert sorted(row for row, *_ in merged(rows, merge)) == [0, 1, 2, 3]


def iou(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    common = np.clip(high - low, 0, None).prod()
    areas = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()
    return common / (areas - common)


def slow_nms(boxes, scores, labels, exits, threshold):
    kept = []
    for row in np.argsort(-scores, kind='stable'):
        if not any(
            labels[row] == labels[other]
            and exits[row] != exits[other]
            and iou(boxes[row], boxes[other]) > threshold
            for other in kept
        ):
            kept.append(row)
    return kept


@pytest.mark.parametrize('exits', [2, 3])
def test_nms_is_greedy(exits):
    rng = np.random.default_rng(SEED)
    for _ in range(20):
        count = int(rng.integers(2, 60))
        corner = rng.random((count, 2)) * 20
        boxes = np.concatenate([corner, corner + 5 + 10 * rng.random((count, 2))], 1)
        scores, labels = rng.random(count).round(2), rng.integers(0, 2, count)
        numbers = rng.integers(0, exits, count)
        if len(set(numbers)) < 2:
            continue
        found = merge_boxes(boxes, scores, labels, numbers, Merge('nms', 0.4))
        assert found.rows.tolist() == slow_nms(boxes, scores, labels, numbers, 0.4)
        assert np.array_equal(found.boxes, boxes[found.rows])
        assert np.array_equal(found.scores, scores[found.rows])


def test_wbf_of_three_exits_by_hand():
    rows = [(0, 1, 0.9, 0, 0, 10, 10), (1, 1, 0.6, 0, 0, 10, 8), (2, 1, 0.3, 0, 0, 10, 9)]
    ((row, score, box),) = merged(rows, WBF)
    assert (row, score) == (0, 0.9)
    # (0.9 * 10 + 0.6 * 8 + 0.3 * 9) / 1.8
    assert box == pytest.approx([0, 0, 10, 16.5 / 1.8])
    assert merged(rows, AVG)[0][1] == pytest.approx(0.6)
    # Two of three that found anything in the image.
    rows[2] = (2, 2, 0.3, *FAR)
    assert merged(rows, AVG)[0][1] == pytest.approx(0.5)


#: Of two exits, each found in a picture of 1 x 1: (class, score, box). What ensemble-boxes 1.0.9
#: makes of them, ``weighted_boxes_fusion(boxes, scores, labels, iou_thr=0.55, conf_type=...)``, is
#: below, rounded to 1e-5: class and box, by score; and the scores.
FIRST = [
    (0, 0.84, [0.054, 0.047, 0.269, 0.275]),
    (1, 0.53, [0.389, 0.054, 0.615, 0.269]),
    (0, 0.14, [0.701, 0.028, 0.944, 0.265]),
    (1, 0.52, [0.686, 0.377, 0.946, 0.615]),
    (0, 0.1, [0.705, 0.707, 0.959, 0.937]),
]
SECOND = [
    (0, 0.64, [0.049, 0.051, 0.281, 0.265]),
    (1, 0.61, [0.06, 0.385, 0.272, 0.637]),
    (0, 0.93, [0.057, 0.714, 0.288, 0.946]),
    (1, 0.3, [0.386, 0.044, 0.615, 0.266]),
    (0, 0.84, [0.397, 0.367, 0.604, 0.621]),
    (1, 0.22, [0.398, 0.725, 0.609, 0.942]),
    (1, 0.42, [0.721, 0.382, 0.944, 0.6]),
    (0, 0.37, [0.725, 0.716, 0.955, 0.943]),
]
FUSED = dict(
    max=[
        (0, 0.93, [0.057, 0.714, 0.288, 0.946]),
        (0, 0.84, [0.397, 0.367, 0.604, 0.621]),
        (0, 0.84, [0.05184, 0.04873, 0.27419, 0.27068]),
        (1, 0.61, [0.06, 0.385, 0.272, 0.637]),
        (1, 0.53, [0.38792, 0.05039, 0.615, 0.26792]),
        (1, 0.52, [0.70164, 0.37923, 0.94511, 0.6083]),
        (0, 0.37, [0.72074, 0.71409, 0.95585, 0.94172]),
        (1, 0.22, [0.398, 0.725, 0.609, 0.942]),
        (0, 0.14, [0.701, 0.028, 0.944, 0.265]),
    ],
    avg=[
        (0, 0.74, [0.05184, 0.04873, 0.27419, 0.27068]),
        (1, 0.47, [0.70164, 0.37923, 0.94511, 0.6083]),
        (0, 0.465, [0.057, 0.714, 0.288, 0.946]),
        (0, 0.42, [0.397, 0.367, 0.604, 0.621]),
        (1, 0.415, [0.38792, 0.05039, 0.615, 0.26792]),
        (1, 0.305, [0.06, 0.385, 0.272, 0.637]),
        (0, 0.235, [0.72074, 0.71409, 0.95585, 0.94172]),
        (1, 0.11, [0.398, 0.725, 0.609, 0.942]),
        (0, 0.07, [0.701, 0.028, 0.944, 0.265]),
    ],
)


@pytest.mark.parametrize('conf_type', FUSED)
def test_wbf_gives_the_numbers_of_ensemble_boxes(conf_type):
    rows = [(0, label, score, *box) for label, score, box in FIRST]
    rows += [(1, label, score, *box) for label, score, box in SECOND]
    found = merged(rows, Merge('wbf', 0.55, conf_type))
    # Where scores are equal, the order is each implementation's own.
    found = sorted((-round(score, 5), rows[row][1], box) for row, score, box in found)
    wanted = sorted((-score, label, box) for label, score, box in FUSED[conf_type])
    for (score, label, box), (other, its, there) in zip(found, wanted, strict=True):
        assert label == its and score == pytest.approx(other, abs=1e-5)
        assert box == pytest.approx(there, abs=1e-5)


@pytest.mark.parametrize(
    'given, found',
    [
        (None, None),
        ('nms', Merge('nms', 0.65)),
        ('wbf', Merge('wbf', 0.55)),
        (dict(type='nms', iou=0.4), Merge('nms', 0.4)),
        (dict(type='wbf', conf_type='avg'), Merge('wbf', 0.55, 'avg')),
        (NMS, NMS),
    ],
)
def test_what_configs_say(given, found):
    assert Merge.parse(given) == found


@pytest.mark.parametrize(
    'given, said',
    [
        ('soft', "merge is 'nms'"),
        (dict(iou=0.5), "merge is 'nms'"),
        (dict(type='nms', threshold=0.5), "merge is 'nms'"),
        (3, "merge is 'nms'"),
        (dict(type='nms', iou=1.5), r'a number in \[0, 1\]'),
        (dict(type='nms', iou=float('nan')), r'a number in \[0, 1\]'),
        (dict(type='nms', iou='half'), r'a number in \[0, 1\]'),
        (dict(type='nms', conf_type='avg'), "of 'wbf' alone"),
        (dict(type='wbf', conf_type='min'), "'max' or 'avg'"),
    ],
)
def test_what_is_no_merging_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        Merge.parse(given)


# Scores.


def test_scores_are_scaled_in_order():
    scores = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    assert scale_scores(scores, 1.0, 0.0) is scores
    # Of 0.5 the logit is 0, of 0.9 log(9).
    found = scale_scores(scores, 2.0, 1.0)
    assert found[2].item() == pytest.approx(1 / (1 + np.exp(-1)))
    assert found[3].item() == pytest.approx(1 / (1 + np.exp(-2 * np.log(9) - 1)))
    assert (found[1:] > found[:-1]).all() and found.dtype == scores.dtype
    assert 0 <= found.min() and found.max() <= 1
    assert scale_scores(scores.half(), 2.0, 1.0).dtype == torch.half


def test_the_fit_finds_the_chances_that_hits_were_drawn_from():
    rng = np.random.default_rng(SEED)
    logits = rng.normal(-1, 2, 200_000)
    hits = rng.random(len(logits)) < 1 / (1 + np.exp(-(0.7 * logits - 0.4)))
    scale, shift = fit_platt_scaling(1 / (1 + np.exp(-logits)), hits)
    # About five standard errors.
    assert scale == pytest.approx(0.7, abs=0.02) and shift == pytest.approx(-0.4, abs=0.04)


def test_the_fit_is_where_the_slope_is_zero():
    """Four detections: both conditions of a logistic regression, with Platt's targets."""
    scores, hits = np.array([0.1, 0.3, 0.6, 0.9]), np.array([False, True, False, True])
    scale, shift = fit_platt_scaling(scores, hits)
    logits = np.log(scores / (1 - scores))
    left = 1 / (1 + np.exp(-(scale * logits + shift))) - np.where(hits, 3 / 4, 1 / 4)
    assert abs(left.sum()) < 1e-6 and abs(left @ logits) < 1e-6


@pytest.mark.parametrize(
    'scores, hits',
    [([], []), ([0.2, 0.8], [True, True]), ([0.2], [False]), ([0.1, 0.9], [True, False])],
)
def test_scores_that_say_nothing_stay(scores, hits):
    assert fit_platt_scaling(np.array(scores), np.array(hits, bool)) == (1.0, 0.0)


def test_finite_where_scores_part_right_from_wrong():
    scale, shift = fit_platt_scaling(np.array([0.0, 0.2, 0.8, 1.0]), np.array([0, 0, 1, 1], bool))
    assert scale > 0 and np.isfinite([scale, shift]).all()


# Records.


def detection(box, score, category=1):
    return dict(bbox=list(map(float, box)), score=score, category_id=category)


def small_record():
    """Two images; exit 1 misses what exit 0 finds in the second."""
    images = [
        dict(
            id=1,
            file='a.jpg',
            difficulty=0.2,
            detections=[
                [detection((0, 0, 10, 10), 0.5), detection((30, 30, 10, 10), 0.25)],
                [detection((0, 0, 10, 9), 0.75)],
            ],
            gflops=[1.0, 3.0],
        ),
        dict(
            id=2,
            file='b.jpg',
            difficulty=0.6,
            detections=[[detection((5, 5, 10, 10), 0.5)], []],
            gflops=[2.0, 4.0],
        ),
    ]
    facts = dict(branch0_gflops=0.5, branch0_latency=0.25)
    return RoutingRecord.from_images(images, [1.5, 3.5], [0.5, 1.5], facts)


def test_a_record_is_merged_as_it_would_have_been_recorded():
    record = small_record()
    found = merge_record(record, NMS)
    assert [own[0] for own in found.detections][0] == record.detections[0][0]
    assert found.detections[1][0] == [
        detection((0, 0, 10, 9), 0.75),
        detection((30, 30, 10, 10), 0.25),
    ]
    assert found.detections[1][1] == record.detections[0][1]
    # What leaves at exit 1 has run exit 0's neck and heads.
    assert found.gflops == [1.5, 4.0] and found.latencies == [0.5, 1.75]
    assert found.image_gflops.tolist() == [[1, 3.5], [2, 4.5]]
    assert found.provenance['merge'] == 'nms (IoU 0.5)'
    assert record == small_record()
    # And who looks at exit 0's detections pays nothing more.
    assert peer_gflops('detections', record) == 0.5 and peer_gflops('detections', found) == 0
    with pytest.raises(UsageError, match='were merged by nms'):
        merge_record(found, NMS)


def test_scaled_scores_decide_who_stays():
    scaling = [(1.0, 2.0), (1.0, -2.0)]
    found = merge_record(small_record(), NMS, scaling)
    first = 1 / (1 + np.exp(-2))
    assert found.detections[0][0][0]['score'] == pytest.approx(first)
    assert [one['bbox'] for one in found.detections[1][0]] == [[0, 0, 10, 10], [30, 30, 10, 10]]
    plain = merge_record(small_record(), None, scaling)
    assert len(plain.detections[1][0]) == 1 and plain.gflops == [1.5, 3.5]


def test_records_that_cannot_be_merged_afterwards():
    record = rebuilt(small_record(), provenance={})
    with pytest.raises(UsageError, match='does not say branch0_gflops'):
        merge_record(record, NMS)
    with pytest.raises(UsageError, match='of 1 exits'):
        merge_record(record.take_exits([0]), NMS)


def test_right_is_what_coco_matches(coco_of):
    """By image and exit; a crowd counts neither way."""
    record = small_record()
    coco = coco_of(
        {1: [((0, 0, 10, 10), 1, 0), ((30, 30, 20, 20), 1, 1)], 2: [((40, 40, 9, 9), 1, 0)]}
    )
    (first, second) = true_positives(record, coco)
    assert sorted(zip(*(own.tolist() for own in first))) == [(0.5, False), (0.5, True)]
    assert sorted(zip(*(own.tolist() for own in second))) == [(0.75, True)]
    scaling = platt_scaling_of(record, coco)
    assert scaling == [fit_platt_scaling(*first), (1.0, 0.0)]
    with pytest.raises(UsageError, match='were merged'):
        platt_scaling_of(merge_record(record, NMS), coco)


@pytest.fixture
def coco_of():
    """``coco_of({image id: [(x, y, w, h), category, crowd), ...]})``: ground truth."""
    import contextlib
    import io

    from pycocotools.coco import COCO

    def make(images):
        coco = COCO()
        coco.dataset = dict(
            images=[dict(id=identity, width=64, height=64) for identity in images],
            categories=[dict(id=1, name='a')],
            annotations=[
                dict(
                    id=number,
                    image_id=identity,
                    bbox=list(box),
                    area=box[2] * box[3],
                    category_id=category,
                    iscrowd=crowd,
                )
                for number, (identity, box, category, crowd) in enumerate(
                    ((identity, *one) for identity, own in images.items() for one in own), 1
                )
            ],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    return make
