"""Pruning: which weights go, as pure functions on modules.

A *mask* is a bool tensor of its weight's shape, true where the weight stays. Masks live beside the
model and are multiplied into the ordinary weights: no parameter is replaced or renamed, so an
optimizer, DDP, EMA and a checkpoint see the model that they know.

    M   layers of a block             C   output channels of a layer
    a *block* is a list of layers with one target, such as the backbone; a *share* is pruned weights
    / weights
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..errors import UsageError
from .pruning_blocks import PrunableLayer, PruningBlock, count_units, disjoint_layers
from .scores import magnitude_scores, random_scores

Masks = dict[str, Tensor]
SCHEDULES = ('one_shot', 'iterative', 'cubic')


def layers_of_blocks(
    model: nn.Module, blocks: Sequence[PruningBlock]
) -> list[dict[str, PrunableLayer]]:
    """The layers of each block, which must not overlap, and each of whose targets must leave
    something.

    Raises:
        UsageError: If not.
    """
    layers_by_block = disjoint_layers(model, blocks)
    for block, layers in zip(blocks, layers_by_block):
        for group in _groups(layers, block):
            _count(group, block, block.target)
    return layers_by_block


def _groups(
    layers: Mapping[str, PrunableLayer], block: PruningBlock
) -> list[dict[str, PrunableLayer]]:
    """The layers whose weights compete with one another."""
    keys: dict[object, dict[str, PrunableLayer]] = {}
    for name, layer in layers.items():
        key = dict(block=None, layer=name, kind=type(layer.module))[block.over]
        keys.setdefault(key, {})[name] = layer
    return list(keys.values())


def _count(group: Mapping[str, PrunableLayer], block: PruningBlock, share: float) -> int:
    """How many weights (or channels) of a group go. Every layer keeps a channel where channels
    go."""
    total = sum(count_units(layer, block) for layer in group.values())
    count = round(share * total)
    least = len(group) if block.structured else 1
    if count > total - least:
        layer = f"layer '{next(iter(group))}' of " if len(group) == 1 else ''
        what = f"{layer}block '{block.name}'"
        kind = 'channels' if block.structured else 'weights'
        raise UsageError(
            f'{what} would be pruned to nothing: {count} of its {total} {kind} at a target of '
            f'{share}; lower the target or exclude it'
        )
    return count


def prune_block(
    layers: Mapping[str, PrunableLayer],
    block: PruningBlock,
    share: float,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    scores: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Choose what goes.

    Args:
        layers (Mapping[str, PrunableLayer]): The block's, from `selected_layers`.
        block (PruningBlock): How.
        share (float): Share to be pruned afterwards, in [0, 1).
        masks (Mapping[str, Tensor], optional): Masks so far: what they have pruned stays pruned.
            Without, all is chosen anew, as Soft Filter Pruning does (He et al. 2018).
        seed (int): Of random scores.
        scores (Mapping[str, Tensor], optional): Layer name -> scores, non-negative, of the weight's
            shape or (C, ). Needed for activations and gradients.

    Returns:
        dict: Layer name -> bool mask of the weight's shape, on its device.

    Raises:
        UsageError: If nothing would be left of the block, or of a layer that is ranked by itself.
    """
    if scores is None and block.score in ('activation', 'gradient'):
        raise UsageError(
            f"block '{block.name}': score='{block.score}' needs scores from training steps"
        )
    chosen: Masks = {}
    for group in _groups(layers, block):
        values = {}
        for name, layer in group.items():
            values[name] = (
                scores[name]
                if scores is not None
                else magnitude_scores(layer, block)
                if block.score == 'magnitude'
                else random_scores(layer, block, seed)
            )
        kept = {
            name: _kept_units(masks[name], layer, block)
            if masks and name in masks
            else torch.ones_like(values[name], dtype=torch.bool)
            for name, layer in group.items()
        }
        chosen.update(_rank(group, block, _count(group, block, share), values, kept))
    return {name: chosen[name] for name in layers}


def _kept_units(mask: Tensor, layer: PrunableLayer, block: PruningBlock) -> Tensor:
    return mask.transpose(0, layer.dim).flatten(1).any(1) if block.structured else mask


def _rank(
    group: Mapping[str, PrunableLayer],
    block: PruningBlock,
    count: int,
    values: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> Masks:
    """Prune the lowest of what is still there, until ``count`` are gone."""
    scores = torch.cat([values[name].flatten() for name in group])
    alive = torch.cat([kept[name].flatten() for name in group])
    if block.structured:
        # A layer without channels would cut the network in two.
        scores = scores.clone()
        start = 0
        for name in group:
            span = slice(start, start + values[name].numel())
            best = torch.where(kept[name].flatten(), scores[span], -1).argmax()
            scores[span][best] = float('inf')
            start = span.stop
    more = count - int((~alive).sum())
    if more > 0:
        there = alive.nonzero().squeeze(1)
        # torch's own choice of the `more` lowest.
        alive[there] = torch_prune.L1Unstructured(more).compute_mask(
            scores[there], torch.ones_like(there, dtype=torch.bool)
        )
    masks, start = {}, 0
    for name, layer in group.items():
        part = alive[start : start + values[name].numel()]
        start += values[name].numel()
        if block.structured:
            shape = [1] * layer.weight.dim()
            shape[layer.dim] = -1
            part = part.reshape(shape).expand_as(layer.weight)
        masks[name] = part.reshape(layer.weight.shape).clone()
    return masks


def prune_weights(model: nn.Module, blocks: Sequence[PruningBlock], seed: int = 0) -> Masks:
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


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Layers of which nothing is left: nothing passes them any more."""
    return [name for name, mask in masks.items() if not mask.any()]


# Schedules.


def share_at(schedule: str, step: int, start: int, end: int, interval: int, target: float) -> float:
    """The share that is due at a step.

    Args:
        schedule (str): ``one_shot``: the target at ``start``. ``iterative``: at ``start``, ``start
            + interval``, ... the same share of what is left. ``cubic``: target
            (1 - (1 - (t - start) / (end - start))^3), which
            begins with nothing at ``start`` and prunes most while there is most (Zhu and Gupta
            2017, eq. 1 with s_i = 0).
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
        return 1 - (1 - target) ** ((done + 1) / moments)
    return target * (1 - (1 - done * interval / (end - start)) ** 3)


# Masks on disk.


def pack_mask(mask: Tensor) -> Tensor:
    """A mask as bits, eight to a byte: uint8 (ceil(n / 8), )."""
    bits = torch.nn.functional.pad(
        mask.flatten().cpu().to(torch.uint8), (0, -mask.numel() % 8)
    ).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask that `pack_mask` packed."""
    bits = packed.cpu().unsqueeze(1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    return bits.flatten()[: torch.Size(shape).numel()].bool().reshape(tuple(shape))
