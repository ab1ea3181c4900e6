"""Remove channels for good: which of a detector's go, and a detector without them.

Letters as in `coupling`: a *unit* goes as a whole, units of a *cluster* compete, U units.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from .coupling import GIVEN, Cluster, example_image, find_clusters, raw_outputs
from .pruning import layers_of_blocks
from .pruning_blocks import PrunableLayer, PruningBlock, find_layers
from .scores import magnitude_scores, random_scores
from .shrinking import Channels, KeptChannels, channels_of, get_by_name, rule_of, shrink_layers

#: Channels that vector units of processors and accelerators take at a time.
ROUND_TO = 16


@dataclass(frozen=True)
class BlockRemoval:
    """What a block loses: channels that could go, and that are left of these."""

    block: str
    channels: int
    left: int

    @property
    def removed(self) -> float:
        """Share, in [0, 1]."""
        return 1 - self.left / self.channels if self.channels else 0.0


@dataclass(frozen=True)
class RemovalPlan:
    """What goes.

    Attributes:
        kept (dict[str, KeptChannels]): Layer -> what stays of it, of layers that lose channels.
        rows (list[BlockRemoval]): One per block.
        alone (dict[str, str]): First layer of a cluster that stays as it is -> why. Prediction
            layers, and what is in no block, are not named.
    """

    kept: dict[str, KeptChannels] = field(repr=False)
    rows: list[BlockRemoval] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)


def plan_removal(
    model: nn.Module, blocks: Sequence[PruningBlock], round_to: int = ROUND_TO, seed: int = 0
) -> RemovalPlan:
    """Choose the channels that go; the model is left as it is.

    What is left computes what it did with the others at zero; that is checked on an image of noise,
    and what fails the check is left alone.

    Args:
        model (nn.Module): With the weights by which channels are ranked; those that a mask has set
            to zero come first.
        blocks (Sequence[PruningBlock]): Of ``structured`` ones, with scores by magnitude or at
            random.
            ``over='layer'`` takes the same share from every cluster, ``'block'`` the weakest of
            all.
        round_to (int): Channels that stay are a multiple of it.
        seed (int): Of random scores.

    Raises:
        UsageError: If a block does not fit the model, or nothing of it can be removed.
    """
    for block in blocks:
        _require_fit(block)
    if round_to < 1:
        raise UsageError(f'channels are rounded to multiples of a number from 1 on; got {round_to}')
    block_of = {
        name: index
        for index, layers in enumerate(layers_of_blocks(model, blocks))
        for name in layers
    }
    layers, alone = find_layers(model), {}
    broken = [name for name, layer in layers.items() if not layer.weight.isfinite().all()]
    if broken:
        raise UsageError(f"the weights of '{broken[0]}' are not finite: did the training diverge?")
    clusters: list[list[Cluster]] = [[] for _ in blocks]
    for cluster in find_clusters(model):
        outs = [name for name in cluster.layers if name in layers]
        owners = {block_of.get(name) for name in outs}
        if not outs or owners == {None}:
            continue
        if len(owners) > 1:
            named = next(name for name in outs if block_of.get(name) != block_of.get(outs[0]))
            alone[outs[0]] = f"coupled with '{named}', which is not in its block"
        elif cluster.why or not _options(cluster, round_to)[:-1]:
            if cluster.why != GIVEN:
                alone[outs[0]] = cluster.why or f'it has {cluster.units * cluster.width} channels'
        else:
            clusters[owners.pop()].append(cluster)
    chosen: list[list[tuple[Cluster, np.ndarray]]] = []
    for block, block_clusters in zip(blocks, clusters):
        if not block_clusters and block.target:
            raise UsageError(
                f"block '{block.name}': nothing in it can be removed"
                + ''.join(f"; '{name}' stays: {why}" for name, why in list(alone.items())[:1])
            )
        chosen.append(_choose(block, block_clusters, layers, round_to, seed))
    sound = _sound(model, [pair for pairs in chosen for pair in pairs if not pair[1].all()])
    rows = []
    for block, pairs in zip(blocks, chosen):
        left = 0
        for cluster, stays in pairs:
            failed = not stays.all() and not any(
                cluster is sound_cluster for sound_cluster, _ in sound
            )
            if failed:
                alone[cluster.layers[0]] = (
                    'without some of them the rest would not compute what it did'
                )
            left += cluster.width * (cluster.units if failed else int(stays.sum()))
        rows.append(
            BlockRemoval(
                block.name, sum(cluster.width * cluster.units for cluster, _ in pairs), left
            )
        )
    return RemovalPlan(_kept(model, sound), rows, alone)


def remove_channels(model: nn.Module, plan: RemovalPlan) -> Channels:
    """Carry a plan out, in place.

    Returns:
        dict: The description, by which `models.build_pruned` builds such a detector. It stands in
        ``removed_channels`` of the model, too.
    """
    channels = {
        **getattr(model, 'removed_channels', {}),
        **shrink_layers(model, plan.kept),
        **_fit_extractors(model),
    }
    model.removed_channels = channels
    return channels


def _require_fit(block: PruningBlock) -> None:
    if block.score not in ('magnitude', 'random'):
        raise UsageError(
            f"block '{block.name}': channels are removed by magnitude or at random, not by "
            f"score='{block.score}': let a PruningHook with structured=True choose by it and set "
            'them '
            'to zero; those go first'
        )
    if block.over == 'kind':
        raise UsageError(
            f"block '{block.name}': channels are coupled over layers of several kinds; over is "
            "'layer' or 'block'"
        )


def _options(cluster: Cluster, round_to: int) -> list[int]:
    """Numbers of units that may stay, ascending; the last is all."""
    step = round_to // math.gcd(round_to, cluster.width)
    return [*range(step, cluster.units, step), cluster.units]


def _choose(
    block: PruningBlock,
    clusters: Sequence[Cluster],
    layers: Mapping[str, PrunableLayer],
    round_to: int,
    seed: int,
) -> list[tuple[Cluster, np.ndarray]]:
    """Which units of each cluster stay, bool (U, )."""
    scores = [_scores(block, cluster, layers, seed) for cluster in clusters]
    goals = [cluster.units * (1 - block.target) for cluster in clusters]
    for cluster in clusters:
        if round(block.target * cluster.units) >= cluster.units:
            raise UsageError(
                f"layer '{cluster.layers[0]}' of block '{block.name}' would be pruned to nothing: "
                'all of its '
                f'{cluster.units * cluster.width} channels at a target of {block.target}; lower '
                'the target '
                'or exclude it'
            )
    if block.over == 'block' and clusters:
        widths = np.concatenate([np.full(cluster.units, cluster.width) for cluster in clusters])
        order = np.argsort(np.concatenate(scores), kind='stable')
        stays = np.empty(len(order), bool)
        stays[order] = np.cumsum(widths[order]) > block.target * widths.sum()
        goals = [
            part.sum()
            for part in np.split(
                stays, np.cumsum([len(cluster_scores) for cluster_scores in scores])[:-1]
            )
        ]
    chosen = []
    for cluster, cluster_scores, goal in zip(clusters, scores, goals):
        # The nearest; of two the larger.
        count = min(_options(cluster, round_to), key=lambda option: (abs(option - goal), -option))
        stays = np.zeros(cluster.units, bool)
        stays[np.argsort(-cluster_scores, kind='stable')[:count]] = True
        chosen.append((cluster, stays))
    return chosen


def _scores(
    block: PruningBlock, cluster: Cluster, layers: Mapping[str, PrunableLayer], seed: int
) -> np.ndarray:
    """What makes a unit worth keeping, (U, ): the mean over the cluster's layers of its Ln norm,
    each over the layer's mean, so that layers and clusters compare."""
    total, count = np.zeros(cluster.units), 0
    for member in cluster.members:
        if not member.leaving or member.layer not in layers:
            continue
        layer = layers[member.layer]
        values = (
            random_scores(layer, block, seed)
            if block.score == 'random'
            else magnitude_scores(layer, block)
        )
        member_scores = np.bincount(
            member.units, values.cpu().double().numpy()[member.channels], cluster.units
        )
        total += member_scores / member_scores.mean() if member_scores.any() else member_scores
        count += 1
    return total / count


