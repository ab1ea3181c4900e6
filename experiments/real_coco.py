"""Routing by image on real pictures, experiments/real.md: what counts, who sees what, and plain sizes.

python experiments/real_coco.py RECORDS WEIGHTS [--out FILE]

RECORDS is a folder of experiments/real_records.py, WEIGHTS the plain detector's. Routers are fitted
to router.npz and judged on test.npz, at the same GFLOPs as plain detectors of several sizes, on the
same bootstrap resamples. Seed 0. Writes one JSON file of numbers.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from real_records import LARGE, stock_config
from scipy.stats import rankdata

from dynamicdet import cli
from dynamicdet.files import write_atomically
from dynamicdet.measuring.baselines import Baseline, record_baseline
from dynamicdet.reports.routing_analysis_baselines import baseline_front, front_shares
from dynamicdet.reports.routing_analysis_curves import with_class_objects
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.detection_features import first_features
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.peers import PEERS, peer_scores
from dynamicdet.routing.record import RoutingRecord, read_record
from dynamicdet.routing.router_fitting import fit_ridge_router, fit_router
from dynamicdet.routing.strata import exit_benefits, exit_benefits_by_class

#: Mean GFLOPs per picture at which routers are compared.
BUDGETS = (0.84, 1.05, 1.27, 1.7)
#: Sides of the squares that plain detectors see.
SIZES = (320, 416, 512)
SEED = 0
#: Gains, of the last exit over the first.
GAINS = ('loss_objects', 'loss_class', 'ap', 'ap_class', 'reward')
#: Linear routers: what they see, the gain, and whether it or its rank is regressed.
FITS = (
    *(('detections', gain, target) for target in ('gain', 'rank') for gain in GAINS),
    *(('both', gain, 'gain') for gain in ('ap_class', 'ap', 'reward')),
    *(('maps', gain, 'gain') for gain in ('loss_class', 'loss_objects', 'ap_class')),
)
#: Those that have intervals.
COMPARED = (
    'rule: score_variance',
    'rule: class_variance',
    'true: ap',
    'true: ap_class',
    'true: reward',
    'ridge: detections, ap, gain',
    'ridge: detections, ap_class, gain',
    'ridge: both, ap, gain',
    'ridge: both, ap_class, gain',
    'ridge: maps, loss_objects, gain',
    'ridge: maps, loss_class, gain',
    'layers: maps, loss_objects, rank',
)
#: Pairs whose difference has one.
PAIRS = (
    ('rule: class_variance', 'rule: score_variance'),
    ('true: ap_class', 'true: ap'),
    ('ridge: detections, ap_class, gain', 'ridge: detections, ap, gain'),
    ('ridge: both, ap_class, gain', 'ridge: both, ap, gain'),
    ('ridge: maps, loss_class, gain', 'ridge: maps, loss_objects, gain'),
)

Scores = tuple[np.ndarray, bool]


def seen(record: RoutingRecord) -> dict[str, np.ndarray]:
    """What routers may see of each picture: name -> (n, d)."""
    detections = first_features(record).astype(np.float32)
    return dict(
        maps=record.features, detections=detections, both=np.hstack([record.features, detections])
    )


def all_scores(
    fitted: tuple[RoutingRecord, COCO],
    judged: tuple[RoutingRecord, COCO],
    judge: Mixtures,
    rewards: bool,
) -> Iterator[tuple[str, Scores]]:
    """Name, scores of the judged pictures, and whether exit 0's neck and head run on each."""
    inputs, others = seen(fitted[0]), seen(judged[0])
    for name, peer in PEERS.items():
        if peer.function and not (peer.fitted or peer.reference):
            yield f'rule: {name}', (peer_scores(name, judged[0]), peer.charged)
    source, truth = (
        gains(*pair, mixtures, rewards)
        for pair, mixtures in ((fitted, Mixtures(*fitted)), (judged, judge))
    )
    for name in truth:
        yield f'true: {name}', (truth[name], False)
    yield (
        'adaptive_feeding',
        (peer_scores('adaptive_feeding', judged[0], fitted[0], source['ap']), True),
    )
    for what, gain, target in FITS:
        if gain in source:
            fit = fit_ridge_router(
                inputs[what], source[gain], dict(type=target, gain='ap'), seed=SEED
            )
            yield f'ridge: {what}, {gain}, {target}', (_logits(fit, others[what]), what != 'maps')
    fit = fit_router(inputs['maps'], source['loss_objects'], 'rank', seed=SEED)
    yield 'layers: maps, loss_objects, rank', (_logits(fit, others['maps']), False)


def gains(
    record: RoutingRecord, coco: COCO, mixtures: Mixtures, rewards: bool
) -> dict[str, np.ndarray]:
    """Those of `GAINS`; rewards take minutes."""
    benefits = dict(exit_benefits(record, mixtures))
    benefits.update(exit_benefits_by_class(record, coco, mixtures, rewards))
    return {name: benefits[name] for name in GAINS if name in benefits}


def _logits(fit, features: np.ndarray) -> np.ndarray:
    state = {name: value.double().numpy() for name, value in fit.state.items()}
    inputs = (features - state['mean']) / state['std']
    hidden = np.maximum(inputs @ state['fc1.weight'].T + state['fc1.bias'], 0)
    return (hidden @ state['fc2.weight'].T + state['fc2.bias'])[:, 0]


