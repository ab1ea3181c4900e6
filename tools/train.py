"""Train either step of a dynamic detector, or any other MMDetection config."""

import argparse
import sys

from dynamicdet_options import add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint, or from the last one in the work dir',
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='say what would be trained, on what, from which weights, and what would be pruned, '
        'shared or rounded; train nothing',
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from dynamicdet import cli
from dynamicdet.cascade.weights import require_all_channels
from dynamicdet.engine.frozen_parameters import count_frozen_parameters
from dynamicdet.engine.router_hook import leaves_load_from_unused
from dynamicdet.engine.switches import check_switches
from dynamicdet.engine.training_plan import describe_training
from dynamicdet.engine.unwrapping import unwrap
from dynamicdet.errors import UsageError
from dynamicdet.files import latest_checkpoint


def main() -> None:
    """Train a detector."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_settings(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if args.amp:
        if get_device() in ('cpu', 'mps'):
            raise UsageError('--amp needs a GPU: mmengine has no mixed precision elsewhere')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UsageError(
                f"--auto-scale-lr needs auto_scale_lr.base_batch_size in '{args.config}'"
            )
        cfg.auto_scale_lr.enable = True
    cli.make_folder(cfg.work_dir)
    last = latest_checkpoint(cfg.work_dir) if args.resume == 'auto' else args.resume
    if last:
        # Without one, the run was killed before its first checkpoint, and starts as it did.
        cfg.resume, cfg.load_from = True, last
    checkpoint = None
    if cfg.get('load_from') and not leaves_load_from_unused(cfg):
        checkpoint = cli.require_checkpoint(
            cfg.load_from,
            'make it first, by training or tools/convert_checkpoint.py, or name another by '
            '--cfg-options load_from=...',
        )
        if checkpoint.get('meta', {}).get('channels') and cfg.model.type != 'PrunedDetector':
            raise UsageError(
                f"'{cfg.load_from}' has lost channels: use the config that tools/prune.py wrote "
                'beside it'
            )
        if cfg.get('resume') and not {'meta', 'optimizer'} <= checkpoint.keys():
            raise UsageError(
                f"'{cfg.load_from}' holds weights alone, from which no run goes on: start "
                f'one by --cfg-options load_from={cfg.load_from}'
            )
    cli.check_data(
        cfg, 'train', *(['val'] if cfg.get('val_dataloader') else []), files=not args.no_data_check
    )
    for line in check_switches(cfg):
        print(f'data: {line}', file=sys.stderr)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if checkpoint:
        require_all_channels(unwrap(runner.model), checkpoint['state_dict'])
    if args.dry_run:
        print(*describe_training(runner), sep='\n')
        return
    count_frozen_parameters(runner)
    try:
        runner.train()
    except ModuleNotFoundError as error:
        # mmengine's, for weights by such a name.
        if error.name != 'torchvision':
            raise
        raise UsageError(
            "the config starts from weights named 'torchvision://...', which torchvision knows: "
            'install the version that fits your torch, or set init_cfg to None and name a '
            'checkpoint by --cfg-options load_from=...'
        ) from error
    except ValueError as error:
        # torch's, of an optimizer of other parameters.
        if 'loaded state dict' not in str(error):
            raise
        raise UsageError(
            f"the optimizer in '{cfg.load_from}' is another run's: --resume goes on with "
            'the same config; to start from weights, --cfg-options load_from=...'
        ) from error


if __name__ == '__main__':
    cli.run(main)
