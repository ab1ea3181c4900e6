"""Other routers over the same record, to compare a router with.

A peer gives each image a score: large is hard, any scale, and only the order counts. Some peers are
plain functions of a record, some are fitted to one first; `peer_scores` runs either by name,
`PEERS` lists them.

What a peer looks at has a price. Features of the first backbone and the image itself are free (an
image is loaded, and the first backbone runs, at every exit). Exit 0's *detections* are there only
after its neck and head ran, which an image that goes on to the last exit would have skipped:
`peer_gflops` says what that costs. True objects and losses are known to no router: those peers are
references.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .detection_features import first_features, first_weights, statistics, variances
from .record import RoutingRecord, require_columns

#: Detections below this score are not counted as such.
SURE = 0.3
#: Penalties that the ridge regression chooses among.
_PENALTIES = tuple(10.0**power for power in range(-1, 7))

Scorer = Callable[[RoutingRecord], np.ndarray]


class Peer(NamedTuple):
    """A router to compare with.

    Attributes:
        function (Callable): ``record -> scores (n,)``; of a fitted peer
            ``(record, benefit) -> such a function``.
        needs (tuple[str]): What the record's images must have besides detections and difficulty.
        description (str): For tables.
        fitted (bool): Whether it is fitted to a record first.
        charged (bool): Whether it looks at exit 0's detections, see `peer_gflops`.
        reference (bool): Whether it looks at the annotations, which no router can.
        benefit (str): What a fitted one learns, and a reference without a function is: a key of
            `strata.benefits`.
    """

    function: Callable | None
    needs: tuple[str, ...]
    description: str
    fitted: bool = False
    charged: bool = False
    reference: bool = False
    benefit: str = ''


def doubt_of_best(record: RoutingRecord) -> np.ndarray:
    """1 minus the largest score of exit 0's detections, (n,), in [0, 1]; 1 without detections."""
    return np.array([1 - max(scores, default=0.0) for scores in _first_scores(record)])


def mean_doubt(record: RoutingRecord) -> np.ndarray:
    """1 minus the mean score of exit 0's detections over `SURE`, (n,), in [0, 1].

    Where none is, 1 minus the largest score: more than of any image that has one.
    """
    means = []
    for scores in _first_scores(record):
        sure = [score for score in scores if score > SURE]
        means.append(np.mean(sure) if sure else max(scores, default=0.0))
    return 1 - np.array(means)


def entropy_of_scores(record: RoutingRecord) -> np.ndarray:
    """Sum over exit 0's detections of the entropy of its score p as a coin's, in bits, (n,)."""
    return np.array([_coin_entropy(np.array(scores)).sum() for scores in _first_scores(record)])


def variance_of_scores(record: RoutingRecord) -> np.ndarray:
    """Sum over exit 0's detections of p (1 - p), (n,): were scores probabilities, the variance of
    the number of right ones."""
    return np.array(
        [sum(score * (1 - score) for score in scores) for scores in _first_scores(record)]
    )


def variance_by_class(record: RoutingRecord) -> np.ndarray:
    """`variance_of_scores`, each detection by the weight of its class (`class_weights`), (n,): a
    doubt of a rare class moves AP more than one of a frequent class. Nothing is fitted."""
    return variances(record.detections[0], first_weights(record))


def detection_count(record: RoutingRecord) -> np.ndarray:
    """Number of exit 0's detections over `SURE`, (n,)."""
    return np.array(
        [sum(score > SURE for score in scores) for scores in _first_scores(record)], float
    )


def image_entropy(record: RoutingRecord) -> np.ndarray:
    """Entropy of the image's gray levels, in bits, (n,)."""
    return _column(record, 'entropy')


def true_objects(record: RoutingRecord) -> np.ndarray:
    """Number of annotated objects, (n,)."""
    return _column(record, 'objects')


def true_loss_difference(record: RoutingRecord) -> np.ndarray:
    """The first exit's loss minus the last's, as the heads average it, (n,)."""
    losses = _column(record, 'losses')
    return losses[:, 0] - losses[:, -1]


def true_loss_difference_by_objects(record: RoutingRecord) -> np.ndarray:
    """`true_loss_difference` times the number of objects: the sum over objects, as AP counts,
    (n,)."""
    return true_loss_difference(record) * true_objects(record)


