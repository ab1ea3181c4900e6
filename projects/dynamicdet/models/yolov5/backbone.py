"""YOLOv5's backbones."""

from mmengine.model import BaseModule
from torch import Tensor

from mmdet.registry import MODELS

from .architecture import yolov5_architecture
from .blocks import build_layers, run_layers


@MODELS.register_module()
class YOLOV5Backbone(BaseModule):
    """Layers 0 to 9 of YOLOv5.

    Args:
        arch (str): 'n', 's', 'm', 'l' or 'x'.
        width (float): Factor on all channels, beside the size's own. Defaults to 1.
        depth (float): Factor on the length of the blocks, beside the size's own. Defaults to 1.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(
        self, arch: str = 's', width: float = 1.0, depth: float = 1.0, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.architecture = yolov5_architecture(arch, width, depth)
        self.layers = build_layers(self.architecture, self.architecture.backbone)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps that the neck takes, of the strides 8, 16 and 32.

        Args:
            images (Tensor): (N, 3, H, W), in [0, 1]; H and W multiples of 32.
        """
        table = self.architecture
        return run_layers(self.layers, table.backbone, {-1: images}, table.passed_on)
