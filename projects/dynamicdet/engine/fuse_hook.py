"""Fuse what can be fused, for a test."""
import copy

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..models import can_fuse, fuse


@HOOKS.register_module()
class FuseHook(Hook):
    """Run a test on a fused copy, where a model has parts of its own to fuse: YOLOv7's. ``tools/test.py``
    adds this hook."""
    # After EMAHook has put its weights into the model; it takes them back from the model itself.
    priority = 'LOWEST'

    def before_test_epoch(self, runner: Runner) -> None:
        self._model = None
        if can_fuse(runner.model):
            self._model = self._swap(runner, None)

    def after_test_epoch(self, runner: Runner, metrics: dict = None) -> None:
        if self._model is not None:
            self._swap(runner, self._model)

    @staticmethod
    def _swap(runner: Runner, model):
        """Put a model in the place of the runner's, inside its wrapper; a fused copy if none is given."""
        owner, name = (runner.model, 'module') if is_model_wrapper(runner.model) else (runner, 'model')
        before = getattr(owner, name)
        setattr(owner, name, fuse(copy.deepcopy(before)) if model is None else model)
        return before
