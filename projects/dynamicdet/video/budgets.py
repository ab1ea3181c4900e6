"""From a wanted speed to the thresholds of an early-exit detector."""

import torch
from torch import Tensor

from ..errors import UsageError
from ..routing.budget import Budget

#: Rows of `EarlyExitDetector.operating_points`: more than a front of thresholds has use for.
POINTS = 64
#: Columns there, from the right.
_COLUMNS = dict(target_gflops=-2, target_latency=-1)


def require_early_exit_budget(budget: Budget, exits: int) -> None:
    """Raise a `UsageError` if a budget is none for E exits.

    Args:
        budget (Budget): A threshold (a number, or E of them), or mean GFLOPs or seconds per frame.
        exits (int): E.
    """
    names = ('threshold', *_COLUMNS)
    if budget.kind not in names:
        raise UsageError(f'a budget of early exits is one of {", ".join(names)}; got {budget.kind}')
    if isinstance(budget.value, tuple) and len(budget.value) != exits:
        raise UsageError(
            f'threshold is one number in [-1, 1], or {exits}: of exit -1 to {exits - 2}; got '
            f'{list(budget.value)}'
        )


def resolve_budget(budget: Budget, points: Tensor, exits: int) -> list[float]:
    """Thresholds of exit -1 to E - 2.

    Args:
        budget (Budget): That `require_early_exit_budget` lets pass.
        points (Tensor): (n, E + 2): E thresholds, mean GFLOPs and mean seconds of calibrated
            settings, each the best for its cost; rows with NaN are not used.
        exits (int): E.

    Raises:
        UsageError: If nothing is calibrated, or all costs more.
    """
    name, value = budget.kind, budget.value
    if name == 'threshold':
        return [float(each) for each in (value if isinstance(value, tuple) else [value] * exits)]
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
