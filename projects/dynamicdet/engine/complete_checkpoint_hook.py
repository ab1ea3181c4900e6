"""Refuse to test with a checkpoint that does not fill the model."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..cascade.weights import missing_of, require_complete
from .unwrapping import unwrap


@HOOKS.register_module()
class CompleteCheckpointHook(Hook):
    """mmengine loads what fits and goes on, which is right for fine-tuning and wrong for testing:
    a checkpoint of another architecture would give an AP of 0. A plain detector's is let pass: it
    fills both exits but for connections and router. ``tools/test.py`` adds this hook."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Raise a `UsageError` if the checkpoint leaves a part of the model random."""
        # Inside a DDP or test-time augmentation wrapper, or both.
        model = unwrap(runner.model)
        state = checkpoint.get('state_dict', checkpoint)
        require_complete(model, state, optional=missing_of(state))
