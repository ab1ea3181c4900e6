"""Test a deployment folder that tools/export.py made: AP, also by size of object, and the latency
of each exit at batch 1. A standalone folder knows no data: give it --config."""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence

from dynamicdet_options import ConfigOptions, add_budget_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='deployment folder')
    add_budget_arguments(parser)
    parser.add_argument('--config', help='of a standalone folder: the config with the test data')
    parser.add_argument(
        '--runtime',
        default='onnxruntime',
        choices=['onnxruntime', 'openvino'],
        help='what runs the graphs: onnxruntime',
    )
    parser.add_argument(
        '--providers',
        nargs='+',
        metavar='NAME',
        help='what ONNX Runtime computes with, such as CPUExecutionProvider: the best there is',
    )
    parser.add_argument(
        '--threads', type=int, default=1, help='CPU threads of graphs and of torch: 1'
    )
    parser.add_argument(
        '--images',
        type=int,
        default=20,
        help='how many images are timed, at all exits: 20; a budget in time goes by that. 0 times '
        'none',
    )
    parser.add_argument('--no-ap', action='store_true', help='measure latencies alone')
    parser.add_argument('--work-dir', default='work_dirs/test_deployed', help='where logs go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs',
    )
    parser.add_argument('--out', help='write the figures to this .json file')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from dynamicdet import cli
from dynamicdet.building import build_loader
from dynamicdet.deploy.folder import load_deployed, read_deployed_config
from dynamicdet.deploy.latencies import (
    describe_latencies,
    measure_latency,
    measure_region_seconds,
    timing_conditions,
)
from dynamicdet.deploy.standalone_model import (
    first_pictures,
    is_standalone,
    open_standalone,
    time_standalone,
)
from dynamicdet.engine import BudgetHook
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.models import DynamicDetector
from dynamicdet.routing.budget import Budget
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS


