"""Hold a budget where regions of images are looked at again: what moves is their price."""

from collections.abc import Mapping, Sequence

import numpy as np

from .budget import Budget
from .budget_controller import BudgetController
from .regions import PriceCurve, threshold_for_area
from .thresholds import Thresholds


class PriceController(BudgetController):
    """A `BudgetController` whose ``share`` is one of pixels. The threshold is the price at which
    the calibration has that share; what images really cost corrects it.

    Args:
        budget (Budget or Mapping): See `BudgetController`; ``hard_share`` is a share of the pixels.
        curve (PriceCurve): The calibration, m prices.
        costs (Sequence[float], optional): Seconds or GFLOPs per image at each price, (m,). A share
            of pixels needs none.
        gain (float): See `BudgetController`. Defaults to 0.01.

    Raises:
        UsageError: If an argument is out of range or missing.
    """

    def __init__(
        self,
        budget: Budget | Mapping[str, float],
        curve: PriceCurve,
        costs: Sequence[float] | None = None,
        gain: float = 0.01,
    ) -> None:
        self._curve = curve
        # Prices rise: the first is the full second exit, the last exit 0 alone.
        self._along = None if costs is None else np.asarray(costs, float)
        ends = None if costs is None else [float(costs[-1]), float(costs[0])]
        super().__init__(budget, ends, gain=gain)
        self.threshold = self._quantile()

    def _first_share(self) -> float:
        linear = super()._first_share()
        if self._costs is None or self._along is None:
            return linear
        # Noise in measured costs must not make them fall with the share.
        rising = np.maximum.accumulate(self._along[::-1])
        return float(np.interp(self.target, rising, self._curve.shares[::-1]))

    def _quantile(self) -> Thresholds:
        return threshold_for_area(self._curve, self.share)

    def decide(self, difficulties: Sequence[float] = ()) -> Thresholds:
        """The price for the next images, as a number in [0, 1]."""
        self.threshold = self._quantile()
        return self.threshold

    def count(self, shares: Sequence[float], counts: Sequence[int]) -> None:
        """Take what was looked at again: of each image the share of its pixels, (n,), and how many
        regions, (n,)."""
        if self.measures or not len(shares):
            return
        costs = np.asarray(shares, float)
        if self._along is not None:
            # A calibration's costs are so much for an image, a region, and its pixels.
            whole, region, pixels = np.linalg.lstsq(
                np.column_stack(
                    [np.ones_like(self._along), self._curve.counts, self._curve.shares]
                ),
                self._along,
                rcond=None,
            )[0]
            costs = whole + region * np.asarray(counts) + pixels * costs
        self._correct(float(costs.mean()), len(shares))
