"""Make a calibrated dynamic detector of published ones, in minutes: one plain detector that looks
at easy pictures in a small size and at hard ones in a large size, or a small and a large detector.

Nothing is trained but the router. CONFIG CHECKPOINT, once or twice, are plain detectors', such as
mmdet::yolox/yolox_tiny_8xb8-300e_coco.py and its file. Every picture of a folder is run through
every exit, a router is fitted to what that gains and calibrated; with --regions, prices of regions
are calibrated instead. Beside OUT.pth the config OUT.py is written and a folder OUT with the record
and the report, report.html. A run that was stopped goes on where it was.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'detectors', nargs='+', metavar='CONFIG CHECKPOINT', help='plain config and its checkpoint'
    )
    parser.add_argument('--data', required=True, help='folder of pictures, see docs/own_data.md')
    parser.add_argument('--ann', help='its COCO annotation file, where it has several')
    parser.add_argument(
        '--img', help='folder of the pictures, where it is another; alone: without annotations'
    )
    parser.add_argument(
        '--exits', nargs='+', type=int, required=True, help='size at each exit, pixels: 320 640'
    )
    parser.add_argument('--out', required=True, help='checkpoint file to write: dynamic.pth')
    parser.add_argument(
        '--hard-share', type=float, default=0.5, help='default hard share of the checkpoint: 0.5'
    )
    parser.add_argument(
        '--sees',
        choices=['detections', 'maps', 'both'],
        default='detections',
        help="what the router sees: exit 0's detections, by default, for which exit 0's head runs "
        'on every picture; its pooled maps; or both',
    )
    parser.add_argument(
        '--gain',
        choices=['ap', 'loss', 'loss_sum', 'reward'],
        default='ap',
        help='what a picture gains by the last exit: its AP by default',
    )
    parser.add_argument(
        '--by-class',
        action=argparse.BooleanOptionalAction,
        help='count an object by how rare its class is, as AP does; by default, but for reward',
    )
    parser.add_argument(
        '--method',
        choices=['linear', 'layers', 'rule'],
        default='linear',
        help='a linear router, by default; two layers; or the rule that fits nothing, as of '
        'tools/fit_router.py',
    )
    parser.add_argument(
        '--merge', choices=['nms', 'wbf'], help='join what all exits find; exits of their own else'
    )
    parser.add_argument(
        '--regions',
        type=int,
        nargs='?',
        const=2,
        metavar='N',
        help='exit 1 looks at regions alone that exit 0 is not sure of, at N of a picture at most, '
        'by default 2; no router is fitted',
    )
    parser.add_argument(
        '--view',
        choices=['flip', 'shift', 'none'],
        default='flip',
        help='second view of each picture, for the honest oracle of the report: flip by default; '
        'shift, for what has no mirror image; none takes half the time',
    )
    parser.add_argument(
        '--score',
        type=float,
        default=0.5,
        help='without annotations: detections of the last exit from this score on stand for the '
        'truth: 0.5',
    )
    parser.add_argument('--batch-size', type=int, default=4, help='pictures at a time: 4')
    parser.add_argument('--workers', type=int, default=2, help='processes that read pictures: 2')
    parser.add_argument('--seed', type=int, default=0, help='of weights, order and folds: 0')
    parser.add_argument('--device', help='device whose latencies count; the best that is there')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

import torch
from mmengine.config import Config
from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.cascade.weights import JOINED, exits_digest
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.datasets.coco_folder import annotations_for, confident_annotations, find_sets
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.measuring import make_dynamic
from dynamicdet.measuring.calibration import record_exits
from dynamicdet.measuring.record_parts import RecordParts
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from dynamicdet.measuring.router_from_records import objective_settings
from dynamicdet.models import DynamicDetector
from dynamicdet.models.budget_control import whole_images
from dynamicdet.reports.routing_analysis import analyze_routing, two_exit_record
from dynamicdet.routing import GAINS, build_objective
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.evaluation import read_truth
from dynamicdet.routing.record import RoutingRecord, read_record, write_record


def check(args: argparse.Namespace) -> None:
    """Raise a `UsageError` for options that do not fit, before anything is read."""
    if len(args.detectors) % 2:
        raise UsageError(
            f'give CONFIG CHECKPOINT for each detector; got {len(args.detectors)} names: '
            f'{" ".join(args.detectors)}'
        )
    make_dynamic.require_exit_sizes(args.exits, len(args.detectors) // 2)
    Budget('hard_share', args.hard_share)
    make_dynamic.require_router_options(
        args.sees,
        args.gain,
        args.method,
        args.regions is not None,
        len(args.exits),
        len(args.detectors) // 2,
    )
    if args.by_class is None:
        args.by_class = args.gain != 'reward'
    if not 0 < args.score < 1 or args.seed < 0 or args.batch_size < 1 or args.workers < 0:
        raise UsageError(
            '--score must be in (0, 1), --batch-size 1 or more, --seed and --workers 0 or more'
        )
    args.device = args.device or get_device()
    cli.require_device(args.device)
    if Path(args.out).suffix != '.pth':
        raise UsageError(f"--out is a checkpoint: name a .pth file, not '{args.out}'")
    cli.require_writable(args.out)
    cli.make_folder(str(Path(args.out).with_suffix('')))


def load_plain(args: argparse.Namespace) -> tuple[list[Config], tuple[str, ...], str, dict]:
    """The plain detectors' configs, their classes, and their checkpoints as one."""
    cfgs, known, paths = [], [], args.detectors[1::2]
    for config, path in zip(args.detectors[::2], paths):
        cfgs.append(cli.load_config(argparse.Namespace(config=config, cfg_options=None)))
        known.append(make_dynamic.classes_of(cfgs[-1], cli.require_checkpoint(path)))
    if len(set(known)) > 1:
        raise UsageError(
            'the detectors of a pair must know the same classes in the same order; these know '
            + ' and '.join(f'{len(names)} ({", ".join(names[:3])}, ...)' for names in known)
        )
    path = paths[0] if len(paths) == 1 else JOINED + ','.join(paths)
    return cfgs, known[0], path, read_checkpoint(path)


