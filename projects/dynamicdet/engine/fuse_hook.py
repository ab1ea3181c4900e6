"""Fuse what can be fused before a test."""
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..models import can_fuse, fuse


@HOOKS.register_module()
class FuseHook(Hook):
    """Run the test on the fused model, where a model has parts of its own to fuse: YOLOv7's. After its weights
    were loaded, and for good: not for configs that train."""

    def before_test(self, runner: Runner) -> None:
        if can_fuse(runner.model):
            fuse(runner.model)