def _kept(
    model: nn.Module, chosen: Sequence[tuple[Cluster, np.ndarray]]
) -> dict[str, KeptChannels]:
    """Layer -> what stays of it."""
    gone: dict[str, dict[bool, set]] = {}
    for cluster, stays in chosen:
        for member in cluster.members:
            removed = member.channels[~stays[member.units]].tolist()
            gone.setdefault(member.layer, {}).setdefault(member.leaving, set()).update(removed)
    kept = {}
    for name, sides in gone.items():
        entering, leaving, _ = channels_of(get_by_name(model, name))
        kept[name] = KeptChannels(
            *(
                _without(sides.get(side), count)
                for side, count in ((False, entering), (True, leaving))
            )
        )
    if 'router.fc1' in kept:
        # What standardizes the router's features is as long as they are.
        kept['router'] = KeptChannels(entering=kept['router.fc1'].entering)
    return {
        name: channels
        for name, channels in kept.items()
        if channels.entering is not None or channels.leaving is not None
    }


def _without(gone: set | None, count: int) -> Tensor | None:
    """What is left of ``count`` channels; None for all."""
    return (
        torch.tensor([channel for channel in range(count) if channel not in gone], dtype=torch.long)
        if gone
        else None
    )


# The check.


def _sound(
    model: nn.Module, chosen: list[tuple[Cluster, np.ndarray]]
) -> list[tuple[Cluster, np.ndarray]]:
    """Those of the clusters without whose units the rest computes what it did."""
    if not chosen or _same(model, _kept(model, chosen)):
        return chosen
    if len(chosen) == 1:
        return []
    half = len(chosen) // 2
    sound = _sound(model, chosen[:half]) + _sound(model, chosen[half:])
    if len(sound) == len(chosen):
        raise UsageError(
            'channels of this detector cannot be removed together: give fewer layers in each block'
        )
    return sound


