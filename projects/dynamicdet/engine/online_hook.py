"""Hold a budget over a test, image by image."""

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..errors import UsageError
from ..models.budget_control import BudgetControl, build_budget_controller, find_dynamic_detector
from ..routing.budget import Budget


@HOOKS.register_module()
class OnlineHook(Hook):
    """Let a controller set a detector's thresholds during a test; ``tools/test.py --online`` adds
    this hook.

    Each process of a distributed test has a controller of its own, for the images that it sees.

    Args:
        budget (Budget or Mapping): One of ``target_latency``, ``throughput``, ``hard_share`` and
            ``target_gflops``, which takes a calibrated checkpoint: ``dict(hard_share=0.5)``.

    Raises:
        UsageError: If the model is not dynamic, or the budget is not one of these.
    """

    # After FuseHook, which puts a copy in the model's place.
    priority = 'LOWEST'

    def __init__(self, budget: Budget | Mapping[str, float]) -> None:
        self.budget = Budget.parse(budget)
        self._online = None

    def before_test_epoch(self, runner: Runner) -> None:
        """Let a new controller set the thresholds."""
        model = find_dynamic_detector(runner.model)
        if model is None:
            raise UsageError(
                f'an online budget is for dynamic detectors, not for {type(runner.model).__name__}'
            )
        self._online = BudgetControl(model, build_budget_controller(model, self.budget))
        self._online.__enter__()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Put the thresholds back and log what the controller reached."""
        if self._online is not None:
            self._online.__exit__(None, None, None)
            runner.logger.info(f'online budget: {self._online.controller.status()}')
            self._online = None
