import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval
from routing_cases import BOX, build_coco, found, ground_truth, make_record, random_case

from conftest import rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.routing.evaluation import Mixtures, check_truth, evaluate, mixed_results, read_truth


def assert_same(scores, expected):
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert (scores[name] is None) == (value is None), name
        if value is not None:
            assert abs(scores[name] - value) < 1e-9, name


def by_pycocotools(coco, record, choice):
    return evaluate(coco, mixed_results(record, choice), [image['id'] for image in record])


def with_copies(coco, record, choice, weights):
    """pycocotools' scores where each image is there as often as its weight says, copies side by
    side."""
    ids, annotations, results = [], [], []
    for index in np.argsort([image['id'] for image in record]):
        image = record[index]
        for _ in range(weights[index]):
            ids.append(len(ids) + 1)
            annotations += [
                {**own, 'image_id': ids[-1], 'id': len(annotations) + count}
                for count, own in enumerate(coco.imgToAnns[image['id']], 1)
            ]
            results += [dict(own, image_id=ids[-1]) for own in image['detections'][choice[index]]]
    return evaluate(build_coco(ids, annotations, coco.cats), results)


@pytest.mark.parametrize(
    'seed, exits, ties', [(0, 2, True), (1, 3, False), (2, 2, True), (3, 4, False)]
)
def test_equals_pycocotools(seed, exits, ties):
    coco, record = random_case(seed=seed, exits=exits, ties=ties)
    mixtures, generator = Mixtures(record, coco), np.random.default_rng(seed)
    assert (mixtures.images, mixtures.exits) == (30, exits)
    for choice in [np.zeros(30, int), *generator.integers(0, exits, (3, 30))]:
        expected = by_pycocotools(coco, record, choice)
        assert expected['small'] is not None
        assert_same(mixtures.scores(choice), expected)
        assert abs(mixtures.ap(choice) - expected['ap']) < 1e-9
        assert mixtures.ap(choice, np.ones(30, int)) == mixtures.ap(choice)


@pytest.mark.parametrize('seed, ties', [(4, True), (5, False)])
def test_weights_are_copies(seed, ties):
    coco, record = random_case(seed=seed, ties=ties)
    mixtures, generator = Mixtures(record, coco), np.random.default_rng(seed)
    for choice in generator.integers(0, 2, (3, 30)):
        weights = generator.multinomial(30, [1 / 30] * 30)
        assert weights.max() > 1
        assert_same(mixtures.scores(choice, weights), with_copies(coco, record, choice, weights))


def test_more_detections_than_count():
    # 100 of an image and category are looked at: the surest.
    coco, record = random_case(images=4, others=900)
    assert max(len(found) for image in record for found in image['detections']) > 400
    assert_same(
        Mixtures(record, coco).scores([0, 1, 0, 1]), by_pycocotools(coco, record, [0, 1, 0, 1])
    )
    # The one that is right is the 101st: it does not count. One that is wrong less, and it does.
    false = [found([100 + index, 10, 5, 5], score=0.9)[0] for index in range(100)]
    right = found(BOX, score=0.1)
    record = make_record([0.5], [false + right], [false[1:] + right])
    mixtures = Mixtures(record, ground_truth([[BOX]]))
    assert mixtures.ap([0]) == 0 and mixtures.ap([1]) == pytest.approx(1)


def test_equal_scores_go_by_image_id():
    # A false and a right detection, equally sure: precision 1/2 if the false one comes first, else
    # 1.
    coco = ground_truth([[], [BOX]])
    record = make_record([0.5, 0.5], [found(BOX), found(BOX)], [[], found(BOX)])
    for images in (list(record), list(record)[::-1]):
        assert Mixtures(rebuilt(record, images), coco).ap([0, 0]) == pytest.approx(50)
    coco = ground_truth([[BOX], []])
    assert Mixtures(record, coco).ap([0, 0]) == pytest.approx(100)


def test_crowds_are_neither_right_nor_wrong():
    crowd = [100, 100, 50, 50]
    coco = build_coco(
        [1],
        [
            dict(image_id=1, bbox=BOX, category_id=7),
            dict(image_id=1, bbox=crowd, category_id=7, iscrowd=1),
        ],
    )
    inside = [found([110 + 9 * index, 110, 8, 8], score=0.95)[0] for index in range(3)]
    record = make_record([0.5], [inside + found(BOX)], [inside + found([1, 100, 9, 9], score=0.99)])
    mixtures = Mixtures(record, coco)
    assert mixtures.ap([0]) == pytest.approx(100) and mixtures.ap([1]) == 0
    assert_same(mixtures.scores([0]), by_pycocotools(coco, record, [0]))


