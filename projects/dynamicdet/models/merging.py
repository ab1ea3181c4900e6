"""Merged exits of mmdet's detections; `routing.box_merging` does the arithmetic."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.structures import InstanceData

from ..errors import UsageError
from ..routing.box_merging import Merge, merge_boxes
from ..transfers import HostDetections, to_host


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
    return [
        join_kept(
            exits,
            [next(on_host) for _ in exits],
            [np.ones(len(instances), bool) for instances in exits],
            merge,
        )
        for exits in images
    ]


def join_kept(
    exits: Sequence[InstanceData],
    on_host: Sequence[HostDetections],
    kept: Sequence[np.ndarray],
    merge: Merge | None,
) -> InstanceData:
    """Some of what exits found in an image, merged, or without ``merge`` one after the other.

    Args:
        exits (Sequence[InstanceData]): What each exit found.
        on_host (Sequence[HostDetections]): The same, as `to_host` has it.
        kept (Sequence[np.ndarray]): Which of it counts, bools, (D,) for each exit.
        merge (Merge, optional): How.
    """
    rows = [np.flatnonzero(which) for which in kept]
    some = [place for place, exit_rows in enumerate(rows) if len(exit_rows)]
    if len(some) < 2:
        place = some[0] if some else -1
        return _take(exits[place], rows[place])
    exits, on_host = ([values[place] for place in some] for values in (exits, on_host))
    counts = [len(arrays.scores) for arrays in on_host]
    starts = np.cumsum([0, *counts])
    rows = np.concatenate([start + rows[place] for start, place in zip(starts, some)])
    if merge is None:
        return _take(InstanceData.cat(exits), rows)
    known = [set(instances.keys()) for instances in exits]
    odd = sorted(set.union(*known) - set.intersection(*known))
    if odd:
        raise UsageError(
            f'only some of the exits that are merged give {", ".join(odd)}: give merge=None'
        )
    boxes, scores, labels = (
        np.concatenate([getattr(arrays, name).numpy() for arrays in on_host])[rows]
        for name in ('boxes', 'scores', 'labels')
    )
    numbers = np.repeat(some, counts)[rows]
    merged_boxes = merge_boxes(boxes, scores, labels, numbers, merge)
    merged = _take(InstanceData.cat(exits), rows[merged_boxes.rows])
    if merge.type == 'wbf':
        merged.scores = torch.from_numpy(merged_boxes.scores).to(merged.scores)
        merged.bboxes = _like(merged.bboxes, torch.from_numpy(merged_boxes.boxes))
    return merged


def _take(instances: InstanceData, rows: np.ndarray) -> InstanceData:
    if np.array_equal(rows, np.arange(len(instances))):
        return instances
    return instances[torch.from_numpy(rows).to(instances.scores.device)]


def _like(boxes, values: torch.Tensor):
    """Boxes, (m, 4), of another's kind: a tensor or mmdet's box type."""
    if isinstance(boxes, torch.Tensor):
        return values.to(boxes)
    return type(boxes)(values.to(boxes.tensor), clone=False)
