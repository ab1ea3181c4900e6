"""Let a controller set a detector's thresholds while it works."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ..routing.budget import Budget
from ..routing.budget_controller import BudgetController
from ..routing.budget_report import BudgetReport, report_budget
from ..routing.price_controller import PriceController
from ..routing.regions import share_of_area
from ..timing import now
from .dynamic_detector import DynamicDetector
from .regions import COST_COLUMNS


def find_dynamic_detector(model: nn.Module) -> DynamicDetector | None:
    """The dynamic detector in a model, which may wrap it for several processes or for test-time
    augmentation; None if there is none."""
    return next((part for part in model.modules() if isinstance(part, DynamicDetector)), None)


def build_budget_controller(
    model: DynamicDetector, budget: Budget | Mapping[str, float]
) -> BudgetController:
    """A controller for a detector: what its calibration knows is where it starts; without one it
    learns.

    Args:
        model (DynamicDetector): Calibrated or not.
        budget (Budget or Mapping): One number, and no threshold; GFLOPs take a calibrated detector.
            See `BudgetController`.

    Raises:
        UsageError: If the budget is none of these, or needs a calibration that is not there.
    """
    budget = Budget.parse(budget)
    if model.regions is not None:
        return _build_price_controller(model, budget)
    known = model.gflops if budget and budget.kind == 'target_gflops' else model.latencies
    costs = known.tolist() if known.isfinite().all() and (known[1:] > known[:-1]).all() else None
    return BudgetController(
        budget, costs=costs, difficulties=model.difficulties.tolist(), exits=model.num_exits
    )


def _build_price_controller(model: DynamicDetector, budget: Budget | None) -> PriceController:
    curve = model.regions.price_curve()
    if budget is None or budget.kind not in COST_COLUMNS:
        return PriceController(budget, curve)
    costs = model.regions.curve[:, COST_COLUMNS[budget.kind]].cpu().numpy()
    return PriceController(budget, curve, costs)


def calibrated_otherwise(model: DynamicDetector, calibration: Mapping) -> str | None:
    """A sentence where a checkpoint was calibrated with other settings than a detector has, so that
    costs or thresholds do not hold; None where they do, or nothing says how it was calibrated.

    Args:
        model (DynamicDetector): Which runs now.
        calibration (Mapping): The checkpoint's ``meta.calibration``.
    """
    if not calibration:
        return None
    for name, here, missed in (
        ('regions', model.regions is not None, 'thresholds and costs do not hold'),
        ('merge', model.merge is not None, 'what an image costs is {} than calibrated'),
    ):
        then = bool(calibration.get(name))
        # Where regions are looked at again, exit 0 runs on every image, merged or not.
        if then != here and (name == 'regions' or model.regions is None):
            was, now = (f'with{"" if on else "out"} {name}' for on in (then, here))
            return (
                f'this checkpoint was calibrated {was}, and runs {now}: '
                f'{missed.format("more" if here else "less")}; run tools/calibrate.py on it with '
                'this config'
            )
    return None


def budget_report_of(
    model: DynamicDetector,
    counts: Sequence[int],
    budget: Budget | None,
    thresholds: Sequence[float] | None,
    seconds: float | None,
) -> BudgetReport:
    """What a detector served beside what was wanted; arguments as of `report_budget`.

    Where regions are looked at again, images are counted as hard of which something was; what an
    image costs is not the same for all of those, and left to the clock.
    """
    if model.regions is None:
        costs = model.latencies.tolist(), model.gflops.tolist()
    else:
        costs = ((math.nan,) * model.num_exits,) * 2
        # Its share is one of pixels.
        budget = budget if budget is not None and budget.kind == 'threshold' else None
    return report_budget(counts, budget, thresholds, model.difficulties.tolist(), *costs, seconds)


@contextlib.contextmanager
def preserved_budget(model: DynamicDetector) -> Iterator[None]:
    """Put a detector's budget and thresholds back at the end."""
    before = model.threshold.clone(), model.budget, model._budget_waits
    try:
        yield
    finally:
        threshold, model.budget, model._budget_waits = before
        model.threshold.copy_(threshold)


@contextlib.contextmanager
def whole_images(model: DynamicDetector) -> Iterator[None]:
    """While this is entered, exits see whole images, whatever regions a detector has."""
    regions, model.regions = model.regions, None
    try:
        yield
    finally:
        model.regions = regions


class BudgetControl:
    """While this is entered, a controller sets the thresholds of each batch that a detector sees.

    The router's difficulties go to the controller before images part; where regions are looked at
    again, it says their price before, and sees them afterwards. With ``timed`` it is also
    told how long each call took, from preprocessing to boxes; without, someone else does that.

    Args:
        model (DynamicDetector): Its budget and thresholds are back as they were at the end.
        controller (BudgetController): Decides. It keeps what it learned.
        timed (bool): Whether to measure calls of the model. Defaults to True.
    """

    def __init__(
        self, model: DynamicDetector, controller: BudgetController, timed: bool = True
    ) -> None:
        self.model, self.controller, self.timed = model, controller, timed
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> BudgetController:
        model = self.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(preserved_budget(model))
            # The controller's is the budget now; the config's must not come in between.
            model.budget, model._budget_waits = None, False
            if model.regions is None:
                stack.callback(model.router.register_forward_hook(self._decide).remove)
            else:
                for hook in (
                    model.regions.register_forward_pre_hook(self._set_price),
                    model.regions.register_forward_hook(self._count_regions),
                ):
                    stack.callback(hook.remove)
            if self.timed and self.controller.measures:
                stack.enter_context(timed_calls(model, self.controller.measure))
            self._stack = stack.pop_all()
        return self.controller

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _decide(self, router, inputs, difficulties: torch.Tensor) -> None:
        threshold = self.controller.decide(difficulties.tolist())
        self.model.threshold.copy_(torch.tensor(threshold))

    def _set_price(self, regions, inputs) -> None:
        self.model.threshold.fill_(self.controller.decide())

    def _count_regions(self, regions, inputs, chosen: list) -> None:
        shares = [
            share_of_area(rectangles, gain_map.shape, regions.halo, regions.step)
            for rectangles, gain_map in zip(chosen, inputs[0])
        ]
        self.controller.count(shares, [len(rectangles) for rectangles in chosen])


@contextlib.contextmanager
def timed_calls(model: DynamicDetector, tell: Callable[[float, int], None]) -> Iterator[None]:
    """While this is entered, ``tell`` learns of each call of a detector how many seconds it took,
    from preprocessing to boxes, and of how many images it was."""
    device, started = model.threshold.device, []

    def start(*_) -> None:
        started[:] = [now(device)]

    def stop(model: nn.Module, inputs: tuple, samples: list) -> None:
        if started:
            tell(now(device) - started.pop(), len(samples))

    with contextlib.ExitStack() as stack:
        stack.callback(model.data_preprocessor.register_forward_pre_hook(start).remove)
        stack.callback(model.register_forward_hook(stop).remove)
        yield
