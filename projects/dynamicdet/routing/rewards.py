"""ORIC: what the better detections of an image add to the AP of an ensemble of images.

Object detection reward per image with context (Qiu et al., Optimizing Edge Offloading Decisions for
Object Detection, SEC 2024, arXiv 2410.18919). An image's own AP says little of what it adds to the
AP of a set, where false alarms of a class cost whether the image has an object of it or not, and
where an object counts by how many of its class there are.
"""

import numpy as np
from pycocotools.coco import COCO

from .evaluation import Mixtures
from .record import RoutingRecord

#: Other pictures of an ensemble: enough of them that the AP of a set is what counts; with more, the
#: time grows with the square.
ENSEMBLE = 500


def marginal_rewards(
    record: RoutingRecord, coco: COCO, ensemble: int = ENSEMBLE, seed: int = 0
) -> np.ndarray:
    """``(n + 1)`` times the AP that each image's detections of the last exit, in place of those of
    the first, add inside an ensemble of n other images that leave at the first exit.

    The images are parted at random; the others of its part are an image's ensemble. An image of an
    ensemble without any objects has a reward of 0.

    Args:
        record (RoutingRecord): See `record`.
        coco (COCO): Its ground truth.
        ensemble (int): n, about; all others where there are fewer. Defaults to 500.
        seed (int): Of the parting. Defaults to 0.

    Returns:
        np.ndarray: (images,), percent of AP times images.
    """
    images = len(record)
    order = np.random.default_rng(seed).permutation(images)
    rewards = np.zeros(images)
    for rows in np.array_split(order, max(1, round(images / (ensemble + 1)))):
        if any(
            coco.getAnnIds(imgIds=[int(identity)], iscrowd=False) for identity in record.ids[rows]
        ):
            rewards[rows] = _rewards_of_all(Mixtures(record.take(rows), coco))
    return rewards


def _rewards_of_all(mixtures: Mixtures) -> np.ndarray:
    """Rewards of each image among all others, (n,)."""
    choice = np.zeros(mixtures.images, int)
    before, rewards = mixtures.ap(choice), np.zeros(mixtures.images)
    for image in range(mixtures.images):
        choice[image] = mixtures.exits - 1
        rewards[image] = mixtures.images * (mixtures.ap(choice) - before)
        choice[image] = 0
    return rewards
