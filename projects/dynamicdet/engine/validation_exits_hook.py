"""Say after each validation which exits its AP is of."""

from collections.abc import Sequence

from mmengine.dist import collect_results
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..models import DynamicDetector
from .unwrapping import unwrap


@HOOKS.register_module()
class ValidationExitsHook(Hook):
    """Log how many images of a validation left at each exit, and by which thresholds.

    A dynamic detector's AP is of a mixture of its exits. Step 1 has an untrained router, step 2 one
    whose difficulties move: without this line a change of the mixture looks like a better or worse
        detector.
    """

    def __init__(self) -> None:
        self._exits: list[int] = []

    def before_val_epoch(self, runner: Runner) -> None:
        """Start to count anew."""
        self._exits = []

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence | None = None,
    ) -> None:
        """Note the exit of each image of the batch."""
        self._exits.extend(sample.exit for sample in outputs or () if 'exit' in sample)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Log the share of images at each exit, over all ranks."""
        model = unwrap(runner.model)
        if isinstance(model, DynamicDetector):
            exits = collect_results(self._exits, len(runner.val_dataloader.dataset))
            # Rank 0 has them all.
            if exits:
                runner.logger.info(describe_exits(model, exits))


def describe_exits(model: DynamicDetector, exits: Sequence[int]) -> str:
    """A line about where images left.

    Args:
        model (DynamicDetector): With the thresholds that sent them.
        exits (Sequence[int]): Of each image.
    """
    shares = ', '.join(
        f'{exits.count(exit) / len(exits):.1%} at exit {exit}' for exit in range(model.num_exits)
    )
    mixed = f'a mixture: {shares}' if len(set(exits)) > 1 else f'exit {exits[0]} alone'
    thresholds = ', '.join(f'{threshold:.4g}' for threshold in model.threshold.reshape(-1).tolist())
    router = ', of a router that is not trained yet' if model.delta.isnan() else ''
    return f'the AP of this validation is of {mixed}, by threshold {thresholds}{router}'
