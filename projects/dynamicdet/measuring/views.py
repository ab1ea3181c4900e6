"""A second view of each image of a record, for the honest oracle."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from mmdet.structures import SampleList

#: How far an image is shifted for a second view: no multiple of any map's stride, so that maps
#: differ.
SHIFT = 5


def flip_images(inputs: Tensor, samples: SampleList) -> Tensor:
    """Flip each image of a batch from left to right; its padding stays at the right and below.

    Args:
        inputs (Tensor): (N, 3, H, W).
        samples (list[DetDataSample]): With ``img_shape``, ``ori_shape`` and ``scale_factor``.

    Returns:
        Tensor: (N, 3, H, W), new.
    """
    flipped = inputs.clone()
    for image, sample in zip(flipped, samples):
        width = _delivered_width(sample)
        image[..., :width] = image[..., :width].flip(-1)
    return flipped


def flip_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes of the flipped image, (D, 4), x, y, w, h, in the frame of the image itself, ``width``
    pixels wide."""
    left = width - boxes[:, 0] - boxes[:, 2]
    return np.column_stack([left, boxes[:, 1:]])


def shift_images(inputs: Tensor, samples: SampleList) -> Tensor:
    """Shift each image of a batch to the right and down by `SHIFT` pixels, its edge repeated behind
    it. For what has no mirror image, such as digits and signs. Arguments and result as
    `flip_images`'s."""
    shifted = inputs.clone()
    for image, sample in zip(shifted, samples):
        height, width = sample.img_shape[0], _delivered_width(sample)
        content = image[..., :height, :width]
        image[..., :height, :width] = F.pad(content, (SHIFT, 0, SHIFT, 0), 'replicate')[
            ..., :height, :width
        ]
    return shifted


def shift_boxes(boxes: np.ndarray, sample) -> np.ndarray:
    """Boxes of the shifted image, (D, 4), x, y, w, h, in the frame of the image itself."""
    across, down = (SHIFT / float(scale) for scale in sample.get('scale_factor', (1.0, 1.0)))
    return boxes - np.array([across, down, 0, 0], boxes.dtype)


def _delivered_width(sample) -> int:
    """Of the image as delivered, without what a pipeline or the batch pads it with at the right."""
    return min(sample.img_shape[1], round(sample.ori_shape[1] * _scale(sample)))


def _original_width(sample) -> float:
    """The same in pixels of the original image."""
    return _delivered_width(sample) / _scale(sample)


def _scale(sample) -> float:
    return float(sample.get('scale_factor', (1.0, 1.0))[0])


class View(NamedTuple):
    """A second look at an image: how it is made from a batch, and how what is found comes back."""

    make: Callable
    back: Callable
    said: str


VIEWS = dict(
    flip=View(
        flip_images,
        lambda boxes, sample: flip_boxes(boxes, _original_width(sample)),
        'flipped from left to right',
    ),
    shift=View(shift_images, shift_boxes, f'shifted by {SHIFT} pixels'),
)
