"""Remove channels for good while training: when, not what."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynamicdet.compression.channel_removal import ROUND_TO, plan_removal, remove_channels
from dynamicdet.errors import UsageError

from . import raw_outputs as raw_outputs  # registers how detectors are traced
from .launching import distributed
from .private_detectron2 import hooks_of
from .pruning_hook import PruningHook, build_blocks
from .quantization_hook import QuantizationHook
from .router_hook import unwrap

#: Below Detectron2's, whose set-up prints it.
_log = logging.getLogger('detectron2.dynamicdet')


class ChannelRemovalHook(HookBase):
    """Take channels out of a detector, plain or dynamic, and train on without them.

    The detector keeps its names; its layers are smaller. The optimizer forgets what it knew of
    layers that changed, such as their momentum. Checkpoints say what is left, and
    `DynamicCheckpointer` gives any detector of the same config that size before it loads them: a
    resume, a test and step 2 need no other config.

    Args:
        blocks (Sequence[Mapping]): Arguments of `PruningBlock`: ``name``, ``modules`` (patterns),
            ``target`` (in [0, 1)) and, where wanted, ``score`` (``magnitude`` or ``random``),
            ``over``, ``norm``, ``exclude``.
        start (int): Iterations done before they go. Defaults to 0: at once, of the weights that
            the run starts from.
        round_to (int): Channels that stay are a multiple of it. Defaults to 16.
        seed (int): Of random scores. Defaults to 0.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Any]],
        start: int = 0,
        round_to: int = ROUND_TO,
        seed: int = 0,
    ) -> None:
        blocks = [{**block, 'structured': True} for block in blocks]
        self.blocks = build_blocks(blocks, 'ChannelRemovalHook')
        if start < 0 or round_to < 1:
            raise UsageError(
                f'ChannelRemovalHook: start={start}, round_to={round_to}: start must not be '
                'negative, round_to at least 1'
            )
        self.start, self.round_to, self.seed = start, round_to, seed
        self._done = False

    def before_train(self) -> None:
        """Refuse a run in which nothing may be removed."""
        if getattr(unwrap(self.trainer.model), 'train_router', False):
            raise UsageError(
                'ChannelRemovalHook: this config trains a router alone, and nothing else may '
                'change; remove channels in step 1'
            )
        others = [type(hook).__name__ for hook in hooks_of(self.trainer)]
        both = {PruningHook.__name__, QuantizationHook.__name__}.intersection(others)
        if both:
            raise UsageError(
                f'ChannelRemovalHook and {both.pop()} count on the same layers: one run for each; '
                'channels that were pruned before go first'
            )
        if self.start >= self.trainer.max_iter:
            raise UsageError(
                f'ChannelRemovalHook: channels go after {self.start} iterations, but the run has '
                f'{self.trainer.max_iter}'
            )

    def before_step(self) -> None:
        """Remove, once."""
        if self._done or self.trainer.iter < self.start:
            return
        model = unwrap(self.trainer.model)
        # Of rank 0: sums may differ in the last bit where ranks are unlike.
        plan = comm.all_gather(plan_removal(model, self.blocks, self.round_to, self.seed))[0]
        with parameters_followed(model, self.trainer):
            remove_channels(model, plan)
        self._done = True
        for row in plan.rows:
            _log.info(f'removed {row.removed:.0%} of the {row.channels} channels of {row.block}')
        for name, why in plan.alone.items():
            _log.info(f"'{name}' stays: {why}")

    def state_dict(self) -> dict:
        """Whether they are gone."""
        return dict(done=self._done)

    def load_state_dict(self, state: dict) -> None:
        """Take up a run that is resumed."""
        self._done = state['done']


@contextlib.contextmanager
def parameters_followed(model: nn.Module, trainer: Any = None) -> Iterator[None]:
    """While this is entered, parameters of a model may be replaced: then the trainer's optimizer
    takes the new ones, and processes are connected anew.

    Args:
        model (nn.Module): Without DDP.
        trainer (TrainerBase, optional): Whose model it is.
    """
    before = dict(model.named_parameters())
    yield
    if trainer is None:
        return
    trainer = getattr(trainer, '_trainer', trainer)
    after = dict(model.named_parameters())
    new = {id(old): after[name] for name, old in before.items() if after[name] is not old}
    for group in trainer.optimizer.param_groups:
        group['params'] = [new.get(id(old), old) for old in group['params']]
    for old in [old for old in trainer.optimizer.state if id(old) in new]:
        del trainer.optimizer.state[old]
    if isinstance(trainer.model, DistributedDataParallel):
        settings = {
            name: getattr(trainer.model, name)
            for name in ('broadcast_buffers', 'find_unused_parameters')
        }
        # The old one lets go of the gradients before the new one takes them.
        trainer.model = model
        trainer.model = distributed(model, **settings)
