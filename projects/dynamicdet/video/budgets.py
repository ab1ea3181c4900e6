"""From a wanted speed to the thresholds of an early-exit detector."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UsageError

#: Rows of `EarlyExitDetector.operating_points`: more than a front of thresholds has use for.
POINTS = 64
#: Columns there, from the right.
_COLUMNS = dict(target_gflops=-2, target_latency=-1)


def check_budget(budget: Mapping, exits: int) -> None:
    """Raise a `UsageError` if a budget is none for E exits.

    Args:
        budget (Mapping): One of ``threshold`` (a number, or E of them, in [-1, 1]),
            ``target_gflops``, ``target_latency``.
        exits (int): E.
    """
    names = ('threshold', *_COLUMNS)
    if len(budget) != 1 or next(iter(budget)) not in names:
        raise UsageError(
            f'a budget of early exits is one of {", ".join(names)}; got {dict(budget)}'
        )
    ((name, value),) = budget.items()
    values = list(value) if isinstance(value, (list, tuple)) and name == 'threshold' else [value]
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values):
        raise UsageError(f'{name} must be a number, got {value}')
    whole = not isinstance(value, (list, tuple)) or len(values) == exits
    if name == 'threshold' and not (whole and all(-1 <= one <= 1 for one in values)):
        raise UsageError(
            f'threshold is one number in [-1, 1], or {exits}: of exit -1 to {exits - 2}; got '
            f'{value}'
        )
    if name != 'threshold' and not 0 < value < float('inf'):
        raise UsageError(f'{name} must be above 0, got {value}')


def resolve_budget(budget: Mapping, points: Tensor, exits: int) -> list[float]:
    """Thresholds of exit -1 to E - 2.

    Args:
        budget (Mapping): That `check_budget` lets pass.
        points (Tensor): (n, E + 2): E thresholds, mean GFLOPs and mean seconds of calibrated
            settings, each the best for its cost; rows with NaN are not used.
        exits (int): E.

    Raises:
        UsageError: If nothing is calibrated, or all costs more.
    """
    ((name, value),) = budget.items()
    if name == 'threshold':
        return (
            [float(one) for one in value]
            if isinstance(value, (list, tuple))
            else [float(value)] * exits
        )
    costs = points[:, _COLUMNS[name]].nan_to_num(nan=float('inf'))
    if not costs.isfinite().any():
        raise UsageError(
            f'{name} needs a calibrated checkpoint: run tools/calibrate_video.py first'
        )
    # Rounding must not shut out a point that is named by its own cost.
    affordable = torch.where(costs <= value * (1 + 1e-5), costs, -1.0)
    if affordable.max() < 0:
        raise UsageError(
            f'{name}={value:g} cannot be met: the calibrated settings cost from {costs.min():.4g} '
            'on'
        )
    return points[affordable.argmax(), :exits].tolist()