class Judge:
    """AP of routers at equal GFLOPs, on the same resamples."""

    def __init__(self, record: RoutingRecord, coco: COCO, resamples: int) -> None:
        self.record, self.mixtures = record, Mixtures(record, coco)
        self.weights = bootstrap_weights(len(record), resamples, SEED)

    def choice(self, scores: np.ndarray, charged: bool, gflops: float) -> np.ndarray:
        """As many of the hardest pictures at the last exit as the budget pays for."""
        easy, hard = self.record.gflops
        if charged:
            hard += float(self.record.provenance['branch0_gflops'])
        count = round(len(scores) * min(1.0, max(0.0, (gflops - easy) / (hard - easy))))
        return (rankdata(-scores, 'ordinal') <= count).astype(int)

    def judge(self, scores: np.ndarray, charged: bool, intervals: bool) -> dict[str, np.ndarray]:
        """AP at each budget, and, if wanted, on each resample, (1 + B,)."""
        weights = self.weights if intervals else self.weights[:0]
        return {
            f'{gflops:g}': _aps(self.mixtures, self.choice(scores, charged, gflops), weights)
            for gflops in BUDGETS
        }


class Front:
    """Plain detectors on the same pictures and resamples, straight lines between."""

    def __init__(self, judge: Judge, coco: COCO, plain: Mapping[str, RoutingRecord]) -> None:
        record = judge.record
        self.gflops = {name: baseline.gflops[0] for name, baseline in plain.items()}
        every = [baseline.detections[0] for baseline in plain.values()]
        mixtures = Mixtures(replace(record, detections=every, view=None), coco)
        choices = [np.full(len(record), at) for at in range(len(every))]
        self.aps = np.array([_aps(mixtures, choice, judge.weights) for choice in choices])

    def at(self, gflops: float) -> np.ndarray:
        """(1 + B,), of the record itself and of each resample."""
        costs = np.array(list(self.gflops.values()))
        kept = baseline_front(self.aps[:, 0], costs)
        return front_shares(costs[kept], gflops) @ self.aps[kept]


def _aps(mixtures: Mixtures, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.array([mixtures.ap(choice), *(mixtures.ap(choice, resample) for resample in weights)])


def last_exit_alone(record: RoutingRecord) -> RoutingRecord:
    """The plain detector at the size of the last exit, which is it bit for bit, but that exit 0's
    backbone runs before."""
    easy, hard = record.gflops
    alone = hard - (easy - float(record.provenance['branch0_gflops']))
    return replace(record.take_exits([1, 1]), gflops=[alone] * 2)


def run(
    records: Path, weights: str, resamples: int, rewards: bool, say: Callable[[str], None] = print
) -> dict:
    """All numbers."""
    pairs = {}
    for split in ('router', 'test'):
        record = read_record(records / f'{split}.npz')
        with cli.silence():
            pairs[split] = record, read_truth(str(records / f'{split}.json'))
    fitted = with_class_objects(pairs['router'][0], *pairs['router']), pairs['router'][1]
    judged = with_class_objects(pairs['test'][0], *pairs['router']), pairs['test'][1]
    judge, routers = Judge(*judged, resamples), {}
    for name, (scores, charged) in all_scores(fitted, judged, judge.mixtures, rewards):
        routers[name] = judge.judge(scores, charged, name in COMPARED)
        say(f'{name:45}' + '  '.join(f'{aps[0]:.2f}' for aps in routers[name].values()))
    plain = {}
    for size in SIZES:
        cfg = stock_config(records / 'test.json', size)
        baseline = Baseline(cfg, weights, size, f'plain {size}')
        plain[str(size)] = record_baseline(
            baseline, judged[0], cli.progress, folder=records / 'test_baselines'
        )
    plain[str(LARGE)] = last_exit_alone(judged[0])
    front = Front(judge, judged[1], plain)
    return dict(
        fitted=len(fitted[0]),
        judged=len(judged[0]),
        gflops=list(judged[0].gflops),
        branch0=judged[0].provenance['branch0_gflops'],
        exits=[judge.mixtures.ap(np.full(len(judged[0]), exit)) for exit in (0, 1)],
        plain={
            name: dict(gflops=gflops, ap=float(aps[0]), interval=confidence_interval(aps[1:]))
            for (name, gflops), aps in zip(front.gflops.items(), front.aps)
        },
        front={f'{gflops:g}': float(front.at(gflops)[0]) for gflops in BUDGETS},
        routers={name: _rows(aps, front) for name, aps in routers.items()},
        pairs=[
            dict(first=first, second=second, **_difference(routers[first], routers[second]))
            for first, second in PAIRS
        ],
        resamples=resamples,
    )


def _rows(aps: Mapping[str, np.ndarray], front: Front) -> dict[str, dict]:
    """At each budget: AP, and by how much that is above the front, with its interval."""
    rows = {}
    for gflops, values in aps.items():
        leads = values - front.at(float(gflops))[: len(values)]
        low, high = confidence_interval(leads[1:])
        rows[gflops] = dict(ap=float(values[0]), lead=float(leads[0]), low=low, high=high)
    return rows


def _difference(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict:
    """At each budget, and in the mean over them: (value, low, high) of a difference of APs."""
    each = {gflops: first[gflops] - second[gflops] for gflops in first}
    rows = dict(each, mean=np.mean(list(each.values()), axis=0))
    return {name: (float(row[0]), *confidence_interval(row[1:])) for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('records', type=Path)
    parser.add_argument('weights')
    parser.add_argument('--out', type=Path, default=Path('real_coco.json'))
    parser.add_argument('--resamples', type=int, default=100, help='for intervals: 100')
    parser.add_argument('--rewards', action='store_true', help="with ORIC's, which take minutes")
    args = parser.parse_args()
    cli.prepare()
    results = run(
        args.records,
        args.weights,
        args.resamples,
        args.rewards,
        lambda line: print(line, flush=True),
    )
    write_atomically(json.dumps(results).encode(), args.out)


if __name__ == '__main__':
    cli.run(main)