@torch.no_grad()
def _same(model: nn.Module, kept: Mapping[str, KeptChannels]) -> bool:
    """Whether a detector without channels says of noise what it says where nothing takes them
    in."""
    whole, small = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    for name, channels in kept.items():
        layer = get_by_name(whole, name)
        if (
            channels.entering is not None
            and getattr(layer, 'groups', 1) == 1
            and hasattr(layer, 'weight')
        ):
            dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            gone = torch.ones(layer.weight.shape[dim], dtype=torch.bool)
            gone[channels.entering] = False
            layer.weight.index_fill_(dim, gone.nonzero().squeeze(1).to(layer.weight.device), 0)
    shrink_layers(small, kept)
    try:
        _fit_extractors(small)
        outputs = _run(small)
    except (RuntimeError, ValueError, IndexError):
        # Shapes that do not go together.
        return False
    wanted = _run(whole)
    return all(
        output.shape == other.shape
        and torch.allclose(
            output, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), equal_nan=True
        )
        for output, other in zip(outputs, wanted)
    )


def _run(model: nn.Module) -> list[Tensor]:
    return raw_outputs(model, example_image(model))


def _is_told(module: nn.Module) -> bool:
    rule = rule_of(module)
    return rule is not None and rule.is_told


@torch.no_grad()
def _fit_extractors(model: nn.Module) -> Channels:
    """Tell RoI extractors how many channels the maps have that they are given.

    Returns:
        dict: The description of those that were told something new.
    """
    told: Channels = {}
    names = {module: name for name, module in model.named_modules() if _is_told(module)}

    def tell(module: nn.Module, inputs: tuple) -> None:
        count = inputs[0][0].shape[1]
        if module.out_channels != count:
            module.out_channels = count
            told[names[module]] = [count, count, 1]

    hooks = [module.register_forward_pre_hook(tell) for module in names]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if names:
            _run(model)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return told