def prepare_data(
    args: argparse.Namespace, classes: tuple[str, ...], folder: Path
) -> tuple[dict[str, tuple[str, str]], dict, bool]:
    """Annotation files with the detector's classes, in the folder of results.

    Returns:
        tuple: 'val' and 'test' -> annotation file and folder of pictures; the content of the
            former; and whether it is annotated.
    """
    picture_sets = find_sets(args.data, args.ann, args.img)
    fitted = next(iter(picture_sets))
    sets: dict[str, tuple[str, str]] = {}
    first: dict = {}
    for split, name in ((fitted, 'val'), ('test', 'test')):
        picture_set = picture_sets.get(split, picture_sets[fitted])
        content, lines = annotations_for(picture_set, classes)
        for line in lines:
            print(f'data: {line}', file=sys.stderr)
        first = first or content
        make_dynamic.require_enough(len(first['images']))
        path = (folder / f'{name}.json').absolute()
        write_atomically(json.dumps(content).encode(), path)
        sets[name] = (str(path), str(picture_set.pictures.absolute()))
    annotated = picture_sets[fitted].ann_file is not None
    print(
        f'{len(first["images"])} pictures in {picture_sets[fitted].pictures}, '
        + (
            f'{len(first["annotations"])} objects in {picture_sets[fitted].ann_file}'
            if annotated
            else 'without annotations: what the last exit detects with a score of '
            f'{args.score:g} or more stands for the truth'
        )
    )
    return sets, first, annotated


def recorded(
    args: argparse.Namespace, cfg: Config, path: str, fingerprint: str, out: Path
) -> RoutingRecord:
    """The record of all pictures: the one that is there if it is of the same, or what a run that
    was stopped has left and the rest, else a new one."""
    if out.is_file():
        try:
            record = read_record(out)
        except UsageError:
            record = None
        if record and record.provenance.get('fingerprint') == fingerprint:
            print(f'{out} is of these pictures and weights: not recorded again')
            return record
    parts = RecordParts(out.with_suffix(f'.{fingerprint}.parts'))
    for other in out.parent.glob(f'{out.stem}.*.parts'):
        if other != parts.folder:
            shutil.rmtree(other)
    if parts.images:
        print(f'{parts.images} pictures are recorded: going on with the others', flush=True)
    model, checkpoint = load_dynamic_detector(cfg, path, args.device)
    cli.check_data(cfg, 'val')
    loader = build_record_loader(cfg, 'val')
    losses = GAINS[args.gain].values == 'losses'
    record = record_data_set(model, cfg, loader, cli.progress, args.view, path, losses, parts)
    record.provenance.update(
        exits_digest=exits_digest(checkpoint['state_dict']), fingerprint=fingerprint
    )
    write_record(record, out)
    parts.remove()
    return record


def write_stand_in_truth(
    args: argparse.Namespace, record: RoutingRecord, content: dict, sets: dict[str, tuple[str, str]]
) -> None:
    """Write what the last exit detects with confidence as annotations, and count it as objects."""
    ids = record.ids.tolist()
    detections = {image: record.detections[-1][row] for row, image in enumerate(ids)}
    made = confident_annotations(content, detections, args.score)
    for ann_file, _ in sets.values():
        write_atomically(json.dumps(made).encode(), ann_file)
    if record.objects is not None:
        counts = Counter(annotation['image_id'] for annotation in made['annotations'])
        record.objects[:] = [counts[image] for image in ids]


