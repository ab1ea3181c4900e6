"""Merged exits: what several exits find in an image, as one set of detections.

Letters: ``n`` detections of an image, those of all its exits together; ``K`` exits.

Each exit has removed its own duplicates, so only detections of *different* exits are compared:
where one exit finds nothing, the merged detections are the other's, as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .evaluation import true_positives
from .record import Detections, RoutingRecord

#: IoU above which two detections of a class are of one object. Of NMS, what YOLOX's own NMS takes
#: (mmdet `yolox_s_8xb8-300e_coco.py`); of WBF, what ensemble-boxes takes.
_IOU = dict(nms=0.65, wbf=0.55)
_CONF_TYPES = ('max', 'avg')
#: Logits of scores are taken no nearer to 0 and 1 than this; float32 knows 6e-8 below 1.
_EDGE = 1e-6
#: Newton's method of `fit_platt_scaling`: steps, and the change at which it ends.
_STEPS, _SMALL = 100, 1e-9


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


# Scores of the exits on one scale.


def scale_scores(scores: Tensor, scale: float, shift: float) -> Tensor:
    """Platt scaling (Platt 1999): ``sigmoid(scale * logit(score) + shift)``, (n,); at a scale of 1
    and a shift of 0 the scores as they are."""
    if (scale, shift) == (1.0, 0.0):
        return scores
    return torch.sigmoid(scale * torch.logit(scores.float(), _EDGE) + shift).to(scores.dtype)


def fit_platt_scaling(scores: np.ndarray, hits: np.ndarray) -> tuple[float, float]:
    """Scale and shift of the logit with which scores are chances to be right: logistic regression,
    by Newton's method, with Platt's targets, which are finite where all are right.

    Args:
        scores (np.ndarray): (n,), in [0, 1].
        hits (np.ndarray): (n,), bool: which detections are right.

    Returns:
        tuple[float, float]: The scale, above 0, and the shift. 1 and 0 where scores say nothing:
        there are none, or the surer ones are wrong more often.
    """
    scores, hits = np.asarray(scores, np.float64), np.asarray(hits, bool)
    right = np.count_nonzero(hits)
    wrong = len(hits) - right
    if not right or not wrong:
        return 1.0, 0.0
    inside = np.clip(scores, _EDGE, 1 - _EDGE)
    inputs = np.column_stack([np.log(inside / (1 - inside)), np.ones(len(scores))])
    targets = np.where(hits, (right + 1) / (right + 2), 1 / (wrong + 2))
    coefficients = np.array([1.0, 0.0])
    loss = _cross_entropy(inputs @ coefficients, targets)
    for _ in range(_STEPS):
        chances = 1 / (1 + np.exp(-(inputs @ coefficients)))
        slope = inputs.T @ (chances - targets)
        curvature = (inputs * (chances * (1 - chances))[:, None]).T @ inputs
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        while (nearer := _cross_entropy(inputs @ (coefficients - step), targets)) > loss:
            step /= 2
            if np.abs(step).max() < _SMALL:
                break
        if np.abs(step).max() < _SMALL:
            break
        coefficients, loss = coefficients - step, nearer
    return (float(coefficients[0]), float(coefficients[1])) if coefficients[0] > 0 else (1.0, 0.0)


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).sum())


def platt_scaling_of(record: RoutingRecord, coco) -> list[tuple[float, float]]:
    """Scale and shift of each exit's logits, K pairs: those of `fit_platt_scaling`, a detection
    being right where COCO's evaluation matches it with an object at IoU 0.5.

    Args:
        record (RoutingRecord): Of exits that were not merged, nor their scores scaled.
        coco (COCO): Its ground truth.

    Raises:
        UsageError: If the record says that its exits were merged, or does not fit ``coco``.
    """
    require_unmerged(record)
    return [fit_platt_scaling(scores, hits) for scores, hits in true_positives(record, coco)]


# Records.


def require_unmerged(record: RoutingRecord) -> None:
    """Raise a `UsageError` if a record is of merged exits."""
    if record.provenance.get('merge'):
        raise UsageError(
            f'the exits of this record were merged by {record.provenance["merge"]}: record with '
            '--cfg-options model.merge=None'
        )


def merge_record(
    record: RoutingRecord,
    merge: Merge | None,
    platt_scaling: Sequence[tuple[float, float]] | None = None,
) -> RoutingRecord:
    """A record as merged exits would have given it, from one of exits that were not.

    Args:
        record (RoutingRecord): Of two exits. It stays as it is.
        merge (Merge, optional): How. None scales scores alone.
        platt_scaling (Sequence[tuple[float, float]], optional): Scale and shift of each exit's
            logits. Defaults to scores as they are.

    Returns:
        RoutingRecord: Detections of exit k are those of exits 0 to k. Costs count exit 0's neck and
        heads for every image, where the record knows them.

    Raises:
        UsageError: If the record is merged already, or is of more exits, since it does not say what
            the necks and heads between cost.
    """
    require_unmerged(record)
    if record.exits != 2:
        raise UsageError(
            f'a record of {record.exits} exits is not merged afterwards: record with --cfg-options '
            'model.merge=nms'
        )
    scaling = platt_scaling or [(1.0, 0.0)] * record.exits
    changed = {
        name: _merged_exits([_scaled(*pair) for pair in zip(by_exit, scaling)], merge)
        for name in ('detections', 'view')
        if (by_exit := getattr(record, name)) is not None
    }
    if merge is None:
        return replace(record, **changed)
    facts = dict(record.provenance, merge=str(merge))
    for kind, name in (('gflops', 'branch0_gflops'), ('latencies', 'branch0_latency')):
        if name not in facts:
            raise UsageError(f'the record does not say {name}: record anew by tools/record.py')
        extra = np.array([0.0, float(facts[name])])
        changed[kind] = (np.array(getattr(record, kind)) + extra).tolist()
        column = record.column(kind)
        if column is not None:
            changed[f'image_{kind}'] = column + extra
    return replace(record, **changed, provenance=facts)


def _scaled(detections: Detections, scaling: tuple[float, float]) -> Detections:
    scores = scale_scores(torch.from_numpy(detections.scores), *scaling)
    return replace(detections, scores=scores.numpy())


def _merged_exits(exits: Sequence[Detections], merge: Merge | None) -> list[Detections]:
    """Detections of each exit, those of the exits before merged into them."""
    if merge is None:
        return list(exits)
    return [
        exits[0] if not last else _merged([*exits[: last + 1]], merge) for last in range(len(exits))
    ]


def _merged(exits: Sequence[Detections], merge: Merge) -> Detections:
    images = []
    for image in range(len(exits[0])):
        rows = [detections.rows(image) for detections in exits]
        boxes, scores, labels = (
            np.concatenate(
                [getattr(detections, name)[part] for detections, part in zip(exits, rows)]
            )
            for name in ('boxes', 'scores', 'categories')
        )
        numbers = np.repeat(np.arange(len(exits)), [part.stop - part.start for part in rows])
        corners = np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
        merged = merge_boxes(corners, scores, labels, numbers, merge)
        sides = np.column_stack([merged.boxes[:, :2], merged.boxes[:, 2:] - merged.boxes[:, :2]])
        images.append((sides, merged.scores, labels[merged.rows]))
    return Detections.join(images)
