"""Hold a budget over a test, image by image."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..errors import UsageError
from ..models.online import Online, build_controller, dynamic_part


@HOOKS.register_module()
class OnlineHook(Hook):
    """Let a controller set a detector's thresholds during a test; ``tools/test.py --online`` adds
    this hook.

    Each process of a distributed test has a controller of its own, for the images that it sees.

    Args:
        target_latency (float, optional): Mean seconds per image.
        throughput (float, optional): Images per second.
        hard_share (float, optional): In [0, 1].
        target_gflops (float, optional): Mean GFLOPs per image; takes a calibrated checkpoint. Give
            one of the four.

    Raises:
        UsageError: If the model is not dynamic, or the budget is not one of these.
    """

    # After FuseHook, which puts a copy in the model's place.
    priority = 'LOWEST'

    def __init__(
        self,
        target_latency: float | None = None,
        throughput: float | None = None,
        hard_share: float | None = None,
        target_gflops: float | None = None,
    ) -> None:
        given = dict(
            target_latency=target_latency,
            throughput=throughput,
            hard_share=hard_share,
            target_gflops=target_gflops,
        )
        self.budget = {name: value for name, value in given.items() if value is not None}
        self._online = None

    def before_test_epoch(self, runner: Runner) -> None:
        model = dynamic_part(runner.model)
        if model is None:
            raise UsageError(
                f'an online budget is for dynamic detectors, not for {type(runner.model).__name__}'
            )
        self._online = Online(model, build_controller(model, self.budget))
        self._online.__enter__()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        if self._online is not None:
            self._online.__exit__(None, None, None)
            runner.logger.info(f'online budget: {self._online.controller.status()}')
            self._online = None
