"""Show what a dynamic detector gains: record every image through every exit, as tools/record.py
does, and analyze the record, as tools/analyze_routing.py does, with the thresholds of the
checkpoint's calibration.

Prints tables and a diagnosis; writes report.html, the page, report.json, its numbers, trade_off.png
and record.npz.
"""

import argparse
import sys
from pathlib import Path

from dynamicdet_options import add_baseline_argument, add_common_arguments, add_record_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of step 2')
    add_common_arguments(parser)
    parser.add_argument('--out-dir', help='where the page goes; WORK_DIR/report by default')
    add_record_arguments(parser, 'val', 'test')
    add_baseline_argument(parser)
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.measuring.baselines import parse_baselines, record_baseline
from dynamicdet.reports.routing_analysis import analyze_routing, two_exit_record
from dynamicdet.reports.routing_analysis_text import share_miss_sentences
from dynamicdet.routing.evaluation import read_truth


def main() -> None:
    """Write the report of a detector."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_record(args, cfg)
    baselines = parse_baselines(args.baseline, cli.read_config)
    out_dir = Path(args.out_dir or Path(cfg.work_dir) / 'report')
    cli.make_folder(str(out_dir))
    model, loader, record = cli.make_record(args, cfg, out_dir / 'record.npz')
    plain = {
        baseline.name: record_baseline(
            baseline,
            record,
            cli.progress,
            args.device,
            out_dir / 'record_baselines',
            (model, loader.dataset),
        )
        for baseline in baselines
    }
    record = two_exit_record(record)
    coco = read_truth(loader.dataset.ann_file, loader.dataset.cat_ids)
    analysis = analyze_routing(
        record,
        coco,
        say=cli.say,
        calibration=model.difficulties.tolist(),
        baselines=plain,
        by_class=model.objective.by_class,
    )
    cli.publish_analysis(record, coco, analysis, out_dir, name='report', with_figure=True)
    for miss in share_miss_sentences(analysis['calibrated']):
        print(f'warning: {miss}', file=sys.stderr)


if __name__ == '__main__':
    cli.run(main)
