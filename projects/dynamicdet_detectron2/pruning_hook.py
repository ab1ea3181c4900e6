"""Prune while training: when, not what."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from dynamicdet.compression import pruning
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.compression.scores import Statistics
from dynamicdet.errors import UsageError

from .router_hook import unwrap

#: Below Detectron2's, whose set-up prints it.
_log = logging.getLogger('detectron2.dynamicdet')


class PruningHook(HookBase):
    """Prune blocks of a detector, plain or dynamic, on a schedule; what is pruned stays zero while
    the rest trains on.

    Weights are set to zero after each step of the optimizer, so momentum and weight decay revive
    none. Checkpoints hold the detector's ordinary keys, with zeros; the masks are beside them, for
    a resume. All ranks have the same masks.

    Args:
        blocks (Sequence[Mapping]): Arguments of `PruningBlock`: ``name``, ``modules`` (patterns),
            ``target`` (in [0, 1)) and, where a block differs from all, ``score``, ``structured``,
            ``over``, ``norm``, ``exclude``.
        schedule (str): ``one_shot``, ``iterative`` or ``cubic``; see `pruning.share_at`.
        start (int): Iterations done before pruning begins. At least 1 for scores from activations
            and gradients, which are gathered meanwhile.
        end (int, optional): As many until the target is reached. ``start`` by default.
        interval (int): As many between two prunings.
        seed (int): Of random scores. Defaults to 0.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Any]],
        schedule: str = 'one_shot',
        start: int = 0,
        end: int | None = None,
        interval: int = 1,
        seed: int = 0,
    ) -> None:
        self.blocks = build_blocks(blocks, 'PruningHook')
        self.end = start if end is None else end
        if schedule not in pruning.SCHEDULES:
            raise UsageError(
                f"PruningHook: schedule='{schedule}' is none of {', '.join(pruning.SCHEDULES)}"
            )
        if start < 0 or self.end < start or interval < 1:
            raise UsageError(
                f'PruningHook: start={start}, end={self.end}, interval={interval}: start must not '
                'be negative, end not before start, interval at least 1'
            )
        if start < 1 and any(block.score in ('activation', 'gradient') for block in self.blocks):
            raise UsageError(
                'PruningHook: scores from activations and gradients need training before it '
                'prunes; set start to 1 or more'
            )
        self.schedule, self.start, self.interval, self.seed = schedule, start, interval, seed
        self.masks: pruning.Masks = {}
        self._shares = [0.0] * len(self.blocks)
        self._saved: dict | None = None

    def before_train(self) -> None:
        """Find the layers, put saved masks back and hook into the optimizer's steps."""
        model = unwrap(self.trainer.model)
        if getattr(model, 'train_router', False):
            raise UsageError(
                'PruningHook: this config trains a router alone, and nothing else may change; '
                'prune in step 1'
            )
        if self.end >= self.trainer.max_iter:
            raise UsageError(
                f'PruningHook: the last pruning is after {self.end} iterations, but the run has '
                f'{self.trainer.max_iter}; the target would not be reached'
            )
        self._layers = pruning.layers_of_blocks(model, self.blocks)
        every = {name: layer for layers in self._layers for name, layer in layers.items()}
        block_of = {
            name: block for block, layers in zip(self.blocks, self._layers) for name in layers
        }
        self._statistics = Statistics(every, block_of)
        if self._saved is not None:
            self._restore(every)
        optimizer = self.trainer.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._statistics.add_gradients()),
            optimizer.register_step_post_hook(lambda *_: pruning.apply_masks(model, self.masks)),
        ]

    def before_step(self) -> None:
        """Prune to the share of this iteration."""
        due = [
            pruning.share_at(
                self.schedule, self.trainer.iter, self.start, self.end, self.interval, block.target
            )
            for block in self.blocks
        ]
        for index, share in enumerate(due):
            if share > self._shares[index]:
                self._prune(index, share)
        self._statistics.begin()

    def after_step(self) -> None:
        """Sum statistics over all ranks."""
        self._statistics.finish(_sum_over_ranks)

    def after_train(self) -> None:
        """Take the hooks off the optimizer and the layers."""
        for handle in self._handles:
            handle.remove()
        self._statistics.remove()

    def state_dict(self) -> dict:
        """Masks, shares and statistics so far."""
        return dict(
            masks={name: pruning.pack_mask(mask) for name, mask in self.masks.items()},
            shares=list(self._shares),
            totals={key: value.cpu() for key, value in self._statistics.totals.items()},
        )

    def load_state_dict(self, state: dict) -> None:
        """Keep what a run that is resumed has saved."""
        self._saved = state

    def _restore(self, layers: dict) -> None:
        saved = self._saved
        if not set(saved['masks']) <= set(layers) or len(saved['shares']) != len(self.blocks):
            raise UsageError(
                'PruningHook: the masks in the checkpoint are of other blocks; --resume goes on '
                'with the same config'
            )
        self._shares = list(saved['shares'])
        self.masks = {
            name: pruning.unpack_mask(packed, layers[name].weight.shape).to(
                layers[name].weight.device
            )
            for name, packed in saved['masks'].items()
        }
        self._statistics.load(saved['totals'])

    def _prune(self, index: int, share: float) -> None:
        block, layers, scores = self.blocks[index], self._layers[index], None
        if block.score in ('activation', 'gradient'):
            scores = self._statistics.scores(list(layers))
            if scores is None:
                _log.warning(f"block '{block.name}' is pruned later: nothing is known yet of it")
                return
        masks = pruning.prune_block(layers, block, share, self.masks, self.seed, scores)
        for mask in masks.values() if comm.get_world_size() > 1 else ():
            # Sums may differ in the last bit where ranks are unlike.
            bits = mask.to(torch.uint8)
            dist.broadcast(bits, src=0)
            mask.copy_(bits.bool())
        self.masks.update(masks)
        self._shares[index] = share
        pruning.apply_masks(unwrap(self.trainer.model), self.masks)
        _log.info(f'pruned {block.name}: {pruning.pruned_share(masks):.2%} of its weights')


def build_blocks(blocks: Sequence[Mapping[str, Any]], hook: str) -> list[PruningBlock]:
    """Blocks of a hook, from the dictionaries in its config; or a `UsageError`."""
    known = {entry.name for entry in fields(PruningBlock)}
    for block in blocks:
        wrong = sorted({*block} - known) or sorted({'name', 'modules', 'target'} - {*block})
        if wrong:
            raise UsageError(
                f'{hook}: unknown or missing in a block: {", ".join(wrong)}; it takes '
                f'{", ".join(sorted(known))}'
            )
    return [PruningBlock(**block) for block in blocks]


def _sum_over_ranks(values: Tensor) -> None:
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
