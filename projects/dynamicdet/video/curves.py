"""AP against cost on a recorded video run: of gates, of fixed exits, of all mixtures of fixed
exits.

A *setting* is E thresholds, as in `gate_simulation`. A *row* is a point of a curve, see
`gate_simulation.curve_point`; costs are 'gflops' or 'latency'.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..progress import CountProgress
from .gate_simulation import (
    GateRun,
    Replays,
    Seconds,
    curve_point,
    detection_sources,
    exit_costs,
    frame_changes,
    nothing_seen,
    simulate_gate,
)
from .gates import Gate

#: How many thresholds on difficulty, and how many on change, a curve tries.
LEVELS, CHANGE_LEVELS = 21, 16
#: Frames later at which changes are looked at: a scene that drifts changes little from one frame to
#: the next.
_LAGS = (1, 4)

Setting = list[float]


def quantile_thresholds(values: Sequence[float], count: int) -> list[float]:
    """So many thresholds at quantiles of some values, at most; each halfway between two of them, so
    that noise in the last digits moves nothing."""
    values = np.unique(np.asarray(values, np.float32))
    middles = (values[:-1] + values[1:]) / 2
    # Neighbors without a float32 between them cannot be parted.
    middles = middles[(middles >= values[:-1]) & (middles < values[1:])]
    if len(middles) > count:
        middles = middles[np.linspace(0, len(middles) - 1, count).round().astype(int)]
    return [float(middle) for middle in middles]


def settings_of(
    record: Mapping,
    gate: Gate,
    difficulties: np.ndarray,
    count: int = LEVELS,
    change_count: int = CHANGE_LEVELS,
) -> list[Setting]:
    """Settings to try: one level for all exits, from all to the end to all at the first exit; for a
    gate that decides early, with each of some thresholds on change.

    Args:
        record (Mapping): Of a video run.
        gate (Gate): The gate.
        difficulties (np.ndarray): (E - 1, n), its own.
        count (int): Levels between the ends. Defaults to 21.
        change_count (int): Thresholds on change, besides none. Defaults to 16.
    """
    # By quantile of all difficulties, each as often as it occurs: where many frames are, steps are
    # small.
    quantiles = np.quantile(difficulties, np.linspace(0, 1, 4 * count + 1))
    levels = [-1.0, *quantile_thresholds(quantiles, count), 1.0]
    early = [-1.0]
    if gate.early:
        change_samples = np.concatenate([frame_changes(record, lag) for lag in _LAGS])
        if len(change_samples):
            early += quantile_thresholds(
                np.quantile(change_samples, np.linspace(0, 1, 4 * change_count + 1)), change_count
            )
        if nothing_seen(record, gate).any():
            early.append(0.0)
    # Above the change that is taken for a cut the detector has nothing left to show again.
    cut = record['provenance'].get('cut', 1.0)
    early = [change for change in early if change < cut]
    return [[change] + [level] * len(difficulties) for change in early for level in levels]


def gate_curve(
    record: Mapping,
    replays: Replays,
    gate: Gate,
    difficulties: np.ndarray,
    settings: Sequence[Setting],
    seconds: Seconds = (0.0, 0.0),
    progress: CountProgress | None = None,
) -> list[dict]:
    """A row for each setting, with it as ``thresholds``.

    Args:
        record (Mapping): Of a video run.
        replays (Replays): Of the same.
        gate (Gate): The gate.
        difficulties (np.ndarray): (E - 1, n), its own.
        settings (Sequence[Setting]): Those that share a threshold on change are best next to each
            other.
        seconds (tuple[float, float]): See `gate_simulation.simulate_gate`. Defaults to none.
        progress (Callable, optional): Called with (settings done, settings in all).
    """
    rows, sources, nothing = [], {}, nothing_seen(record, gate)
    for setting in settings:
        change = setting[0]
        if gate.early and change not in sources:
            sources[change] = detection_sources(record, change, nothing)
        run = simulate_gate(record, gate, difficulties, setting, seconds, sources.get(change))
        rows.append(
            dict(curve_point(run, replays.ap(run), len(record['gflops'])), thresholds=list(setting))
        )
        if progress:
            progress(len(rows), len(settings))
    return rows


def pareto_front(rows: Sequence[Mapping], cost: str = 'gflops') -> list[dict]:
    """The rows that no other beats in AP at as little cost, from the cheapest on, AP rising."""
    best, kept = -np.inf, []
    for row in sorted(rows, key=lambda row: (row[cost], -row['ap'])):
        if row['ap'] > best:
            best = row['ap']
            kept.append(dict(row))
    return kept


def fixed_exits(record: Mapping, replays: Replays) -> list[dict]:
    """A row for each exit, all frames leaving there and no other head run; with ``exit``."""
    images, exits = len(record['images']), len(record['gflops'])
    gflops, latencies = (exit_costs(record, kind, looks=False) for kind in ('gflops', 'latencies'))
    rows = []
    for exit in range(exits):
        run = GateRun(
            np.full(images, exit),
            np.arange(images),
            np.full(images, gflops[exit + 1]),
            np.full(images, latencies[exit + 1]),
        )
        rows.append(dict(curve_point(run, replays.ap(run), exits), exit=exit))
    return rows


def line_at(rows: Sequence[Mapping], cost: float, key: str = 'gflops') -> float:
    """AP at a cost on the line over some points: what is between two of them is a straight line,
    and a point below the line of two others counts for nothing. NaN below the cheapest; beyond the
    dearest, the best AP.

    For fixed exits: what choosing among them by the roll of dice gives, about.
    """
    hull: list[tuple] = []
    for point in [(row[key], row['ap']) for row in pareto_front(rows, key)]:
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    xs, ys = zip(*hull)
    return float(np.interp(cost, xs, ys, left=np.nan))


def _turns_up(first: tuple, middle: tuple, last: tuple) -> bool:
    """Whether the middle point lies on or below the line from the first to the last."""
    return (middle[1] - first[1]) * (last[0] - first[0]) <= (last[1] - first[1]) * (
        middle[0] - first[0]
    )
