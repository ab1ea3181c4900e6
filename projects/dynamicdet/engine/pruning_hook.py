"""Prune while training: when, not what."""

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce, broadcast, get_world_size
from mmengine.runner import Runner
from torch import nn

from mmdet.registry import HOOKS

from ..compression import pruning
from ..compression.pruning_blocks import PrunableLayer, PruningBlock
from ..compression.scores import Statistics
from ..errors import UsageError
from .compression_hook import CompressionHook, averaged_models, build_blocks, plain_model


@HOOKS.register_module()
class PruningHook(CompressionHook):
    """Prune blocks of a detector on a schedule; what is pruned stays zero while the rest trains on.

    Weights are set to zero after each step of the optimizer, so momentum and weight decay revive
    none, and in the averaged weights of an `EMAHook`. Checkpoints hold the detector's ordinary
    keys, with zeros; the masks are beside them under ``pruning``, for ``--resume``. All ranks have
    the same masks.

    Args:
        blocks (Sequence[dict]): Arguments of `dynamicdet.compression.pruning_blocks.PruningBlock`:
            ``name``,
            ``modules`` (patterns), ``target`` (in [0, 1)) and, where a block differs from what is
            given here, ``score``, ``structured``, ``over``, ``norm``, ``exclude``.
        schedule (str): ``one_shot``, ``iterative`` or ``cubic``; see `pruning.share_at`.
        start (int): Epochs, or iterations, done before pruning begins. At least 1 for scores from
            activations and gradients, which are gathered meanwhile: over the epoch before, or over
            the iterations since pruning last took place.
        end (int, optional): As many until the target is reached. ``start`` by default.
        interval (int): As many between two prunings.
        by_epoch (bool): Whether these count epochs.
        soft (bool): Soft Filter Pruning (He et al. 2018): channels are zeroed every ``interval``
            epochs, train on, and are chosen anew. They are zero where an interval ends, and at the
            end of the run.
        score, structured, over, norm: Of all blocks that say nothing else.
        seed (int, optional): Of random scores; the run's by default.
    """

    # After EMAHook, whose averages are masked too; before the hooks that write checkpoints.
    priority = 'BELOW_NORMAL'
    state_name, verb = 'pruning', 'prune'

    def __init__(
        self,
        blocks: Sequence[dict],
        schedule: str = 'one_shot',
        start: int = 0,
        end: int | None = None,
        interval: int = 1,
        by_epoch: bool = True,
        soft: bool = False,
        score: str = 'magnitude',
        structured: bool = False,
        over: str = 'block',
        norm: float = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__(by_epoch)
        common = dict(score=score, structured=structured, over=over, norm=norm)
        self.blocks = build_blocks(PruningBlock, blocks, 'PruningHook', common)
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
        for block in self.blocks:
            if soft and not block.structured:
                raise UsageError(
                    f"PruningHook: block '{block.name}': soft pruning is of channels; "
                    'set structured=True'
                )
            if block.score in ('activation', 'gradient') and start < 1 and not soft:
                raise UsageError(
                    f"PruningHook: block '{block.name}': score='{block.score}' needs training "
                    'before it prunes; set start to 1 or more'
                )
        self.schedule, self.start, self.interval = schedule, start, interval
        self.soft, self.seed = soft, seed
        self.masks: pruning.Masks = {}
        self._shares = [0.0] * len(self.blocks)

    def describe(self, runner: Runner) -> list[str]:
        """What it would do, a line for each block; raises what a training would."""
        self._require_fit(runner)
        when = (
            f'after {self.start} {self.unit}'
            if self.schedule == 'one_shot'
            else f'{self.schedule}, between {self.start} and {self.end} {self.unit}'
        )
        lines = []
        for block, layers in zip(
            self.blocks, pruning.layers_of_blocks(plain_model(runner), self.blocks)
        ):
            weights = sum(layer.weight.numel() for layer in layers.values())
            what = 'of the channels' if block.structured else 'of the weights'
            lines.append(
                f'prune {block.name}: {block.target:.0%} {what} of {len(layers)} layers, '
                f'{weights / 1e6:.2f} M weights, by {block.score} over the {block.over}, {when}'
            )
        return lines

    def before_train(self, runner: Runner) -> None:
        """Find the layers, put saved masks back and hook into the optimizer's steps."""
        self._require_fit(runner)
        model = plain_model(runner)
        self._layers = pruning.layers_of_blocks(model, self.blocks)
        every = {name: layer for layers in self._layers for name, layer in layers.items()}
        block_of = {
            name: block for block, layers in zip(self.blocks, self._layers) for name in layers
        }
        self._statistics = Statistics(every, block_of)
        if self._saved is not None:
            self._restore(every)
        self._around_steps(runner, self._before_step, lambda *_: self._mask(model))

    def before_train_epoch(self, runner: Runner) -> None:
        """Prune to the share of this epoch, where schedules count epochs."""
        if self.by_epoch and not self.soft:
            self._advance(runner, runner.epoch)
        if self.by_epoch:
            self._statistics.reset()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Prune to the share of this iteration, where schedules count iterations."""
        if not self.by_epoch and not self.soft:
            self._advance(runner, runner.iter)
        self._counted = False
        self._statistics.begin()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Sum statistics over all ranks; soft pruning: zero the weakest, if iterations count."""
        self._statistics.finish(all_reduce)
        if self.soft and not self.by_epoch:
            self._soften(runner, runner.iter + 1, runner.max_iters)

    def after_train_epoch(self, runner: Runner) -> None:
        """Soft pruning: zero the weakest weights, if epochs count."""
        if self.soft and self.by_epoch:
            self._soften(runner, runner.epoch + 1, runner.max_epochs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add masks and shares to the checkpoint."""
        checkpoint['pruning'] = dict(
            masks={name: pruning.pack_mask(mask) for name, mask in self.masks.items()},
            shares=list(self._shares),
            totals={key: value.cpu() for key, value in self._statistics.totals.items()},
        )

    def after_train(self, runner: Runner) -> None:
        """Take the hooks off the optimizer and the layers."""
        super().after_train(runner)
        self._statistics.remove()

    def _require_fit(self, runner: Runner) -> None:
        """Refuse a run in which the schedule cannot end, or in which nothing may be pruned."""
        super()._require_fit(runner)
        length = self._length(runner)
        last = self.start if self.schedule == 'one_shot' else self.end
        if last + (not self.soft) > length:
            raise UsageError(
                f'PruningHook: the last pruning is after {last} {self.unit}, but the run has '
                f'{length}; the target would not be reached'
            )

    def _restore(self, layers: dict[str, PrunableLayer]) -> None:
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

    def _before_step(self, *_) -> None:
        # Gradients are unscaled and averaged over the ranks here; afterwards they are gone. Several
        # optimizers may step in one iteration.
        if not self._counted:
            self._statistics.add_gradients()
            self._counted = True

    def _mask(self, model: nn.Module) -> None:
        if not self.soft:
            pruning.apply_masks(model, self.masks)

    def _advance(self, runner: Runner, step: int) -> None:
        """Prune what is due and not yet pruned."""
        due = self._due(step)
        changed = [index for index, share in enumerate(due) if share > self._shares[index]]
        self._choose(runner, due, changed)

    def _soften(self, runner: Runner, step: int, length: int) -> None:
        """Choose channels anew, where an interval ends."""
        if step < self.start or (step - self.start) % self.interval and step != length:
            return
        self._choose(runner, self._due(step), list(range(len(self.blocks))))

    def _due(self, step: int) -> list[float]:
        """The share that each block is pruned to by a step."""
        return [
            pruning.share_at(self.schedule, step, self.start, self.end, self.interval, block.target)
            for block in self.blocks
        ]

    def _choose(self, runner: Runner, due: list[float], changed: Sequence[int]) -> None:
        if not changed:
            return
        for index in changed:
            block, layers = self.blocks[index], self._layers[index]
            scores = None
            if block.score in ('activation', 'gradient'):
                scores = self._statistics.scores(list(layers))
                if scores is None:
                    runner.logger.warning(
                        f"block '{block.name}' is pruned later: nothing is known yet of its "
                        f'{block.score}s'
                    )
                    continue
            seed = runner.seed if self.seed is None else self.seed
            self.masks.update(
                pruning.prune_block(
                    layers, block, due[index], None if self.soft else self.masks, seed or 0, scores
                )
            )
            self._shares[index] = due[index]
        self._agree()
        for model in [plain_model(runner), *averaged_models(runner)]:
            pruning.apply_masks(model, self.masks)
        self._statistics.reset()
        self._log(runner, changed)

    def _agree(self) -> None:
        """Rank 0's masks on all ranks: sums may differ in the last bit where ranks are unlike."""
        if get_world_size() > 1:
            for mask in self.masks.values():
                bits = mask.to(torch.uint8)
                broadcast(bits, src=0)
                mask.copy_(bits.bool())

    def _log(self, runner: Runner, changed: Sequence[int]) -> None:
        for index in changed:
            masks = {name: self.masks[name] for name in self._layers[index] if name in self.masks}
            if not masks:
                continue
            total = sum(mask.numel() for mask in masks.values())
            runner.logger.info(
                f'pruned {self.blocks[index].name}: {pruning.pruned_share(masks):.2%} of '
                f'{total / 1e6:.2f} M weights'
            )
            empty = pruning.empty_layers(masks)
            if empty:
                runner.logger.warning(
                    f'nothing is left of {len(empty)} layers, such as {empty[0]}: nothing passes '
                    'them any more'
                )
