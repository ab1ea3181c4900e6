"""Merged exits of mmdet's detections; `routing.merging` does the arithmetic."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.structures import InstanceData

from ..errors import UsageError
from ..routing.merging import Merge, merge_boxes
from ..transfers import to_host


def merge_instances(images: Sequence[Sequence[InstanceData]], merge: Merge) -> list[InstanceData]:
    """Merge what exits found in images: boxes, scores and labels, and whatever else detections
    have, such as masks, which follow those that stay; of several that become one, the surest's.

    Args:
        images (Sequence[Sequence[InstanceData]]): Of each image, what each of its exits found, all
            in one frame.
        merge (Merge): How.

    Returns:
        list[InstanceData]: Of each image, new objects where there is something to merge; the one
        exit's own where the others found nothing.

    Raises:
        UsageError: If one exit gives masks, say, and another does not.
    """
    # One copy from the device for all.
    on_host = iter(to_host([instances for exits in images for instances in exits]))
    return [_merged(exits, [next(on_host) for _ in exits], merge) for exits in images]


def _merged(exits: Sequence[InstanceData], on_host: Sequence, merge: Merge) -> InstanceData:
    some = [place for place, instances in enumerate(exits) if len(instances)]
    if len(some) < 2:
        return exits[some[0]] if some else exits[-1]
    exits, on_host = ([values[place] for place in some] for values in (exits, on_host))
    known = [set(instances.keys()) for instances in exits]
    odd = sorted(set.union(*known) - set.intersection(*known))
    if odd:
        raise UsageError(
            f'only some of the exits that are merged give {", ".join(odd)}: give merge=None'
        )
    boxes, scores, labels = (
        np.concatenate([getattr(arrays, name).numpy() for arrays in on_host])
        for name in ('boxes', 'scores', 'labels')
    )
    numbers = np.repeat(some, [len(instances) for instances in exits])
    merged_boxes = merge_boxes(boxes, scores, labels, numbers, merge)
    every = InstanceData.cat(exits)
    merged = every[torch.from_numpy(merged_boxes.rows).to(every.scores.device)]
    if merge.type == 'wbf':
        merged.scores = torch.from_numpy(merged_boxes.scores).to(every.scores)
        merged.bboxes = _like(every.bboxes, torch.from_numpy(merged_boxes.boxes))
    return merged


def _like(boxes, values: torch.Tensor):
    """Boxes, (m, 4), of another's kind: a tensor or mmdet's box type."""
    if isinstance(boxes, torch.Tensor):
        return values.to(boxes)
    return type(boxes)(values.to(boxes.tensor), clone=False)
