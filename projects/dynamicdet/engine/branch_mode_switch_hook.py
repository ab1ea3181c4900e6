"""YOLOX's last epochs, for a dynamic detector."""
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmdet.engine.hooks import YOLOXModeSwitchHook
from mmdet.registry import HOOKS


@HOOKS.register_module()
class BranchModeSwitchHook(YOLOXModeSwitchHook):
    """mmdet's, which looks for one ``bbox_head``, for a detector that has one in each branch: in the
    last epochs no mosaic and mixup, and an L1 loss beside the others.

    Data workers that live longer than an epoch see the new pipeline by `ResumeHook`, which starts
    them anew.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        # As mmdet's counts them: one epoch earlier than its argument says.
        if runner.epoch + 1 < runner.max_epochs - self.num_last_epochs:
            return
        runner.train_dataloader.dataset.update_skip_type_keys(self.skip_type_keys)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for branch in model.branches:
            branch.bbox_head.use_l1 = True
