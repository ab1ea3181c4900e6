"""What a detector knows of its speed, and how a budget becomes thresholds."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..routing import resolve_threshold
from ..routing.budget import Budget
from ..routing.thresholds import Thresholds


class CalibrationState:
    """Thresholds, and the calibration that they are chosen by: buffers, so that a checkpoint keeps
    them. A part of `DynamicDetector`."""

    def _init_calibration(self, budget: Budget | None) -> None:
        self.budget: Budget | None = budget
        # Between exit k and k + 1, ascending; of two exits a single number.
        shape = () if self.num_exits == 2 else (self.num_exits - 1,)
        self.register_buffer('threshold', torch.full(shape, 0.5))
        # NaN: not measured yet.
        self.register_buffer('delta', torch.tensor(float('nan')))
        # The calibration: sorted difficulties of the validation set, (n,), and what each exit
        # costs, seconds and GFLOPs (2 x multiply-adds) per image. Empty until tools/calibrate.py
        # fills them.
        self.register_buffer('difficulties', torch.zeros(0))
        self.register_buffer('latencies', torch.full((self.num_exits,), float('nan')))
        self.register_buffer('gflops', torch.full((self.num_exits,), float('nan')))
        # Of the logit of each exit's scores, which are compared where exits are merged, and in any
        # AP; see `routing.merging.scale_scores`.
        self.register_buffer('platt_scale', torch.ones(self.num_exits))
        self.register_buffer('platt_shift', torch.zeros(self.num_exits))
        # The same on the host, which decides whether there is anything to scale, and would have to
        # wait for the device.
        self._scaling = [(1.0, 0.0)] * self.num_exits
        #: Said to who asks for a mean latency: how these differ from those here. See
        #: `timing.timed_elsewhere`.
        self.timed_elsewhere: str | None = None
        self._apply_budget()

    def set_budget(
        self,
        budget: Budget | Mapping[str, float | Sequence[float]] | None = None,
        **named: float | Sequence[float],
    ) -> Thresholds:
        """Choose the speed.

        Args:
            budget (Budget or Mapping): A threshold, a share of the calibration's hard images, or
                mean seconds or GFLOPs per image as they were calibrated; see `Budget.parse`. For
                K > 2 exits a threshold or a hard share may also be a list of K - 1: rising
                thresholds, or the shares that go beyond exit 0, 1, ..., falling.
            **named: The same by name: ``set_budget(hard_share=0.5)``.

        Returns:
            float or list[float]: The threshold; K - 1 of them for K > 2 exits.

        Raises:
            UsageError: If out of range, or if the model is not calibrated and needs to be.
        """
        budget = Budget.parse(budget, **named)
        if self.regions is not None:
            thresholds = self.regions.threshold_for(budget)
        else:
            thresholds = resolve_threshold(
                budget, self.difficulties.tolist(), self.latencies.tolist(), self.gflops.tolist()
            )
        self.threshold.copy_(torch.tensor(thresholds))
        self.budget, self._budget_waits = budget, False
        if budget.kind == 'target_latency' and self.timed_elsewhere:
            warnings.warn(self.timed_elsewhere)
        return thresholds

    def _apply_budget(self) -> None:
        """Set the threshold as soon as what the config's budget needs is loaded."""
        # Where there are regions, their calibration is loaded after this.
        ready = self.regions is None and len(self.difficulties)
        if self.budget and (self.budget.kind == 'threshold' or ready):
            self.set_budget(self.budget)
        else:
            self._budget_waits = self.budget is not None

    def set_platt_scaling(self, scaling: Sequence[tuple[float, float]]) -> None:
        """Choose scale and shift of the logit of each exit's scores, K pairs; see
        `routing.merging.scale_scores`."""
        values = self.platt_scale.new_tensor(scaling)
        self.platt_scale.copy_(values[:, 0])
        self.platt_shift.copy_(values[:, 1])
        self._scaling = [(scale, shift) for scale, shift in values.tolist()]

    def _exits_of(self, phi: Tensor) -> Tensor:
        """The exit of each image, (N,), by its difficulty, (N,)."""
        return (phi[:, None] > self.threshold.reshape(1, -1)).sum(1)
