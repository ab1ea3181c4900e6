"""What merged exits are worth on records of real pictures, nothing run again.

The scaling of scores is fitted to one record, figures are of another:

    python experiments/real_merging.py router.npz test.npz --out merging.json

Records are of two exits that were not merged (experiments/real_records.py, or tools/record.py).
IoUs are the package's own, or, by --choose-ious, the best on the first record. At half hard the pictures go on in
which exit 0 is least sure, by class: the sum of p (1 - p) / (objects of the class + 20) over its
detections, with the objects of the first record; no router is fitted.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from dynamicdet import cli
from dynamicdet.files import write_atomically
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.merging import merge_record, platt_scaling_of
from dynamicdet.routing.record import RoutingRecord, read_record

#: What is tried: kinds and, of each, IoUs.
KINDS = dict(
    nms=dict(type='nms'),
    wbf=dict(type='wbf', conf_type='max'),
    wbf_avg=dict(type='wbf', conf_type='avg'),
)
IOUS = (0.45, 0.55, 0.65, 0.75)
#: Pictures of a class with few objects count as if there were so many more.
RARE = 20


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('chosen_on', help='record to which the scaling is fitted')
    parser.add_argument('test', help='record whose figures count')
    parser.add_argument('--choose-ious', action='store_true', help='try IoUs on the first record')
    parser.add_argument('--bootstrap', type=int, default=200, help='resamples of the pictures: 200')
    parser.add_argument('--seed', type=int, default=0, help='of the resamples: 0')
    parser.add_argument('--out', default='merging.json', help='file to write: merging.json')
    return parser.parse_args()


def truth_of(record: RoutingRecord):
    """Ground truth of a record."""
    return read_truth(record.provenance['ann_file'], record.provenance.get('categories') or None)


def doubt_by_class(record: RoutingRecord, coco) -> np.ndarray:
    """The sum of p (1 - p) / (objects of the class + 20) over exit 0's detections, (n,)."""
    objects = {category: len(coco.getAnnIds(catIds=[category])) for category in coco.getCatIds()}
    first = record.detections[0]
    weights = np.array([1 / (objects[category] + RARE) for category in first.categories.tolist()])
    doubt = first.scores * (1 - first.scores) * weights
    return np.bincount(first.images, doubt, len(record))


def half_hard(scores: np.ndarray) -> np.ndarray:
    """The half of the pictures with the largest scores, (n,), bool."""
    hard = np.zeros(len(scores), bool)
    hard[np.argsort(-scores, kind='stable')[: len(scores) // 2]] = True
    return hard


def aps(
    record: RoutingRecord, coco, scores: np.ndarray, resamples: Sequence[np.ndarray]
) -> dict[str, list[float]]:
    """AP all hard and half hard: of the record, then of each resample."""
    mixtures = Mixtures(record, coco)
    return {
        name: [mixtures.ap(choice), *(mixtures.ap(choice, weights) for weights in resamples)]
        for name, choice in (
            ('all_hard', np.ones(len(record), int)),
            ('half_hard', half_hard(scores)),
        )
    }


def ap_at(iou: float, kind: str, record: RoutingRecord, coco) -> float:
    """AP all hard where detections of two exits overlap above an IoU."""
    merged = merge_record(record, Merge.parse(dict(KINDS[kind], iou=iou)))
    return Mixtures(merged, coco).ap(np.ones(len(record), int))


def main() -> None:
    """Fit to one record, measure on the other, print a table and write all numbers."""
    args = parse_args()
    cli.prepare()
    chosen_on, test = read_record(args.chosen_on), read_record(args.test)
    cocos = truth_of(chosen_on), truth_of(test)
    scaling = platt_scaling_of(chosen_on, cocos[0])
    tried = {}
    for kind in cli.progress(list(KINDS) if args.choose_ious else [], 'IoUs'):
        tried[kind] = {iou: ap_at(iou, kind, chosen_on, cocos[0]) for iou in IOUS}
    rng = np.random.default_rng(args.seed)
    resamples = [
        np.bincount(rng.integers(0, len(test), len(test)), minlength=len(test))
        for _ in range(args.bootstrap)
    ]
    scores = doubt_by_class(test, cocos[0])
    ways = {'none': None}
    for kind, settings in KINDS.items():
        best = {'iou': max(tried[kind], key=tried[kind].get)} if tried else {}
        ways[kind] = Merge.parse(dict(settings, **best))
    rows, plain = [], None
    for name, merge in cli.progress(list(ways.items()), 'kinds'):
        for scaled in (False, True):
            merged = merge_record(test, merge, scaling if scaled else None)
            measured = aps(merged, cocos[1], scores, resamples)
            plain = plain or measured
            hard = half_hard(scores)
            row = dict(merge=str(merge) if merge else 'none', scaled=scaled)
            row['gflops'] = dict(all_hard=merged.gflops[1])
            row['gflops']['half_hard'] = float(np.mean(np.where(hard, *merged.gflops[::-1])))
            for share, values in measured.items():
                gained = np.array(values) - np.array(plain[share])
                low, high = np.percentile(gained[1:], (2.5, 97.5)) if args.bootstrap else (0, 0)
                row[share] = dict(
                    ap=values[0], gained=float(gained[0]), low=float(low), high=float(high)
                )
            rows.append(row)
            print(line_of(row), flush=True)
    results = dict(
        rows=rows,
        ious=tried,
        scaling=scaling,
        images=[len(chosen_on), len(test)],
        seed=args.seed,
        bootstrap=args.bootstrap,
        provenance=[chosen_on.provenance, test.provenance],
    )
    write_atomically(json.dumps(results, indent=1).encode(), args.out)
    print(f'scale and shift of the exits: {scaling}\nIoUs: {tried}\n{args.out}')


def line_of(row: dict) -> str:
    """A row of the table, as Markdown has it."""
    cells = [row['merge'], 'yes' if row['scaled'] else 'no']
    for share in ('half_hard', 'all_hard'):
        result = row[share]
        cells.append(f'{row["gflops"][share]:.2f}')
        cells.append(
            f'{result["ap"]:.1f} ({result["gained"]:+.2f}, {result["low"]:+.2f} to {result["high"]:+.2f})'
        )
    return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
    cli.run(main)
