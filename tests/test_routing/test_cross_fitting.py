"""Difficulties by routers that were not fitted to the image, for each way to fit one."""

import numpy as np
import pytest

from dynamicdet.errors import UsageError
from dynamicdet.routing.cross_fitting import cross_fitted_difficulties, difficulties_by
from dynamicdet.routing.objective import Objective
from dynamicdet.routing.router_fitting import METHODS, fit_by_method, rank_correlation

OBJECTIVE = Objective('ap', 'regression')


def data(images=60, width=6, seed=0):
    """Features of which the last is the gain, but for noise."""
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(images, width)).astype(np.float32)
    return features, features[:, -1] + 0.1 * draw.normal(size=images)


@pytest.mark.parametrize('method', METHODS)
def test_difficulties_rank_gains_and_are_of_the_method(method):
    features, gains = data()
    difficulties = cross_fitted_difficulties(features, gains, OBJECTIVE, 4, method=method)
    assert difficulties.shape == (60,) and (0 < difficulties).all() and (difficulties < 1).all()
    assert rank_correlation(difficulties, gains) > 0.9
    # Each by the router of the other folds, by hand.
    fold = np.random.default_rng(0).permutation(60) % 3
    others = fold != fold[0]
    fit = fit_by_method(method, features[others], gains[others], OBJECTIVE, 4, seed=0)
    assert difficulties[0] == difficulties_by(fit.state, features[:1])[0]


def test_an_image_does_not_teach_its_own_router():
    """Its gain, however large, moves the difficulties of others alone."""
    features, gains = data()
    before = cross_fitted_difficulties(features, gains, OBJECTIVE, 4, method='linear')
    gains[7] -= 5
    after = cross_fitted_difficulties(features, gains, OBJECTIVE, 4, method='linear')
    fold = np.random.default_rng(0).permutation(60) % 3
    same = fold == fold[7]
    assert (before[same] == after[same]).all() and (before[~same] != after[~same]).all()


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match='layers, linear, rule'):
        fit_by_method('trees', *data())
