"""Record what every exit of a dynamic Detectron2 detector finds in its test data, and say what the
router is worth: record.npz, routing.json, routing.html and trade_off.png.

A config counts as of both steps: give that of step 1, and a checkpoint of step 2. A record that is
there already, of the same weights and data, is not made again. record.py and analyze_routing.py
beside this do the same in two steps.
"""

import argparse
from pathlib import Path

from detectron2_options import (
    add_analysis_arguments,
    add_model_arguments,
    add_record_arguments,
    run,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_record_arguments(parser)
    parser.add_argument('--out-dir', required=True, help='folder for the record and the page')
    add_analysis_arguments(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Record, analyze, and write the page."""
    from dynamicdet.progress import progress
    from dynamicdet.reports.routing_analysis import two_exit_record
    from dynamicdet_detectron2.building import load_model
    from dynamicdet_detectron2.measuring import make_record
    from dynamicdet_detectron2.reporting import publish, run_baselines

    cfg, model = load_model(args.config, args.checkpoint, args.opts)
    path = Path(args.out_dir) / 'record.npz'
    record = make_record(cfg, model, args, path, progress)
    baselines = run_baselines(args.baseline, record, args.dataset, path.with_suffix(''))
    calibration = model.difficulties.tolist()
    publish(two_exit_record(record), args.out_dir, args.bootstrap, calibration, baselines)


if __name__ == '__main__':
    run(main, parse_args())
