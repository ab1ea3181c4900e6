"""Let a controller set a detector's thresholds while it works."""
import contextlib
import time
from typing import Iterator, Mapping, Optional

import torch

from ..routing.controller import Controller
from .dynamic_detector import DynamicDetector


def build_controller(model: DynamicDetector, budget: Mapping[str, float]) -> Controller:
    """A controller for a detector: what its calibration knows is where it starts; without one it learns.

    Args:
        model (DynamicDetector): Calibrated or not.
        budget (Mapping): One of ``target_latency``, ``throughput``, ``hard_share`` and ``target_gflops``, the
            last for a calibrated detector; see `Controller`.

    Raises:
        UsageError: If the budget is none of these, or needs a calibration that is not there.
    """
    known = model.gflops if 'target_gflops' in budget else model.latencies
    costs = known.tolist() if known.isfinite().all() and (known[1:] > known[:-1]).all() else None
    return Controller(**budget, costs=costs, difficulties=model.difficulties.tolist(), exits=model.num_exits)


@contextlib.contextmanager
def kept_speed(model: DynamicDetector) -> Iterator[None]:
    """Put a detector's budget and thresholds back at the end."""
    before = model.threshold.clone(), model.budget, model._budget_waits
    try:
        yield
    finally:
        threshold, model.budget, model._budget_waits = before
        model.threshold.copy_(threshold)


class Online:
    """While this is entered, a controller sets the thresholds of each batch that a detector sees.

    The router's difficulties go to the controller before images part. With ``timed`` it is also told how
    long each call took, from preprocessing to boxes; without, someone else does that.

    Args:
        model (DynamicDetector): Its budget and thresholds are back as they were at the end.
        controller (Controller): Decides. It keeps what it learned.
        timed (bool): Whether to measure calls of the model. Defaults to True.
    """

    def __init__(self, model: DynamicDetector, controller: Controller, timed: bool = True) -> None:
        self.model, self.controller, self.timed = model, controller, timed
        self._stack: Optional[contextlib.ExitStack] = None
        self._started, self._images = None, 0

    def __enter__(self) -> Controller:
        model = self.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(kept_speed(model))
            # The controller's is the budget now; the config's must not come in between.
            model.budget, model._budget_waits = None, False
            stack.callback(model.router.register_forward_hook(self._decide).remove)
            if self.timed and self.controller.measures:
                stack.callback(model.data_preprocessor.register_forward_pre_hook(self._start).remove)
                stack.callback(model.register_forward_hook(self._stop).remove)
            self._stack = stack.pop_all()
        return self.controller

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _decide(self, router, inputs, difficulties: torch.Tensor) -> None:
        threshold = self.controller.decide(difficulties.tolist())
        self.model.threshold.copy_(torch.tensor(threshold))
        self._images = len(difficulties)

    def _start(self, *_) -> None:
        self._started = now(self.model.threshold.device)

    def _stop(self, *_) -> None:
        if self._started is not None:
            self.controller.measure(now(self.model.threshold.device) - self._started, self._images)
            self._started = None


def now(device: torch.device) -> float:
    """Seconds, once a device has done all it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
