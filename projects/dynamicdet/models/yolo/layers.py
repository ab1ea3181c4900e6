"""A detector as a list of layers, to be run one after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class YOLOLayer(NamedTuple):
    """One that computes; it is given the `concatenate_maps` of its inputs.

    Attributes:
        name (str): Of its module, in the detector (``get_submodule``).
        inputs (tuple[int, ...]): Positions in the list of the earlier layers that it is given, in
            the order in which they are put together; none for the one that sees the image.
        channels (int): Of the map that it gives.
        stride (int): Pixels of the image per cell of that map.
    """

    name: str
    inputs: tuple[int, ...]
    channels: int
    stride: int


def append_layer(
    layers: list[YOLOLayer], name: str, inputs: tuple[int, ...], channels: int, stride: int = 1
) -> int:
    """Add a layer that has a stride of its own over that of its inputs; its position."""
    entering = min((layers[position].stride for position in inputs), default=1)
    layers.append(YOLOLayer(name, inputs, channels, entering * stride))
    return len(layers) - 1


def concatenate_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps, (N, C_i, H_i, W_i), behind each other: (N, sum of C_i, H, W). Smaller ones are brought
    to the size of the largest, by nearest neighbors. One map, or the image, is left as it is."""
    if len(maps) == 1:
        return maps[0]
    size = max(tuple(feature_map.shape[2:]) for feature_map in maps)
    return torch.cat(
        [
            feature_map
            if tuple(feature_map.shape[2:]) == size
            else F.interpolate(feature_map, size=size, mode='nearest')
            for feature_map in maps
        ],
        dim=1,
    )
