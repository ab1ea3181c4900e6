import math

import numpy as np
import pytest

from dynamicdet.errors import UsageError
from dynamicdet.routing.class_weights import class_weights
from dynamicdet.routing.peers import (
    PEERS,
    cross_fit,
    fit_adaptive_feeding,
    fit_ridge,
    peer_gflops,
    peer_scores,
)
from dynamicdet.routing.record import RoutingRecord


def boxes(*scores, side=10):
    return [dict(bbox=[0, 0, side, side], score=score, category_id=1) for score in scores]


def make_record(firsts, **columns):
    """Record whose exit 0 has the detections ``firsts``, and whose images have the columns."""
    images = [
        dict(id=index, file=f'{index}.jpg', difficulty=0.5, detections=[first, boxes(1.0)])
        for index, first in enumerate(firsts)
    ]
    for name, values in columns.items():
        for image, value in zip(images, values):
            image[name] = value
    return RoutingRecord.from_images(images, [10.0, 30.0], [0.01, 0.03])


@pytest.fixture
def record():
    """No detection; one doubtful; one sure and one doubtful, the sure one second; two sure."""
    return make_record(
        [[], boxes(0.2), boxes(0.25, 0.75), boxes(1.0, 0.5)],
        objects=[3, 0, 2, 1],
        losses=[[1, 2], [3, 1], [2, 1.5], [4, 4]],
        entropy=[7.0, 1.0, 0.0, 2.5],
    )


@pytest.mark.parametrize(
    'name, scores',
    [
        ('doubt_of_best', [1, 0.8, 0.25, 0]),
        ('mean_doubt', [1, 0.8, 0.25, 0.25]),
        ('score_variance', [0, 0.16, 0.375, 0.25]),
        ('score_entropy', [0, 0.7219281, 2 * (2 - 0.75 * math.log2(3)), 1]),
        ('detections', [0, 0, 1, 2]),
        ('image_entropy', [7, 1, 0, 2.5]),
        ('objects', [3, 0, 2, 1]),
        ('loss', [-1, 2, 0.5, 0]),
        ('loss_objects', [-3, 0, 1, 0]),
    ],
)
def test_by_hand(record, name, scores):
    assert peer_scores(name, record) == pytest.approx(scores, abs=1e-7)


def test_doubts_of_rare_classes_weigh_more(record):
    """Of the counted classes, or by exit 0's own scores where nobody counted."""
    record.detections[0].categories[:] = [1, 1, 2, 2, 1]
    # Sums of scores: 1: 0.2 + 0.25 + 0.5 of three detections, 2: 0.75 + 1.
    assert record.detections[0].scores.tolist() == pytest.approx([0.2, 0.25, 0.75, 1.0, 0.5])
    one, two = class_weights([0.95, 1.75])
    expected = [0, 0.16 * one, 0.1875 * (one + two), 0.25 * one]
    assert peer_scores('class_variance', record) == pytest.approx(expected)
    record.provenance.update(categories=[2, 5, 1], class_objects=[80, 100, 0])
    two, _, one = class_weights([80, 100, 0])
    assert one == pytest.approx(5 * two)
    expected = [0, 0.16 * one, 0.1875 * (one + two), 0.25 * one]
    assert peer_scores('class_variance', record) == pytest.approx(expected)
    # Of a class that the counted data do not know, there are none.
    record.provenance.update(categories=[2, 5], class_objects=[80, 100])
    assert peer_scores('class_variance', record) == pytest.approx(expected)


def test_references_that_are_benefits(record):
    assert peer_scores('reward', record, benefit=[1, 2, 0, -1]).tolist() == [1, 2, 0, -1]
    with pytest.raises(UsageError, match='is a benefit: give it'):
        peer_scores('ap_class', record)


def test_three_exits_compare_the_first_with_the_last(record):
    record.losses = np.insert(record.losses, 1, 99, axis=1)
    assert peer_scores('loss', record).tolist() == [-1, 2, 0.5, 0]


@pytest.mark.parametrize('name', PEERS)
def test_needs_are_what_is_needed(record, name):
    """Without any one of its needs a peer says so; with them alone it runs."""
    peer = PEERS[name]
    generator = np.random.default_rng(0)
    columns = dict(
        objects=[1] * 20,
        losses=[[2, 1]] * 20,
        entropy=[1.0] * 20,
        features=generator.normal(size=(20, 3)),
    )
    assert set(peer.needs) <= set(columns)
    benefit = np.arange(20) % 2 if peer.fitted or peer.function is None else None
    firsts = [boxes(*generator.uniform(size=2)) for _ in range(20)]
    alone = make_record(firsts, **{need: columns[need] for need in peer.needs})
    assert np.isfinite(peer_scores(name, alone, benefit=benefit)).all()
    for need in peer.needs:
        short = make_record(
            firsts, **{other: columns[other] for other in peer.needs if other != need}
        )
        with pytest.raises(UsageError, match=need):
            peer_scores(name, short, benefit=benefit)


