"""Show what a dynamic detector gains: a table, and a page with the trade-off curve against random
routing, the difficulties, the easiest and hardest images, and both exits' AP by size.

One pass over the test set runs every image through both exits; every mix of the two follows from
it.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.building import build_loader, load_dynamic_detector, require_dynamic
from dynamicdet.datasets.config_datasets import require_one_coco
from dynamicdet.measuring.calibration import measure_gflops, passed, provenance, record_exits
from dynamicdet.measuring.latencies import measure_latencies
from dynamicdet.reports.analysis import pair_of
from dynamicdet.reports.report import (
    BY_CALIBRATION,
    BY_QUANTILE,
    format_table,
    misses,
    write_report,
)
from dynamicdet.routing.curve import Chance, by_calibration, trade_off
from dynamicdet.routing.evaluation import Mixtures, check_record, read_truth


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of step 2')
    cli.add_common_arguments(parser)
    parser.add_argument('--out-dir', help='where the page goes; WORK_DIR/report by default')
    parser.add_argument(
        '--split', choices=['val', 'test'], default='test', help='data: test by default'
    )
    parser.add_argument('--device', default=get_device(), help='device whose latencies count')
    return parser.parse_args()


def main() -> None:
    """Write the report of a detector."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    require_dynamic(cfg)
    cli.require_settings(cfg, f'{args.split}_dataloader')
    cli.require_device(args.device)
    dataset = require_one_coco(cfg, args.split, 'a report is made')
    cli.check_data(cfg, args.split, files=not args.no_data_check)
    model, _ = load_dynamic_detector(cfg, args.checkpoint, args.device)
    loader = build_loader(dict(cfg[f'{args.split}_dataloader'], dataset=dataset))
    record = dataclasses.replace(
        record_exits(model, loader, cli.progress),
        gflops=measure_gflops(model, loader.dataset),
        latencies=measure_latencies(model, loader.dataset, cli.progress),
        provenance=dict(
            provenance(cfg, args.checkpoint, loader.dataset, args.device), **passed(model, loader)
        ),
    )
    if model.num_exits > 2:
        # The page is about two: where easy and where hard images leave.
        record = pair_of(record)
    coco = read_truth(loader.dataset.ann_file, loader.dataset.cat_ids)
    check_record(record, coco)
    chance = Chance(Mixtures(record, coco))
    rows = trade_off(record, coco, progress=cli.counter('evaluations'), chance=chance)
    difficulties = model.difficulties.tolist()
    calibrated = by_calibration(record, chance, difficulties) if difficulties else []
    page = write_report(
        record, coco, args.out_dir or Path(cfg.work_dir) / 'report', rows, calibrated=calibrated
    )
    print(f'{BY_QUANTILE}\n\n{format_table(rows)}')
    if calibrated:
        print(f'\n{BY_CALIBRATION}\n\n{format_table(calibrated, calibrated=True)}')
    else:
        print(
            '\nThe checkpoint is not calibrated: there is no threshold to serve a hard share by '
            '(tools/calibrate.py)'
        )
    for miss in misses(calibrated):
        print(f'warning: {miss}', file=sys.stderr)
    print(f'\nThe same with pictures: {page}')


if __name__ == '__main__':
    cli.run(main)
