"""What knowing each frame could reach: the best exit of every frame, or none, under a budget.

Letters: n frames, E exits, L the longest reuse in frames. ``values``: what is shown is worth, on
each frame, for example its own AP in percent. An oracle maximizes their sum, which is not the AP of
the set, but near it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..routing.oracle import allocate
from .gate_simulation import GateRun, Replays, curve_point, exit_costs, frames_by_video

#: How long the oracle may reuse detections, in frames.
LONGEST = 8
#: Halvings of the price; the gap to the bound is then that of the program itself.
_STEPS = 40


class ExitPlan(NamedTuple):
    """What an oracle chose: ``exits``, (n,), -1 where nothing is computed; ``source``, (n,), as in
    `gate_simulation`; ``value``, the sum of what is shown; ``bound``: no choice within the budget
    has a larger one."""

    exits: np.ndarray
    source: np.ndarray
    value: float
    bound: float


def plan_without_memory(values: np.ndarray, costs: Sequence[float], budget: float) -> ExitPlan:
    """The oracle of Gay 2022: per frame an exit or *no detection*, by `routing.oracle.allocate`.

    Args:
        values (np.ndarray): (E, n).
        costs (Sequence[float]): Of exits -1, 0, ..., E - 1.
        budget (float): Mean cost per frame.
    """
    values = np.asarray(values, float)
    allocation = allocate(np.concatenate([np.zeros((1, values.shape[1])), values]), costs, budget)
    exits = allocation.choice - 1
    return ExitPlan(
        exits, np.where(exits < 0, -1, np.arange(len(exits))), allocation.value, allocation.bound
    )


def plan_with_reuse(
    values: np.ndarray, costs: Sequence[float], budget: float, videos: Sequence[Sequence[int]]
) -> ExitPlan:
    """An oracle that may also show again what it last computed, for up to L frames.

    At a price per cost the best plan of a video is a shortest path: at each frame one of E exits is
        computed,
    or what is shown stays (E exits, up to L frames old), or nothing is shown. The price is found by
    halving, as the largest that the budget does not bind at. The least of the Lagrangian's values
    over the prices tried bounds every plan within the budget.

    Args:
        values (np.ndarray): (L + 1, E, n): of what each exit found so many frames before; -inf
            where a video is not so long yet.
        costs (Sequence[float]): Of exits -1, 0, ..., E - 1.
        budget (float): Mean cost per frame.
        videos (Sequence[Sequence[int]]): Frames of each video, in order.

    Raises:
        UsageError: If the budget is below the cheapest plan.
    """
    values, costs = np.asarray(values, float), np.asarray(costs, float)
    frames = values.shape[2]
    room = budget * frames * (1 + 1e-9)
    cheapest = costs.min() * frames
    if not room >= cheapest:
        raise UsageError(
            f'a budget of {budget:g} per frame is below the cheapest plan, {costs.min():g}: raise '
            'it'
        )
    best = _plan_at(values, costs, 0.0, videos)
    if costs[best.exits + 1].sum() <= room:
        return best._replace(bound=best.value)
    # At the high end any saving is worth more than any frame.
    spread = np.ptp(np.unique(costs)) and np.diff(np.unique(costs)).min()
    low, high = (
        0.0,
        2
        * float(values[np.isfinite(values)].max(initial=1.0))
        * values.shape[0]
        / max(spread, 1e-12),
    )
    within, bound = _plan_at(values, costs, high, videos), best.value
    for _ in range(_STEPS):
        price = (low + high) / 2
        tried = _plan_at(values, costs, price, videos)
        cost = costs[tried.exits + 1].sum()
        bound = min(bound, tried.value + price * (room - cost))
        if cost <= room:
            high = price
            within = max(within, tried, key=lambda plan: plan.value)
        else:
            low = price
    return within._replace(bound=bound)


def _plan_at(
    values: np.ndarray, costs: np.ndarray, price: float, videos: Sequence[Sequence[int]]
) -> ExitPlan:
    exits, source = np.full(values.shape[2], -1), np.full(values.shape[2], -1)
    total = 0.0
    for frames in videos:
        ages, chosen = _path(values[:, :, frames], price * costs)
        shown_places = np.arange(len(frames)) - ages
        shown = chosen >= 0
        where = np.asarray(frames)
        exits[where[ages == 0]] = chosen[ages == 0]
        source[where[shown]] = where[shown_places[shown]]
        total += values[ages[shown], chosen[shown], where[shown]].sum()
    return ExitPlan(exits, source, float(total), np.inf)


def _path(values: np.ndarray, paid: np.ndarray) -> tuple:
    """The best path through one video: age, (m,), and exit, (m,), of what is shown at each frame;
    exit -1 (and age -1) where nothing is.

    A state is (age, exit), and one more: nothing is shown. ``paid``: (E + 1,).
    """
    longest, exits, count = values.shape
    scores = np.full((longest, exits), -np.inf)
    score_of_nothing, back = 0.0, []
    for frame in range(count):
        start = max(score_of_nothing, scores.max())
        # What was before the frame: nothing (-1), or a state by its number.
        back.append(-1 if score_of_nothing >= start else int(scores.argmax()))
        aged = np.full_like(scores, -np.inf)
        aged[1:] = scores[:-1] + values[1:, :, frame] - paid[0]
        aged[0] = start + values[0, :, frame] - paid[1:]
        scores, score_of_nothing = aged, start - paid[0]
    ages, chosen = np.full(count, -1), np.full(count, -1)
    state = -1 if score_of_nothing >= scores.max() else int(scores.argmax())
    for frame in range(count - 1, -1, -1):
        if state < 0:
            state = back[frame]
            continue
        age, exit = divmod(state, exits)
        ages[frame], chosen[frame] = age, exit
        # Older ones were one frame younger at the frame before.
        state = back[frame] if age == 0 else state - exits
    return ages, chosen


def values_by_age(
    replays: Replays, videos: Sequence[Sequence[int]], frames: int, longest: int = LONGEST
) -> np.ndarray:
    """AP of each frame by itself, of what each exit found up to ``longest`` frames before: (L + 1,
    E, n), percent.

    Args:
        replays (Replays): Of the record.
        videos (Sequence[Sequence[int]]): See `gate_simulation.frames_by_video`.
        frames (int): n.
        longest (int): L. Defaults to 8.
    """
    by_age = []
    for age in range(longest + 1):
        source = np.full(frames, -1)
        for frames_of_video in videos:
            source[frames_of_video[age:]] = frames_of_video[: len(frames_of_video) - age]
        values = replays.mixtures(source).image_ap()[:-1]
        by_age.append(np.where(source >= 0, values, -np.inf))
        if (source < 0).all():
            break
    return np.stack(by_age)


def oracle_rows(
    record: Mapping,
    replays: Replays,
    budgets: Sequence[float],
    kind: str = 'gflops',
    reuses: bool = True,
    longest: int = LONGEST,
) -> list[dict]:
    """Rows of an oracle at several budgets, with ``budget``, and ``value`` and ``bound``, means
    over frames.

    It looks at no head that it does not choose.

    Args:
        record (Mapping): Of a video run.
        replays (Replays): Of the same.
        budgets (Sequence[float]): Mean cost per frame, in the unit of ``kind``. Those below the
            cheapest are raised to it.
        kind (str): 'gflops' or 'latencies'. Defaults to 'gflops'.
        reuses (bool): Whether it may show the last detections again; else *no detection* shows
            none.
        longest (int): For how many frames. Defaults to 8.
    """
    frames, exits = len(record['images']), len(record['gflops'])
    videos = frames_by_video(record)
    values = values_by_age(replays, videos, frames, longest if reuses else 0)
    gflops, latencies = (exit_costs(record, name, looks=False) for name in ('gflops', 'latencies'))
    costs = dict(gflops=gflops, latencies=latencies)[kind]
    rows = []
    for budget in budgets:
        budget = max(budget, costs.min())
        plan = (
            plan_with_reuse(values, costs, budget, videos)
            if reuses
            else plan_without_memory(values[0], costs, budget)
        )
        run = GateRun(plan.exits, plan.source, gflops[plan.exits + 1], latencies[plan.exits + 1])
        rows.append(
            dict(
                curve_point(run, replays.ap(run), exits),
                budget=float(budget),
                value=plan.value / frames,
                bound=plan.bound / frames,
            )
        )
    return rows
