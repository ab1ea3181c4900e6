"""Say what the router of a dynamic Detectron2 detector is worth, from a record that
tools/detectron2/record.py made: routing.json, routing.html and trade_off.png. Runs no model but
those of --baseline.
"""

import argparse
from pathlib import Path

from detectron2_options import add_analysis_arguments, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('record', help='record of the test data')
    parser.add_argument('--val-record', help='record of the validation data, for thresholds')
    parser.add_argument('--dataset', help="the recorded data's name, for --baseline")
    parser.add_argument('--out-dir', help="where the page goes: a folder of the record's name")
    add_analysis_arguments(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Analyze, and write the page."""
    from dynamicdet.errors import UsageError
    from dynamicdet.reports.routing_analysis import two_exit_record
    from dynamicdet.routing.evaluation import read_truth
    from dynamicdet.routing.record import read_record, require_of_detector
    from dynamicdet_detectron2.reporting import publish, run_baselines

    record = two_exit_record(read_record(args.record))
    facts, validation = record.provenance, None
    if args.val_record:
        other = two_exit_record(read_record(args.val_record))
        require_of_detector(
            other.provenance,
            other.exits,
            2,
            str(facts.get('checkpoint', '')),
            str(facts.get('exits_digest', '')),
        )
        categories = other.provenance.get('categories') or None
        validation = other, read_truth(other.provenance['ann_file'], categories)
    if args.baseline and not (args.dataset or facts.get('dataset')):
        raise UsageError('the record does not name its data: give --dataset for --baseline')
    name = args.dataset or facts.get('dataset')
    baselines = run_baselines(args.baseline, record, name, Path(args.record).with_suffix(''))
    out_dir = args.out_dir or Path(args.record).with_suffix('')
    publish(record, out_dir, args.bootstrap, baselines=baselines, validation=validation)


if __name__ == '__main__':
    run(main, parse_args())