def fit_router(
    args: argparse.Namespace,
    cfg: Config,
    plain: tuple[DynamicDetector, dict, str],
    data: tuple[dict, dict, bool],
    folder: Path,
) -> dict:
    """Record, fit a router and write the report: the checkpoint."""
    (model, checkpoint, path), (sets, content, annotated) = plain, data
    classes = cfg.val_dataloader.dataset.metainfo.classes
    objective = build_objective(cfg.model.objective)
    fingerprint = make_dynamic.fingerprint_of(
        cfg,
        checkpoint['state_dict'],
        content,
        view=args.view,
        device=args.device,
        batch=args.batch_size,
        losses=GAINS[args.gain].values == 'losses',
    )
    print('1 of 3: every picture through every exit', flush=True)
    record = recorded(args, cfg, path, fingerprint, folder / 'record.npz')
    if not annotated:
        write_stand_in_truth(args, record, content, sets)
    with cli.silence():
        coco = read_truth(sets['val'][0], range(1, len(classes) + 1))
    print('2 of 3: the router', flush=True)
    made = make_dynamic.make_router(
        model, record, objective, coco, seed=args.seed, progress=cli.counter, method=args.method
    )
    facts = dict(
        records=[str(folder / 'record.npz')],
        objective=objective_settings(objective),
        method=args.method,
        sees=args.sees,
        images=len(record),
        truth=truth_said(args, annotated),
        seed=args.seed,
        cascade=path,
    )
    done = make_dynamic.calibrated_checkpoint(
        model, checkpoint, made, facts, classes, args.hard_share
    )
    write_checkpoint(done, args.out)
    print(
        f'router fitted to {len(record)} pictures; correlation with the gain on those that it was '
        f'not fit to: {made.fit.correlation:.3f}\n3 of 3: the report',
        flush=True,
    )
    judged = two_exit_record(made.record)
    analysis = analyze_routing(judged, coco, say=cli.say, by_class=objective.by_class)
    cli.publish_analysis(judged, coco, analysis, folder, name='report', with_figure=True)
    return done


def calibrate_prices(
    args: argparse.Namespace,
    cfg: Config,
    plain: tuple[DynamicDetector, dict, str],
    data: tuple[dict, dict, bool],
) -> None:
    """Measure what the prices of regions follow from, and write the checkpoint."""
    (_, checkpoint, path), (sets, content, annotated) = plain, data
    model, _ = load_dynamic_detector(cfg, path, args.device)
    cli.check_data(cfg, 'val')
    loader = build_loader(cfg.val_dataloader)
    if not annotated:
        with whole_images(model):
            record = record_exits(model, loader, cli.progress)
        write_stand_in_truth(args, record, content, sets)
    done = make_dynamic.region_checkpoint(
        model,
        cfg,
        loader,
        checkpoint,
        path,
        truth_said(args, annotated),
        args.hard_share,
        cli.progress,
    )
    write_checkpoint(done, args.out)


def truth_said(args: argparse.Namespace, annotated: bool) -> str:
    """What stands for the truth."""
    return 'annotations' if annotated else f'detections of score {args.score:g} or more'


def main() -> None:
    """Make a dynamic detector."""
    args = parse_args()
    cli.prepare()
    check(args)
    out, folder = Path(args.out), Path(args.out).with_suffix('')
    cfgs, classes, path, checkpoint = load_plain(args)
    sets, content, annotated = prepare_data(args, classes, folder)
    cfg = make_dynamic.dynamic_config(
        cfgs,
        args.exits,
        classes,
        sets,
        make_dynamic.objective_config(args.gain, args.by_class),
        args.batch_size,
        args.workers,
        router=dict(sees=args.sees),
        merge=args.merge,
        regions=None if args.regions is None else dict(limit=args.regions),
    )
    config = out.with_suffix('.py')
    write_atomically(cfg.pretty_text.encode(), config)
    cfg = cli.load_config(
        argparse.Namespace(config=str(config), cfg_options=None, work_dir=str(folder))
    )
    torch.manual_seed(args.seed)
    model, weights = make_dynamic.plain_weights(cfg, checkpoint, path)
    plain, data = (model, dict(checkpoint, state_dict=weights), path), (sets, content, annotated)
    if args.regions is not None:
        calibrate_prices(args, cfg, plain, data)
    else:
        fit_router(args, cfg, plain, data, folder)
    print(
        f'\nwritten: {config} and {out}, as they are for every tool, such as\n'
        f'    python tools/image_demo.py PICTURES {config} {out} --hard-share {args.hard_share:g}'
    )


if __name__ == '__main__':
    cli.run(main)
