"""Difficulties of images by routers that were not fitted to them."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from .objective import Objective
from .router_fitting import fit_by_method


def difficulties_by(state: Mapping[str, Tensor], features: np.ndarray) -> np.ndarray:
    """Difficulties, (n,), of pooled features, (n, d), by a fitted router: its
    `RouterFit`'s state."""
    inputs = (features - state['mean'].numpy()) / state['std'].numpy()
    hidden = inputs @ state['fc1.weight'].numpy().T + state['fc1.bias'].numpy()
    logits = hidden.clip(0) @ state['fc2.weight'].numpy().T + state['fc2.bias'].numpy()
    return (1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))).astype(np.float32)


def cross_fitted_difficulties(
    features: np.ndarray,
    gains: np.ndarray,
    objective: Objective,
    hidden: int | None = None,
    folds: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    method: str = 'layers',
) -> np.ndarray:
    """Difficulty of each image by a router that was fitted to the images of the other folds.

    What a router says of images that it was fitted to flatters it; these say what it is worth on
    others, from the same images.

    Args:
        features, gains, objective, hidden, seed: See `fit_router`.
        folds (int): Defaults to 3.
        progress (Callable, optional): Called with (folds done, folds).
        method (str): See `fit_by_method`. Defaults to 'layers'.

    Returns:
        np.ndarray: (n,), float32.
    """
    fold = np.random.default_rng(seed).permutation(len(gains)) % folds
    difficulties = np.zeros(len(gains), np.float32)
    for index in range(folds):
        held_out, others = fold == index, fold != index
        fit = fit_by_method(method, features[others], gains[others], objective, hidden, seed=seed)
        difficulties[held_out] = difficulties_by(fit.state, features[held_out])
        if progress:
            progress(index + 1, folds)
    return difficulties
