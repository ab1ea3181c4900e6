"""A smaller view of a batch, where an exit sees less than what is delivered.

Letters: ``ratio`` is (width, height) of the smaller batch over those of the delivered one.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError

Ratio = tuple[float, float]


def exit_scales(
    exits: int, first_scale: float = 1.0, scales: Sequence[float] | None = None, free: bool = False
) -> tuple[float, ...]:
    """How large each exit sees the image, as a share of its delivered sides.

    Args:
        exits (int): How many there are.
        first_scale (float): Of exit 0, where ``scales`` are not given; the others see all.
        scales (Sequence[float], optional): Of each exit.
        free (bool): Whether there may be as many exits as scales, at least 2, as of one backbone.
            Defaults to False.

    Raises:
        UsageError: If one is not in (0, 1], or they are not as many as the exits.
    """
    if scales is None:
        scales = (first_scale, *[1.0] * (exits - 1))
    elif first_scale != 1:
        raise UsageError('give first_scale or scales, not both')
    if isinstance(scales, (str, int, float)) or not all(
        isinstance(scale, (int, float)) and 0 < scale <= 1 for scale in scales
    ):
        raise UsageError(f'first_scale must be in (0, 1], and so must each of scales; got {scales}')
    if len(scales) != exits and not (free and len(scales) >= 2):
        raise UsageError(f'scales needs a number for each of the {exits} exits; got {scales}')
    return tuple(map(float, scales))


def reduce_images(images: Tensor, scale: float, stride: int = 32) -> tuple[Tensor, Ratio]:
    """Resize a batch to about ``scale`` of its sides: to multiples of a stride, on the device.

    Each side is rounded by itself, so small batches change their proportions a little: 96 x 160
        pixels at 0.5
    become 64 x 64. Samples are reduced by the same two ratios.

    Args:
        images (Tensor): (N, 3, H, W).
        scale (float): In (0, 1]. At 1 the batch comes back as it is, whatever its size.
        stride (int): The deepest map's. Necks that upsample by 2 need sizes that it divides.

    Returns:
        tuple: (N, 3, H', W') and the ratio (W' / W, H' / H).
    """
    if scale == 1:
        return images, (1.0, 1.0)
    height, width = images.shape[-2:]
    size = [max(1, round(side * scale / stride)) * stride for side in (height, width)]
    smaller = F.interpolate(images, size=size, mode='bilinear', antialias=True)
    return smaller, (size[1] / width, size[0] / height)
