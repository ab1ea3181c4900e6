"""Test a detector at any speed."""

import argparse
from copy import deepcopy
from pathlib import Path

from dynamicdet_options import add_budget_arguments, add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    add_common_arguments(parser)
    add_budget_arguments(parser)
    parser.add_argument(
        '--online',
        action='store_true',
        help='hold the budget over the images as they come: thresholds follow their difficulties '
        'and, for --target-latency or --throughput, the time that they take',
    )
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='write pictures of the predictions, under the work dir')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a shown picture stays')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from dynamicdet import cli
from dynamicdet.building import is_dynamic
from dynamicdet.engine import BudgetHook
from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget
from mmdet.evaluation import DumpDetResults


def hold_online(cfg: Config, budget: Budget | None) -> None:
    """Let a controller hold the budget in place of the model's calibration."""
    if budget is None or budget.kind == 'threshold':
        raise UsageError(
            '--online needs something to hold: --hard-share, --target-latency, --throughput or '
            '--target-gflops'
        )
    cfg.model.budget = None
    cfg.custom_hooks.append(dict(type='OnlineHook', budget=budget.as_dict()))


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Switch the config's visualization hook on."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(
            '--show and --show-dir need default_hooks.visualization in the config: '
            "dict(type='DetVisualizationHook')"
        )
    hook.update(draw=True, show=args.show, wait_time=args.wait_time, test_out_dir=args.show_dir)


def augment(cfg: Config) -> None:
    """Wrap the model for test-time augmentation; a flip where the config says nothing else."""
    tta_model = cfg.get('tta_model') or dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    pipeline = cfg.get('tta_pipeline')
    if pipeline is None:
        *steps, pack = deepcopy(dataset.pipeline)
        pack.meta_keys = (
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        )
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        steps = [step for step in steps if step.type != 'LoadAnnotations']
        # Flipped before padding, or it would change sides.
        pads = next((at for at, step in enumerate(steps) if step.type == 'Pad'), len(steps))
        choices = [flips, *([step] for step in steps[pads:]), [pack]]
        pipeline = steps[:pads] + [dict(type='TestTimeAug', transforms=choices)]
    cfg.model = ConfigDict(**tta_model, module=cfg.model)
    dataset.pipeline = pipeline


def main() -> None:
    """Test a detector and say what was served."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_settings(cfg, 'test_dataloader', 'test_evaluator', 'test_cfg')
    cli.require_checkpoint(args.checkpoint)
    if args.out and Path(args.out).suffix not in ('.pkl', '.pickle'):
        raise UsageError(f"--out writes a pickle: name a .pkl file, not '{args.out}'")
    if args.out:
        cli.require_writable(args.out)
    cli.make_folder(cfg.work_dir)
    budget = cli.budget_from(args)
    if budget:
        if not is_dynamic(cfg):
            raise UsageError(
                f'--{budget.kind.replace("_", "-")} is for dynamic detectors; '
                f"this config's model is {cfg.model.type}"
            )
        cfg.model.budget = budget.as_dict()
    cfg.load_from = args.checkpoint
    cfg.resume = False
    cfg.custom_hooks = cfg.get('custom_hooks', []) + [
        dict(type='CompleteCheckpointHook'),
        dict(type='FuseHook'),
        dict(type='BudgetHook'),
    ]
    if args.online:
        hold_online(cfg, budget)
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.tta:
        augment(cfg)
    cli.check_data(cfg, 'test', files=not args.no_data_check)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()
    cli.print_budget_report(
        next(hook for hook in runner.hooks if isinstance(hook, BudgetHook)).budget_report
    )


if __name__ == '__main__':
    cli.run(main)
