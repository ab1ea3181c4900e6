"""YOLOX's last epochs, for a dynamic detector."""

from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from mmdet.engine.hooks import YOLOXModeSwitchHook
from mmdet.registry import HOOKS

from ..errors import UsageError
from .unwrapping import unwrap


@HOOKS.register_module()
class BranchModeSwitchHook(YOLOXModeSwitchHook):
    """mmdet's, which looks for one ``bbox_head``, for a detector that has one in each branch: in
    the last epochs no mosaic and mixup, and an L1 loss beside the others.

    Where the data set mixes no images, or no head has such a loss, that part is left out, and the
    log says so; and it says where the run is so short that all its epochs are the last ones.

    Raises:
        UsageError: In a loop of iterations, which has no last epochs.
    """

    def before_train(self, runner: Runner) -> None:
        """Raise a `UsageError` in a loop of iterations; log what will not switch."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            raise UsageError(
                'BranchModeSwitchHook counts epochs, and this run has iterations alone: take it '
                'out of custom_hooks, or train by EpochBasedTrainLoop'
            )
        if runner.max_epochs <= self.num_last_epochs + 1:
            runner.logger.warning(
                f'BranchModeSwitchHook: all of the {runner.max_epochs} epochs are among the last '
                f'ones, and go without mosaic: num_last_epochs={self.num_last_epochs} in '
                'custom_hooks is for a longer run'
            )
        if not _mixture(runner):
            runner.logger.warning(
                'BranchModeSwitchHook: the training data are not mixed (no MultiImageMixDataset), '
                'so there is no mosaic to end'
            )
        if not _switchable_heads(runner):
            runner.logger.warning(
                'BranchModeSwitchHook: no head of this detector has an L1 loss to add: the hook is '
                "for YOLOX's"
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch all branches and the pipeline once its epoch has come."""
        # As mmdet's counts them: one epoch earlier than its argument says.
        if self._has_switched or runner.epoch + 1 < runner.max_epochs - self.num_last_epochs:
            return
        self._has_switched = True
        for mixture in _mixture(runner):
            mixture.update_skip_type_keys(self.skip_type_keys)
            # Data workers that live on have a copy of the data set: new ones, at the next epoch's
            # start.
            runner.train_dataloader._iterator = None
        for head in _switchable_heads(runner):
            head.use_l1 = True


def _mixture(runner: Runner) -> list:
    """The training data's `MultiImageMixDataset`, wherever it is wrapped; none or one."""
    dataset = runner.train_dataloader.dataset
    while not hasattr(dataset, 'update_skip_type_keys'):
        dataset = getattr(dataset, 'dataset', None)
        if dataset is None:
            return []
    return [dataset]


def _switchable_heads(runner: Runner) -> list[nn.Module]:
    model = unwrap(runner.model)
    return [part for part in model.modules() if hasattr(part, 'use_l1')]
