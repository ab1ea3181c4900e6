"""Where the stages of CSPDarknet (YOLOX) and CSPNeXt (RTMDet) are."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmdet.models.backbones import CSPDarknet, CSPNeXt
from mmdet.registry import MODELS

from ...errors import UsageError
from .composite import CompositeBackbone, register_family


@register_family(CSPDarknet, CSPNeXt)
class CompositeCSP(CompositeBackbone):
    """Stem: stride 2. Stages: ``stage1`` to ``stage4`` (arch P5) or ``stage5`` (P6), each of stride
    2.

    mmdet's ``out_indices`` count the stem as 0; stages count from 0 here, so ``stage1`` is 0.
    """

    def stage_indices(self, backbone: dict) -> tuple[Sequence[int], Sequence[int]]:
        """The config's ``out_indices``, less one for the stem, and those of all stages."""
        wanted = tuple(backbone.get('out_indices', (2, 3, 4)))
        if 0 in wanted:
            raise UsageError(
                f"a composite {backbone['type']} cannot give its stem's map: leave 0 out "
                f'of out_indices; got {wanted}'
            )
        net = backbone['type']
        net = MODELS.get(net) if isinstance(net, str) else net
        rows = backbone.get('arch_ovewrite') or net.arch_settings[backbone.get('arch', 'P5')]
        return tuple(index - 1 for index in wanted), tuple(range(1, len(rows) + 1))

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter each stage, and that leave it."""
        leaving = [getattr(net, name)[-1].final_conv.out_channels for name in net.layers[1:]]
        first = net.stage1[0]
        entering = getattr(first, 'depthwise_conv', first).in_channels
        return [entering] + leaving[:-1], leaving

    def drop_leading(self, net: nn.Module, count: int) -> None:
        """Replace the stem and ``count`` stages by identities."""
        for name in net.layers[: count + 1]:
            setattr(net, name, nn.Identity())

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images, (N, 3, H, W), to the map that the first stage is given."""
        return net.stem(images)

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's map, which also enters the next stage."""
        x = getattr(net, net.layers[index + 1])(x)
        return x, x
