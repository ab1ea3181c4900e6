"""Two checks of gains by class for experiments/real.md.

python experiments/real_classes.py constants RECORDS: other constants than 20, and sizes of boxes, on
the test pictures of experiments/real_records.py; true rewards, too.
python experiments/real_classes.py equal RECORD.npz: by class and not, on a record whose classes are
equally frequent, such as that of the demo's report; routers are cross-fitted. Seed 0.
"""

import argparse
from pathlib import Path

import numpy as np
from real_coco import Judge
from scipy.stats import rankdata

from dynamicdet import cli
from dynamicdet.reports.routing_analysis_curves import all_benefits, with_class_objects
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.class_weights import class_weights, count_objects
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.peers import (
    cross_fit,
    fit_ridge_on_both,
    variance_by_class,
    variance_of_scores,
)
from dynamicdet.routing.record import read_record
from dynamicdet.routing.rewards import marginal_rewards

CONSTANTS = (1, 5, 20, 50, 100, 400, 1e9)
#: Sides of boxes, pixels, up to which a detection counts fully.
SIDE = 64
SHARES = (0.25, 0.5, 0.75)


def constants(records: Path) -> None:
    """AP at the budgets of `real_coco`."""
    with cli.silence():
        coco, fitted = (read_truth(str(records / f'{name}.json')) for name in ('test', 'router'))
    judge = Judge(read_record(records / 'test.npz'), coco, 0)

    def say(name: str, scores: np.ndarray, charged: bool) -> None:
        aps = judge.judge(scores, charged, False).values()
        print(f'{name:24}' + '  '.join(f'{ap[0]:.2f}' for ap in aps), flush=True)

    mixtures, first = judge.mixtures, judge.record.detections[0]
    easy, hard = mixtures.category_ap() * mixtures.objects
    place = np.searchsorted(sorted(coco.getCatIds()), first.categories)
    scores = first.scores.astype(float)
    counts = count_objects(fitted, fitted.getImgIds()).sum(axis=0)
    for constant in CONSTANTS:
        say(
            f'true, {constant:g}',
            (hard - easy) @ class_weights(mixtures.objects.sum(0), constant),
            False,
        )
        each = scores * (1 - scores) * class_weights(counts, constant)[place]
        say(f'rule, {constant:g}', np.bincount(first.images, each, minlength=len(first)), True)
    sides = np.sqrt(first.boxes[:, 2] * first.boxes[:, 3])
    each = (
        scores * (1 - scores) * class_weights(counts)[place] * np.minimum(1, SIDE / sides.clip(8))
    )
    say('rule by size', np.bincount(first.images, each, minlength=len(first)), True)
    say('true rewards', marginal_rewards(judge.record, coco), False)


def equal(path: Path) -> None:
    """AP in the mean over `SHARES`."""
    record = read_record(path)
    with cli.silence():
        coco = read_truth(record.provenance['ann_file'], record.provenance.get('categories'))
    mixtures, weights = Mixtures(record, coco), bootstrap_weights(len(record), 100, 0)
    record = with_class_objects(record, record, coco)
    gained = all_benefits(record, coco, mixtures)

    def aps(scores: np.ndarray) -> np.ndarray:
        ranks = rankdata(-scores, 'ordinal')
        choices = [(ranks <= round(share * len(scores))).astype(int) for share in SHARES]
        each = [
            [mixtures.ap(choice), *(mixtures.ap(choice, resample) for resample in weights)]
            for choice in choices
        ]
        return np.mean(each, axis=0)

    def say(name: str, by_class: np.ndarray, plain: np.ndarray) -> None:
        difference = aps(by_class) - aps(plain)
        low, high = confidence_interval(difference[1:])
        print(f'{name:24}{difference[0]:+.2f} ({low:+.2f} to {high:+.2f})', flush=True)

    say('rule', variance_by_class(record), variance_of_scores(record))
    for by_class, plain in (('ap_class', 'ap'), ('loss_class', 'loss_objects')):
        say(f'true: {plain}', gained[by_class], gained[plain])
        fits = [cross_fit(fit_ridge_on_both, record, gained[name]) for name in (by_class, plain)]
        say(f'ridge: {plain}', *fits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('check', choices=['constants', 'equal'])
    parser.add_argument('path', type=Path)
    args = parser.parse_args()
    cli.prepare()
    (constants if args.check == 'constants' else equal)(args.path)


if __name__ == '__main__':
    cli.run(main)
