"""What a router may see of exit 0's detections: numbers of an image, the same for any image size.

They are there only after exit 0's neck and heads ran, which costs: see `peers.peer_gflops`.
Letters: ``n`` images, ``D`` detections of all images.
"""

from collections.abc import Sequence

import numpy as np

from .class_weights import class_weights
from .record import Detections, RoutingRecord

#: Scores over which detections are counted; and of how many of the surest score and size are seen.
COUNTED, SUREST = (0.1, 0.3, 0.5), 10
#: How many numbers an image has: those of `statistics`, and two sums by class.
WIDTH = 2 * SUREST + len(COUNTED) + 1 + 2


def features(detections: Detections, weights: Sequence[float]) -> np.ndarray:
    """`statistics`, and sums over the detections of score and of p (1 - p), each by the weight of
    its class.

    Args:
        detections (Detections): Of exit 0, boxes in the frame of the original image.
        weights (Sequence[float]): Of each detection's class, (D,).

    Returns:
        np.ndarray: (n, `WIDTH`), float64.
    """
    scores = detections.scores.astype(float)
    return np.column_stack(
        [
            statistics(detections),
            _summed(detections, scores * weights),
            variances(detections, weights),
        ]
    )


def variances(detections: Detections, weights: Sequence[float] | None = None) -> np.ndarray:
    """Sum of p (1 - p) over each image's detections, (n,), each by its weight."""
    scores = detections.scores.astype(float)
    return _summed(detections, scores * (1 - scores) * (1.0 if weights is None else weights))


def statistics(detections: Detections) -> np.ndarray:
    """Scores of the ten surest detections and the roots of their areas, in pixels, 0 where there
    are fewer; numbers of detections over 0.1, 0.3 and 0.5; and the sum of p (1 - p). (n, 24)."""
    rows = []
    for image in range(len(detections)):
        image_rows = detections.rows(image)
        order = np.argsort(-detections.scores[image_rows], kind='stable')
        scores, boxes = (
            detections.scores[image_rows][order].astype(float),
            detections.boxes[image_rows][order][:SUREST],
        )
        row = np.zeros(WIDTH - 2)
        row[: len(boxes)] = scores[:SUREST]
        # Pixels, not square pixels, whose largest few would be all that counts.
        row[SUREST : SUREST + len(boxes)] = (
            np.maximum(0, boxes[:, 2].astype(float) * boxes[:, 3]) ** 0.5
        )
        row[2 * SUREST :] = [
            *((scores > floor).sum() for floor in COUNTED),
            (scores * (1 - scores)).sum(),
        ]
        rows.append(row)
    return np.array(rows).reshape(-1, WIDTH - 2)


def first_features(record: RoutingRecord) -> np.ndarray:
    """`features` of a record's exit 0, (n, `WIDTH`)."""
    return features(record.detections[0], first_weights(record))


def first_weights(record: RoutingRecord) -> np.ndarray:
    """Weight of the class of each of exit 0's detections, (D,).

    Objects of a class are counted by ``class_objects`` in the record's provenance, by
    ``categories``; where it does not say them, by the sum of exit 0's scores of the class.
    """
    first, facts = record.detections[0], record.provenance
    known, place = np.unique(first.categories, return_inverse=True)
    if 'class_objects' in facts:
        counts = dict(zip(facts['categories'], facts['class_objects']))
        # With those that are not detected: the mean weight is over all objects.
        counts = {**dict.fromkeys(known.tolist(), 0), **counts}
        weights = dict(zip(counts, class_weights(list(counts.values()))))
        return np.array([weights[category] for category in known.tolist()] or [1.0])[place]
    return class_weights(np.bincount(place, first.scores, minlength=len(known)))[place]


def _summed(detections: Detections, values: np.ndarray) -> np.ndarray:
    """Sums over each image's detections, (n,), of a value for each of them, (D,)."""
    return np.bincount(detections.images, values, minlength=len(detections))
