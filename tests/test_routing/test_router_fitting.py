"""Routers that are fit to arrays: what can be learned is, what cannot is not."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from conftest import SEED
from dynamicdet.errors import UsageError
from dynamicdet.routing import build_objective, quantiles_of
from dynamicdet.routing.record import RoutingRecord
from dynamicdet.routing.router import Router
from dynamicdet.routing.router_fitting import (
    _best_constant,
    class_weights_of_records,
    features_of_record,
    fit_ridge_router,
    fit_router,
    gains_of_record,
    rank_correlation,
)

#: Half of the fits of the defaults.
QUICK = dict(weight_decays=(0.01, 1.0), folds=2, seed=SEED)


def problem(n, noise=0.0, seed=0):
    """(n, 24) features around 5 from four hidden factors; gains from two of these, skewed, and
    noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, 4))
    mix = np.random.default_rng(99).normal(size=(4, 24))
    features = 5 + hidden @ mix + 0.1 * rng.normal(size=(n, 24))
    gains = np.exp(hidden[:, 0] / 2) + np.abs(hidden[:, 1]) + noise * rng.normal(size=n)
    return features.astype(np.float32), gains


def difficulties(fit, features):
    """By the model's own router."""
    router = Router([features.shape[1]])
    router.load_state_dict(fit.state)
    with torch.no_grad():
        return router.score(torch.from_numpy(features)).numpy()


@pytest.mark.parametrize(
    'objective',
    [
        'paper',
        'rank',
        dict(type='rank', error='squared'),
        'pairwise',
        'gain',
        dict(type='gain', share=0.2),
    ],
)
def test_a_predictable_gain_is_learned(objective):
    fit = fit_router(*problem(400), objective, **QUICK)
    features, gains = problem(500, seed=1)
    phi = difficulties(fit, features)
    assert rank_correlation(phi, gains) > 0.8
    assert abs(fit.correlation - rank_correlation(phi, gains)) < 0.1
    if objective != 'pairwise':
        # Difficulty 0.5 is where it should be: half above it, or a fifth.
        share = 0.2 if isinstance(objective, dict) and 'share' in objective else 0.5
        assert abs(np.mean(phi > 0.5) - share) < 0.15


@pytest.mark.parametrize('objective', ['paper', 'rank', 'pairwise', 'gain'])
def test_noise_is_not_learned(objective):
    features, _ = problem(500)
    gains = np.random.default_rng(5).normal(size=500)
    fit = fit_router(features, gains, objective, **QUICK)
    new, _ = problem(500, seed=1)
    phi, fresh = difficulties(fit, new), np.random.default_rng(6).normal(size=500)
    # Four standard deviations of a correlation of 500 pairs.
    assert abs(rank_correlation(phi, fresh)) < 4 / 500**0.5
    # The best of many epochs looks a little better than nothing.
    assert fit.correlation < 4 / 500**0.5


