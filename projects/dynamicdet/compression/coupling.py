"""Which channels of a detector can only go together: torch-pruning's graph of a detector, and what
follows from it.

Letters: U units of a cluster; a *unit* is what goes as a whole, a *cluster* is what units compete
in.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from ..errors import UsageError, import_optional
from .shrinking import channels_of, get_by_name

#: Why prediction layers stay as they are.
GIVEN = 'the detector gives them'
_CONVS = (nn.Conv2d, nn.ConvTranspose2d)


class ClusterMember(NamedTuple):
    """Channels of a layer that belong to units of a cluster.

    Attributes:
        layer (str): Its first name.
        leaving (bool): Whether these are channels that it gives; else those that enter it.
        channels (ndarray): Which, (m, ).
        units (ndarray): To which unit each belongs, (m, ), 0 to U - 1.
    """

    layer: str
    leaving: bool
    channels: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class Cluster:
    """Channels that are coupled: unit u of all members goes, or none of it.

    Attributes:
        width (int): Channels of a unit, where it has fewest.
        units (int): U.
        members (list[ClusterMember]): All layers that lose channels with it.
        why (str): What keeps it as it is; empty if it may shrink.
    """

    width: int
    units: int
    members: list[ClusterMember] = field(repr=False)
    why: str = ''

    @property
    def layers(self) -> list[str]:
        """Layers whose output the channels are."""
        return [member.layer for member in self.members if member.leaving]


#: Kinds of detectors -> what gives all raw outputs of one: (detector, images, routed) -> tensors or
#: containers of them. The framework that has them registers them; see `raw_outputs`.
OUTPUT_RULES: dict[type, Callable[[nn.Module, Tensor, Callable | None], Any]] = {}
#: Called with the copy of a detector that is traced: shows torch-pruning, in place and under the
#: same names, layers that are no modules of torch. The framework that has them registers it.
TRACED_RULES: list[Callable[[nn.Module], None]] = []


def raw_outputs(model: nn.Module, images: Tensor, routed: Callable | None = None) -> list[Tensor]:
    """Outputs of a detector's heads for images, at all exits, with regions that do not depend on
    the images: each value is a function of all that a channel can reach, and no detection is made.

    Args:
        model (nn.Module): A detector of a registered kind, dynamic or not.
        images (Tensor): (N, 3, H, W), normalized.
        routed (Callable, optional): Is given a dynamic detector's first maps, in place of its
            router.

    Raises:
        UsageError: If the detector is of a kind that is not known.
    """
    for kind, outputs_of in OUTPUT_RULES.items():
        if isinstance(model, kind):
            return _flat(outputs_of(model, images, routed))
    raise UsageError(
        f'channels of a {type(model).__name__} cannot be removed: no rule for it is registered'
    )


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return [tensor for output in outputs if output is not None for tensor in _flat(output)]


def example_image(model: nn.Module, size: int = 64) -> Tensor:
    """An image to trace a model with, (1, 3, size, size), where the model is."""
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).device)


def find_clusters(model: nn.Module) -> list[Cluster]:
    """All clusters of a detector; the model is left as it is.

    The graph is torch-pruning's (Fang et al. 2023, DepGraph), which follows autograd through one
    forward: so second backbones, connections between them, shared heads and sums over levels are
    coupled by what is really computed. Of convolutions with groups and of group norms whole groups
    are a unit, so that the others compute what they did. Its groups name one root for a channel:
    where channels of one layer are added to each other, the rest of their coupling is not seen.
    `plan_removal` finds that by computing, and leaves them alone.

    Raises:
        UsageError: If torch-pruning is not installed, or the detector is of a kind that this does
            not know.
    """
    library = import_optional('torch_pruning', 'tools that remove channels', 'compression')
    traced = _Traced(model)
    with torch.enable_grad():
        graph = library.DependencyGraph().build_dependency(
            traced, example_image(traced), verbose=False
        )
    names = _Names(traced)
    spreads: list[_Spread] = []
    seen: dict[str, set] = {}
    for module in list(graph.module2node):
        if isinstance(module, (*_CONVS, nn.Linear)) and names.of(module) and channels_of(module):
            name, count = names.of(module), channels_of(module)[1]
            roots = [index for index in range(count) if index not in seen.get(name, ())]
            if roots:
                spreads.append(_spread(graph, module, roots))
                for (target, leaving), channels in spreads[-1].items():
                    if leaving:
                        seen.setdefault(names.of(target.module), set()).update(channels)
    return _merge(spreads, names)


class _Traced(nn.Module):
    """A detector that can be traced: a copy, since frozen parameters would not be on the graph. Its
    ``probes`` stand for a router's first layer, one for each map; joined in a vector the maps could
    not be told apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        device = next(model.parameters()).device
        self.probes = (
            nn.ModuleList(nn.Linear(count, 1, device=device) for count in _routed_channels(model))
            if hasattr(model, 'router')
            else None
        )
        for rule in TRACED_RULES:
            rule(self.model)
        self.requires_grad_(True)

    def train(self, mode: bool = True) -> '_Traced':
        """Nothing: torch-pruning asks for eval mode, upon which a ResNet would freeze its stages
        again."""
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = raw_outputs(
            self.model,
            images,
            lambda maps: sum(
                probe(feature_map.mean((2, 3))) for probe, feature_map in zip(self.probes, maps)
            ),
        )
        # Times one: so that an output is a node of its own.
        return [output * 1 for output in outputs]


