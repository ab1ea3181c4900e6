"""Run every image of a data set through every exit of a dynamic Detectron2 detector, and keep what
comes out in one file: detections, difficulties, the router's features, GFLOPs and latencies.

tools/detectron2/analyze_routing.py says from it what the router is worth; so does
tools/analyze_routing.py, where MMDetection is installed.
"""

import argparse

from detectron2_options import add_model_arguments, add_record_arguments, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_record_arguments(parser)
    parser.add_argument('--out', default='record.npz', help='file to write: record.npz')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Record all exits on a data set."""
    from dynamicdet.progress import progress
    from dynamicdet_detectron2.building import load_model
    from dynamicdet_detectron2.measuring import make_record

    cfg, model = load_model(args.config, args.checkpoint, args.opts)
    record = make_record(cfg, model, args, args.out, progress)
    print(f'{len(record)} images, {record.exits} exits: {args.out}')


if __name__ == '__main__':
    run(main, parse_args())