def test_wrong_use(record):
    with pytest.raises(UsageError, match='choose from'):
        peer_scores('nobody', record)
    with pytest.raises(UsageError, match='benefits'):
        peer_scores('ridge', make_record([[]] * 9, features=np.eye(9)))
    with pytest.raises(UsageError, match='as many'):
        fit_adaptive_feeding(record, [1, 2])
    with pytest.raises(UsageError, match='not finite'):
        fit_adaptive_feeding(record, [1, 2, math.nan, 0])
    with pytest.raises(UsageError, match='none of the images'):
        fit_adaptive_feeding(record, [0, 0, -1, 0])
    with pytest.raises(UsageError, match='all of the images'):
        fit_adaptive_feeding(record, [1, 1, 1, 1])
    with pytest.raises(UsageError, match='record more'):
        cross_fit(fit_ridge, record, [1, 2, 3, 4])


def detected(generator, n):
    """Images with some sure and many doubtful detections; the latter gain."""
    doubtful = generator.random(n) < 0.3
    firsts = [
        boxes(*generator.uniform(0.05, 0.45, 6)) if doubt else boxes(*generator.uniform(0.6, 1, 2))
        for doubt in doubtful
    ]
    return make_record(firsts), np.where(doubtful, 20.0, -5.0)


def test_adaptive_feeding_learns_and_carries_over():
    generator = np.random.default_rng(0)
    training, benefit = detected(generator, 200)
    record, truth = detected(generator, 100)
    scores = peer_scores('adaptive_feeding', record, training, benefit)
    assert ((scores > 0) == (truth > 0)).all()
    # Turned benefits turn the scores.
    turned = peer_scores('adaptive_feeding', record, training, -benefit)
    assert ((turned > 0) == (truth < 0)).all()


def test_adaptive_feeding_sees_sizes():
    generator = np.random.default_rng(0)
    large = generator.random(120) < 0.5
    record = make_record([boxes(0.7, 0.6, side=50 if own else 10) for own in large])
    scores = peer_scores('adaptive_feeding', record, benefit=np.where(large, 1, 0))
    assert scores[large].min() > scores[~large].max()


def test_adaptive_feeding_does_not_depend_on_the_order_of_detections():
    training, benefit = detected(np.random.default_rng(0), 60)
    shuffled = make_record([image['detections'][0][::-1] for image in training])
    score = fit_adaptive_feeding(training, benefit)
    assert score(shuffled) == pytest.approx(score(training))


def pooled(generator, n, weights, noise):
    features = generator.normal(3, 1, (n, len(weights))).astype(np.float32)
    return make_record([[]] * n, features=features), features @ weights + generator.normal(
        0, noise, n
    )


def test_ridge_finds_a_linear_benefit():
    generator = np.random.default_rng(0)
    weights = np.array([2.0, -1.0, 0, 0, 0])
    training, benefit = pooled(generator, 300, weights, noise=0.5)
    record, truth = pooled(generator, 100, weights, noise=0)
    assert peer_scores('ridge', record, training, benefit) == pytest.approx(truth, abs=0.3)


def test_ridge_shrinks_where_there_is_only_noise():
    """More features than images: a plain fit would be exact on what it saw, and wild on the
    rest."""
    generator = np.random.default_rng(0)
    training, benefit = pooled(generator, 60, np.zeros(80), noise=1)
    record, _ = pooled(generator, 60, np.zeros(80), noise=1)
    assert peer_scores('ridge', record, training, benefit).std() < 0.2


def test_cross_fit_scores_images_by_others():
    generator = np.random.default_rng(0)
    record, benefit = pooled(generator, 60, np.zeros(80), noise=1)
    own = fit_ridge(record, benefit)(record)
    scores = peer_scores('ridge', record, benefit=benefit)
    assert abs(np.corrcoef(scores, benefit)[0, 1]) < 0.3
    assert ((0 < scores) & (scores < 1)).all() and own.shape == scores.shape
    assert (peer_scores('ridge', record, benefit=benefit) == scores).all()
    # And finds what there is.
    record, benefit = pooled(generator, 200, np.array([1.0, 2.0]), noise=0.1)
    assert np.corrcoef(peer_scores('ridge', record, benefit=benefit), benefit)[0, 1] > 0.9


def test_cross_fit_never_shows_an_image_to_its_own_fit():
    record = make_record([[]] * 23)
    seen = []

    def fit(part, benefit):
        assert [image['id'] for image in part] == benefit.tolist()
        ids = {image['id'] for image in part}

        def score(other):
            own = [image['id'] for image in other]
            assert not ids & set(own) and len(ids) + len(own) == 23
            seen.extend(own)
            return np.array(own, float)

        return score

    cross_fit(fit, record, np.arange(23))
    assert sorted(seen) == list(range(23))


def test_charge(record):
    assert (
        peer_gflops('image_entropy', record)
        == peer_gflops('ridge', record)
        == peer_gflops('objects', record)
        == 0
    )
    with pytest.raises(UsageError, match='what that costs: record anew'):
        peer_gflops('detections', record)
    record.provenance['branch0_gflops'] = 4
    assert peer_gflops('detections', record) == 4
    assert peer_gflops('adaptive_feeding', record, branch_gflops=6) == 6
