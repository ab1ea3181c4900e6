"""Say in one line what the weights that a run starts from fill."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..cascade.weights import fit_weights
from ..private_mmengine import path_to_load, resumes, trains
from .unwrapping import unwrap


@HOOKS.register_module()
class LoadedWeightsHook(Hook):
    """Start a training from weights of another detector, such as a published one with other
    classes.

    What fits is taken, what does not starts as initialized, and the log says in one line which is
    which. Without this hook mmengine lists each entry, for each exit and for each copy of the
    weights.
    """

    # After RouterHook, which changes what is loaded; before EMAHook (49), which loads it a second
    # time.
    priority = 45

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep of the checkpoint what fits, and log in one line what does not."""
        # A loop that is not run is still a config.
        if resumes(runner) or not trains(runner):
            return
        model = unwrap(runner.model)
        fitted, line = fit_weights(model, checkpoint.get('state_dict', checkpoint))
        if 'state_dict' not in checkpoint:
            # Bare weights, which EMAHook does not take.
            checkpoint.clear()
        checkpoint['state_dict'] = fitted
        runner.logger.info(f"load_from '{path_to_load(runner)}': {line}")