def fit_adaptive_feeding(record: RoutingRecord, benefit: Sequence[float]) -> Scorer:
    """A linear support vector machine on exit 0's detections, as in Adaptive Feeding (Zhou, ICCV
    2017).

    It tells images with a benefit above 0 from the others; their classes weigh the same. It sees
    score and size of the surest detections, the numbers of detections over some scores, and the sum
    of p (1 - p).

    Args:
        record (RoutingRecord): To fit to; images that the detectors were not trained on.
        benefit (Sequence[float]): AP of each image under the last exit minus under the first, (n,).

    Returns:
        Callable: ``record -> scores``, the signed distances from the plane, (n,).

    Raises:
        UsageError: If all images have a benefit, or none.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    gains = _checked(benefit, record) > 0
    if gains.all() or not gains.any():
        raise UsageError(
            f'{"all" if gains.all() else "none"} of the images gain by the last exit: Adaptive '
            'Feeding has nothing to tell apart'
        )
    machine = make_pipeline(
        StandardScaler(),
        LinearSVC(class_weight='balanced', dual=False, max_iter=10_000, random_state=0),
    )
    machine.fit(statistics(record.detections[0]), gains)
    return lambda other: machine.decision_function(statistics(other.detections[0]))


def fit_ridge(record: RoutingRecord, benefit: Sequence[float]) -> Scorer:
    """Ridge regression of the benefit on the pooled features, its penalty by leave-one-out.

    Args:
        record (RoutingRecord): To fit to, with ``features``; images that the detectors were not
            trained on.
        benefit (Sequence[float]): What each image gains by the last exit, (n,), in any unit.

    Returns:
        Callable: ``record -> scores``, predicted benefits, (n,).
    """
    return _fit_ridge(_features, record, benefit)


def fit_ridge_on_both(record: RoutingRecord, benefit: Sequence[float]) -> Scorer:
    """`fit_ridge` on the pooled features and on what exit 0 detects
    (`detection_features.features`)."""
    return _fit_ridge(_both, record, benefit)


def fit_ridge_on_detections(record: RoutingRecord, benefit: Sequence[float]) -> Scorer:
    """`fit_ridge` on what exit 0 detects (`detection_features.features`) alone."""
    return _fit_ridge(first_features, record, benefit)


def _fit_ridge(seen: Scorer, record: RoutingRecord, benefit: Sequence[float]) -> Scorer:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=_PENALTIES))
    model.fit(seen(record), _checked(benefit, record))
    return lambda other: model.predict(seen(other))


#: Name -> peer. Fitted ones take any benefit; what each learns in an analysis is its ``benefit``.
PEERS: dict[str, Peer] = {
    'doubt_of_best': Peer(doubt_of_best, (), "1 - exit 0's largest score", charged=True),
    'mean_doubt': Peer(mean_doubt, (), "1 - mean of exit 0's scores over 0.3", charged=True),
    'score_entropy': Peer(
        entropy_of_scores, (), "entropy of exit 0's scores, summed", charged=True
    ),
    'score_variance': Peer(
        variance_of_scores, (), "p (1 - p) of exit 0's scores, summed", charged=True
    ),
    'class_variance': Peer(
        variance_by_class,
        (),
        "p (1 - p) of exit 0's scores over the objects of their class, summed",
        charged=True,
    ),
    'detections': Peer(detection_count, (), "exit 0's detections over 0.3", charged=True),
    'adaptive_feeding': Peer(
        fit_adaptive_feeding,
        (),
        "Adaptive Feeding: linear SVM on exit 0's detections",
        fitted=True,
        charged=True,
        benefit='ap',
    ),
    'oric': Peer(
        fit_ridge_on_detections,
        (),
        "ORIC: its reward, by ridge regression on exit 0's detections",
        fitted=True,
        charged=True,
        benefit='reward',
    ),
    'image_entropy': Peer(image_entropy, ('entropy',), "entropy of the image's gray levels"),
    'ridge': Peer(
        fit_ridge,
        ('features',),
        'ridge regression on the pooled features',
        fitted=True,
        benefit='loss_objects',
    ),
    'ridge_by_class': Peer(
        fit_ridge_on_both,
        ('features',),
        "ridge regression on the pooled features and exit 0's detections, by class",
        fitted=True,
        charged=True,
        benefit='ap_class',
    ),
    'objects': Peer(true_objects, ('objects',), 'true number of objects', reference=True),
    'loss': Peer(
        true_loss_difference, ('losses',), 'true loss difference, averaged', reference=True
    ),
    'loss_objects': Peer(
        true_loss_difference_by_objects,
        ('losses', 'objects'),
        'true loss difference times objects',
        reference=True,
    ),
    'loss_class': Peer(
        None,
        ('losses',),
        'true loss difference times objects, by class',
        reference=True,
        benefit='loss_class',
    ),
    'ap_class': Peer(
        None, (), 'true difference of AP, by class', reference=True, benefit='ap_class'
    ),
    'reward': Peer(None, (), 'true reward by ORIC', reference=True, benefit='reward'),
}


def peer_scores(
    name: str,
    record: RoutingRecord,
    training: RoutingRecord | None = None,
    benefit: Sequence[float] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Scores of a record by any peer.

    Args:
        name (str): A key of `PEERS`.
        record (RoutingRecord): What to score.
        training (RoutingRecord, optional): Record that a fitted peer is fitted to. Without one,
            ``record`` itself is split: each image is scored by a fit to others.
        benefit (Sequence[float], optional): Benefits of the images of ``training``, else of
            ``record``; fitted peers need them. Of ``record`` for a reference that is its benefit.
        seed (int): Seed of the split. Defaults to 0.

    Returns:
        np.ndarray: (n,), large is hard.

    Raises:
        UsageError: If there is no such peer, or no benefit, or the record lacks what the peer
            needs.
    """
    if name not in PEERS:
        raise UsageError(f"no peer is named '{name}': choose from {', '.join(PEERS)}")
    peer = PEERS[name]
    require_columns(record, *peer.needs)
    if not peer.fitted and peer.function is not None:
        return peer.function(record)
    if benefit is None:
        raise UsageError(
            f"peer '{name}' is fitted: give the benefits of the images that it is fitted to"
            if peer.fitted
            else f"peer '{name}' is a benefit: give it"
        )
    if peer.function is None:
        return _checked(benefit, record)
    if training is None:
        return cross_fit(peer.function, record, benefit, seed=seed)
    require_columns(training, *peer.needs)
    if 'features' in peer.needs:
        widths = [source.features.shape[1] for source in (record, training)]
        if widths[0] != widths[1]:
            raise UsageError(
                f"peer '{name}' learns from {widths[1]} features per image, and these images have "
                f'{widths[0]}: record both by one detector'
            )
    return peer.function(training, benefit)(record)