def load(args: argparse.Namespace) -> Config:
    """The folder's config, with its detector as the model."""
    budget, standalone = cli.budget_from(args), is_standalone(args.folder)
    cli.register_all_modules(init_default_scope=False)
    if standalone != bool(args.config):
        raise UsageError(
            f"'{args.folder}' is standalone and knows no data: name a config by --config"
            if standalone
            else '--config is of a standalone folder; other folders have theirs'
        )
    if standalone and args.runtime != 'onnxruntime':
        raise UsageError('a standalone folder is tested by onnxruntime')
    if standalone:
        cfg = cli.load_config(args)
    else:
        cfg = read_deployed_config(args.folder)
        cli.override(cfg, args.cfg_options, args.folder)
    cli.require_settings(cfg, 'test_dataloader', 'test_evaluator', 'test_cfg')
    # Of its heads, before they are the folder's.
    cli.check_settings(cfg, 'test')
    budget = budget and budget.as_dict()
    common = dict(folder=args.folder, threads=args.threads, providers=args.providers, budget=budget)
    cfg.model = (
        ConfigDict(type='StandaloneDetector', **common)
        if standalone
        else ConfigDict(type='DeployedDetector', runtime=args.runtime, **common)
    )
    # What a training needs has no part in this.
    cfg.custom_hooks, cfg.load_from, cfg.resume, cfg.launcher = (
        [] if standalone else [dict(type='BudgetHook')],
        None,
        False,
        'none',
    )
    for name in ('train', 'val'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg.pop(f'{name}_{part}', None)
    cfg.pop('optim_wrapper', None)
    cfg.pop('param_scheduler', None)
    cfg.work_dir = args.work_dir
    return cfg


def require_reachable(model: BaseDetector, budget: Budget | None) -> None:
    """Raise a `UsageError`, before anything is timed, if a budget cannot be met as the folder has
    it. Latencies that it has from another machine or runtime rule nothing out."""
    if budget is None or not isinstance(model, DynamicDetector):
        return
    known = model.latencies.isfinite().all() and not model.timed_elsewhere
    if budget.kind == 'target_latency' and not known:
        return
    try:
        # What there is to warn of is said when it is served.
        with warnings.catch_warnings(action='ignore'):
            model.set_budget(budget)
    except UsageError as error:
        if budget.kind != 'target_latency':
            raise
        raise UsageError(
            f'{error}; these are the latencies of the folder, measured on this machine: where it '
            'was busy then, tools/export.py measures them anew'
        ) from error


def require_classes(known: list[str], given: Sequence[str]) -> None:
    """Raise a `UsageError` if a folder's classes are not those of the data."""
    if list(known) != list(given) and known != [str(label) for label in range(len(given))]:
        raise UsageError(
            f"the folder's classes are {', '.join(known[:5])}, ..., and those of the data "
            f'{", ".join(given[:5])}, ...: name the config that it was exported with'
        )


def print_sizes(metrics: Mapping[str, float]) -> None:
    """AP by size of object, as a table: what 8 bits cost is not the same for all. A dash where the
    data have none of a size."""
    for kind in ('bbox', 'segm'):
        names = [f'coco/{kind}_mAP{end}' for end in ('', '_s', '_m', '_l')]
        if all(name in metrics for name in names):
            values = [metrics[name] for name in names]
            print(f'{kind:<6}{"all":>8}{"small":>8}{"medium":>8}{"large":>8}')
            print('AP    ' + ''.join(f'{"-" if x < 0 else f"{100 * x:.1f}":>8}' for x in values))


def main() -> None:
    """Time and test a deployment folder."""
    args = parse_args()
    cli.prepare()
    if args.threads < 1 or args.images < 0:
        raise UsageError('--threads must be 1 or more, and --images not negative')
    if args.out:
        cli.require_writable(args.out)
    torch.set_num_threads(args.threads)
    figures: dict[str, object] = dict(
        folder=args.folder, runtime=args.runtime, threads=args.threads
    )
    cfg = load(args)
    cli.check_data(cfg, 'test')
    settings = dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)
    if args.images and cfg.model.type == 'StandaloneDetector':
        detector = open_standalone(args.folder, args.threads, args.providers)
        with cli.silence():
            dataset = build_loader(settings).dataset
        require_classes(detector.about['classes'], dataset.metainfo['classes'])
        pictures = first_pictures(dataset, args.images)
        seconds = time_standalone(detector, pictures, cli.progress)
        figures['milliseconds'] = [1e3 * one for one in seconds]
        conditions = timing_conditions(args.runtime, args.threads, args.providers)
        print(describe_latencies(dict(conditions, seconds=seconds)))
        cfg.model.seconds = seconds
        # A budget that cannot be is said now.
        MODELS.build(cfg.model)
    elif args.images:
        model = load_deployed(args.folder, args.threads, args.runtime, args.providers)
        require_reachable(model, cli.budget_from(args))
        with cli.silence():
            dataset = build_loader(settings).dataset
        latencies: list[float] = measure_latency(model, dataset, cli.progress, args.images)
        regions = measure_region_seconds(model, dataset, cli.progress, args.images)
        figures['milliseconds'] = [1e3 * seconds for seconds in latencies]
        if regions:
            figures['region_milliseconds'] = [1e3 * seconds for seconds in regions]
        print(
            describe_latencies(
                dict(
                    timing_conditions(args.runtime, args.threads, args.providers),
                    seconds=latencies,
                    region_seconds=regions,
                )
            )
        )
        # A budget in time goes by what runs the graphs now.
        cfg.model.latencies, cfg.model.region_seconds = latencies, regions
    if not args.no_ap:
        cli.make_folder(cfg.work_dir)
        runner = Runner.from_cfg(cfg)
        figures['metrics'] = {key: float(value) for key, value in runner.test().items()}
        for key, value in figures['metrics'].items():
            if not key.startswith('budget/'):
                print(f'{key}: {value:.4f}')
        print_sizes(figures['metrics'])
        for hook in runner.hooks:
            if isinstance(hook, BudgetHook):
                cli.print_budget_report(hook.budget_report)
    if args.out:
        write_atomically(json.dumps(figures, indent=1).encode(), args.out)


if __name__ == '__main__':
    cli.run(main)
