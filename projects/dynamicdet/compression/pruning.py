"""Pruning: which weights go, as pure functions on modules.

A *mask* is a bool tensor of its weight's shape, true where the weight stays. Masks live beside the model and
are multiplied into the ordinary weights: no parameter is replaced or renamed, so an optimiser, DDP, EMA and a
checkpoint see the model that they know.

    M   layers of a block             C   output channels of a layer
    a *block* is a list of layers with one target, such as the backbone; a *share* is pruned weights / weights
"""
import zlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..errors import UsageError

Masks = Dict[str, Tensor]
SCORES = ('magnitude', 'random', 'activation', 'gradient')
SCOPES = ('block', 'layer', 'kind')
SCHEDULES = ('one_shot', 'iterative', 'cubic')
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Block:
    """What is pruned together, how far and by what.

    Args:
        name (str): For messages.
        modules (Sequence[str]): Patterns (`fnmatch`) of module names; what is below a module that matches
            belongs to it, so ``backbone`` is all of the backbone.
        target (float): Share of the block's weights to prune, in [0, 1). Of whole channels where
            ``structured``.
        exclude (Sequence[str]): Patterns of modules that stay as they are.
        score (str): What makes a weight worth keeping. ``magnitude``: its absolute value. ``random``.
            ``activation``: mean absolute output of a channel; for single weights magnitude times root mean
            square of their input (Sun et al. 2023, Wanda). ``gradient``: first-order Taylor, the squared
            change of the loss without it (Molchanov et al. 2019, eq. 8; for channels eq. 9).
        structured (bool): Whole output channels instead of single weights.
        over (str): Who competes: all weights of the ``block``, those of a ``layer``, or those of layers of
            one ``kind`` in the block (convolutions, linear layers).
        norm (float): The n of the Ln norm that ranks channels by magnitude.
    """
    name: str
    modules: Sequence[str]
    target: float
    exclude: Sequence[str] = field(default=())
    score: str = 'magnitude'
    structured: bool = False
    over: str = 'block'
    norm: float = 2

    def __post_init__(self) -> None:
        if not isinstance(self.target, (int, float)) or not 0 <= self.target < 1:
            raise UsageError(
                f"block '{self.name}': its target is {self.target}; it must be at least 0 and below 1")
        for value, known, what in ((self.score, SCORES, 'score'), (self.over, SCOPES, 'over')):
            if value not in known:
                raise UsageError(f"block '{self.name}': {what}='{value}' is none of {', '.join(known)}")
        for patterns, what in ((self.modules, 'modules'), (self.exclude, 'exclude')):
            if isinstance(patterns, str):
                raise UsageError(f"block '{self.name}': {what} is a list of patterns, not one string")


@dataclass(frozen=True)
class Layer:
    """A module with a weight to prune. ``name`` is its first name, ``names`` are all that it goes by."""
    name: str
    names: Tuple[str, ...]
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def dim(self) -> int:
        """The weight's dimension of output channels."""
        return 1 if isinstance(self.module, _TRANSPOSED) else 0