def cross_fit(
    fit: Callable[[RoutingRecord, Sequence[float]], Scorer],
    record: RoutingRecord,
    benefit: Sequence[float],
    folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Scores of images by fits to the others, (n,).

    Each fold's scores are replaced by their ranks in the fold, in (0, 1): fits of different folds
    have no common scale.

    Args:
        fit (Callable): For example `fit_ridge`.
        record (RoutingRecord): What to fit to and to score.
        benefit (Sequence[float]): Of each of its images, (n,).
        folds (int): Number of parts, 2 to n. Defaults to 5.
        seed (int): Seed of the split. Defaults to 0.
    """
    benefit, images = _checked(benefit, record), len(record)
    if images < folds:
        raise UsageError(f'{images} images cannot be split into {folds} parts: record more')
    scores = np.empty(images)
    for part in np.array_split(np.random.default_rng(seed).permutation(images), folds):
        rest = np.setdiff1d(np.arange(images), part)
        part_scores = fit(record.take(rest), benefit[rest])(record.take(part))
        scores[part] = _ranks(part_scores)
    return scores


def is_charged(name: str, record: RoutingRecord) -> bool:
    """Whether a peer runs more on hard images of a record than the detector does; see
    `peer_gflops`."""
    return PEERS[name].charged and not record.provenance.get('merge')


def peer_gflops(name: str, record: RoutingRecord, branch_gflops: float | None = None) -> float:
    """GFLOPs that a peer adds to each *hard* image.

    A peer that looks at exit 0's detections has run branch 0, neck and head, on every image. Easy
    images need that anyway, and all where exits are merged; else to a hard one it is added. Boxes
    and losses being there, the scores themselves are free.

    Args:
        name (str): A key of `PEERS`.
        record (RoutingRecord): Its provenance may say ``branch0_gflops``.
        branch_gflops (float, optional): GFLOPs of branch 0. Defaults to the record's.

    Returns:
        float: GFLOPs per hard image, 2 x multiply-adds; 0 for references, which cannot be run at
            all.

    Raises:
        UsageError: If the peer is charged and nobody says what branch 0 costs.
    """
    if not is_charged(name, record):
        return 0.0
    if branch_gflops is None:
        branch_gflops = record.provenance.get('branch0_gflops')
    if branch_gflops is None:
        raise UsageError(
            f"peer '{name}' runs branch 0 on every image, and the record does not say what that "
            'costs: record anew by tools/record.py'
        )
    return float(branch_gflops)


def _first_scores(record: RoutingRecord) -> list:
    """Scores of exit 0's detections, a list per image, the surest first."""
    first = record.detections[0]
    return [
        sorted(first.scores[first.rows(row)].tolist(), reverse=True) for row in range(len(record))
    ]


def _coin_entropy(probabilities: np.ndarray) -> np.ndarray:
    inside = np.clip(probabilities, 1e-12, 1 - 1e-12)  # p log p goes to 0
    return -(inside * np.log2(inside) + (1 - inside) * np.log2(1 - inside))


def _column(record: RoutingRecord, name: str) -> np.ndarray:
    require_columns(record, name)
    return record.column(name).astype(float)


def _features(record: RoutingRecord) -> np.ndarray:
    require_columns(record, 'features')
    return record.features.astype(float)


def _both(record: RoutingRecord) -> np.ndarray:
    return np.hstack([_features(record), first_features(record)])


def _checked(benefit: Sequence[float], record: RoutingRecord) -> np.ndarray:
    benefit = np.asarray(benefit, float)
    if benefit.shape != (len(record),):
        raise UsageError(f'{len(record)} images need as many benefits, got {benefit.shape}')
    if not np.isfinite(benefit).all():
        raise UsageError('some benefits are not finite')
    return benefit


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks over their number, in (0, 1); equal values share a rank."""
    from scipy.stats import rankdata

    return (rankdata(values) - 0.5) / len(values)
