"""What hooks share that compress a detector while it is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields

from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..errors import UsageError
from ..private_mmengine import resumes
from .unwrapping import unwrap


class CompressionHook(Hook):
    """Counts epochs or iterations, acts on the optimizer's steps and takes up what a run that is
    resumed has saved.

    Attributes:
        state_name (str): Of what it adds to checkpoints.
        verb (str): What it does, for messages.

    Args:
        by_epoch (bool): Whether it counts epochs.
    """

    state_name: str
    verb: str

    def __init__(self, by_epoch: bool) -> None:
        self.by_epoch = by_epoch
        self.unit = 'epochs' if by_epoch else 'iterations'
        self._saved: dict | None = None
        self._handles: list = []

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what the checkpoint of a run that is resumed has for it."""
        self._saved = checkpoint.get(self.state_name) if resumes(runner) else None

    def after_train(self, runner: Runner) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _require_fit(self, runner: Runner) -> None:
        """Refuse a run in which nothing may be compressed, or whose epochs are none."""
        name = type(self).__name__
        if getattr(plain_model(runner), 'train_router', False):
            raise UsageError(
                f'{name}: this config trains a router alone, and nothing else may change; '
                f'{self.verb} in step 1'
            )
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise UsageError(f'{name}: this run counts iterations, not epochs; set by_epoch=False')

    def _length(self, runner: Runner) -> int:
        """Epochs or iterations of the run."""
        return runner.max_epochs if self.by_epoch else runner.max_iters

    def _around_steps(self, runner: Runner, before: Callable, after: Callable) -> None:
        """Call functions before and after each step of each optimizer, with the optimizer first,
        until the training ends."""
        wrapper = runner.optim_wrapper
        for optim_wrapper in (
            wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        ):
            self._handles += [
                optim_wrapper.optimizer.register_step_pre_hook(before),
                optim_wrapper.optimizer.register_step_post_hook(after),
            ]


def build_blocks(
    kind: type, blocks: Sequence[dict], hook: str, common: Mapping[str, object] = {}
) -> list:
    """Blocks of a hook: objects of a dataclass, from the dictionaries in its config and what is
    common to them; or a `UsageError`."""
    if (
        not isinstance(blocks, (list, tuple))
        or not blocks
        or not all(isinstance(block, dict) for block in blocks)
    ):
        raise UsageError(f'{hook}: blocks is a list of dictionaries, one or more; got {blocks!r}')
    known = {entry.name for entry in fields(kind)}
    needed = {entry.name for entry in fields(kind) if entry.default is MISSING}
    for given in map(set, blocks):
        for wrong, what in ((given - known, 'unknown'), (needed - given, 'missing')):
            if wrong:
                raise UsageError(f'{hook}: {what} in a block: {", ".join(sorted(wrong))}')
    return [kind(**{**common, **block}) for block in blocks]


def plain_model(runner: Runner) -> nn.Module:
    """The model without its DDP wrapper."""
    return unwrap(runner.model)


def averaged_models(runner: Runner) -> list[nn.Module]:
    """The averaged models of all `EMAHook`s."""
    return [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
