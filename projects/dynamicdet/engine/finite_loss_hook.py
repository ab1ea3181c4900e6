"""Stop at the first loss that is not a number, and say where."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..errors import UsageError


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Raise a `UsageError` that names the images when the loss becomes NaN or infinite.

    Checkpoints written before stay good; the one in memory is not written. Under AMP the loss
    scaler skips steps with infinite gradients; the loss itself must still be finite.
    """

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Raise a `UsageError` that names losses that are not finite, and the images."""
        # The log reads every loss on the host each iteration anyhow: no further sync.
        bad = [
            name
            for name, value in (outputs or {}).items()
            if 'loss' in name and not torch.isfinite(torch.as_tensor(value)).all()
        ]
        if bad:
            samples = (data_batch or {}).get('data_samples', [])
            images = ', '.join(str(getattr(sample, 'img_path', '?')) for sample in samples)
            raise UsageError(
                f'{", ".join(bad)} not finite at epoch {runner.epoch + 1}, iteration '
                f'{runner.iter + 1} (images: {images}). The checkpoints in {runner.work_dir} are '
                'from before: lower the learning rate, clip gradients or look at these images, '
                'then --resume'
            )
