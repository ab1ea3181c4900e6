"""Compare all ways to exit early, on a record of test videos (tools/record_video.py): AP against
GFLOPs and latency of each gate, of fixed exits and of the oracle. Prints a table; writes gates.json
and gates.png.
"""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('record', help='record of the test videos')
    parser.add_argument('--ann-file', help='its annotations: what was recorded by default')
    parser.add_argument(
        '--val-record', help='record of other videos, on which thresholds are chosen'
    )
    parser.add_argument('--val-ann-file', help='its annotations')
    parser.add_argument(
        '--fit-record', help='record that halting gates are fitted to; without, there are none'
    )
    parser.add_argument('--fit-ann-file', help='its annotations')
    parser.add_argument(
        '--gate-of',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help="also the config's gate, as it was trained",
    )
    parser.add_argument(
        '--by', choices=['gflops', 'latency'], default='latency', help='cost to save: latency'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the fits: 0')
    parser.add_argument('--out-dir', help="where files go: a folder of the record's name beside it")
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.routing.record import require_of_detector
from dynamicdet.video.gate_analysis import (
    RULES,
    analyze_gates,
    fitted_gates,
    format_gate_analysis,
    load_truth,
    write_gate_analysis,
)
from dynamicdet.video.record import read_video_record
from dynamicdet.video.recording import gate_of_checkpoint
from mmdet.registry import MODELS


def load(path: str, ann_file: str, exits: int, checkpoint: str) -> tuple:
    """A record of videos and its ground truth; checks that it is of this checkpoint."""
    record = read_video_record(path)
    require_of_detector(record['provenance'], len(record['gflops']), exits, checkpoint)
    return record, load_truth(record, ann_file)


def say(what: str) -> None:
    """Print what is done now, to stderr."""
    print(f'{what} ...', file=sys.stderr, flush=True)


def main() -> None:
    """Analyze gates on records and write tables and figures."""
    args = parse_args()
    cli.prepare()
    if args.seed < 0:
        raise UsageError('--seed must be 0 or more')
    record = read_video_record(args.record)
    exits, detector_file = len(record['gflops']), str(record['provenance'].get('checkpoint', ''))
    coco = load_truth(record, args.ann_file)
    out_dir = args.out_dir or str(Path(args.record).with_suffix(''))
    cli.make_folder(out_dir)
    val = (
        load(args.val_record, args.val_ann_file, exits, detector_file) if args.val_record else None
    )
    gates = {name: MODELS.build(config) for name, config in RULES.items()}
    if args.gate_of:
        config, checkpoint = args.gate_of
        cfg = cli.load_config(argparse.Namespace(config=config, cfg_options=None))
        gates["the config's"] = gate_of_checkpoint(cfg, checkpoint)
    if args.fit_record:
        say('fitting')
        gates.update(
            fitted_gates(
                *load(args.fit_record, args.fit_ann_file, exits, detector_file), seed=args.seed
            )
        )
    analysis = analyze_gates(record, coco, gates, val, args.by, say=say)
    picture = write_gate_analysis(analysis, out_dir)
    print(format_gate_analysis(analysis))
    print(f'\nThe same as a picture: {picture}')


if __name__ == '__main__':
    cli.run(main)