def test_views_of_an_image_stay_together():
    """Each image twice, with a gain of pure noise: apart, a view tells of the other, and it looks
    learnable."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(150, 60)), 2, axis=0).astype(np.float32)
    gains = np.repeat(rng.normal(size=150), 2)
    together = fit_router(features, gains, 'rank', groups=np.repeat(np.arange(150), 2), **QUICK)
    apart = fit_router(features, gains, 'rank', **QUICK)
    assert together.correlation < 0.2 < 0.4 < apart.correlation


def test_a_regression_starts_at_its_mean():
    """The constant that leaves the least squared error: nothing that is common is left to learn."""
    objective = build_objective(dict(type='gain', share=0.2))
    gains = torch.from_numpy(np.random.default_rng(0).normal(size=200)).float()
    quantiles = quantiles_of(gains.tolist())
    best = _best_constant(objective, gains, quantiles)
    errors = [
        objective.loss(torch.full((200,), best + step), gains, quantiles)
        for step in (-0.01, 0, 0.01)
    ]
    assert errors[1] < errors[0] and errors[1] < errors[2]


def test_the_same_seed_gives_the_same_router():
    data = problem(120, noise=1.0)
    state = torch.get_rng_state()
    first, second, other = (fit_router(*data, 'rank', steps=(3,), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    assert not torch.equal(first.state['fc1.weight'], other.state['fc1.weight'])


def test_what_comes_back():
    features, gains = problem(90)
    features[:, 3] = 7
    seen = []
    fit = fit_router(
        features,
        gains,
        'paper',
        hidden=5,
        steps=(2, 4),
        weight_decays=(0.1, 1.0),
        folds=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert {name: tuple(value.shape) for name, value in fit.state.items()} == {
        'mean': (24,),
        'std': (24,),
        'fc1.weight': (5, 24),
        'fc1.bias': (5,),
        'fc2.weight': (1, 5),
        'fc2.bias': (1,),
    }
    np.testing.assert_allclose(fit.state['mean'], features.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.state['std'][:3], features.std(axis=0)[:3], rtol=1e-4)
    assert fit.state['std'][3] > 0
    assert fit.quantiles[50].item() == pytest.approx(np.median(gains))
    assert fit.steps in (2, 4) and fit.weight_decay in (0.1, 1.0)
    assert seen == [(done, 5) for done in range(1, 6)]


def test_rank_correlation_by_hand():
    """Ranks 1, 2, 3 against 0, 0, 3: covariance 1, over sqrt(2/3 * 2)."""
    assert rank_correlation([0.1, 0.2, 9.0], [0, 0, 3]) == pytest.approx(1 / (2 / 3 * 2) ** 0.5)
    assert rank_correlation([3, 2, 1], [1, 2, 3]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == rank_correlation([1, 2, 3], [2, 2, 2]) == 0
    # Ties share a rank: 1.5, 1.5, 3.
    assert rank_correlation([0, 0, 1], [1.5, 1.5, 3]) == pytest.approx(1)


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(gains=np.zeros(7)), r'got \(9, 2\) and \(7,\)'),
        (dict(features=np.zeros(9)), r'got \(9,\)'),
        (dict(gains=np.full(9, np.nan)), 'must be finite'),
        (dict(folds=5), '9 images cannot be cross-validated in 5 folds'),
        (dict(folds=1), 'take 2 folds or more'),
        (dict(groups=[0] * 9), '1 images cannot'),
        (dict(objective='best'), 'objective must be one of'),
    ],
)
def test_what_is_refused(change, said):
    with pytest.raises(UsageError, match=said):
        fit_router(**{**dict(features=np.eye(9, 2), gains=np.arange(9.0)), **change})


# From a record.


def box(x, score):
    return dict(bbox=[x, 0, 10, 10], score=score, category_id=1)


@pytest.fixture
def record():
    """Exit 0 finds the object of image 4, exit 2 those of both images; exit 1 does not matter."""
    return RoutingRecord.from_images(
        [
            dict(
                id=7,
                file='7.jpg',
                difficulty=0.5,
                losses=[3.0, 9.0, 1.0],
                objects=2,
                features=np.array([1, 2], np.float32),
                detections=[[], [], [box(0, 0.9), box(50, 0.8)]],
            ),
            dict(
                id=4,
                file='4.jpg',
                difficulty=0.5,
                losses=[1.0, 9.0, 1.5],
                objects=1,
                features=np.array([3, 4], np.float32),
                detections=[[box(0, 0.9)], [], [box(0, 0.9)]],
            ),
        ]
    )


@pytest.fixture
def coco():
    coco = COCO()
    objects = [(7, 0), (7, 50), (4, 0)]
    coco.dataset = dict(
        images=[dict(id=4), dict(id=7)],
        categories=[dict(id=1, name='it')],
        annotations=[
            dict(id=index, image_id=image, bbox=[x, 0, 10, 10], area=100, iscrowd=0, category_id=1)
            for index, (image, x) in enumerate(objects, 1)
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def test_gains_of_a_record_by_hand(record, coco):
    assert gains_of_record(record, 'loss').tolist() == [2.0, -0.5]
    assert gains_of_record(record, 'loss_sum').tolist() == [4.0, -0.5]
    np.testing.assert_allclose(gains_of_record(record, 'ap', coco), [100, 0], atol=1e-6)
    assert features_of_record(record).tolist() == [[1, 2], [3, 4]]


def test_gains_by_class_by_hand(record, coco):
    """Image 7 has two objects of the first category and image 4 one of a second."""
    coco.dataset['categories'].append(dict(id=2, name='rare'))
    coco.dataset['annotations'][2]['category_id'] = 2
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    weights = class_weights_of_records([record, record], [coco, coco])
    # 1 / 22 and 1 / 21, with a mean of 1 over the three objects.
    first, second = 3 / (2 + 22 / 21), 3 / (1 + 2 * 21 / 22)
    np.testing.assert_allclose(weights, [first, second])
    np.testing.assert_allclose(
        gains_of_record(record, 'loss', coco, weights), [2 * first, -0.5 * second]
    )
    np.testing.assert_allclose(
        gains_of_record(record, 'loss_sum', coco, weights), [4 * first, -0.5 * second]
    )
    # What image 4 has at the last exit is of the other category than its object.
    np.testing.assert_allclose(
        gains_of_record(record, 'ap', coco, weights), [200 * first, 0], atol=1e-6
    )
    # Behind image 4's false alarm, which is as sure: precision 2 / 3 in one of two categories.
    np.testing.assert_allclose(gains_of_record(record, 'reward', coco), [2 * 100 / 3, 0], atol=1e-3)


def test_gains_by_class_need_annotations(record):
    with pytest.raises(UsageError, match="'loss by class' needs the annotation file"):
        gains_of_record(record, 'loss', None, [1.0])
    with pytest.raises(UsageError, match="'reward' needs the annotation file"):
        gains_of_record(record, 'reward')


@pytest.mark.parametrize('objective', ['paper', 'rank', 'gain', dict(type='gain', share=0.2)])
def test_a_linear_router_learns_what_is_linear(objective):
    """Its layers say what the regression says, whatever width they have."""
    rng = np.random.default_rng(SEED)
    features = rng.normal(3, 2, size=(300, 12)).astype(np.float32)
    gains = features @ rng.normal(size=12) + 0.1 * rng.normal(size=300)
    fit = fit_ridge_router(features, gains, objective, hidden=3, seed=SEED)
    assert fit.correlation > 0.95 and fit.steps == 0
    router = Router([12])
    router.load_state_dict(fit.state)
    with torch.no_grad():
        logits = router.logits(torch.from_numpy(features)).numpy()
    assert rank_correlation(logits, gains) > 0.95
    # A linear function: of the mean of two images, the mean.
    middle = torch.from_numpy((features[::2] + features[1::2]) / 2)
    with torch.no_grad():
        np.testing.assert_allclose(
            router.logits(middle), (logits[::2] + logits[1::2]) / 2, atol=1e-4
        )
    half = (logits > 0).mean()
    assert half == pytest.approx(build_objective(objective).share, abs=0.08)


def test_a_linear_router_is_sklearns():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(SEED)
    features, gains = rng.normal(size=(60, 80)).astype(np.float32), rng.normal(size=60)
    fit = fit_ridge_router(features, gains, 'rank', penalties=(30.0,), seed=SEED)
    ranks = np.argsort(np.argsort(gains)) / 59
    inputs = (features - features.mean(0)) / features.std(0)
    expected = Ridge(alpha=30.0).fit(inputs, 4 * (ranks - 0.5)).predict(inputs)
    router = Router([80])
    router.load_state_dict(fit.state)
    with torch.no_grad():
        # Ranks are read off 101 quantiles, not off the gains themselves.
        np.testing.assert_allclose(router.logits(torch.from_numpy(features)), expected, atol=0.05)


def test_a_linear_router_does_not_learn_noise():
    rng = np.random.default_rng(SEED)
    features, gains = rng.normal(size=(90, 200)).astype(np.float32), rng.normal(size=90)
    fit = fit_ridge_router(features, gains, 'gain', seed=SEED)
    router = Router([200])
    router.load_state_dict(fit.state)
    fresh = rng.normal(size=(500, 200)).astype(np.float32)
    with torch.no_grad():
        assert router.logits(torch.from_numpy(fresh)).std() < 0.3


def test_a_linear_router_needs_two_channels():
    with pytest.raises(UsageError, match='two hidden channels'):
        fit_ridge_router(*problem(40), hidden=1)


@pytest.mark.parametrize(
    'lacking, kind', [('losses', 'loss'), ('losses', 'loss_sum'), ('objects', 'loss_sum')]
)
def test_a_record_that_lacks_something_is_refused(record, lacking, kind):
    record = dataclasses.replace(record, **{lacking: None})
    with pytest.raises(
        UsageError, match=f'the record has no {lacking}: make it with tools/record.py'
    ):
        gains_of_record(record, kind)


def test_a_record_that_does_not_serve_is_refused(record):
    with pytest.raises(UsageError, match='needs the annotation file'):
        gains_of_record(record, 'ap')
    with pytest.raises(UsageError, match="one of loss, loss_sum, ap, reward; got 'iou'"):
        gains_of_record(record, 'iou')
    with pytest.raises(UsageError, match='no images'):
        gains_of_record(record.take([]), 'loss')
    record.losses[1, 0] = float('nan')
    with pytest.raises(UsageError, match=r'image 4 \(4.jpg\) are not finite'):
        gains_of_record(record, 'loss')
    record.features = None
    with pytest.raises(UsageError, match='has no features'):
        features_of_record(record)
