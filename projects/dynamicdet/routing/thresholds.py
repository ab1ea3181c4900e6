"""From a wish for speed to a threshold on difficulty.

An image is hard when ``difficulty > threshold``. Threshold 1 makes all images easy, -1 all hard.

K exits have K - 1 thresholds, in rising order; an image leaves at the exit whose number is how many
of them are below its difficulty. Then one number still says how fast: see `shares_beyond`.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UsageError
from .budget import BUDGET_NAMES, Budget

ALL_HARD, ALL_EASY = -1.0, 1.0

#: One threshold for two exits, K - 1 for more.
Thresholds = float | list[float]


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


def quantile_map(difficulties: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Difficulties as another form of a detector would give them, from what it does to some images.

    Quantiles of the images go to the same quantiles, 0 and 1 stay, and between them it is linear.
    So the order of difficulties stays, and equal forms leave all as it is.

    Args:
        difficulties (np.ndarray): (n,), of the detector as it was; or thresholds, of which -1 and 1
            stay.
        before, after (np.ndarray): Of some images, (m,), m > 0: as it was, and in the other form.

    Returns:
        np.ndarray: (n,), float32.
    """
    old, new = (
        np.concatenate([[0.0], np.sort(difficulties), [1.0]]) for difficulties in (before, after)
    )
    known, place = np.unique(old, return_inverse=True)
    # Where several had the same difficulty, by the mean of what they have now.
    moves = np.bincount(place, new - old) / np.bincount(place)
    return (difficulties + np.interp(difficulties, known, moves)).astype(np.float32)


def shares_beyond(share: float, exits: int = 2) -> list[float]:
    """How many images go beyond each exit but the last, at a hard share: (K - 1,), falling.

    With two exits it is the share itself. With more, exits are shared out as ``Binomial(K - 1,
    share)`` has
    it (0.5 of three: a quarter, a half, a quarter): all at the first at 0, all at the last at 1,
        and the mean number of the exit is ``(K - 1) * share``. It is a convention, one curve from
        end to end; other shares can be given exit by exit.

    Args:
        share (float): In [0, 1].
        exits (int): K, 2 or more.
    """
    count = exits - 1
    chances = [
        math.comb(count, exit) * share**exit * (1 - share) ** (count - exit)
        for exit in range(exits)
    ]
    return [min(1.0, math.fsum(chances[exit + 1 :])) for exit in range(count)]


def mean_cost(share: float, costs: Sequence[float]) -> float:
    """Mean cost per image at a hard share; ``(1 - share) * costs[0] + share * costs[1]`` for two
    exits.

    Args:
        share (float): In [0, 1].
        costs (Sequence[float]): Of each exit, (K,), any unit.
    """
    return mean_of_shares(_at_exits(shares_beyond(share, len(costs))), costs)


def mean_of_shares(shares: Sequence[float], costs: Sequence[float]) -> float:
    """Mean cost per image where each exit, (K,), has a share of the images and costs so much."""
    return math.fsum(share * cost for share, cost in zip(shares, costs))


def _at_exits(beyond: Sequence[float]) -> list[float]:
    """Shares that leave at each exit, (K,), from those that go beyond each but the last, (K -
    1,)."""
    ends = [1.0, *beyond, 0.0]
    return [more - less for more, less in zip(ends, ends[1:])]


def thresholds_for_share(difficulties: Sequence[float], share: float, exits: int = 2) -> Thresholds:
    """`threshold_for_share`, for any number of exits: a float for two, K - 1 in rising order for
    more."""
    thresholds = [
        threshold_for_share(difficulties, beyond) for beyond in shares_beyond(share, exits)
    ]
    return thresholds[0] if exits == 2 else thresholds


def share_for_latency(target: float, *latencies: float) -> float:
    """Hard share that meets a mean latency: ``(t - lat1) / (lat2 - lat1)``, clipped to [0, 1].

    A target above the last exit's is met by all hard, which is said in a warning; one below
    ``lat1`` cannot be met.

    Args:
        target (float): Wanted mean latency per image, seconds.
        *latencies (float): Latency of an image at each exit, ``lat1``, ``lat2``, ..., seconds.

    Raises:
        UsageError: If the target is below ``lat1`` or not finite.
    """
    reason = (
        f'a target latency of {target:g} s is outside lat1 = {latencies[0]:.4g} s '
        f'(exit 0) to lat{len(latencies)} = {latencies[-1]:.4g} s (exit {len(latencies) - 1})'
    )
    return _share_for_cost(target, latencies, reason, 'lat1')


def share_for_gflops(target: float, *gflops: float) -> float:
    """Hard share that meets mean GFLOPs: ``(g - g0) / (g1 - g0)``, clipped to [0, 1]; as
    `share_for_latency`.

    Args:
        target (float): Wanted mean GFLOPs per image, 2 x multiply-adds.
        *gflops (float): GFLOPs of an image at each exit, ``g0``, ``g1``, ...

    Raises:
        UsageError: If the target is below ``g0`` or not finite.
    """
    reason = (
        f'a target of {target:g} GFLOPs is outside g0 = {gflops[0]:.4g} (exit 0) to '
        f'g{len(gflops) - 1} = {gflops[-1]:.4g} (exit {len(gflops) - 1})'
    )
    return _share_for_cost(target, gflops, reason, 'g0')


