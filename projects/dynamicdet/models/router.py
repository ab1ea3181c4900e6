"""The router: feature maps -> difficulty."""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet.registry import MODELS


@MODELS.register_module()
class Router(BaseModule):
    """Predict how much an image needs the second detector (DynamicDet, equations 6 to 8).

    Global average pooling of each map, concatenated to a vector of width d; ``fc d -> floor(d/4)``,
    ReLU, ``fc -> 1``, sigmoid. The released code's score is one minus this.

    ``mean`` and ``std``, (d,), standardise the vector. At 0 and 1, as they start, this is the paper's
    router; `RouterHook` sets them to the training set's. Pooled maps are all positive, and what is
    common to all images would otherwise move every difficulty together, to 0 or 1, before the
    router tells images apart.

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
        self.register_buffer('mean', torch.zeros(width))
        self.register_buffer('std', torch.ones(width))
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
        return self.score(self.pool(maps, valid))

    def score(self, features: Tensor) -> Tensor:
        """Difficulty, (N,), of pooled features, (N, d), as `pool` gives them."""
        # In float32 also under AMP and in models of half precision, which has too few values near 1 to
        # rank images by.
        with torch.autocast(features.device.type, enabled=False):
            features = (features - self.mean) / self.std
            hidden = F.linear(features, self.fc1.weight.float(), self.fc1.bias.float()).relu()
            logit = F.linear(hidden, self.fc2.weight.float(), self.fc2.bias.float())
            return logit.squeeze(1).sigmoid()

    @staticmethod
    def pool(maps: Sequence[Tensor],
             valid: Optional[Sequence[Tuple[float, float]]] = None) -> Tensor:
        """Mean of each map over the image, concatenated, (N, d), float32. Arguments as `forward`'s."""
        return torch.cat([_average(m, valid) for m in maps], dim=1)


def _average(values: Tensor, valid: Optional[Sequence[Tuple[float, float]]]) -> Tensor:
    """Mean over the valid part of each map, (N, C)."""
    if valid is None or all(high == wide == 1 for high, wide in valid):
        return values.mean(dim=(2, 3), dtype=torch.float32)
    height, width = values.shape[-2:]
    return torch.stack([
        one[:, :math.ceil(high * height), :math.ceil(wide * width)].mean(dim=(1, 2), dtype=torch.float32)
        for one, (high, wide) in zip(values, valid)
    ])
