"""The router: feature maps -> difficulty."""
import math
from typing import Optional, Sequence, Tuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet.registry import MODELS


@MODELS.register_module()
class Router(BaseModule):
    """Predict how much an image needs the second detector (DynamicDet, equations 6 to 8).

    Global average pooling of each map, concatenated to a vector of width d; ``fc d -> floor(d/4)``,
    ReLU, ``fc -> 1``, sigmoid. The released code's score is one minus this.

    Args:
        in_channels (Sequence[int]): Channels of the maps; d is their sum.
        reduction (int): d over the hidden width. Defaults to 4, the paper's.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(self,
                 in_channels: Sequence[int],
                 reduction: int = 4,
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        width = sum(in_channels)
        self.fc1 = nn.Linear(width, width // reduction)
        self.fc2 = nn.Linear(width // reduction, 1)

    def forward(self,
                maps: Sequence[Tensor],
                valid: Optional[Sequence[Tuple[float, float]]] = None) -> Tensor:
        """Score a batch.

        Args:
            maps (Sequence[Tensor]): The first backbone's maps, (N, C_i, H_i, W_i).
            valid (Sequence[tuple], optional): For each image the shares of height and width that
                are image and not padding, in (0, 1]. Padding is left out of the average, or an
                image's difficulty would depend on what it is batched with. Defaults to all.

        Returns:
            Tensor: Difficulty, (N,), float32 in [0, 1], large is hard.
        """
        # In float32 also under AMP: half precision has too few values near 1 to rank images by.
        with torch.autocast(maps[0].device.type, enabled=False):
            pooled = torch.cat([_average(m.float(), valid) for m in maps], dim=1)
            return self.fc2(self.fc1(pooled).relu()).squeeze(1).sigmoid()


def _average(values: Tensor, valid: Optional[Sequence[Tuple[float, float]]]) -> Tensor:
    """Mean over the valid part of each map, (N, C)."""
    if valid is None or all(high == wide == 1 for high, wide in valid):
        return values.mean(dim=(2, 3))
    height, width = values.shape[-2:]
    return torch.stack([
        one[:, :math.ceil(high * height), :math.ceil(wide * width)].mean(dim=(1, 2))
        for one, (high, wide) in zip(values, valid)
    ])
