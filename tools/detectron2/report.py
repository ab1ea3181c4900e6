"""Record what every exit of a dynamic Detectron2 detector finds in its test data, and say what the
router is worth: record.npz, routing.json, routing.html and trade_off.png.

A config counts as of both steps: give that of step 1, and a checkpoint of step 2. A record that is
there already, of the same weights and data, is not made again. tools/analyze_routing.py, where
MMDetection is installed, takes the record as well.
"""

import argparse
from pathlib import Path

from detectron2_options import add_model_arguments, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--dataset', help='test data, by name: the first of DATASETS.TEST')
    parser.add_argument('--out-dir', required=True, help='folder for the record and the page')
    parser.add_argument('--bootstrap', type=int, default=200, help='resamples for intervals: 200')
    parser.add_argument(
        '--losses',
        action='store_true',
        help="record each exit's losses, too, which takes three times as long: for the diagnosis",
    )
    parser.add_argument('--record-only', action='store_true', help='make the record alone')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Record, analyze, and write the page."""
    from dynamicdet.files import write_atomically
    from dynamicdet.progress import progress
    from dynamicdet.reports.figures import png, trade_off_figure
    from dynamicdet.reports.routing_analysis import analyze_routing, two_exit_record, write_analysis
    from dynamicdet.reports.routing_analysis_text import format_analysis
    from dynamicdet.routing.evaluation import read_truth
    from dynamicdet.routing.record import write_record
    from dynamicdet_detectron2.building import load_model
    from dynamicdet_detectron2.data import every_test_image
    from dynamicdet_detectron2.measuring import known_record, record_exits

    cfg, model = load_model(args.config, args.checkpoint, args.opts)
    name = args.dataset or cfg.DATASETS.TEST[0]
    path = Path(args.out_dir) / 'record.npz'
    record = known_record(path, model, name)
    if record is None:
        batches = every_test_image(cfg, name, annotated=args.losses)
        record = record_exits(model, batches, name, progress, args.checkpoint, args.config)
        write_record(record, path)
    if args.record_only:
        print(f'{len(record)} images recorded in {path}')
        return
    record = two_exit_record(record)
    truth = read_truth(record.provenance['ann_file'], record.provenance['categories'] or None)
    calibration = model.difficulties.tolist()
    analysis = analyze_routing(record, truth, bootstrap=args.bootstrap, calibration=calibration)
    figure = trade_off_figure(analysis['rows'], analysis['baselines']['points'])
    write_atomically(png(figure), Path(args.out_dir) / 'trade_off.png')
    page = write_analysis(record, truth, analysis, args.out_dir)
    print(format_analysis(analysis))
    print(f'\nThe same with pictures: {page}')


if __name__ == '__main__':
    run(main, parse_args())
