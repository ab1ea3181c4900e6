"""Composite connections: what a backbone sees of the maps of the one before.

Letters, as in the papers (DynamicDet, arXiv 2304.05552; CBNetV2, arXiv 2107.00420):

* L: number of stages of a backbone. Stages count from 0 here, shallow to deep.
* ``f1[i]``, ``f2[i]``: the output of stage i in the first and second backbone, (N, C_i, H_i, W_i).
  Of three backbones, the third is to the second what the second is to the first.
* ``w[l, i]``: a 1x1 convolution with its norm, from C_i channels to those that enter stage l.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError

Maps = tuple[Tensor, ...]


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    return (
        values
        if tuple(values.shape[-2:]) == size
        else F.interpolate(values, size=size, mode='nearest')
    )


def _add(w: nn.Module, f: Tensor, total: Tensor) -> Tensor:
    """``total + w(f)``; in one operation where the projection knows one, as fused ones do."""
    add_to = getattr(w, 'add_to', None)
    return total + w(f) if add_to is None else add_to(total, f)


def normed_projection(in_channels: int, out_channels: int) -> nn.Module:
    """``w[l, i]`` with a norm, CBNetV2's for ResNet. Its weight starts at zero, and so does the
    sum: the second backbone starts as a plain one."""
    norm = nn.BatchNorm2d(out_channels)
    # Always trainable, also where a backbone's own norms are not: a zero that cannot move would cut
    # the connection for good.
    nn.init.zeros_(norm.weight)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm)


def biased_projection(in_channels: int, out_channels: int) -> nn.Module:
    """``w[l, i]`` with a bias and no norm, Dy-YOLOv7's. Starts at zero."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class Connection(nn.Module):
    """All that enters one stage of the second backbone from the first: DHLC of CBNetV2.

    ``H[l] = sum over i >= l of upsample(w[l, i](f1[i]))``. Norms stay in eval mode (CBNetV2,
    section 4).

    Args:
        in_channels (Sequence[int]): Channels of ``f1[l], f1[l + 1], ...``.
        out_channels (int): Channels that enter stage l.
        projection (callable): Makes ``w[l, i]`` from the channels that enter and leave it.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        projection: Callable[[int, int], nn.Module] = normed_projection,
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            projection(channels, out_channels) for channels in in_channels
        )

    def forward(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:
        """Add to what enters stage l.

        Where every size divides the next larger one, nearest resizing composes, so the sum runs
        from the deepest map upwards and touches the full resolution once. Elsewhere each map is
        resized on its own.

        Args:
            maps (Sequence[Tensor]): ``f1[l], f1[l + 1], ...``, (N, C_i, H_i, W_i).
            x (Tensor): What enters stage l, (N, C, H, W).

        Returns:
            Tensor: ``x + H[l]``.
        """
        sizes = [tuple(m.shape[-2:]) for m in (x, *maps)]
        if not all(
            large % small == 0
            for larger, smaller in zip(sizes, sizes[1:])
            for large, small in zip(larger, smaller)
        ):
            return x + sum(_resize(w(f), sizes[0]) for w, f in zip(self.projections, maps))
        *rest, deepest = zip(self.projections, maps)
        total = deepest[0](deepest[1])
        for w, f in reversed(rest):
            total = _add(w, f, _resize(total, tuple(f.shape[-2:])))
        return x + _resize(total, sizes[0])

    def train(self, mode: bool = True) -> 'Connection':
        """Set the mode; norms stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


#: Names of the backbones, which the keys of a checkpoint begin with.
ORDINALS = ('first', 'second', 'third', 'fourth')


def require_count(count: int) -> None:
    """Raise a `UsageError` unless there can be so many backbones."""
    if not 1 <= count <= len(ORDINALS):
        raise UsageError(f'a composite has 1 to {len(ORDINALS)} backbones, got {count}')