def test_nothing_found():
    coco, record = random_case(images=8)
    record = rebuilt(
        record, [dict(image, detections=[[], image['detections'][1]]) for image in record]
    )
    mixtures = Mixtures(record, coco)
    assert_same(mixtures.scores([0] * 8), by_pycocotools(coco, record, [0] * 8))
    assert mixtures.ap([0] * 8) == 0 and (mixtures.image_ap()[0] == 0).all()
    assert_same(mixtures.scores([1] * 8), by_pycocotools(coco, record, [1] * 8))


def test_no_objects():
    coco = ground_truth([[BOX], []])
    record = make_record([0.5, 0.5], [found(BOX), found(BOX)], [[], []])
    mixtures = Mixtures(record, coco)
    # Only the image without objects counts: there is no AP.
    assert np.isnan(mixtures.ap([0, 0], [0, 1]))
    assert set(mixtures.scores([0, 0], [0, 1]).values()) == {None}
    with pytest.raises(UsageError, match='no objects'):
        Mixtures(record, ground_truth([[], []]))


def test_part_of_the_data_set():
    coco, record = random_case()
    part = record.take(range(5, 17))
    choice = np.arange(12) % 2
    assert_same(Mixtures(part, coco).scores(choice), by_pycocotools(coco, part, choice))
    weights = np.zeros(30, int)
    weights[5:17] = 1
    whole = np.zeros(30, int)
    whole[5:17] = choice
    assert Mixtures(record, coco).ap(whole, weights) == pytest.approx(
        Mixtures(part, coco).ap(choice)
    )


def test_image_ap():
    coco, record = random_case(seed=6, exits=3)
    per_image = Mixtures(record, coco).image_ap()
    assert per_image.shape == (3, 30)
    for exit, own in enumerate(per_image):
        for value, image in zip(own, record):
            results = [dict(each, image_id=image['id']) for each in image['detections'][exit]]
            # Images without objects: 0.
            assert abs(value - (evaluate(coco, results, [image['id']])['ap'] or 0)) < 1e-8
    empty = [not coco.getAnnIds([image['id']], iscrowd=False) for image in record]
    assert any(empty) and (per_image[:, empty] == 0).all()


def test_image_ap_by_hand():
    coco = ground_truth([[BOX, [100, 100, 20, 20]], [], [BOX]])
    record = make_record(
        [0.5] * 3,
        [found(BOX), found(BOX), found([10, 10, 20, 16])],
        [found(BOX, [100, 100, 20, 20]), [], []],
    )
    # Half of the objects: 51 of 101 recalls. IoU 0.8: right at seven of ten thresholds.
    assert Mixtures(record, coco).image_ap() == pytest.approx(
        np.array([[100 * 51 / 101, 0, 70], [100, 0, 0]])
    )


def test_views():
    coco, record = random_case(images=10)
    with pytest.raises(UsageError, match='lacks view'):
        Mixtures(record, coco, view=True)
    turned = rebuilt(
        record,
        [
            dict(image, view=image['detections'], detections=image['detections'][::-1])
            for image in record
        ],
    )
    choice = np.arange(10) % 2
    original, views, swapped = (
        Mixtures(record, coco),
        Mixtures(turned, coco, view=True),
        Mixtures(turned, coco),
    )
    assert views.ap(choice) == original.ap(choice) == swapped.ap(1 - choice) != swapped.ap(choice)


def test_expected_ap():
    coco, record = random_case()
    mixtures, choice = Mixtures(record, coco), np.arange(30) % 2
    weights = np.random.default_rng(0).multinomial(30, [1 / 30] * 30)
    assert mixtures.expected_ap(np.eye(2)[choice]) == pytest.approx(mixtures.ap(choice))
    assert mixtures.expected_ap(np.eye(2)[choice], weights) == pytest.approx(
        mixtures.ap(choice, weights)
    )
    # Exit 1 finds the object, exit 0 something else, as sure: of two expected detections, one right
    # half.
    record = make_record([0.5], [found([100, 100, 20, 20])], [found(BOX)])
    coins = Mixtures(record, ground_truth([[BOX]])).expected_ap([[0.5, 0.5]])
    # At recalls up to a half, 51 of 101, precision is 1/2: the image's false half comes first.
    assert coins == pytest.approx(100 * 51 / 101 / 2)
    with pytest.raises(ValueError, match='probabilities'):
        mixtures.expected_ap(np.ones((30, 2)))


