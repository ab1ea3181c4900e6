"""Say what the router of a dynamic detector is worth, from a record that tools/record.py made.

Prints tables and a diagnosis; writes routing.json and routing.html, a page with the trade-off
curve, a slider over the threshold, and images. Runs no model but those of --baseline: seconds to
minutes.
"""

import argparse
import warnings
from pathlib import Path

from dynamicdet_options import add_baseline_argument


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('record', help='record of the test data, by tools/record.py')
    parser.add_argument(
        '--val-record',
        help='record of the validation data: thresholds chosen on it are tried on the other',
    )
    parser.add_argument(
        '--train-record',
        help='record of images that the detectors were trained on, for the diagnosis',
    )
    parser.add_argument(
        '--ann-file', help='annotations of the test data: what was recorded by default'
    )
    parser.add_argument('--val-ann-file', help='the same for the validation data')
    parser.add_argument(
        '--out-dir', help="where the page goes: a folder of the record's name beside it"
    )
    parser.add_argument(
        '--exits',
        nargs=2,
        type=int,
        default=[0, -1],
        metavar=('EASY', 'HARD'),
        help='the exits to choose between, where there are more than two: the first and the last',
    )
    parser.add_argument(
        '--bootstrap', type=int, default=200, help='resamples for 95 %% intervals: 200; 0 for none'
    )
    parser.add_argument('--seed', type=int, default=0, help='of resamples and random routing: 0')
    parser.add_argument(
        '--by-class',
        action='store_true',
        help='let oracles and the diagnosis count an object by how rare its class is, as AP does',
    )
    add_baseline_argument(parser)
    parser.add_argument('--device', default='cpu', help='where baselines run and are timed: cpu')
    parser.add_argument('--title', default='What routing is worth', help='of the page')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from pycocotools.coco import COCO

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.measuring.baselines import parse_baselines, record_baseline
from dynamicdet.reports.routing_analysis import analyze_routing, two_exit_record
from dynamicdet.routing.evaluation import read_truth
from dynamicdet.routing.record import RoutingRecord, read_record, require_of_detector
from dynamicdet.timing import machine_of, timed_elsewhere


def load_annotations(record: RoutingRecord, ann_file: str, option: str) -> COCO:
    """Ground truth of a record, or a `UsageError` that names the option."""
    path = ann_file or record.provenance.get('ann_file', '')
    if not path or not Path(path).is_file():
        raise UsageError(f"there is no annotation file '{path}': name it by {option}")
    try:
        return read_truth(path, record.provenance.get('categories') or None)
    except UsageError as error:
        raise UsageError(f'{error}; or name another by {option}') from None


def load(path: str, ann_file: str, option: str, exits: list) -> tuple:
    """A record of two exits, and its ground truth."""
    record = two_exit_record(read_record(path), tuple(exits))
    return record, load_annotations(record, ann_file, option)


def run_baselines(record: RoutingRecord, baselines: list, args: argparse.Namespace) -> dict:
    """Records of plain detectors, by name; kept beside the record, so that each runs once."""
    if not baselines:
        return {}
    cli.require_device(args.device)
    elsewhere = timed_elsewhere(record.provenance, machine_of(args.device))
    if elsewhere:
        warnings.warn(f'do not compare times with plain detectors: {elsewhere}')
    folder = Path(args.record).with_suffix('')
    folder = folder.with_name(f'{folder.name}_baselines')
    return {
        baseline.name: record_baseline(baseline, record, cli.progress, args.device, folder)
        for baseline in baselines
    }


def main() -> None:
    """Analyze a router on a record and write the page."""
    args = parse_args()
    cli.prepare()
    for name in ('bootstrap', 'seed'):
        if getattr(args, name) < 0:
            raise UsageError(f'--{name} must be 0 or more')
    record, coco = load(args.record, args.ann_file, '--ann-file', args.exits)
    val = (
        load(args.val_record, args.val_ann_file, '--val-ann-file', args.exits)
        if args.val_record
        else None
    )
    if val and val[0].provenance['exits'] != record.provenance['exits']:
        raise UsageError(
            'the validation record has other exits than the test record: record both by the same '
            'detector'
        )
    training = (
        two_exit_record(read_record(args.train_record), tuple(args.exits))
        if args.train_record
        else None
    )
    others = [other for other in (val[0] if val else None, training) if other]
    facts = record.provenance
    for other in others:
        require_of_detector(
            other.provenance,
            other.exits,
            2,
            str(facts.get('checkpoint', '')),
            str(facts.get('exits_digest', '')),
        )
    baselines = parse_baselines(args.baseline, cli.read_config)
    out_dir = args.out_dir or str(Path(args.record).with_suffix(''))
    cli.make_folder(out_dir)
    analysis = analyze_routing(
        record,
        coco,
        val,
        args.bootstrap,
        args.seed,
        training,
        say=cli.say,
        baselines=run_baselines(record, baselines, args),
        by_class=args.by_class,
    )
    cli.publish_analysis(record, coco, analysis, out_dir, args.title)


if __name__ == '__main__':
    cli.run(main)
