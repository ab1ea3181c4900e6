"""Merged exits: their scores on one scale, and their records; `box_merging` merges detections.

Letters: ``n`` detections of an image; ``K`` exits.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .box_merging import Merge, merge_boxes
from .evaluation import true_positives
from .record import Detections, RoutingRecord

#: Logits of scores are taken no nearer to 0 and 1 than this; float32 knows 6e-8 below 1.
_EDGE = 1e-6
#: Newton's method of `fit_platt_scaling`: steps, and the change at which it ends.
_STEPS, _SMALL = 100, 1e-9


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
