"""How much to prune of each layer or block for a wanted size, by how much the detector suffers
where that one alone is pruned: pure functions on curves, which `measuring.sensitivity` measures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..routing.oracle import allocate


class SensitivityCurve(NamedTuple):
    """AP where one part alone is pruned.

    Attributes:
        name (str): Of the part: a layer or a block.
        weights (int): How many weights it has.
        shares (tuple[float]): Pruned shares, ascending from 0, in [0, 1).
        aps (tuple[float]): AP at each, in percent.
    """

    name: str
    weights: int
    shares: Sequence[float]
    aps: Sequence[float]


class PruningAllocation(NamedTuple):
    """What to prune.

    Attributes:
        shares (dict[str, float]): Part -> share.
        left (float): Share of all the parts' weights that is left.
        loss (float): Predicted loss of AP, percent points: the sum over the parts of what each
            costs alone.
        bound (float): No choice among the measured shares has a smaller sum; at most ``loss``.
    """

    shares: dict[str, float]
    left: float
    loss: float
    bound: float


def allocate_pruning(curves: Sequence[SensitivityCurve], size: float) -> PruningAllocation:
    """One of the measured shares for each part, such that the sum of losses is least and at most
    ``size`` of all weights is left.

    It takes losses of parts to add up, which holds for small ones: a multiple-choice knapsack, as
    the oracle of routing solves (`routing.oracle.allocate`), with parts for images and shares for
    exits. Where pruning raised the AP, which is noise as a rule, the loss counts as 0.

    Args:
        curves (Sequence[SensitivityCurve]): Of parts that have no weight in common, all at the same
            shares.
        size (float): In (0, 1].

    Raises:
        UsageError: If the size is out of range, or below what the measured shares reach.
    """
    if not 0 < size <= 1:
        raise UsageError(f'a target size is a share of the weights in (0, 1]; got {size}')
    if (
        not curves
        or any(
            list(curve.shares) != list(curves[0].shares) or len(curve.aps) != len(curve.shares)
            for curve in curves
        )
        or curves[0].shares[0] != 0
    ):
        raise UsageError('curves must be of the same shares, the first of which is 0')
    losses = np.array(
        [np.maximum(curve.aps[0] - np.asarray(curve.aps, float), 0) for curve in curves]
    ).T
    left = np.outer(1 - np.asarray(curves[0].shares, float), [curve.weights for curve in curves])
    total = sum(curve.weights for curve in curves)
    if left[-1].sum() > size * total * (1 + 1e-9):
        raise UsageError(
            f'{left[-1].sum() / total:.1%} of the weights are left at the largest measured share; '
            f'a size of {size:.1%} needs larger ones'
        )
    allocation = allocate(-losses, left, size * total / len(curves))
    shares = {
        curve.name: float(curve.shares[choice]) for curve, choice in zip(curves, allocation.choice)
    }
    return PruningAllocation(
        shares,
        float(allocation.cost * len(curves) / total),
        -allocation.value + 0.0,
        max(-allocation.bound, 0.0),
    )
