"""Routers for pictures without annotations: how much worse they are, docs/published_weights.md.

    python experiments/real_truth.py router.npz test.npz

Fits a router to the first record, to AP by its annotations and by confident detections of its last
exit, as tools/make_dynamic.py does without annotations; prints AP on the second record, by its
annotations, at three hard shares. Records are of two exits (experiments/real_records.py).
"""

import argparse
import json
import tempfile
from collections.abc import Sequence

import numpy as np

from dynamicdet.datasets.coco_folder import confident_annotations
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.cross_fitting import difficulties_by
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import RoutingRecord, read_record
from dynamicdet.routing.router_fitting import features_of_record, fit_router, gains_of_record

SHARES = (0.25, 0.5, 0.75)
#: Scores from which on a detection stands for the truth.
SCORES = (0.2, 0.3, 0.5)
#: Seeds of routers, draws of random routing, resamples of the pictures.
SEEDS, DRAWS, RESAMPLES = 3, 20, 100


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('fitted_to', help='record to which routers are fitted')
    parser.add_argument('test', help='record whose figures count')
    return parser.parse_args()


def truth_of(record: RoutingRecord):
    """Ground truth of a record."""
    return read_truth(record.provenance['ann_file'], record.provenance.get('categories') or None)


def confident_truth(record: RoutingRecord, truth, score: float):
    """The last exit's detections from a score on, as ground truth."""
    content = dict(truth.dataset, annotations=[])
    detections = {key: record.detections[-1][row] for row, key in enumerate(record.ids.tolist())}
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(confident_annotations(content, detections, score), file)
        file.flush()
        return read_truth(file.name)


def curve(
    mixtures: Mixtures, scores: np.ndarray, weights: Sequence[int] | None = None
) -> np.ndarray:
    """AP at each of `SHARES`, the pictures of the largest scores hard."""
    order, aps = np.argsort(-scores, kind='stable'), []
    for share in SHARES:
        choice = np.zeros(len(scores), int)
        choice[order[: round(share * len(scores))]] = 1
        aps.append(mixtures.ap(choice, weights))
    return np.array(aps)


def main() -> None:
    """Print a row for each truth."""
    args = parse_args()
    fitted_to, test = read_record(args.fitted_to), read_record(args.test)
    truth, mixtures = truth_of(fitted_to), Mixtures(test, truth_of(test))
    ends = [mixtures.ap(np.full(len(test), exit)) for exit in (0, 1)]
    print(f'exits: {ends[0]:.2f} and {ends[1]:.2f} AP on {len(test)} pictures', flush=True)
    draws = np.random.default_rng(0)
    random = [curve(mixtures, draws.random(len(test))) for _ in range(DRAWS)]
    print('random routing', np.mean(random, axis=0).round(2), flush=True)
    resamples = bootstrap_weights(len(test), RESAMPLES)
    reference = None
    for name, score in (('annotations', None), *((f'score {limit}', limit) for limit in SCORES)):
        objects = truth if score is None else confident_truth(fitted_to, truth, score)
        gains = gains_of_record(fitted_to, 'ap', objects)
        fits = [
            fit_router(features_of_record(fitted_to), gains, 'ap', seed=seed)
            for seed in range(SEEDS)
        ]
        scores = [difficulties_by(fit.state, features_of_record(test)) for fit in fits]
        aps = np.mean([curve(mixtures, ranking) for ranking in scores], axis=0)
        drawn = np.array(
            [
                np.mean([curve(mixtures, ranking, drawn) for ranking in scores], axis=0)
                for drawn in resamples
            ]
        )
        reference = drawn if reference is None else reference
        less = [
            '({:+.2f} to {:+.2f})'.format(*confidence_interval(column))
            for column in (drawn - reference).T
        ]
        print(name, aps.round(2), 'less annotations', *less, flush=True)


if __name__ == '__main__':
    main()
