"""Compare after a test what was served with the budget."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from mmengine.dist import broadcast_object_list, collect_results
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..models import DynamicDetector
from ..models.budget_control import (
    budget_report_of,
    calibrated_otherwise,
    find_dynamic_detector,
    timed_calls,
)
from ..routing.budget_report import BudgetReport
from ..timing import dtype_of, machine_of, timed_elsewhere
from .online_hook import OnlineHook


@HOOKS.register_module()
class BudgetHook(Hook):
    """Count which exits the images of a test left at, over all ranks, and how long they took;
    ``tools/test.py`` adds this hook. Shares, mean GFLOPs and milliseconds go into the log as
    ``budget/...``. Of test-time augmentation each image's first view counts, and costs are left
    out.

    Attributes:
        budget_report (BudgetReport, optional): Of the last test, on rank 0; None for a
            detector that is not dynamic.
    """

    # Before RuntimeInfoHook, which gives the log what it has of metrics.
    priority = 'HIGHEST'

    def __init__(self) -> None:
        self.budget_report: BudgetReport | None = None
        self._left: list[tuple[int, float]] = []
        self._calls: list[float] = []
        self._timer = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note how the calibration's machine differs from this one."""
        model = find_dynamic_detector(runner.model)
        if model is None:
            return
        device = model.threshold.device
        dtype = dtype_of(model)
        if getattr(runner.test_loop, 'fp16', False):
            dtype = 'float16' if device.type == 'cuda' else 'bfloat16'
        calibration = checkpoint.get('meta', {}).get('calibration', {})
        model.timed_elsewhere = timed_elsewhere(calibration, dict(machine_of(device), dtype=dtype))
        if doubt := calibrated_otherwise(model, calibration):
            warnings.warn(doubt)

    def before_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Start to time calls of the detector with the first batch."""
        model = find_dynamic_detector(runner.model)
        # At the first: other hooks put copies in the model's place before.
        if batch_idx == 0 and model is not None:
            self._left, self._calls = [], []
            self._timer = timed_calls(
                model, lambda seconds, images: self._calls.append(seconds / images)
            )
            self._timer.__enter__()

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence | None = None,
    ) -> None:
        """Note exit and seconds of each image of the batch."""
        if self._timer is not None:
            # What a first run takes is no cost of an image.
            seconds = self._calls[-1] if batch_idx else float('nan')
            self._left.extend((sample.exit, seconds) for sample in outputs)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Gather all ranks, make the report and add its figures to the metrics."""
        if self._timer is None:
            return
        self._timer.__exit__(None, None, None)
        self._timer = None
        # Ranks may have seen an image twice, so that all have as many.
        left = collect_results(self._left, len(runner.test_dataloader.dataset))
        if left is not None:
            self.budget_report = _report_budget(runner, left)
        # All ranks have the same metrics: LoggerHook writes one file on each of them.
        figures = [self.budget_report.figures() if self.budget_report else None]
        broadcast_object_list(figures)
        if metrics is not None:
            metrics.update({f'budget/{name}': value for name, value in figures[0].items()})


def _report_budget(runner: Runner, left: Sequence[tuple[int, float]]) -> BudgetReport:
    model: DynamicDetector = find_dynamic_detector(runner.model)
    online = next((hook for hook in runner.hooks if isinstance(hook, OnlineHook)), None)
    # A frame that repeats the one before went no further than exit 0.
    exits = [max(exit, 0) for exit, _ in left]
    counts = [exits.count(exit) for exit in range(model.num_exits)]
    thresholds = None if online else model.threshold.reshape(-1).tolist()
    budget = model.budget if online is None else online.budget
    timed = [seconds for _, seconds in left if seconds == seconds]
    budget_report = budget_report_of(
        model, counts, budget, thresholds, float(np.mean(timed)) if timed else None
    )
    if any(isinstance(part, BaseTTAModel) for part in runner.model.modules()):
        # Costs are of a view.
        unknown = (math.nan,) * model.num_exits
        return replace(budget_report, gflops=unknown, latencies=unknown, seconds=None)
    return budget_report
