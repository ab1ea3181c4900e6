"""How much an object counts in AP, by the frequency of its class.

AP is a mean over classes, so an object of a rare class moves it many times as much as one of a
frequent class. Letters: ``n`` images, ``C`` classes (or categories).
"""

from collections.abc import Sequence

import numpy as np

#: Added to a class's number of objects, or a class with one object would count a thousand times one
#: with a thousand. On COCO 5 to 100 serve about alike (experiments/real.md).
SMOOTHING = 20.0


def class_weights(counts: Sequence[float], smoothing: float = SMOOTHING) -> np.ndarray:
    """Weight of an object of each class: ``1 / (objects of the class + smoothing)``, scaled so that
    the mean over all objects is 1.

    Args:
        counts (Sequence[float]): Objects of each class, (C,), none below 0.
        smoothing (float): Above 0. Defaults to 20.

    Returns:
        np.ndarray: (C,), float64, above 0; ones where there are no objects at all.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.sum():
        return np.ones(counts.shape)
    weights = 1 / (counts + smoothing)
    return weights * (counts.sum() / (counts @ weights))


def mean_weights(counts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Mean weight of each image's objects, (n,); 1, the mean of all, for images without objects.

    Args:
        counts (np.ndarray): Objects of each image and class, (n, C).
        weights (Sequence[float]): Of each class, (C,); see `class_weights`.
    """
    counts = np.asarray(counts, np.float64)
    objects = counts.sum(axis=1)
    return np.where(objects > 0, counts @ np.asarray(weights) / np.maximum(objects, 1), 1.0)


def count_objects(coco, ids: Sequence[int]) -> np.ndarray:
    """Annotated objects of each image and category, without crowds, (n, C), float64.

    Args:
        coco (COCO): Ground truth.
        ids (Sequence[int]): Image ids, (n,).

    Returns:
        np.ndarray: Columns in the order of the sorted category ids.
    """
    column = {category: index for index, category in enumerate(sorted(coco.getCatIds()))}
    counts = np.zeros((len(ids), len(column)))
    for row, identity in enumerate(ids):
        for annotation in coco.imgToAnns.get(int(identity), ()):
            if not annotation.get('iscrowd', 0) and annotation['category_id'] in column:
                counts[row, column[annotation['category_id']]] += 1
    return counts
