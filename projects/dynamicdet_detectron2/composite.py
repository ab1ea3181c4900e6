"""Composite backbones: where the stages of Detectron2's backbones are. The data flow is
`dynamicdet.cascade.composite`, with its letters."""

from collections.abc import Sequence

from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.regnet import AnyNet
from torch import Tensor, nn

from dynamicdet.cascade.composite import ORDINALS, CompositeNets, Maps, require_count
from dynamicdet.errors import UsageError


class CompositeBottomUp(CompositeNets):
    """Backbones of one architecture, each fed by the one before: base of all families.

    Args:
        nets (Sequence[nn.Module]): The backbones, 1 to 4, as the stock detector has them.
        reuse_stages (int): How many leading stages, with the stem, later backbones take over.
            Defaults to 1.
    """

    def __init__(self, nets: Sequence[nn.Module], reuse_stages: int = 1) -> None:
        names = self.stage_names(nets[0])
        wanted = list(nets[0].output_shape())
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UsageError(
                f'a composite {type(nets[0]).__name__} gives the maps of its stages, '
                f'{", ".join(names)}, alone: leave {", ".join(unknown)} out of OUT_FEATURES'
            )
        super().__init__(nets, reuse_stages, [names.index(name) for name in wanted])
        #: Names of the maps that the neck expects.
        self.map_names = wanted

    def stage_names(self, net: nn.Module) -> list[str]:
        """Names of a backbone's stages, shallow to deep."""
        raise NotImplementedError

    def first_maps(self, images: Tensor) -> Maps:
        """The maps of all stages of the first backbone for images, (N, 3, H, W), normalized."""
        x, maps = self.stem(self.first, images), []
        for index in range(len(self.channels)):
            output, x = self.stage(self.first, index, x)
            maps.append(output)
        return tuple(maps)

    def select(self, maps: Maps) -> dict[str, Tensor]:
        """The maps that the neck expects, by name."""
        return dict(zip(self.map_names, super().select(maps)))


class CompositeResNet(CompositeBottomUp):
    """ResNet and ResNeXt of any depth. Stem: stride 4. Stages: ``res2`` to ``res5``, of any blocks:
    stride in the first or in the 3x3 convolution, deformable ones where the extension is there."""

    def stage_names(self, net: nn.Module) -> list[str]:
        """Names of the stages, shallow to deep."""
        return list(net.stage_names)

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter each stage, and that leave it."""
        leaving = [stage[-1].out_channels for stage in net.stages]
        return [net.stem.out_channels] + leaving[:-1], leaving

    def drop_leading(self, net: nn.Module, count: int) -> None:
        """Replace the stem and ``count`` stages by identities."""
        net.stem = nn.Identity()
        for index in range(count):
            net.stages[index] = nn.Identity()
            setattr(net, net.stage_names[index], net.stages[index])

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images, (N, 3, H, W), to a map of stride 4."""
        return net.stem(images)

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's map, which also enters the next stage."""
        x = net.stages[index](x)
        return x, x


class CompositeRegNet(CompositeBottomUp):
    """RegNet X and Y. Stem: stride 2. Stages: ``s1`` to ``s4``."""

    def stage_names(self, net: nn.Module) -> list[str]:
        """Names of the stages, shallow to deep."""
        return [name for _, name in net.stages_and_names]

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter each stage, and that leave it."""
        leaving = [list(stage.children())[-1].out_channels for stage, _ in net.stages_and_names]
        return [net.stem.out_channels] + leaving[:-1], leaving

    def drop_leading(self, net: nn.Module, count: int) -> None:
        """Replace the stem and ``count`` stages by identities."""
        net.stem = nn.Identity()
        for index in range(count):
            nothing, name = nn.Identity(), net.stages_and_names[index][1]
            net.stages_and_names[index] = (nothing, name)
            setattr(net, name, nothing)

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images, (N, 3, H, W), to a map of stride 2."""
        return net.stem(images)

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's map, which also enters the next stage."""
        x = net.stages_and_names[index][0](x)
        return x, x


class SingleBackbone(nn.Module):
    """One backbone of any kind, used as a composite is: exits differ by resolution alone.

    Args:
        net (Backbone): As the stock detector has it.
    """

    reuse_stages = 0
    needs_images = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        shapes = net.output_shape()
        self.map_names = list(shapes)
        self.names = ORDINALS[:1]
        self.first = net
        self.connections = nn.ModuleList()
        self.channels = [shapes[name].channels for name in self.map_names]

    @property
    def nets(self) -> list[nn.Module]:
        """The backbone."""
        return [self.first]

    def first_maps(self, images: Tensor) -> Maps:
        """The maps that the neck expects, for images, (N, 3, H, W), normalized."""
        maps = self.first(images)
        return tuple(maps[name] for name in self.map_names)

    def select(self, maps: Maps) -> dict[str, Tensor]:
        """The same by name."""
        return dict(zip(self.map_names, maps))


#: Backbone class -> the family that knows its stages. A subclass with a ``forward`` of its own is
#: not served: its stages may be elsewhere.
_FAMILIES: list[tuple[type, type[CompositeBottomUp]]] = [
    (ResNet, CompositeResNet),
    (AnyNet, CompositeRegNet),
]


def register_family(backbone: type):
    """Class decorator: this family serves a Detectron2 backbone and its subclasses."""

    def register(family: type[CompositeBottomUp]) -> type[CompositeBottomUp]:
        _FAMILIES.append((backbone, family))
        return family

    return register


def build_composite(
    nets: Sequence[nn.Module], reuse_stages: int = 1
) -> CompositeBottomUp | SingleBackbone:
    """The composite of some backbones of one architecture; arguments as `CompositeBottomUp`'s.

    Raises:
        UsageError: If no family serves several backbones of this kind.
    """
    require_count(len(nets))
    if len(nets) == 1:
        return SingleBackbone(nets[0])
    kind = type(nets[0])
    for served, family in _FAMILIES:
        if issubclass(kind, served) and kind.forward is served.forward:
            return family(nets, reuse_stages)
    raise UsageError(
        f'no composite family serves the backbone {kind.__name__} (served: '
        f'{", ".join(served.__name__ for served, _ in _FAMILIES)}): take one of these, or one '
        'backbone at two sizes (MODEL.DYNAMIC.BACKBONES 1, FIRST_SCALE 0.5)'
    )
