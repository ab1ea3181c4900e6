"""Backbones that know nothing of each other: those of several plain detectors, or of one."""

import copy
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from mmdet.registry import MODELS

from ...errors import UsageError
from .composite import ORDINALS, CompositeBackbone, Maps, build_composite, find_family

#: Sides of the picture that tells what a backbone gives: as large as the largest stride.
_SIDE = 64


class IndependentBackbones(BaseModule):
    """Backbones without connections, each as mmdet builds it; used as a `CompositeBackbone` is.

    Args:
        backbones (Sequence[dict]): Config of each, 1 to 4, of any kind. Left as they are.
    """

    #: Each has all of its stages, and looks at the images.
    reuse_stages = 0
    needs_images = True

    def __init__(self, backbones: Sequence[dict]) -> None:
        super().__init__()
        if not 1 <= len(backbones) <= len(ORDINALS):
            raise UsageError(f'there are 1 to {len(ORDINALS)} detectors; got {len(backbones)}')
        self.names = ORDINALS[: len(backbones)]
        for name, backbone in zip(self.names, backbones):
            self.add_module(name, MODELS.build(copy.deepcopy(backbone)))
        self.connections = ModuleList()
        #: Of the first one's maps, which the router sees.
        self.channels = _channels_of(self.first)

    @property
    def nets(self) -> list[nn.Module]:
        """The backbones, in the order of their exits."""
        return [getattr(self, name) for name in self.names]

    def first_maps(self, images: Tensor) -> Maps:
        """Run the first backbone on images, (N, 3, H, W), normalized: the maps that its neck
        expects."""
        return tuple(self.first(images))

    def deeper_maps(self, images: Tensor, maps: Maps, index: int = 1) -> Maps:
        """Run a later backbone, of number ``index``, on images, (N, 3, H, W), normalized as its
        detector does. The maps of the one before are not looked at."""
        return tuple(self.nets[index](images))

    def select(self, maps: Maps) -> Maps:
        """The maps that the neck expects: all."""
        return maps


def _channels_of(net: nn.Module) -> list[int]:
    """Channels of each map that a backbone gives."""
    training = net.training
    # mmdet's backbones do not give themselves back.
    net.eval()
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, _SIDE, _SIDE))
    net.train(training)
    return [m.shape[1] for m in maps]


def build_backbones(
    backbones: Sequence[dict], reuse_stages: int = 1, count: int = 2
) -> CompositeBackbone | IndependentBackbones:
    """Build what gives the exits their maps.

    Args:
        backbones (Sequence[dict]): Config of the backbone; several, if each exit has another.
        reuse_stages (int), count (int): Of a composite; see `CompositeBackbone`.

    Raises:
        TypeError: If a composite is wanted of a backbone that no family serves.
    """
    if len(backbones) > 1 or count == 1 and find_family(backbones[0]) is None:
        return IndependentBackbones(backbones)
    return build_composite(backbones[0], reuse_stages, count)