@pytest.mark.parametrize(
    'choice, weights',
    [
        ([0] * 9, None),
        ([2] * 10, None),
        ([-1] * 10, None),
        ([0] * 10, [1] * 9),
        ([0] * 10, [0.5] * 10),
        ([0] * 10, [-1] * 10),
    ],
)
def test_bad_choices(choice, weights):
    coco, record = random_case(images=10)
    with pytest.raises(ValueError, match='wanted|whole numbers'):
        Mixtures(record, coco).ap(choice, weights)


def test_bad_records():
    coco, record = random_case(images=10)
    with pytest.raises(UsageError, match='detections of 1 exits'):
        Mixtures(record.take_exits([0]), coco)
    images = list(record)
    images[3]['detections'] = images[3]['detections'][:1]
    with pytest.raises(UsageError, match='record every image through every exit'):
        rebuilt(record, images)


def test_annotations_of_another_split_are_refused():
    """Splits may share ids and file names."""
    coco, record = random_case(images=10)
    own = [
        dict(image, objects=len(coco.getAnnIds(imgIds=[image['id']], iscrowd=False)))
        for image in record
    ]
    check_truth(rebuilt(record, own), coco)
    few = [dict(image, objects=image['objects'] + (index < 4)) for index, image in enumerate(own)]
    check_truth(rebuilt(record, few), coco)
    with pytest.raises(UsageError, match='10 of 10 images have another number of objects'):
        check_truth(
            rebuilt(record, [dict(image, objects=image['objects'] + 1) for image in own]), coco
        )
    foreign = list(record)
    foreign[0]['detections'][0] = [dict(bbox=[0, 0, 5, 5], score=0.5, category_id=77)]
    with pytest.raises(UsageError, match='category 77'):
        check_truth(rebuilt(record, foreign), coco)


def test_nothing_is_printed_or_written_into(capsys):
    coco, record = random_case(images=10)
    before = copy.deepcopy(record)
    capsys.readouterr()
    Mixtures(record, coco).scores([0] * 10)
    assert record == before and capsys.readouterr().out == ''


def test_agrees_with_faster_coco_eval():
    """An implementation of its own, in C++."""
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    coco, record = random_case(seed=8, ties=False)
    choice = np.random.default_rng(8).integers(0, 2, 30)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = FasterCOCO(coco.dataset)
        evaluator = COCOeval_faster(theirs, theirs.loadRes(mixed_results(record, choice)), 'bbox')
        evaluator.run()
    expected = dict(
        zip(('ap', 'ap50', 'small', 'medium', 'large'), 100 * evaluator.stats[[0, 1, 3, 4, 5]])
    )
    assert_same(Mixtures(record, coco).scores(choice), expected)


def test_a_detector_of_some_categories_is_judged_by_these_alone(tmp_path, capsys):
    """As mmdet's CocoMetric: pycocotools with `catIds`."""
    coco, record = random_case(images=20)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(coco.dataset))
    known, *others = sorted(coco.cats)
    assert others
    images = list(record)
    for image in images:
        image['detections'] = [
            [one for one in own if one['category_id'] == known] for own in image['detections']
        ]
        image['objects'] = len(coco.getAnnIds(imgIds=[image['id']], catIds=[known], iscrowd=False))
    record = rebuilt(record, images)
    evaluator = COCOeval(coco, coco.loadRes(mixed_results(record, [0] * 20)), 'bbox')
    evaluator.params.catIds = [known]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval['precision'][..., 0, -1]
    capsys.readouterr()
    own = read_truth(str(path), [known])
    assert capsys.readouterr().out == ''
    check_truth(record, own)
    assert Mixtures(record, own).ap([0] * 20) == pytest.approx(
        100 * precision[precision > -1].mean()
    )
    whole = read_truth(str(path), coco.cats)
    assert Mixtures(record, whole).ap([0] * 20) < Mixtures(record, own).ap([0] * 20)