@torch.no_grad()
def _routed_channels(model: nn.Module) -> list[int]:
    """Channels of the maps that a router sees."""
    return [
        feature_map.shape[1]
        for feature_map in copy.deepcopy(model.backbone).eval().first_maps(example_image(model))
    ]


class _Names:
    """First names of modules and parameters of a detector that is traced."""

    def __init__(self, traced: _Traced) -> None:
        self.model, self.probes = traced.model, list(traced.probes or ())
        self._names = {
            id(part): name
            for named in (self.model.named_modules(), self.model.named_parameters())
            for name, part in named
        }

    def of(self, module: Any) -> str:
        """Empty for what is no part of the model, such as a sum."""
        return self._names.get(id(module), '')


#: Where channels that a layer gives, its roots, are met again: (node, whether it gives them) ->
#: channel -> root.
_Spread = dict[tuple[Any, bool], dict[int, int]]


def _spread(graph: Any, module: nn.Module, roots: list[int]) -> _Spread:
    remove = graph.get_pruner_of_module(module).prune_out_channels
    spread: _Spread = {}
    for item in graph.get_pruning_group(module, remove, roots).items:
        # What a norm or a sum is given is what it gives.
        leaving = graph.is_out_channel_pruning_fn(item.dep.handler)
        spread.setdefault((item.dep.target, leaving), {}).update(zip(item.idxs, item.root_idxs))
    return spread