def _share_for_cost(target: float, costs: Sequence[float], reason: str, least: str) -> float:
    if not math.isfinite(target) or target < costs[0]:
        raise UsageError(f'{reason}: it cannot be met, ask for at least {least}')
    if target >= costs[-1]:
        if target > costs[-1]:
            warnings.warn(f'{reason}: every image takes the hard path')
        return 1.0
    if len(costs) == 2:
        return (target - costs[0]) / (costs[1] - costs[0])
    low, high = 0.0, 1.0
    # Halved until doubles have no more digits.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_cost(middle, costs) < target else (low, middle)
    return high


def resolve_threshold(
    budget: Budget | Mapping[str, float | Sequence[float]],
    difficulties: Sequence[float] | None = None,
    latencies: Sequence[float] | None = None,
    gflops: Sequence[float] | None = None,
) -> Thresholds:
    """Turn a budget into a threshold.

    Args:
        budget (Budget or Mapping): See `Budget.parse`.
        difficulties (Sequence[float], optional): The calibration's difficulties. A threshold
            needs none.
        latencies (Sequence[float], optional): The calibration's ``(lat1, lat2, ...)``, seconds,
            (K,). How many there are, or else how many ``gflops``, says how many exits there are;
            two without both.
        gflops (Sequence[float], optional): The calibration's GFLOPs of each exit, (K,).

    Returns:
        float or list[float]: The threshold of two exits, or the K - 1 of more.

    Raises:
        UsageError: If the budget is out of range, or needs a calibration that is not there.
    """
    budget = Budget.parse(budget)
    if budget is None:
        raise UsageError(f'a budget is exactly one of {", ".join(BUDGET_NAMES)}; got none')
    name = budget.kind
    exits = next((len(costs) for costs in (latencies, gflops) if costs is not None), 2)
    if name == 'threshold':
        return _per_exit(budget.value, exits, name)
    if difficulties is None or not len(difficulties):
        raise UsageError(
            f'{name} needs a calibrated checkpoint: run tools/calibrate.py on it first'
        )
    beyond = _per_exit(_beyond(budget, exits, latencies, gflops), exits, name)
    thresholds = [_threshold(difficulties, share) for share in ([beyond] if exits == 2 else beyond)]
    return thresholds[0] if exits == 2 else thresholds


def require_exits(budget: Budget, exits: int) -> None:
    """Raise a `UsageError` if a budget that is given exit by exit is none for K exits: it has K - 1
    numbers, of which thresholds rise and hard shares fall."""
    if isinstance(budget.value, tuple):
        _per_exit(budget.value, exits, budget.kind)


def wanted_shares(
    budget: Budget | Mapping[str, float | Sequence[float]],
    exits: int = 2,
    latencies: Sequence[float] | None = None,
    gflops: Sequence[float] | None = None,
) -> list[float]:
    """The share of images that a budget wants at each exit, (K,).

    Args:
        budget (Budget or Mapping): Any but a threshold.
        exits (int): K. Defaults to 2.
        latencies, gflops (Sequence[float], optional): The calibration's, (K,), which a target
            needs.

    Raises:
        UsageError: As `resolve_threshold`.
    """
    budget = Budget.parse(budget)
    beyond = _per_exit(_beyond(budget, exits, latencies, gflops), exits, budget.kind)
    return _at_exits([beyond] if exits == 2 else beyond)


def _beyond(
    budget: Budget, exits: int, latencies: Sequence[float] | None, gflops: Sequence[float] | None
) -> float | Sequence[float]:
    """The share of images that goes beyond each exit but the last."""
    if budget.kind == 'hard_share':
        share = budget.value
    elif budget.kind == 'target_latency':
        share = share_for_latency(budget.value, *_measured(latencies, budget.kind))
    else:
        share = share_for_gflops(budget.value, *_measured(gflops, budget.kind))
    return share if exits == 2 or isinstance(share, (list, tuple)) else shares_beyond(share, exits)


def _measured(costs: Sequence[float] | None, name: str) -> Sequence[float]:
    if costs is None or not np.isfinite(costs).all():
        raise UsageError(
            f'{name} needs a checkpoint calibrated for it: run tools/calibrate.py on it again; a '
            'folder needs latencies: run tools/export.py where its validation images are'
        )
    return costs


def _per_exit(value: float | Sequence[float], exits: int, name: str) -> Thresholds:
    """A float for two exits, K - 1 for more; one number counts for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * (exits - 1)
    if len(values) != exits - 1:
        raise UsageError(
            f'{name} by exit must have {exits - 1} numbers for {exits} exits, got {values}'
        )
    if values != sorted(values, reverse=name != 'threshold'):
        raise UsageError(
            f'{name} by exit must {"rise" if name == "threshold" else "fall"}, got {values}'
        )
    return float(values[0]) if exits == 2 else [float(number) for number in values]


def _threshold(difficulties: Sequence[float], share: float) -> float:
    """`threshold_for_share`, saying so where it misses the share."""
    threshold = threshold_for_share(difficulties, share)
    got = hard_share(difficulties, threshold)
    if abs(got - share) > max(0.01, 1 / len(difficulties)):
        warnings.warn(
            f'many images share a difficulty: a hard share of {share:.3g} was asked for, the '
            f'nearest that a threshold gives is {got:.3g}'
        )
    return threshold
