"""Merged exits: what several exits find in an image, as one set of detections. Needs numpy alone: a
standalone export has a copy.

Letters: ``n`` detections of an image, those of all its exits together.

Each exit has removed its own duplicates, so only detections of *different* exits are compared:
where one exit finds nothing, the merged detections are the other's, as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UsageError

#: IoU above which two detections of a class are of one object. Of NMS, what YOLOX's own NMS takes
#: (mmdet `yolox_s_8xb8-300e_coco.py`); of WBF, what ensemble-boxes takes.
_IOU = dict(nms=0.65, wbf=0.55)
_CONF_TYPES = ('max', 'avg')


@dataclass(frozen=True)
class Merge:
    """How the detections of an image's exits are merged, by class.

    Attributes:
        type (str): 'nms': of two that overlap, the surer one stays, as it is. 'wbf': weighted boxes
            fusion (Solovyev 2019, arXiv 1910.13302): they become one box, the mean weighted by
            scores.
        iou (float): They overlap if their IoU is above it, in [0, 1].
        conf_type (str): Of 'wbf', the fused score, as ensemble-boxes calls it: 'max', the surest
            one's; or 'avg', as published: the mean, times the share of exits that found the object,
            of the exits that found anything in the image.
    """

    type: str
    iou: float
    conf_type: str = 'max'

    @classmethod
    def parse(cls, merge: 'str | Mapping | Merge | None') -> 'Merge | None':
        """From what configs say: a type, ``dict(type=..., iou=..., conf_type=...)`` or None.

        Raises:
            UsageError: If it is none of these.
        """
        if merge is None or isinstance(merge, cls):
            return merge
        given = dict(type=merge) if isinstance(merge, str) else merge
        names = ('type', 'iou', 'conf_type')
        if not isinstance(given, Mapping) or given.get('type') not in _IOU or set(given) - {*names}:
            raise UsageError(
                "merge is 'nms', 'wbf', dict(type=..., iou=..., conf_type=...) or None; got "
                f'{merge}'
            )
        parsed = cls(**{'iou': _IOU[given['type']], **given})
        # Not `iou < 0 or ...`, which lets NaN pass.
        if not isinstance(parsed.iou, (int, float)) or not 0 <= parsed.iou <= 1:
            raise UsageError(f'iou of merge is a number in [0, 1]; got {parsed.iou}')
        if parsed.conf_type not in _CONF_TYPES or 'conf_type' in given and parsed.type != 'wbf':
            raise UsageError(
                f"conf_type of merge is 'max' or 'avg', and of 'wbf' alone; got {parsed.conf_type}"
            )
        return parsed

    def __str__(self) -> str:
        kind = f', {self.conf_type}' if self.type == 'wbf' else ''
        return f'{self.type} (IoU {self.iou:g}{kind})'


class Merged(NamedTuple):
    """Merged detections of an image, the surest first.

    Attributes:
        rows (np.ndarray): Which of the n detections each is or, if it is of several, the surest of
            them: whose class and mask it has, (m,).
        boxes (np.ndarray): (m, 4), x1, y1, x2, y2.
        scores (np.ndarray): (m,).
    """

    rows: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def merge_boxes(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, exits: np.ndarray, merge: Merge
) -> Merged:
    """Merge the detections of an image's exits.

    Args:
        boxes (np.ndarray): (n, 4), x1, y1, x2, y2, all in one frame.
        scores (np.ndarray): (n,), in [0, 1].
        labels (np.ndarray): (n,), classes.
        exits (np.ndarray): (n,), the exit that found each.
        merge (Merge): How.

    Returns:
        Merged: Of one exit's detections, these in their order.
    """
    if len(np.unique(exits)) < 2:
        return Merged(np.arange(len(scores)), boxes, scores)
    order = np.argsort(-scores, kind='stable')
    ordered = boxes[order], scores[order], exits[order]
    first, second = _overlapping(boxes[order], labels[order], exits[order], merge.iou)
    if merge.type == 'nms':
        kept = _surest(len(order), first, second)
        return Merged(order[kept], ordered[0][kept], ordered[1][kept])
    rows, boxes, scores = _fused(*ordered, first, second, merge)
    again = np.argsort(-scores, kind='stable')
    return Merged(order[rows][again], boxes[again], scores[again])


def _overlapping(
    boxes: np.ndarray, labels: np.ndarray, exits: np.ndarray, iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of detections, surest first, of one class and two exits whose IoU is above a number:
    the surer and the less sure of each, in the order of the surer."""
    alike = (labels[:, None] == labels) & (exits[:, None] != exits)
    first, second = np.nonzero(np.triu(alike, 1))
    near = _ious(boxes[first], boxes[second]) > iou
    return first[near], second[near]


def _ious(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of each pair of boxes, (m,); NaN or less than any threshold where a box is none."""
    # Random weights may make infinite or empty boxes.
    with np.errstate(invalid='ignore', divide='ignore', over='ignore'):
        low, high = np.maximum(ones[:, :2], others[:, :2]), np.minimum(ones[:, 2:], others[:, 2:])
        common = np.clip(high - low, 0, None).prod(1)
        areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (ones, others)]
        return common / (areas[0] + areas[1] - common)


def _surest(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which detections stay, (n,), bool: none that overlaps a surer one that stays."""
    kept = np.ones(count, bool)
    for surer, other in zip(first.tolist(), second.tolist()):
        if kept[surer]:
            kept[other] = False
    return kept


def _fused(
    boxes: np.ndarray,
    scores: np.ndarray,
    exits: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    merge: Merge,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the surest of each cluster, fused boxes and fused scores. A cluster has at most one
    detection of each exit."""
    surer: dict[int, list[int]] = {}
    for better, other in zip(first.tolist(), second.tolist()):
        surer.setdefault(other, []).append(better)
    clusters: dict[int, list[int]] = {}
    founder = np.arange(len(scores))
    for row in sorted(surer):
        best = _best_cluster(row, surer[row], founder, clusters, boxes, scores, exits, merge.iou)
        if best is not None:
            founder[row] = best
            clusters.setdefault(best, [best]).append(row)
    fused, sure = boxes.copy(), scores.copy()
    for row, members in clusters.items():
        fused[row] = _mean_box(boxes[members], scores[members])
    if merge.conf_type == 'avg':
        total = np.bincount(founder, scores, len(scores))
        sure = (total / len(np.unique(exits))).astype(scores.dtype)
    rows = np.flatnonzero(founder == np.arange(len(scores)))
    return rows, fused[rows], sure[rows]


def _best_cluster(
    row: int,
    surer: Sequence[int],
    founder: np.ndarray,
    clusters: Mapping[int, Sequence[int]],
    boxes: np.ndarray,
    scores: np.ndarray,
    exits: np.ndarray,
    iou: float,
) -> int | None:
    """The cluster whose fused box a detection overlaps most, by its surest one; None without."""
    best = None
    for start in dict.fromkeys(founder[surer].tolist()):
        members = clusters.get(start, [start])
        if exits[row] not in exits[members]:
            mean = _mean_box(boxes[members], scores[members])
            overlap = _ious(boxes[row][None], mean[None])[0]
            if overlap > iou:
                best, iou = start, overlap
    return best


def _mean_box(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The mean of boxes, weighted by their scores; of one, that box."""
    weights = scores.astype(np.float64)
    if len(boxes) == 1 or not weights.sum() > 0:
        return boxes[0]
    return (weights @ boxes / weights.sum()).astype(boxes.dtype)