class CompositeNets(nn.Module):
    """Backbones of one architecture, each fed by the one before.

    A subclass says where the stages of a backbone are; the data flow is here.

    Args:
        nets (Sequence[nn.Module]): The backbones, 1 to 4. The later ones lose what they take over.
        reuse_stages (int): How many leading stages, with the stem, the second backbone takes over
            from the first instead of computing its own (CBNetV2's ``cb_del_stages``; 1 there for
            ResNet). 0 gives it a stem of its own. Defaults to 1.
        out_indices (Sequence[int], optional): The stages whose maps the neck expects. Defaults to
            all.

    Raises:
        UsageError: If they are more than 4, or so many stages cannot be taken over.
    """

    #: Makes the 1x1 convolutions of the connections.
    projection: Callable[[int, int], nn.Module] = staticmethod(normed_projection)
    #: Whether stages can be taken over: where a stage's map is all that enters the next one.
    can_reuse = True

    def __init__(
        self,
        nets: Sequence[nn.Module],
        reuse_stages: int = 1,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require_count(len(nets))
        self.names = ORDINALS[: len(nets)]
        for name, net in zip(self.names, nets):
            self.add_module(name, net)
        # (channels that enter, channels that leave) each stage.
        entering, self.channels = self.stage_channels(self.first)
        stages = len(self.channels)
        self.out_indices = tuple(range(stages) if out_indices is None else out_indices)
        if reuse_stages and not self.can_reuse:
            raise UsageError(
                f'a composite {type(self.first).__name__} needs reuse_stages=0: its second '
                f'backbone takes over no stage; got {reuse_stages}'
            )
        if not 0 <= reuse_stages < stages:
            raise UsageError(f'reuse_stages must be in [0, {stages}), got {reuse_stages}')
        self.reuse_stages = reuse_stages
        if reuse_stages:
            for net in self.nets[1:]:
                self.drop_leading(net, reuse_stages)
        #: The first stage with a connection, and all behind it have one.
        self.connected = max(reuse_stages, self.unconnected_stages(self.first))
        # Those into the second backbone, shallow to deep, then those into the third, ...
        self.connections = nn.ModuleList(
            Connection(self.channels[stage:], entering[stage], self.projection)
            for _ in self.nets[1:]
            for stage in range(self.connected, stages)
        )

    # What a subclass says about its backbones.

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter and that leave each stage."""
        raise NotImplementedError

    def drop_leading(self, net: nn.Module, count: int) -> None:
        """Replace the stem and the first ``count`` stages by ``nn.Identity``: no weights, no
        work."""
        raise NotImplementedError

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """What enters stage 0."""
        raise NotImplementedError

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run one stage: its map, and what enters the next stage."""
        raise NotImplementedError

    def deeper_stage(
        self, net: nn.Module, index: int, x: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `stage`, of a later backbone; ``before`` is that stage's map of the backbone
        before."""
        return self.stage(net, index, x)

    def unconnected_stages(self, net: nn.Module) -> int:
        """How many leading stages have no connection."""
        return 0

    # What all share.

    @property
    def nets(self) -> list[nn.Module]:
        """The backbones, in the order in which they run."""
        return [getattr(self, name) for name in self.names]

    @property
    def needs_images(self) -> bool:
        """Whether the second backbone looks at the images: not where it takes over a stage."""
        return self.reuse_stages == 0

    def first_maps(self, images: Tensor) -> Maps:
        """Run the first backbone.

        Args:
            images (Tensor): (N, 3, H, W), normalized.

        Returns:
            tuple[Tensor]: ``f1``: the maps of all stages, shallow to deep.
        """
        return tuple(self.first(images))

    def deeper_maps(self, images: Tensor, maps: Maps, index: int = 1) -> Maps:
        """Run a later backbone on the maps of the one before it.

        Args:
            images (Tensor): (N, 3, H, W), normalized. Unused where the stem is taken over.
            maps (tuple[Tensor]): Maps of backbone ``index - 1``.
            index (int): Which backbone; the first is 0. Defaults to 1, the second.

        Returns:
            tuple[Tensor]: Its maps, shapes as ``maps``.
        """
        net, reused = self.nets[index], self.reuse_stages
        # Where this backbone's connections begin.
        offset = (index - 1) * (len(maps) - self.connected) - self.connected
        outputs = list(maps[:reused])
        x = outputs[-1] if reused else self.stem(net, images)
        for stage in range(reused, len(maps)):
            if stage >= self.connected:
                x = self.connections[offset + stage](maps[stage:], x)
            output, x = self.deeper_stage(net, stage, x, maps[stage])
            outputs.append(output)
        return tuple(outputs)

    def select(self, maps: Maps) -> Maps:
        """The maps that the neck expects: those of the config's ``out_indices``."""
        return tuple(maps[index] for index in self.out_indices)
