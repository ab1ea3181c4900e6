"""The first exit's view of a batch, where that is smaller than what the pipeline delivers.

Letters: ``ratio`` is (width, height) of the smaller batch over those of the delivered one.
"""

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.structures import SampleList

from ..cascade.resolution import Ratio


def reduce_samples(samples: SampleList, ratio: Ratio) -> SampleList:
    """The samples of a reduced batch: shapes, boxes and masks in its frame.

    Args:
        samples (list[DetDataSample]): Samples of the delivered batch; they stay as they are.
        ratio (tuple[float, float]): Of width and height.

    Returns:
        list[DetDataSample]: New objects, also where the ratio is 1: heads write into what they are
        given (RTMDet-Ins its masks), and several exits read the same batch.
    """
    if samples is None:
        return None
    return [_reduce(sample, ratio) for sample in samples]


def _reduce(sample, ratio: Ratio):
    wide, high = ratio
    reduced = sample.new()
    if ratio == (1.0, 1.0):
        for name in ('gt_instances', 'ignored_instances'):
            if name in sample:
                setattr(reduced, name, sample.get(name).new())
        return reduced
    scale = sample.get('scale_factor', (1.0, 1.0))
    # All at once: what is set is copied each time.
    changed: dict[str, object] = dict(scale_factor=(scale[0] * wide, scale[1] * high))
    if 'batch_input_shape' in sample:
        # For losses that depend on the size of images: the exits' are to compare.
        changed['delivered_shape'] = sample.batch_input_shape
    for name in ('img_shape', 'pad_shape', 'batch_input_shape'):
        if name in sample:
            shape = sample.get(name)
            changed[name] = (round(shape[0] * high), round(shape[1] * wide))
    reduced.set_metainfo(changed)
    for name in ('gt_instances', 'ignored_instances'):
        if name in sample:
            setattr(reduced, name, _reduce_instances(sample.get(name), ratio))
    return reduced


def _reduce_instances(instances: InstanceData, ratio: Ratio) -> InstanceData:
    reduced = instances.new()
    if 'bboxes' in instances:
        reduced.bboxes = scale_boxes(instances.bboxes, ratio)
    if 'masks' in instances:
        height, width = instances.masks.height, instances.masks.width
        reduced.masks = instances.masks.resize((round(height * ratio[1]), round(width * ratio[0])))
    return reduced


def scale_boxes(boxes, ratio: Ratio):
    """Boxes, (n, 4) as a tensor or mmdet's box type, in the frame of a resized image."""
    if isinstance(boxes, Tensor):
        # No tensor of factors: it would have to be copied to the device.
        wide, high = ratio
        return torch.stack(
            [boxes[:, 0] * wide, boxes[:, 1] * high, boxes[:, 2] * wide, boxes[:, 3] * high], dim=1
        )
    scaled = boxes.clone()
    scaled.rescale_(ratio)
    return scaled


def valid_shares(batch_inputs: Tensor, samples: SampleList) -> list[tuple[float, float]]:
    """Shares of each image's height and width in the batch that are not padding."""
    height, width = batch_inputs.shape[-2:]
    return [(sample.img_shape[0] / height, sample.img_shape[1] / width) for sample in samples]
