"""Where the stages of YOLOv7's backbones are."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..yolov7 import YOLOV7Backbone, yolov7_architecture
from .composite import CompositeBackbone, biased_projection, register_family


@register_family(YOLOV7Backbone)
class CompositeYOLOV7(CompositeBackbone):
    """Stem: up to the first block. Stages: a block, then what halves the resolution for the next.

    Connections end behind the halving, as Dy-YOLOv7's do, and have a bias and no norm. W6's first
    stage, which has no block, gets none.
    """

    projection = staticmethod(biased_projection)
    can_reuse = False

    def stage_indices(self, backbone: dict) -> tuple[Sequence[int], Sequence[int]]:
        """The config's ``out_indices``, and all stages."""
        table = yolov7_architecture(backbone.get('arch', 'v7'))
        stages = tuple(range(len(table.stages)))
        return tuple(backbone.get('out_indices') or stages[-table.levels :]), stages

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter each stage, and that leave it."""
        return net.entering, net.channels

    def unconnected_stages(self, net: nn.Module) -> int:
        """How many leading stages have no connection in the released architecture."""
        return net.unconnected

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images, (N, 3, H, W), to the map that the first stage is given."""
        return net.enter(images)

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's map, and the same at half the size, which enters the next stage."""
        x = net.blocks[index](x)
        return x, net.downs[index + 1](x) if index + 1 < len(net.blocks) else x

    def deeper_stage(
        self, net: nn.Module, index: int, x: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `stage`; the convolution before X's crossed stage reads ``before``."""
        if index + 1 != net.crossed_stage:
            return self.stage(net, index, x)
        x = net.blocks[index](x)
        return x, net.downs[index + 1](x, before)
