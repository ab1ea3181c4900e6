"""Thresholds of a gate from a record of validation videos: for a wished cost, or for a loss of AP
that is allowed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO

from ..errors import UsageError
from ..progress import CountProgress
from ..routing.budget import Budget
from ..routing.budget_controller import BudgetController
from .budgets import POINTS
from .curves import CHANGE_LEVELS, fixed_exits, gate_curve, pareto_front, settings_of
from .gate_simulation import Replays, Seconds, evidence_by_exit, exit_costs, gate_difficulties
from .gates import Gate, name_of

#: Levels that a calibration tries: finer than a curve.
LEVELS = 61
#: A wish -> the cost of a row that it is about.
_COST = dict(target_gflops='gflops', target_latency='latency', max_drop='gflops')


class Calibration(NamedTuple):
    """What was chosen on a record.

    Attributes:
        thresholds (list[float]): (E,), of exits -1, 0, ..., E - 2.
        gflops, latencies (list[float]): (E + 1,), of a frame that leaves at exit -1, 0, ..., E - 1;
            seconds.
        row (dict): The point that the thresholds give on the record, see
            `gate_simulation.curve_point`.
        last (dict): That of the last exit for all frames, no other head run.
        front (list[dict]): The best rows of all that were tried, from the cheapest, with their
            ``thresholds``.
    """

    thresholds: list[float]
    gflops: list[float]
    latencies: list[float]
    row: dict
    last: dict
    front: list[dict]


def calibrate_gate(
    record: Mapping,
    coco: COCO,
    gate: Gate,
    wish: Mapping[str, float],
    by: str | None = None,
    seconds: Seconds = (0.0, 0.0),
    count: int = LEVELS,
    change_count: int = CHANGE_LEVELS,
    progress: CountProgress | None = None,
) -> Calibration:
    """Choose thresholds: one level for all exits and, for a gate that decides early, one on change,
    together.

    Args:
        record (Mapping): Of validation videos, see `record`.
        coco (COCO): Its ground truth.
        gate (Gate): On the CPU; trained, if it learns.
        wish (Mapping): One of ``target_gflops`` and ``target_latency`` (seconds), means per frame:
            the largest AP at no more; and ``max_drop``: the least cost at an AP at most so many
            points below the last exit's.
        by (str, optional): The cost that counts for ``max_drop``: 'gflops' or 'latency'. Defaults
            to 'gflops'.
        seconds (tuple[float, float]): See `gate_simulation.simulate_gate`. Defaults to none.
        count (int): Levels to try. Defaults to 61.
        change_count (int): Thresholds on change to try. Defaults to 16.
        progress (Callable, optional): Called with (settings done, settings in all).

    Raises:
        UsageError: If the wish is none, or cannot be met.
    """
    ((name, value),) = _checked(wish).items()
    cost = by if by and name == 'max_drop' else _COST[name]
    replays, difficulties = Replays(record, coco), gate_difficulties(gate, evidence_by_exit(record))
    last = fixed_exits(record, replays)[-1]
    rows = gate_curve(
        record,
        replays,
        gate,
        difficulties,
        settings_of(record, gate, difficulties, count, change_count),
        seconds,
        progress,
    )
    row = _choose(rows, name, value, cost, last)
    gflops, latencies = (
        exit_costs(record, kind, gate.looks_at_detections).tolist()
        for kind in ('gflops', 'latencies')
    )
    return Calibration(row['thresholds'], gflops, latencies, row, last, pareto_front(rows, cost))


def _checked(wish: Mapping[str, float]) -> Mapping[str, float]:
    if len(wish) != 1 or next(iter(wish)) not in _COST:
        raise UsageError(f'a calibration takes exactly one of {", ".join(_COST)}; got {dict(wish)}')
    ((name, value),) = wish.items()
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UsageError(f'{name} must be a number from 0 on, got {value}')
    return wish


def _choose(rows: Sequence[dict], name: str, value: float, cost: str, last: Mapping) -> dict:
    if name == 'max_drop':
        # Rounding must not shut out the last exit itself.
        # There always is one: at thresholds of -1 all frames go to the last exit.
        good = [row for row in rows if row['ap'] >= last['ap'] - value - 1e-9]
        return min(good, key=lambda row: (row[cost], -row['ap']))
    good = [row for row in rows if row[cost] <= value * (1 + 1e-9)]
    if not good:
        raise UsageError(
            f'a mean {cost} of {value:g} per frame cannot be met: this gate needs at least '
            f'{min(row[cost] for row in rows):.4g}'
        )
    return max(good, key=lambda row: (row['ap'], -row[cost]))


def put_calibration(
    checkpoint: Mapping, calibration: Calibration, gate: Gate, facts: Mapping[str, object]
) -> dict:
    """A checkpoint of an `EarlyExitDetector` with a gate and its calibration.

    Args:
        checkpoint (Mapping): With ``state_dict``; it stays as it is.
        calibration (Calibration): Its thresholds and costs go into the buffers, all else into
            ``meta``.
        gate (Gate): Its weights take the place of those of the gate that was there.
        facts (Mapping): Strings, numbers and lists of them: where it comes from.
    """
    state = {
        key: value for key, value in checkpoint['state_dict'].items() if not key.startswith('gate.')
    }
    state.update({f'gate.{name}': value.clone() for name, value in gate.state_dict().items()})
    state.update(
        {
            name: torch.tensor(getattr(calibration, name))
            for name in ('thresholds', 'gflops', 'latencies')
        }
    )
    state['operating_points'] = operating_points(calibration.front, len(calibration.thresholds))
    meta = dict(
        checkpoint.get('meta', {}),
        calibration=dict(
            facts,
            gate=name_of(gate),
            row=calibration.row,
            last=calibration.last,
            front=calibration.front,
        ),
    )
    return dict(checkpoint, state_dict=state, meta=meta)


def operating_points(rows: Sequence[Mapping], exits: int) -> torch.Tensor:
    """A front as `EarlyExitDetector.operating_points` keeps it, (64, E + 2); thinned out where it
    is longer."""
    if len(rows) > POINTS:
        rows = [rows[at] for at in np.linspace(0, len(rows) - 1, POINTS).round().astype(int)]
    points = torch.full((POINTS, exits + 2), float('nan'))
    points[: len(rows)] = torch.tensor(
        [[*row['thresholds'], row['gflops'], row['latency']] for row in rows]
    )
    return points


class GateBudgetController:
    """Hold a mean cost on a stream whose frames grow harder, or on a machine that slows down.

    A calibration's front is a line of settings from cheap to dear. Where on it to be is the share
    of a `routing.budget_controller.BudgetController`, which moves with what frames really cost; the
    setting is the one whose cost on the calibration's record is nearest.

    Args:
        front (Sequence[Mapping]): Of a `Calibration`: two rows or more.
        budget (Budget or Mapping): ``target_latency`` or ``target_gflops``, means per frame.
        window (int): As of `BudgetController`. Defaults to 256.
        gain (float): As of `BudgetController`. Defaults to 0.01.

    Raises:
        UsageError: If the budget is no target, or the front does not rise.
    """

    def __init__(
        self,
        front: Sequence[Mapping],
        budget: Budget | Mapping[str, float],
        window: int = 256,
        gain: float = 0.01,
    ) -> None:
        budget = Budget.parse(budget)
        if budget is None or not budget.is_target:
            raise UsageError('give one of target_latency and target_gflops')
        cost = _COST[budget.kind]
        self._rows = sorted(front, key=lambda row: row[cost])
        if len(self._rows) < 2:
            raise UsageError(
                'a front of two settings or more is needed to choose among: calibrate on more '
                'frames'
            )
        self._costs = np.array([row[cost] for row in self._rows])
        # Its unit is whatever it is told: seconds or GFLOPs.
        self._controller = BudgetController(
            Budget('target_latency', budget.value),
            costs=(self._costs[0], self._costs[-1]),
            window=window,
            gain=gain,
        )

    @classmethod
    def of_points(
        cls, points: torch.Tensor, budget: Budget | Mapping[str, float]
    ) -> 'GateBudgetController':
        """From `EarlyExitDetector.operating_points` and a target."""
        known = points[~points.isnan().any(dim=1)].tolist()
        return cls(
            [dict(thresholds=row[:-2], gflops=row[-2], latency=row[-1]) for row in known], budget
        )

    def measure(self, cost: float, frames: int = 1) -> None:
        """Take what frames cost, all together: seconds or GFLOPs, as the target."""
        self._controller.measure(cost, frames)

    @property
    def thresholds(self) -> list[float]:
        """For the next frame, (E,)."""
        wanted = self._costs[0] + self._controller.share * (self._costs[-1] - self._costs[0])
        return list(self._rows[int(np.abs(self._costs - wanted).argmin())]['thresholds'])

    def status(self) -> dict[str, object]:
        """As `BudgetController.status`, with the ``thresholds``."""
        return dict(self._controller.status(), thresholds=self.thresholds)
