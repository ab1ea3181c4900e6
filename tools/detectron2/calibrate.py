"""Measure difficulties and costs of a trained dynamic Detectron2 detector on its validation data,
and write them into the checkpoint: speeds are chosen by them.

A config counts as of both steps: give that of step 1, and a checkpoint of step 2.
"""

import argparse

from detectron2_options import add_model_arguments, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--dataset', help='validation data, by name: the first of DATASETS.TEST')
    parser.add_argument('--out', help='file to write: the checkpoint itself')
    parser.add_argument('--hard-share', type=float, default=0.5, help='of the threshold: 0.5')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Calibrate, and write."""
    from dynamicdet.exchange.reading import read_content
    from dynamicdet.exchange.writing import write_checkpoint
    from dynamicdet.progress import progress
    from dynamicdet.routing.budget import Budget
    from dynamicdet_detectron2.building import load_model
    from dynamicdet_detectron2.data import every_test_image
    from dynamicdet_detectron2.measuring import calibrate

    Budget('hard_share', args.hard_share)
    cfg, model = load_model(args.config, args.checkpoint, args.opts)
    name = args.dataset or cfg.DATASETS.TEST[0]
    facts = calibrate(model, every_test_image(cfg, name), progress, args.hard_share)
    content = read_content(args.checkpoint)
    content['model'] = {key: value.cpu() for key, value in model.state_dict().items()}
    content['calibration'] = dict(facts, dataset=name)
    write_checkpoint(content, args.out or args.checkpoint)
    costs = '; '.join(
        f'exit {exit} {facts[f"lat{exit + 1}"] * 1e3:.1f} ms, {facts[f"g{exit}"]:.2f} GFLOPs'
        for exit in range(model.num_exits)
    )
    thresholds = ', '.join(f'{value:.4f}' for value in model.threshold.reshape(-1).tolist())
    print(
        f"calibrated on {facts['images']} images of '{name}': {costs} per image; hard share "
        f'{args.hard_share:g} is threshold {thresholds}; written to {args.out or args.checkpoint}'
    )


if __name__ == '__main__':
    run(main, parse_args())
