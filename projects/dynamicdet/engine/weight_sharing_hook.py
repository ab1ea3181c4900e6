"""Share weights while training: when, not what."""

from collections.abc import Mapping, Sequence

import torch
from mmengine.dist import broadcast, get_world_size
from mmengine.runner import Runner
from torch import nn

from mmdet.registry import HOOKS

from ..compression import weight_sharing
from ..compression.pruning_blocks import PrunableLayer, disjoint_layers
from ..errors import UsageError
from .compression_hook import CompressionHook, averaged_models, build_blocks, plain_model
from .pruning_hook import PruningHook


@HOOKS.register_module()
class WeightSharingHook(CompressionHook):
    """Let the weights of each layer share few values, found by k-means, and train these.

    Which weight has which value stays as it was found; the gradient of a value is the sum over its
    weights. Weights are tied after each step of the optimizer, and in the averages of an `EMAHook`.
    What is zero when sharing begins stays zero. Checkpoints hold the detector's ordinary keys, with
    few different values per layer; the indices are beside them under ``weight_sharing``, for
    ``--resume``. All ranks share alike.

    Args:
        blocks (Sequence[dict]): Arguments of
            `dynamicdet.compression.weight_sharing.WeightSharingBlock`:
            ``name``, ``modules`` (patterns) and, where wanted, ``bits`` (2 to 8, 4 by default) and
            ``exclude``.
        start (int): Epochs, or iterations, done before sharing begins. A `PruningHook` of the same
            run must have pruned all by then.
        by_epoch (bool): Whether it counts epochs.
        reduction (str): ``sum``, or ``mean`` for optimizers whose steps grow with the gradient
            (SGD) at a learning rate that was found for single weights. It makes no difference to
            Adam and its kin.
    """

    # After PruningHook and EMAHook; before the hooks that write checkpoints.
    priority = 'LOW'
    state_name, verb = 'weight_sharing', 'share weights'

    def __init__(
        self, blocks: Sequence[dict], start: int = 0, by_epoch: bool = True, reduction: str = 'sum'
    ) -> None:
        super().__init__(by_epoch)
        self.blocks = build_blocks(weight_sharing.WeightSharingBlock, blocks, 'WeightSharingHook')
        if start < 0:
            raise UsageError(f'WeightSharingHook: start={start} must not be negative')
        if reduction not in weight_sharing.REDUCTIONS:
            raise UsageError(
                f"WeightSharingHook: reduction='{reduction}' is none of "
                f'{", ".join(weight_sharing.REDUCTIONS)}'
            )
        self.start, self.reduction = start, reduction
        #: Layer name -> who shares; empty before sharing begins.
        self.shared: dict[str, weight_sharing.WeightSharing] = {}

    def describe(self, runner: Runner) -> list[str]:
        """What it would do, a line for each block; raises what a training would."""
        self._require_fit(runner)
        layers_by_block = disjoint_layers(plain_model(runner), self.blocks)
        return [
            f'share {block.name}: {2**block.bits} values in each of {len(layers)} layers, after '
            f'{self.start} {self.unit}'
            for block, layers in zip(self.blocks, layers_by_block)
        ]

    def before_train(self, runner: Runner) -> None:
        """Find the layers, put saved indices back and hook into the optimizer's steps."""
        self._require_fit(runner)
        layers_by_block = disjoint_layers(plain_model(runner), self.blocks)
        self._layers = {name: layer for layers in layers_by_block for name, layer in layers.items()}
        self._bits = {
            name: block.bits
            for block, layers in zip(self.blocks, layers_by_block)
            for name in layers
        }
        if self._saved is not None:
            self._restore()
        self._around_steps(runner, self._before_step, lambda *_: self._tie(self._layers))

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin to share weights once the epoch has come."""
        if self.by_epoch:
            self._begin(runner, runner.epoch)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Begin to share weights once the iteration has come."""
        if not self.by_epoch:
            self._begin(runner, runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Tie averaged weights to their codebooks again."""
        # Averaging works element by element, but not to the last bit alike.
        self._tie_averages(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add indices and pruned places of each layer."""
        checkpoint['weight_sharing'] = {
            name: dict(indices=shared.indices.cpu(), pruned=shared.pruned)
            for name, shared in self.shared.items()
        }

    def _require_fit(self, runner: Runner) -> None:
        """Refuse a run that ends before it begins to share, or prunes afterwards."""
        super()._require_fit(runner)
        length = self._length(runner)
        if self.start >= length:
            raise UsageError(
                f'WeightSharingHook: sharing begins after {self.start} {self.unit}, but the run '
                f'has {length}'
            )
        start = self._in_iterations(runner, self.start, self.by_epoch)
        for hook in runner.hooks:
            if isinstance(hook, PruningHook):
                last = hook.start if hook.schedule == 'one_shot' else hook.end
                if hook.soft or self._in_iterations(runner, last, hook.by_epoch) > start:
                    raise UsageError(
                        'WeightSharingHook: PruningHook goes on after sharing begins; set '
                        "start to its end, or share in a run after it (soft pruning's)"
                    )

    @staticmethod
    def _in_iterations(runner: Runner, step: int, by_epoch: bool) -> int:
        return step * len(runner.train_dataloader) if by_epoch else step

    def _restore(self) -> None:
        saved = self._saved
        if saved and saved.keys() != self._layers.keys():
            raise UsageError(
                'WeightSharingHook: what the checkpoint shares are other layers; --resume goes on '
                'with the same config'
            )
        self.shared = {
            name: weight_sharing.weight_sharing_of(
                entry['indices'].to(self._layers[name].weight.device), entry['pruned']
            )
            for name, entry in saved.items()
        }

    def _begin(self, runner: Runner, step: int) -> None:
        if self.shared or step < self.start:
            return
        for name, layer in self._layers.items():
            try:
                self.shared[name] = weight_sharing.share_weights(layer.weight, self._bits[name])
            except UsageError as error:
                raise UsageError(f"WeightSharingHook: layer '{name}': {error}") from None
        self._agree()
        self._tie_averages(runner)
        total = sum(layer.weight.numel() for layer in self._layers.values())
        runner.logger.info(
            f'{total / 1e6:.2f} M weights of {len(self._layers)} layers share values'
        )

    def _agree(self) -> None:
        """Rank 0's indices on all ranks."""
        if get_world_size() > 1:
            for name, shared in self.shared.items():
                broadcast(shared.indices, src=0)
                broadcast(self._layers[name].weight.data, src=0)
                self.shared[name] = weight_sharing.weight_sharing_of(shared.indices, shared.pruned)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        # Gradients are unscaled and averaged over the ranks here. Each optimizer's own, once.
        trained = {id(weight) for group in optimizer.param_groups for weight in group['params']}
        for name, shared in self.shared.items():
            weight = self._layers[name].weight
            if id(weight) in trained and weight.grad is not None:
                weight_sharing.tie_gradient(weight.grad, shared, self.reduction)

    def _tie_averages(self, runner: Runner) -> None:
        for model in averaged_models(runner) if self.shared else []:
            modules = dict(model.named_modules())
            self._tie({name: modules[name] for name in self.shared})

    def _tie(self, layers: Mapping[str, PrunableLayer | nn.Module]) -> None:
        for name, shared in self.shared.items():
            weight_sharing.tie_weights(layers[name].weight, shared)
