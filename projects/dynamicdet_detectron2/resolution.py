"""What an exit sees of a batch's inputs, where that is smaller than what is delivered.

Letters: ``ratio`` is (width, height) of the smaller batch over those of the delivered one.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

from dynamicdet.cascade.resolution import Ratio

Size = tuple[float, float]


def scale_boxes(boxes: Boxes, ratio: Ratio) -> Boxes:
    """Boxes in the frame of a resized image: new ones."""
    boxes = boxes.clone()
    boxes.scale(*ratio)
    return boxes


def reduced_size(size: Sequence[int], ratio: Ratio, whole: bool) -> Size:
    """Height and width in the smaller frame. What it measures need not be whole numbers, but for
    maps of labels, which are cut out by them."""
    if ratio == (1.0, 1.0):
        return tuple(size)
    height, width = size[0] * ratio[1], size[1] * ratio[0]
    return (round(height), round(width)) if whole else (height, width)


def reduce_inputs(inputs: dict[str, Any], size: Sequence[int], ratio: Ratio) -> dict[str, Any]:
    """An image's inputs in the frame that an exit sees: a new dict, with results still asked for in
    the frame of the delivered image or larger.

    Args:
        inputs (dict): As Detectron2's models are called with them; left as they are.
        size (Sequence[int]): Height and width of the delivered image.
        ratio (tuple[float, float]): How large the exit sees it.
    """
    if ratio == (1.0, 1.0):
        return inputs
    reduced = {'height': size[0], 'width': size[1], **inputs}
    if 'instances' in inputs:
        reduced['instances'] = _reduce_instances(inputs['instances'], size, ratio)
    if 'sem_seg' in inputs:
        reduced['sem_seg'] = _resized_labels(inputs['sem_seg'], ratio)
    return reduced


def _reduce_instances(instances: Instances, size: Sequence[int], ratio: Ratio) -> Instances:
    reduced = Instances(reduced_size(size, ratio, whole=True))
    for name, values in instances.get_fields().items():
        if isinstance(values, Boxes):
            values = scale_boxes(values, ratio)
        elif isinstance(values, PolygonMasks):
            values = PolygonMasks(
                [
                    [polygon * _alternating(polygon, ratio) for polygon in polygons]
                    for polygons in values.polygons
                ]
            )
        elif isinstance(values, BitMasks):
            values = BitMasks(_resized_labels(values.tensor, ratio))
        elif isinstance(values, Keypoints):
            tensor = values.tensor.clone()
            tensor[..., 0] *= ratio[0]
            tensor[..., 1] *= ratio[1]
            values = Keypoints(tensor)
        reduced.set(name, values)
    return reduced


def _alternating(polygon, ratio: Ratio):
    """Factors of x, y, x, y, ..."""
    factors = polygon * 0 + ratio[0]
    factors[1::2] = ratio[1]
    return factors


def _resized_labels(labels: Tensor, ratio: Ratio) -> Tensor:
    """Maps of labels or truth values, (..., H, W), by the nearest."""
    height, width = labels.shape[-2:]
    size = (round(height * ratio[1]), round(width * ratio[0]))
    maps = labels.reshape(-1, 1, height, width).float()
    resized = F.interpolate(maps, size=size, mode='nearest')
    return resized.reshape(*labels.shape[:-2], *size).to(labels.dtype)
