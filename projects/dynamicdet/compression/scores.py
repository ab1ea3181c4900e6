"""What makes a weight worth keeping: scores from magnitudes, chance, and what training steps
tell."""

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .pruning_blocks import PrunableLayer, PruningBlock, count_units


def magnitude_scores(layer: PrunableLayer, block: PruningBlock) -> Tensor:
    """|w|, or the Ln norm of each channel.

    Channels of several layers compete by the norm's mean over their weights, (sum |w|^n /
    count)^(1/n): a channel must not win by having more weights.
    """
    weight = layer.weight.detach().float()
    if not block.structured:
        return weight.abs()
    rows = weight.transpose(0, layer.dim).flatten(1)
    norms = torch.linalg.vector_norm(rows, ord=block.norm, dim=1)
    return norms if block.over == 'layer' else norms / rows.shape[1] ** (1 / block.norm)


def random_scores(layer: PrunableLayer, block: PruningBlock, seed: int) -> Tensor:
    """Uniform in [0, 1), by seed and name alone: the same on every rank and at every call, so that
    masks of a growing share are nested."""
    # torch's generator takes 32 bits.
    generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {layer.name}'.encode()))
    shape = (count_units(layer, block),) if block.structured else layer.weight.shape
    return torch.rand(shape, generator=generator).to(layer.weight.device)


def taylor_terms(layer: PrunableLayer, block: PruningBlock) -> Tensor | None:
    """(w g)^2 of each weight, or (sum of w g over a channel)^2, from the gradient that is there."""
    if layer.weight.grad is None:
        return None
    product = (layer.weight.detach() * layer.weight.grad).float()
    if block.structured:
        product = product.transpose(0, layer.dim).flatten(1).sum(1)
    return product.square()


def activation_scores(
    layer: PrunableLayer, block: PruningBlock, squares: Tensor, outputs: Tensor
) -> Tensor:
    """Scores from what a layer saw.

    Args:
        layer (PrunableLayer): The layer.
        block (PruningBlock): Its block.
        squares (Tensor): Mean square of each input channel, (channels in, ).
        outputs (Tensor): Mean absolute value of each output channel, (C, ).

    Returns:
        Tensor: (C, ) where ``structured``, else of the weight's shape.
    """
    if block.structured:
        return outputs
    weight = layer.weight.detach().float().abs()
    groups = getattr(layer.module, 'groups', 1)
    rms = squares.sqrt()
    if layer.dim:
        return weight * rms.reshape(-1, *[1] * (weight.dim() - 1))
    # A channel's weights meet the inputs of its own group.
    per_channel = rms.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return weight * per_channel.reshape(*per_channel.shape, *[1] * (weight.dim() - 2))


class Statistics:
    """Gathers gradients and activations of some layers over training steps.

    Args:
        layers (Mapping[str, PrunableLayer]): Layer name -> layer.
        blocks (Mapping[str, PruningBlock]): Layer name -> its block. Only blocks that score by
            ``activation`` or ``gradient`` are watched.

    Attributes:
        totals (dict): Name -> sums so far, of what `state_dict` gives.
    """

    def __init__(
        self, layers: Mapping[str, PrunableLayer], blocks: Mapping[str, PruningBlock]
    ) -> None:
        self._layers = {
            name: layer
            for name, layer in layers.items()
            if blocks[name].score in ('activation', 'gradient')
        }
        self._blocks = blocks
        self._active = False
        self._pending: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self._handles = [
            layer.module.register_forward_hook(self._watch(name))
            for name, layer in self._layers.items()
            if blocks[name].score == 'activation'
        ]

    def __bool__(self) -> bool:
        return bool(self._layers)

    def remove(self) -> None:
        """Take the forward hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Watch activations until `finish`: not those of a validation."""
        self._active = True

    def add_gradients(self) -> None:
        """Add the gradients that are there now: between the backward pass and the optimizer's
        step."""
        for name, layer in self._layers.items():
            if self._blocks[name].score == 'gradient':
                terms = taylor_terms(layer, self._blocks[name])
                if terms is not None:
                    self._add(self.totals, f'{name}:terms', terms)

    def finish(self, reduce: Callable[[Tensor], None]) -> None:
        """End a training step.

        Args:
            reduce (Callable): Sums a float32 vector over all ranks, in place. It is called on every
                rank alike, once where activations are watched.
        """
        self._active = False
        names = [
            name for name, layer in self._layers.items() if self._blocks[name].score == 'activation'
        ]
        if not names:
            return
        parts = [(name, part) for name in names for part in ('calls', 'squares', 'outputs')]
        vectors = [
            self._pending.get(f'{name}:{part}', self._zeros(name, part)) for name, part in parts
        ]
        every = torch.cat(vectors)
        reduce(every)
        for (name, part), vector in zip(parts, every.split([len(vector) for vector in vectors])):
            self._add(self.totals, f'{name}:{part}', vector)
        self._pending.clear()

    def scores(self, names: Sequence[str]) -> dict[str, Tensor] | None:
        """Scores of one block's layers, or none if nothing was gathered. What was never used scores
        0."""
        if not any(key.rsplit(':', 1)[0] in set(names) for key in self.totals):
            return None
        return {name: self._score(name) for name in names}

    def reset(self) -> None:
        """Forget all."""
        self.totals.clear()

    def load(self, totals: Mapping[str, Tensor]) -> None:
        """Take up the `totals` of a run that ended."""
        self.totals = {
            key: value.to(self._layers[key.rsplit(':', 1)[0]].weight.device)
            for key, value in totals.items()
            if key.rsplit(':', 1)[0] in self._layers
        }

    def _score(self, name: str) -> Tensor:
        layer, block = self._layers[name], self._blocks[name]
        if block.score == 'gradient':
            shape = (count_units(layer, block),) if block.structured else layer.weight.shape
            return self.totals.get(
                f'{name}:terms', layer.weight.new_zeros(shape, dtype=torch.float32)
            )
        calls = self.totals[f'{name}:calls'].clamp(min=1)
        return activation_scores(
            layer,
            block,
            self.totals[f'{name}:squares'] / calls,
            self.totals[f'{name}:outputs'] / calls,
        )

    def _zeros(self, name: str, part: str) -> Tensor:
        layer = self._layers[name]
        shape, groups = layer.weight.shape, getattr(layer.module, 'groups', 1)
        size = dict(
            calls=1, squares=shape[0] if layer.dim else shape[1] * groups, outputs=shape[layer.dim]
        )[part]
        return torch.zeros(size, device=layer.weight.device)

    def _watch(self, name: str) -> Callable:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._active:
                return
            given, out = inputs[0].detach().float(), output.detach().float()
            if given.numel():
                # Convolutions have channels in dimension 1, linear layers in the last.
                last = self._layers[name].weight.dim() == 2
                given, out = (
                    (value if last else value.transpose(1, -1)).flatten(0, -2)
                    for value in (given, out)
                )
                self._add(self._pending, f'{name}:squares', given.square().mean(0))
                self._add(self._pending, f'{name}:outputs', out.abs().mean(0))
                self._add(self._pending, f'{name}:calls', given.new_ones(1))

        return watch

    @staticmethod
    def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
        sums[key] = sums[key] + value if key in sums else value.clone()