def _merge(spreads: list[_Spread], names: _Names) -> list[Cluster]:
    """Clusters of spreads: those that share a convolution with groups become one."""
    atoms = [{root: None for root in next(iter(spread.values()))} for spread in spreads]
    offsets, total = [], 0
    for spread_atoms in atoms:
        offsets.append(total)
        spread_atoms.update({root: total + place for place, root in enumerate(spread_atoms)})
        total += len(spread_atoms)
    members: dict[tuple[str, bool], dict[int, int]] = {}
    whys: dict[int, str] = {}
    for number, spread in enumerate(spreads):
        for (node, leaving), channels in spread.items():
            name, kind = names.of(node.module), type(node.module).__name__
            if node.type.name == 'OUTPUT':
                whys[number] = GIVEN
            elif name and channels_of(node.module) is None:
                whys[number] = f'a {kind} is among them'
            elif node.module in names.probes:
                members.setdefault(('router.fc1', False), {}).update(
                    {
                        place: atoms[number][root]
                        for channel, root in channels.items()
                        for place in _pooled(names, names.probes.index(node.module), channel)
                    }
                )
            elif name:
                members.setdefault((name, leaving), {}).update(
                    {channel: atoms[number][root] for channel, root in channels.items()}
                )
    links = _group_links(members, names)
    firsts, other = zip(*links) if links else ((), ())
    _, unit_of = connected_components(
        coo_matrix((np.ones(len(firsts)), (firsts, other)), (total, total)), directed=False
    )
    spread_of = np.repeat(np.arange(len(spreads)), [len(spread_atoms) for spread_atoms in atoms])
    # Spreads that share a unit are one cluster.
    pairs = np.stack([spread_of, unit_of + len(spreads)])
    size = len(spreads) + unit_of.max() + 1
    _, cluster_of = connected_components(
        coo_matrix((np.ones(total), pairs), (size, size)), directed=False
    )
    rows: dict[int, list[tuple]] = {}
    for (name, leaving), channels in members.items():
        channels, units = np.array(sorted(channels.items())).T
        for number in np.unique(cluster_of[spread_of[units]]):
            mine = cluster_of[spread_of[units]] == number
            rows.setdefault(number, []).append(
                (name, leaving, channels[mine], unit_of[units[mine]])
            )
    return [
        part
        for number in dict.fromkeys(cluster_of[: len(spreads)])
        for part in _clusters(
            rows[number], unit_of, spread_of, np.flatnonzero(cluster_of[spread_of] == number), whys
        )
    ]


def _pooled(names: _Names, number: int, channel: int) -> range:
    """Where a router's vector has a channel of a map: once for each pool."""
    counts = [probe.in_features for probe in names.probes]
    return range(
        sum(counts[:number]) + channel, sum(counts) * len(names.model.router.pools), sum(counts)
    )


def _group_links(
    members: dict[tuple[str, bool], dict[int, int]], names: _Names
) -> list[tuple[int, int]]:
    """Pairs of atoms that are in one group of a layer."""
    links = []
    for (name, leaving), channels in members.items():
        entering, leaving_count, groups = channels_of(get_by_name(names.model, name))
        if groups == 1:
            continue
        first: dict[int, int] = {}
        # Both sides of a convolution: what a group is given, it alone gives on.
        for side, count in ((False, entering), (True, leaving_count)):
            for channel, atom in members.get((name, side), {}).items():
                links.append((first.setdefault(channel * groups // count, atom), atom))
    return links


def _clusters(
    rows: list[tuple],
    unit_of: np.ndarray,
    spread_of: np.ndarray,
    atoms: np.ndarray,
    whys: dict[int, str],
) -> list[Cluster]:
    """Clusters of some atoms which are coupled: one for all units that the same layers
    give. Where maps are put behind each other, a layer gives some of them alone, and must keep
    some."""
    units, places = np.unique(unit_of[atoms], return_inverse=True)
    rows = [
        (name, leaving, channels, np.searchsorted(units, wanted))
        for name, leaving, channels, wanted in rows
    ]
    spreads = np.unique(spread_of[atoms])
    widths = np.stack(
        [
            np.bincount(places[spread_of[atoms] == spread], minlength=len(units))
            for spread in spreads
        ]
    )
    why = next((whys[spread] for spread in spreads if spread in whys), '')
    leaves = np.zeros((len(units), len(rows)), bool)
    for column, (_, leaving, _, wanted) in enumerate(rows):
        leaves[wanted, column] = leaving
    _, part_of = np.unique(leaves, axis=0, return_inverse=True)
    clusters = []
    for part in dict.fromkeys(part_of.reshape(-1).tolist()):
        inside = part_of.reshape(-1) == part
        number = np.cumsum(inside) - 1
        members = [
            ClusterMember(name, leaving, channels[inside[wanted]], number[wanted[inside[wanted]]])
            for name, leaving, channels, wanted in rows
            if inside[wanted].any()
        ]
        there = widths[:, inside][widths[:, inside].any(1)]
        uneven = (there.min(1) != there.max(1)).any()
        clusters.append(
            Cluster(
                int(there.min()),
                int(inside.sum()),
                members,
                why or ('groups of several layers overlap' if uneven else ''),
            )
        )
    return clusters
