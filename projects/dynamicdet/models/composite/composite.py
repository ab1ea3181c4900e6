"""Composite backbones of mmdet: where stages are, and which family a config belongs to.

The data flow is `cascade.composite`, with its letters.
"""

import copy
from collections.abc import Sequence

from mmengine.model import BaseModule

from mmdet.registry import MODELS

from ...cascade.composite import (
    ORDINALS,
    CompositeNets,
    Connection,
    Maps,
    biased_projection,
    normed_projection,
    require_count,
)

__all__ = [
    'ORDINALS',
    'CompositeBackbone',
    'Connection',
    'Maps',
    'biased_projection',
    'build_composite',
    'find_family',
    'normed_projection',
    'register_family',
]


class CompositeBackbone(CompositeNets, BaseModule):
    """Backbones of one architecture, each fed by the one before: base of all families.

    A family (a subclass, listed with `register_family`) says where the stages of a backbone are;
    the data flow is `CompositeNets`'.

    Args:
        backbone (dict): Config of one backbone, as mmdet knows it. Left as it is.
        reuse_stages (int): See `CompositeNets`. Defaults to 1.
        count (int): How many backbones, 1 to 4. Defaults to 2.
    """

    def __init__(self, backbone: dict, reuse_stages: int = 1, count: int = 2) -> None:
        require_count(count)
        backbone = copy.deepcopy(backbone)
        out_indices, all_stages = self.stage_indices(backbone)
        backbone['out_indices'] = all_stages
        super().__init__([MODELS.build(backbone) for _ in range(count)], reuse_stages, out_indices)

    def stage_indices(self, backbone: dict) -> tuple[Sequence[int], Sequence[int]]:
        """The config's ``out_indices``, and those that give the maps of all stages."""
        raise NotImplementedError


#: Backbone class -> the family that knows its stages.
_FAMILIES: list[tuple[type, type[CompositeBackbone]]] = []


def register_family(*backbones: type):
    """Class decorator: this family serves these mmdet backbones and their subclasses.

    A subclass that has a ``forward`` of its own is not served: its stages may be elsewhere.
    """

    def register(family: type[CompositeBackbone]) -> type[CompositeBackbone]:
        _FAMILIES.extend((backbone, family) for backbone in backbones)
        return family

    return register


def find_family(backbone: dict) -> type[CompositeBackbone] | None:
    """The family that a backbone config belongs to, if there is one."""
    net = MODELS.get(backbone['type']) if isinstance(backbone['type'], str) else backbone['type']
    for served, family in _FAMILIES:
        if net is not None and issubclass(net, served) and net.forward is served.forward:
            return family
    return None


def build_composite(backbone: dict, reuse_stages: int = 1, count: int = 2) -> CompositeBackbone:
    """Build the composite of the family that a backbone config belongs to; arguments as
    `CompositeBackbone`'s.

    Raises:
        TypeError: If no family serves this backbone.
    """
    family = find_family(backbone)
    if family is not None:
        return family(backbone, reuse_stages, count)
    known = ', '.join(served.__name__ for served, _ in _FAMILIES)
    raise TypeError(
        f"no composite family serves the backbone '{backbone['type']}' (served: {known} "
        'and subclasses that keep their forward); docs/composite.md shows how to add one'
    )
