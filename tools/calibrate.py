"""Measure a trained dynamic detector on its validation set, so that it can be run at any speed.

Writes difficulties, latencies of each exit on this device, their GFLOPs, and the threshold of a
hard share into the checkpoint.
"""

import argparse

from dynamicdet_options import add_common_arguments

#: Buffers of the model that a calibration sets.
CALIBRATED = ('difficulties', 'gflops', 'latencies', 'threshold', 'platt_scale', 'platt_shift')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of step 2')
    add_common_arguments(parser)
    parser.add_argument('--out', help='write here instead of into the checkpoint')
    parser.add_argument('--device', help='device whose latencies count; the best that is there')
    parser.add_argument(
        '--hard-share', type=float, default=0.5, help='default hard share of the checkpoint: 0.5'
    )
    parser.add_argument(
        '--scores',
        action='store_true',
        help='also bring the scores of all exits on one scale: chances to be right, fitted to the '
        'annotations; for exits that are merged',
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.building import build_loader, load_dynamic_detector, require_dynamic
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.measuring.calibration import (
    calibrate,
    inference_settings,
    provenance,
    require_trained_router,
    score_facts,
)
from dynamicdet.measuring.region_calibration import calibrate_regions
from dynamicdet.routing.budget import Budget


def main() -> None:
    """Calibrate a checkpoint and write it back."""
    args = parse_args()
    args.device = args.device or get_device()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_settings(cfg, 'val_dataloader')
    cli.require_device(args.device)
    out = args.out or args.checkpoint
    if '://' in out:
        raise UsageError('a checkpoint from a URL is not written back: name a file by --out')
    Budget('hard_share', args.hard_share)
    cli.require_writable(out)
    require_dynamic(cfg)
    cli.check_settings(cfg, 'val')
    model, checkpoint = load_dynamic_detector(cfg, args.checkpoint, args.device)
    if model.regions is None:
        require_trained_router(model)
    cli.check_data(cfg, 'val', files=not args.no_data_check)
    loader = build_loader(cfg.val_dataloader)
    if model.regions is None:
        calibration = calibrate(model, loader, cli.progress, args.hard_share, args.scores)
    else:
        calibration = calibrate_regions(model, loader, cli.progress, args.hard_share, args.scores)
        region_state = model.regions.state_dict(prefix='regions.')
        checkpoint['state_dict'].update({name: value.cpu() for name, value in region_state.items()})
    for name in CALIBRATED:
        checkpoint['state_dict'][name] = getattr(model, name).cpu()
    checkpoint.setdefault('meta', {})['calibration'] = dict(
        calibration,
        hard_share=args.hard_share,
        **provenance(cfg, args.checkpoint, loader.dataset, args.device),
        **inference_settings(model, loader),
        **{name: fact for name, fact in score_facts(model).items() if fact is not None},
        **({} if model.regions is None else dict(regions=True)),
    )
    write_checkpoint(checkpoint, out)
    costs = [
        f'{calibration[f"lat{exit + 1}"] * 1e3:.1f} ms, {calibration[f"g{exit}"]:.2f} GFLOPs'
        for exit in range(model.num_exits)
    ]
    thresholds = ', '.join(f'{value:.4f}' for value in model.threshold.reshape(-1).tolist())
    print(
        f'calibrated on {len(loader.dataset)} images: '
        + '; '.join(f'exit {exit} {cost}' for exit, cost in enumerate(costs))
        + f' per image; {"hard share" if model.regions is None else "share of pixels"} '
        f'{args.hard_share:g} is threshold {thresholds}; written to {out}'
    )


if __name__ == '__main__':
    cli.run(main)