def find_layers(model: nn.Module) -> Dict[str, Layer]:
    """All layers with a weight of two or more dimensions: convolutions of all sorts and linear layers.

    A weight that is held under several names (as RTMDet's heads do) is one layer.

    Returns:
        dict: First name -> `Layer`, in the model's order.
    """
    found: Dict[int, Tuple[nn.Module, List[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, 'weight', None)
        grouped_transposed = isinstance(module, _TRANSPOSED) and module.groups > 1
        if (isinstance(weight, nn.Parameter) and weight.dim() >= 2 and weight.is_floating_point()
                and not isinstance(module, nn.Embedding) and not grouped_transposed):
            found.setdefault(id(weight), (module, []))[1].append(name)
    return {names[0]: Layer(names[0], tuple(names), module) for module, names in found.values()}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module, or one that it is part of, matches one of the patterns."""
    parts = name.split('.')
    above = ['.'.join(parts[:count + 1]) for count in range(len(parts))]
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in above)


def layers_of(model: nn.Module, block: Block) -> Dict[str, Layer]:
    """The layers of a block, in the model's order.

    Raises:
        UsageError: If a pattern matches no layer, or ``exclude`` leaves none.
    """
    every = find_layers(model)
    for pattern in block.modules:
        if not any(matches(name, [pattern]) for layer in every.values() for name in layer.names):
            parts = ', '.join(dict.fromkeys(name.split('.')[0] for name in every))
            raise UsageError(f"block '{block.name}': the pattern '{pattern}' matches no module with weights; "
                             f'the model has {parts}')
    kept = {name: layer for name, layer in every.items()
            if any(matches(own, block.modules) for own in layer.names)
            and not any(matches(own, block.exclude) for own in layer.names)}
    if not kept:
        raise UsageError(f"block '{block.name}': exclude={list(block.exclude)} leaves no layer")
    return kept


def layers_of_blocks(model: nn.Module, blocks: Sequence[Block]) -> List[Dict[str, Layer]]:
    """The layers of each block, which must not overlap, and each of whose targets must leave something.

    Raises:
        UsageError: If not.
    """
    owner: Dict[str, str] = {}
    found = [layers_of(model, block) for block in blocks]
    for block, layers in zip(blocks, found):
        for name in layers:
            if name in owner:
                raise UsageError(
                    f"'{name}' is in two blocks, '{owner[name]}' and '{block.name}'; exclude it from one")
            owner[name] = block.name
        for group in _groups(layers, block):
            _count(group, block, block.target)
    return found


def _groups(layers: Mapping[str, Layer], block: Block) -> List[Dict[str, Layer]]:
    """The layers whose weights compete with one another."""
    keys: Dict[object, Dict[str, Layer]] = {}
    for name, layer in layers.items():
        key = dict(block=None, layer=name, kind=type(layer.module))[block.over]
        keys.setdefault(key, {})[name] = layer
    return list(keys.values())


def _units(layer: Layer, block: Block) -> int:
    return layer.weight.shape[layer.dim] if block.structured else layer.weight.numel()


def _count(group: Mapping[str, Layer], block: Block, share: float) -> int:
    """How many weights (or channels) of a group go. Every layer keeps a channel where channels go."""
    total = sum(_units(layer, block) for layer in group.values())
    count = round(share * total)
    least = len(group) if block.structured else 1
    if count > total - least:
        layer = f"layer '{next(iter(group))}' of " if len(group) == 1 else ''
        what = f"{layer}block '{block.name}'"
        kind = 'channels' if block.structured else 'weights'
        raise UsageError(
            f'{what} would be pruned to nothing: {count} of its {total} {kind} at a target of {share}; '
            'lower the target or exclude it')
    return count


# Scores.


def magnitude_scores(layer: Layer, block: Block) -> Tensor:
    """|w|, or the Ln norm of each channel.

    Channels of several layers compete by the norm's mean over their weights, (sum |w|^n / count)^(1/n): a
    channel must not win by having more weights.
    """
    weight = layer.weight.detach().float()
    if not block.structured:
        return weight.abs()
    rows = weight.transpose(0, layer.dim).flatten(1)
    norms = torch.linalg.vector_norm(rows, ord=block.norm, dim=1)
    return norms if block.over == 'layer' else norms / rows.shape[1]**(1 / block.norm)


def random_scores(layer: Layer, block: Block, seed: int) -> Tensor:
    """Uniform in [0, 1), by seed and name alone: the same on every rank and at every call, so that masks of a
    growing share are nested."""
    # torch's generator takes 32 bits.
    generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {layer.name}'.encode()))
    shape = (_units(layer, block), ) if block.structured else layer.weight.shape
    return torch.rand(shape, generator=generator).to(layer.weight.device)


def taylor_terms(layer: Layer, block: Block) -> Optional[Tensor]:
    """(w g)^2 of each weight, or (sum of w g over a channel)^2, from the gradient that is there."""
    if layer.weight.grad is None:
        return None
    product = (layer.weight.detach() * layer.weight.grad).float()
    if block.structured:
        product = product.transpose(0, layer.dim).flatten(1).sum(1)
    return product.square()


def activation_scores(layer: Layer, block: Block, squares: Tensor, outputs: Tensor) -> Tensor:
    """Scores from what a layer saw.

    Args:
        layer (Layer): The layer.
        block (Block): Its block.
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


# Masks.


def prune_block(layers: Mapping[str, Layer],
                block: Block,
                share: float,
                masks: Optional[Mapping[str, Tensor]] = None,
                seed: int = 0,
                scores: Optional[Mapping[str, Tensor]] = None) -> Masks:
    """Choose what goes.

    Args:
        layers (Mapping[str, Layer]): The block's, from `layers_of`.
        block (Block): How.
        share (float): Share to be pruned afterwards, in [0, 1).
        masks (Mapping[str, Tensor], optional): Masks so far: what they have pruned stays pruned. Without,
            all is chosen anew, as Soft Filter Pruning does (He et al. 2018).
        seed (int): Of random scores.
        scores (Mapping[str, Tensor], optional): Layer name -> scores, non-negative, of the weight's shape
            or (C, ). Needed for activations and gradients.

    Returns:
        dict: Layer name -> bool mask of the weight's shape, on its device.

    Raises:
        UsageError: If nothing would be left of the block, or of a layer that is ranked by itself.
    """
    if scores is None and block.score in ('activation', 'gradient'):
        raise UsageError(f"block '{block.name}': score='{block.score}' needs scores from training steps")
    chosen: Masks = {}
    for group in _groups(layers, block):
        values = {}
        for name, layer in group.items():
            values[name] = (scores[name] if scores is not None
                            else magnitude_scores(layer, block) if block.score == 'magnitude'
                            else random_scores(layer, block, seed))
        kept = {name: _kept_units(masks[name], layer, block) if masks and name in masks
                else torch.ones_like(values[name], dtype=torch.bool) for name, layer in group.items()}
        chosen.update(_rank(group, block, _count(group, block, share), values, kept))
    return {name: chosen[name] for name in layers}


def _kept_units(mask: Tensor, layer: Layer, block: Block) -> Tensor:
    return mask.transpose(0, layer.dim).flatten(1).any(1) if block.structured else mask


def _rank(group: Mapping[str, Layer], block: Block, count: int, values: Mapping[str, Tensor],
          kept: Mapping[str, Tensor]) -> Masks:
    """Prune the lowest of what is still there, until ``count`` are gone."""
    scores = torch.cat([values[name].flatten() for name in group])
    alive = torch.cat([kept[name].flatten() for name in group])
    if block.structured:
        # A layer without channels would cut the network in two.
        scores = scores.clone()
        start = 0
        for name in group:
            own = slice(start, start + values[name].numel())
            best = torch.where(kept[name].flatten(), scores[own], -1).argmax()
            scores[own][best] = float('inf')
            start = own.stop
    more = count - int((~alive).sum())
    if more > 0:
        there = alive.nonzero().squeeze(1)
        # torch's own choice of the `more` lowest.
        alive[there] = torch_prune.L1Unstructured(more).compute_mask(
            scores[there], torch.ones_like(there, dtype=torch.bool))
    masks, start = {}, 0
    for name, layer in group.items():
        part = alive[start:start + values[name].numel()]
        start += values[name].numel()
        if block.structured:
            shape = [1] * layer.weight.dim()
            shape[layer.dim] = -1
            part = part.reshape(shape).expand_as(layer.weight)
        masks[name] = part.reshape(layer.weight.shape).clone()
    return masks


def prune(model: nn.Module, blocks: Sequence[Block], seed: int = 0) -> Masks:
    """Prune a model to its blocks' targets, once, in place. For magnitude and random scores.

    Returns:
        dict: Layer name -> mask.

    Raises:
        UsageError: If the blocks do not fit the model.
    """
    masks: Masks = {}
    for block, layers in zip(blocks, layers_of_blocks(model, blocks)):
        masks.update(prune_block(layers, block, block.target, seed=seed))
    apply_masks(model, masks)
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what is pruned to zero, in place, also where it was infinite or NaN."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        weight = modules[name].weight
        weight.masked_fill_(~mask.to(weight.device), 0)


def pruned_share(masks: Mapping[str, Tensor]) -> float:
    """Pruned weights / weights of some masks, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(int((~mask).sum()) for mask in masks.values()) / total


def emptied(masks: Mapping[str, Tensor]) -> List[str]:
    """Layers of which nothing is left: nothing passes them any more."""
    return [name for name, mask in masks.items() if not mask.any()]


# Schedules.


def share_at(schedule: str, step: int, start: int, end: int, interval: int, target: float) -> float:
    """The share that is due at a step.

    Args:
        schedule (str): ``one_shot``: the target at ``start``. ``iterative``: at ``start``, ``start +
            interval``, ... the same share of what is left. ``cubic``: target
            (1 - (1 - (t - start) / (end - start))^3), which
            begins with nothing at ``start`` and prunes most while there is most (Zhu and Gupta 2017, eq. 1
            with s_i = 0).
        step (int): Epochs or iterations that are done.
        start (int): First moment.
        end (int): Last moment; the target is reached there at the latest.
        interval (int): Steps between two moments, at least 1.
        target (float): In [0, 1).

    Returns:
        float: In [0, target]; constant between two moments.
    """
    if step < start:
        return 0.0
    if schedule == 'one_shot' or step >= end:
        return float(target)
    done = (step - start) // interval
    if schedule == 'iterative':
        moments = -(-(end - start) // interval) + 1
        return 1 - (1 - target)**((done + 1) / moments)
    return target * (1 - (1 - done * interval / (end - start))**3)


# What training steps tell of weights.


class Statistics:
    """Gathers gradients and activations of some layers over training steps.

    Args:
        layers (Mapping[str, Layer]): Layer name -> layer.
        blocks (Mapping[str, Block]): Layer name -> its block. Only blocks that score by ``activation`` or
            ``gradient`` are watched.

    Attributes:
        totals (dict): Name -> sums so far, of what `state_dict` gives.
    """

    def __init__(self, layers: Mapping[str, Layer], blocks: Mapping[str, Block]) -> None:
        self._layers = {name: layer for name, layer in layers.items()
                        if blocks[name].score in ('activation', 'gradient')}
        self._blocks = blocks
        self._active = False
        self._pending: Dict[str, Tensor] = {}
        self.totals: Dict[str, Tensor] = {}
        self._handles = [
            layer.module.register_forward_hook(self._watch(name)) for name, layer in self._layers.items()
            if blocks[name].score == 'activation']

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
        """Add the gradients that are there now: between the backward pass and the optimiser's step."""
        for name, layer in self._layers.items():
            if self._blocks[name].score == 'gradient':
                terms = taylor_terms(layer, self._blocks[name])
                if terms is not None:
                    self._add(self.totals, f'{name}:terms', terms)

    def finish(self, reduce: Callable[[Tensor], None]) -> None:
        """End a training step.

        Args:
            reduce (Callable): Sums a float32 vector over all ranks, in place. It is called on every rank
                alike, once where activations are watched.
        """
        self._active = False
        names = [name for name, layer in self._layers.items() if self._blocks[name].score == 'activation']
        if not names:
            return
        parts = [(name, part) for name in names for part in ('calls', 'squares', 'outputs')]
        vectors = [self._pending.get(f'{name}:{part}', self._zeros(name, part)) for name, part in parts]
        every = torch.cat(vectors)
        reduce(every)
        for (name, part), vector in zip(parts, every.split([len(vector) for vector in vectors])):
            self._add(self.totals, f'{name}:{part}', vector)
        self._pending.clear()

    def scores(self, names: Sequence[str]) -> Optional[Dict[str, Tensor]]:
        """Scores of one block's layers, or none if nothing was gathered. What was never used scores 0."""
        if not any(key.rsplit(':', 1)[0] in set(names) for key in self.totals):
            return None
        return {name: self._score(name) for name in names}

    def reset(self) -> None:
        """Forget all."""
        self.totals.clear()

    def load(self, totals: Mapping[str, Tensor]) -> None:
        """Take up the `totals` of a run that ended."""
        self.totals = {key: value.to(self._layers[key.rsplit(':', 1)[0]].weight.device)
                       for key, value in totals.items() if key.rsplit(':', 1)[0] in self._layers}

    def _score(self, name: str) -> Tensor:
        layer, block = self._layers[name], self._blocks[name]
        if block.score == 'gradient':
            shape = (_units(layer, block), ) if block.structured else layer.weight.shape
            return self.totals.get(f'{name}:terms', layer.weight.new_zeros(shape, dtype=torch.float32))
        calls = self.totals[f'{name}:calls'].clamp(min=1)
        return activation_scores(layer, block, self.totals[f'{name}:squares'] / calls,
                                 self.totals[f'{name}:outputs'] / calls)

    def _zeros(self, name: str, part: str) -> Tensor:
        layer = self._layers[name]
        shape, groups = layer.weight.shape, getattr(layer.module, 'groups', 1)
        size = dict(calls=1, squares=shape[0] if layer.dim else shape[1] * groups,
                    outputs=shape[layer.dim])[part]
        return torch.zeros(size, device=layer.weight.device)

    def _watch(self, name: str) -> Callable:
        def watch(module: nn.Module, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
            if not self._active:
                return
            given, out = inputs[0].detach().float(), output.detach().float()
            if given.numel():
                # Convolutions have channels in dimension 1, linear layers in the last.
                last = self._layers[name].weight.dim() == 2
                given, out = ((value if last else value.transpose(1, -1)).flatten(0, -2)
                              for value in (given, out))
                self._add(self._pending, f'{name}:squares', given.square().mean(0))
                self._add(self._pending, f'{name}:outputs', out.abs().mean(0))
                self._add(self._pending, f'{name}:calls', given.new_ones(1))

        return watch

    @staticmethod
    def _add(sums: Dict[str, Tensor], key: str, value: Tensor) -> None:
        sums[key] = sums[key] + value if key in sums else value.clone()


# Masks on disk.


def pack(mask: Tensor) -> Tensor:
    """A mask as bits, eight to a byte: uint8 (ceil(n / 8), )."""
    bits = torch.nn.functional.pad(mask.flatten().cpu().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask that `pack` packed."""
    bits = packed.cpu().unsqueeze(1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    return bits.flatten()[:torch.Size(shape).numel()].bool().reshape(tuple(shape))
