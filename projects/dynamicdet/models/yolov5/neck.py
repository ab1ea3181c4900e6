"""YOLOv5's neck: upwards from the deepest map, then down again."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor

from mmdet.registry import MODELS

from .architecture import yolov5_architecture
from .blocks import build_layers, run_layers


@MODELS.register_module()
class YOLOV5PAFPN(BaseModule):
    """Layers 10 to 23 of YOLOv5: path aggregation over the maps of `YOLOV5Backbone`.

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
        self.layers = build_layers(self.architecture, self.architecture.neck)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Mix the maps.

        Args:
            maps (Sequence[Tensor]): (N, C_i, H_i, W_i), shallow to deep, each half the size before.

        Returns:
            tuple[Tensor]: As many maps of the same sizes.
        """
        table = self.architecture
        return run_layers(self.layers, table.neck, dict(zip(table.passed_on, maps)), table.outputs)
