"""Fuse what can be fused, for a test."""

import copy

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..models import can_fuse, fuse


@HOOKS.register_module()
class FuseHook(Hook):
    """Run a test on a fused copy, where a model has parts of its own to fuse: YOLOv7's.
    ``tools/test.py`` adds this hook."""

    # After EMAHook has put its weights into the model; it takes them back from the model itself.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._model = None

    def before_test_epoch(self, runner: Runner) -> None:
        """Put a fused copy in the place of the model."""
        if can_fuse(runner.model):
            owner, name = _place(runner)
            self._model = getattr(owner, name)
            setattr(owner, name, fuse(copy.deepcopy(self._model)))

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Put the model back."""
        if self._model is not None:
            setattr(*_place(runner), self._model)
            self._model = None


def _place(runner: Runner) -> tuple[object, str]:
    """Where a runner has its model: the owner and the name there."""
    return (runner.model, 'module') if is_model_wrapper(runner.model) else (runner, 'model')
