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
from real_records import stock_config
from scipy.stats import rankdata

from dynamicdet import cli
from dynamicdet.files import write_atomically
from dynamicdet.measuring.baselines import Baseline, record_baseline
from dynamicdet.reports.routing_analysis_baselines import baseline_front, front_shares
from dynamicdet.reports.routing_analysis_curves import all_benefits, with_class_objects
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.detection_features import first_features
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.peers import PEERS, peer_scores
from dynamicdet.routing.record import RoutingRecord, read_record
from dynamicdet.routing.router_fitting import fit_ridge_router, fit_router

#: Mean GFLOPs per picture at which routers are compared.
BUDGETS = (0.84, 1.05, 1.27, 1.7)
#: Sides of the squares that plain detectors see.
SIZES = (320, 416, 512, 640)
RESAMPLES, SEED = 200, 0
#: What is fitted: gains of `all_benefits`.
GAINS = ('loss', 'loss_objects', 'loss_class', 'ap', 'ap_class', 'reward')

Scores = tuple[np.ndarray, bool]


def seen(record: RoutingRecord) -> dict[str, np.ndarray]:
    """What routers may see of each picture: name -> (n, d)."""
    detections = first_features(record).astype(np.float32)
    return dict(
        maps=record.features, detections=detections, both=np.hstack([record.features, detections])
    )


def all_scores(
    fitted: tuple[RoutingRecord, COCO], judged: tuple[RoutingRecord, COCO]
) -> Iterator[tuple[str, Scores]]:
    """Name, scores of the judged pictures, and whether exit 0's neck and head run on each."""
    source, truth = (all_benefits(*one, Mixtures(*one)) for one in (fitted, judged))
    inputs, others = seen(fitted[0]), seen(judged[0])
    for name, peer in PEERS.items():
        if peer.fitted or peer.reference:
            continue
        yield f'rule: {name}', (peer_scores(name, judged[0]), peer.charged)
    for name in ('ap', *GAINS[1:3], 'ap_class', 'reward'):
        yield f'true: {name}', (truth[name], False)
    yield (
        'adaptive_feeding',
        (peer_scores('adaptive_feeding', judged[0], fitted[0], source['ap']), True),
    )
    for gain in GAINS:
        for what in inputs:
            for target in ('gain', 'rank'):
                fit = fit_ridge_router(
                    inputs[what], source[gain], dict(type=target, gain='ap'), seed=SEED
                )
                yield (
                    f'ridge: {what}, {gain}, {target}',
                    (_logits(fit, others[what]), what != 'maps'),
                )
    for gain in ('loss', 'loss_objects', 'ap', 'ap_class'):
        for objective in ('paper', 'rank'):
            fit = fit_router(
                inputs['maps'], source[gain], dict(type=objective, gain='ap'), seed=SEED
            )
            yield f'layers: maps, {gain}, {objective}', (_logits(fit, others['maps']), False)


def _logits(fit, features: np.ndarray) -> np.ndarray:
    state = {name: value.double().numpy() for name, value in fit.state.items()}
    inputs = (features - state['mean']) / state['std']
    hidden = np.maximum(inputs @ state['fc1.weight'].T + state['fc1.bias'], 0)
    return (hidden @ state['fc2.weight'].T + state['fc2.bias'])[:, 0]


class Judge:
    """AP of routers and of plain detectors at equal GFLOPs, on the same resamples."""

    def __init__(
        self, record: RoutingRecord, coco: COCO, plain: Mapping[str, RoutingRecord]
    ) -> None:
        self.record, self.mixtures = record, Mixtures(record, coco)
        self.weights = bootstrap_weights(len(record), RESAMPLES, SEED)
        self.plain = {name: one.gflops[0] for name, one in plain.items()}
        every = [one.detections[0] for one in plain.values()]
        plain_mixtures = Mixtures(replace(record, detections=every, view=None), coco)
        self.plain_aps = np.array(
            [
                _aps(plain_mixtures, np.full(len(record), at), self.weights)
                for at in range(len(every))
            ]
        )

    def baseline_front(self, gflops: float) -> np.ndarray:
        """Of plain detectors, (1 + B,), on the record itself and on each resample."""
        costs = np.array(list(self.plain.values()))
        kept = baseline_front(self.plain_aps[:, 0], costs)
        return front_shares(costs[kept], gflops) @ self.plain_aps[kept]

    def choice(self, scores: np.ndarray, charged: bool, gflops: float) -> np.ndarray:
        """As many of the hardest pictures at the last exit as the budget pays for."""
        easy, hard = self.record.gflops
        if charged:
            hard += float(self.record.provenance['branch0_gflops'])
        count = round(len(scores) * min(1.0, max(0.0, (gflops - easy) / (hard - easy))))
        return (rankdata(-scores, 'ordinal') <= count).astype(int)

    def judge_router(self, scores: np.ndarray, charged: bool) -> dict:
        """At each budget: AP, and by how much that is above the front, with its interval."""
        found = {}
        for gflops in BUDGETS:
            aps = _aps(self.mixtures, self.choice(scores, charged, gflops), self.weights)
            leads = aps - self.front(gflops)
            low, high = confidence_interval(leads[1:])
            found[f'{gflops:g}'] = dict(
                ap=float(aps[0]),
                lead=float(leads[0]),
                low=low,
                high=high,
                aps=aps.round(4).tolist(),
            )
        return found


def _aps(mixtures: Mixtures, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.array([mixtures.ap(choice), *(mixtures.ap(choice, own) for own in weights)])


def run(records: Path, weights: str, say: Callable[[str], None] = print) -> dict:
    """All numbers."""
    pairs = {}
    for split in ('router', 'test'):
        record = read_record(records / f'{split}.npz')
        with cli.silence():
            pairs[split] = record, read_truth(str(records / f'{split}.json'))
    fitted = with_class_objects(pairs['router'][0], *pairs['router']), pairs['router'][1]
    judged = with_class_objects(pairs['test'][0], *pairs['router']), pairs['test'][1]
    plain = {}
    for size in SIZES:
        cfg = stock_config(records / 'test.json', size)
        baseline = Baseline(cfg, weights, size, f'plain {size}')
        plain[str(size)] = record_baseline(
            baseline, judged[0], cli.progress, folder=records / 'test_baselines'
        )
    judge = Judge(*judged, plain)
    found = dict(
        fitted=len(fitted[0]),
        judged=len(judged[0]),
        gflops=list(judged[0].gflops),
        branch0=judged[0].provenance['branch0_gflops'],
        exits=[judge.mixtures.ap(np.full(len(judged[0]), exit)) for exit in (0, 1)],
        plain={
            name: dict(gflops=gflops, ap=float(own[0]), interval=confidence_interval(own[1:]))
            for (name, gflops), own in zip(judge.plain.items(), judge.plain_aps)
        },
        front={f'{gflops:g}': float(judge.front(gflops)[0]) for gflops in BUDGETS},
        routers={},
    )
    for name, (scores, charged) in all_scores(fitted, judged):
        found['routers'][name] = judge.judge(scores, charged)
        rows = found['routers'][name].values()
        say(f'{name:45}' + '  '.join(f'{row["ap"]:.2f} ({row["lead"]:+.2f})' for row in rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('records', type=Path)
    parser.add_argument('weights')
    parser.add_argument('--out', type=Path, default=Path('real_coco.json'))
    args = parser.parse_args()
    cli.prepare()
    found = run(args.records, args.weights, lambda line: print(line, flush=True))
    write_atomically(json.dumps(found).encode(), args.out)


if __name__ == '__main__':
    cli.run(main)
