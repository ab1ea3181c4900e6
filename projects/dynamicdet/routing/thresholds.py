"""From a wish for speed to a threshold on difficulty.

An image is hard when ``difficulty > threshold``. Threshold 1 makes all images easy, -1 all hard.
"""
import math
import warnings
from typing import Mapping, Optional, Sequence

import numpy as np

from ..errors import UsageError

ALL_HARD, ALL_EASY = -1.0, 1.0


def hard_share(difficulties: Sequence[float], threshold: float) -> float:
    """Share of hard images, in [0, 1].

    Args:
        difficulties (Sequence[float]): (n,), n > 0.
        threshold (float): Threshold.
    """
    return float(np.mean(np.asarray(difficulties, np.float32) > np.float32(threshold)))


def threshold_for_share(difficulties: Sequence[float], share: float) -> float:
    """The (1 - share) quantile of the difficulties (DynamicDet, section 3.4).

    It lies halfway between the easiest hard image and the hardest easy one, so that noise in the
    last digits moves no image. Where many images share a score, no threshold parts them: they go
    together to the side that brings the share nearest to the one asked for.

    Args:
        difficulties (Sequence[float]): Difficulties of a validation set, (n,), n > 0.
        share (float): Wanted share of hard images, in [0, 1].

    Returns:
        float: The threshold: -1 for all hard, 1 for all easy.

    Raises:
        UsageError: If the share is outside [0, 1] or there are no difficulties.
    """
    if not 0 <= share <= 1:
        raise UsageError(f'a hard share must be in [0, 1], got {share}')
    scores = np.sort(np.asarray(difficulties, dtype=np.float32))
    if not len(scores):
        raise UsageError('no difficulties to take a quantile of: the validation set is empty')
    if not np.isfinite(scores).all():
        raise UsageError('some difficulties are not finite: was the router trained?')
    # Where it is possible to cut: before the first image, between unequal scores, after the last.
    cuts = np.flatnonzero(np.diff(scores)) + 1
    cuts = np.concatenate([[0], cuts, [len(scores)]])
    easy = cuts[np.argmin(np.abs(cuts - (1 - share) * len(scores)))]
    if easy == 0:
        return ALL_HARD
    if easy == len(scores):
        return ALL_EASY
    below, above = scores[easy - 1], scores[easy]
    middle = np.float32((below + above) / 2)
    return float(middle if below <= middle < above else below)


def share_for_latency(target: float, easy: float, hard: float) -> float:
    """Hard share that meets a mean latency: ``(t - lat1) / (lat2 - lat1)``, clipped to [0, 1].

    A target above ``lat2`` is met by all hard, which is said in a warning; one below ``lat1`` cannot
    be met.

    Args:
        target (float): Wanted mean latency per image, seconds.
        easy (float): Latency of an easy image, ``lat1``, seconds.
        hard (float): Latency of a hard image, ``lat2``, seconds.

    Raises:
        UsageError: If the target is below ``lat1`` or not finite.
    """
    said = f'a target latency of {target:g} s is outside lat1 = {easy:.4g} s to lat2 = {hard:.4g} s'
    if not math.isfinite(target) or target < easy:
        raise UsageError(f'{said}: it cannot be met, ask for at least lat1')
    if target >= hard:
        if target > hard:
            warnings.warn(f'{said}: every image takes the hard path')
        return 1.0
    return (target - easy) / (hard - easy)


def check_budget(budget: Mapping[str, float]) -> None:
    """Raise a `UsageError` unless a budget is one of ``threshold`` in [-1, 1], ``hard_share`` in
    [0, 1] and ``target_latency`` > 0, seconds."""
    allowed = dict(threshold=(-1, 1), hard_share=(0, 1), target_latency=(0, math.inf))
    if len(budget) != 1 or next(iter(budget)) not in allowed:
        raise UsageError(f'a budget is exactly one of {", ".join(allowed)}; got {dict(budget)}')
    (name, value), = budget.items()
    low, high = allowed[name]
    # Not `value < low`, which lets NaN pass.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f'{name} must be a number in [{low}, {high}], got {value}')


def resolve_threshold(budget: Mapping[str, float],
                      difficulties: Optional[Sequence[float]] = None,
                      latencies: Optional[Sequence[float]] = None) -> float:
    """Turn a budget into a threshold.

    Args:
        budget (Mapping[str, float]): One of ``threshold``, ``hard_share``, ``target_latency``; see
            `check_budget`.
        difficulties (Sequence[float], optional): The calibration's difficulties. A threshold
            needs none.
        latencies (Sequence[float], optional): The calibration's ``(lat1, lat2)``, seconds.

    Raises:
        UsageError: If the budget is out of range, or needs a calibration that is not there.
    """
    check_budget(budget)
    if 'threshold' in budget:
        return float(budget['threshold'])
    if difficulties is None or not len(difficulties):
        name = next(iter(budget))
        raise UsageError(f'{name} needs a calibrated checkpoint: run tools/calibrate.py on it first')
    share = budget.get('hard_share')
    if share is None:
        share = share_for_latency(budget['target_latency'], *latencies)
    threshold = threshold_for_share(difficulties, share)
    got = hard_share(difficulties, threshold)
    if abs(got - share) > max(0.01, 1 / len(difficulties)):
        warnings.warn(f'many images share a difficulty: a hard share of {share:.3g} was asked for, the '
                      f'nearest that a threshold gives is {got:.3g}')
    return threshold
