"""Where the exits differ, and whether the router knows: AP by kind of image, and rank correlations.

AP is COCO's in percent, of the images of a stratum by themselves; None where they have no objects.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO
from scipy.stats import spearmanr

from .bootstrap import RESAMPLES, bootstrap_weights, confidence_interval
from .class_weights import class_weights, count_objects
from .evaluation import Mixtures
from .record import RoutingRecord, require_columns
from .rewards import marginal_rewards

#: Strata by number of objects: name -> fewest and most.
OBJECTS = {'0': (0, 0), '1': (1, 1), '2': (2, 2), '3-4': (3, 4), '5-8': (5, 8), '9+': (9, np.inf)}


def by_size(mixtures: Mixtures) -> dict[str, list[float | None]]:
    """AP of each exit by the area of the objects: ``small``, ``medium``, ``large`` -> K values."""
    exit_scores = [
        mixtures.scores(np.full(mixtures.images, exit)) for exit in range(mixtures.exits)
    ]
    return {size: [scores[size] for scores in exit_scores] for size in ('small', 'medium', 'large')}


def by_objects(record: RoutingRecord, mixtures: Mixtures) -> list[dict]:
    """AP of each exit by the number of an image's objects.

    Args:
        record (RoutingRecord): With ``objects``; see `record`.
        mixtures (Mixtures): Of the same record.

    Returns:
        list[dict]: Per key of `OBJECTS`: ``objects``, the key; ``images``, how many; ``ap``, K
            values.

    Raises:
        UsageError: If the record lacks numbers of objects.
    """
    require_columns(record, 'objects')
    objects = record.objects
    return [
        dict(objects=name, **_stratum(mixtures, (objects >= fewest) & (objects <= most)))
        for name, (fewest, most) in OBJECTS.items()
    ]


def by_difficulty(mixtures: Mixtures, scores: Sequence[float], parts: int = 10) -> list[dict]:
    """AP of each exit by difficulty, in parts of equally many images, the easiest first.

    Args:
        mixtures (Mixtures): Of a record.
        scores (Sequence[float]): Difficulties, (n,), finite. Equal ones may be parted.
        parts (int): How many. Defaults to 10; fewer if there are fewer images.

    Returns:
        list[dict]: Per part: ``low`` and ``high``, the smallest and largest score; ``images``, how
        many; ``ap``, K values.
    """
    scores = np.asarray(scores, float)
    rows = []
    for members in np.array_split(np.argsort(scores, kind='stable'), min(parts, len(scores))):
        inside = np.zeros(len(scores), bool)
        inside[members] = True
        rows.append(
            dict(
                low=float(scores[members].min()),
                high=float(scores[members].max()),
                **_stratum(mixtures, inside),
            )
        )
    return rows


def exit_benefits(
    record: RoutingRecord, mixtures: Mixtures, exits: tuple[int, int] = (0, -1)
) -> dict[str, np.ndarray]:
    """What each image gains from the second of two exits, (n,) each.

    Args:
        record (RoutingRecord): See `record`. Without losses, or objects, there is less to tell.
        mixtures (Mixtures): Of the same record.
        exits (tuple[int, int]): The exits. Defaults to the first and the last.

    Returns:
        dict: ``ap``: difference of per-image AP, percent (`Mixtures.image_ap`); ``loss``: loss
            under the first exit minus under the second, as the heads average it; ``loss_objects``:
            that times the number of objects, which is the sum over objects, as AP counts.
    """
    easy, hard = exits
    per_image = mixtures.image_ap()
    benefits = dict(ap=per_image[hard] - per_image[easy])
    if record.losses is not None:
        benefits['loss'] = record.losses[:, easy] - record.losses[:, hard]
        if record.objects is not None:
            benefits['loss_objects'] = benefits['loss'] * record.objects
    return benefits


def exit_benefits_by_class(
    record: RoutingRecord, coco: COCO, mixtures: Mixtures, rewards: bool = True
) -> dict[str, np.ndarray]:
    """What each image gains from the last exit instead of the first where classes count as in AP,
    (n,) each.

    Args:
        record (RoutingRecord): See `record`.
        coco (COCO): Its ground truth, by whose objects classes are weighted (`class_weights`).
        mixtures (Mixtures): Of the same record.
        rewards (bool): Whether with rewards, which take longest. Defaults to True.

    Returns:
        dict: ``ap_class``: difference of `Mixtures.image_ap` by class; ``loss_class``: of losses,
            summed over objects, each by its class, where the record has losses; ``reward``:
            `rewards.marginal_rewards`.
    """
    counts = count_objects(coco, record.ids)
    weights = class_weights(counts.sum(axis=0))
    per_image = mixtures.image_ap(weights)
    benefits = dict(ap_class=per_image[-1] - per_image[0])
    if record.losses is not None:
        benefits['loss_class'] = (record.losses[:, 0] - record.losses[:, -1]) * (counts @ weights)
    return dict(benefits, reward=marginal_rewards(record, coco)) if rewards else benefits


def rank_correlations(
    scores: Sequence[float],
    gained: Mapping[str, Sequence[float]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Whether a router puts first what gains most.

    Args:
        scores (Sequence[float]): Difficulties, (n,).
        gained (Mapping[str, Sequence[float]]): As `exit_benefits` gives it.
        resamples (int): Bootstrap resamples for the intervals. Defaults to 200.
        seed (int): Their seed. Defaults to 0.

    Returns:
        dict: Per key of ``gained``: ``correlation``, Spearman's, in [-1, 1], with ``low`` and
            ``high``, the ends of its 95 % interval; None where the scores or the gains are all the
            same.
    """
    scores = np.asarray(scores, float)
    weights = bootstrap_weights(len(scores), resamples, seed)
    correlations = {}
    for name, values in gained.items():
        values = np.asarray(values, float)
        drawn = [
            _spearman(np.repeat(scores, counts), np.repeat(values, counts)) for counts in weights
        ]
        low, high = confidence_interval([each for each in drawn if each is not None])
        correlations[name] = dict(correlation=_spearman(scores, values), low=low, high=high)
    return correlations


def _stratum(mixtures: Mixtures, inside: np.ndarray) -> dict:
    aps = [
        mixtures.scores(np.full(mixtures.images, exit), inside.astype(int), sizes=False)['ap']
        for exit in range(mixtures.exits)
    ]
    return dict(images=int(inside.sum()), ap=aps)


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
