"""Plain detectors and the dynamic one in Detectron2, beside the dynamic one in MMDetection: AP
against GFLOPs and against milliseconds, on the built-in data, in one picture.

.venv-detectron2/bin/python experiments/detectron2_baselines.py --mmdet-python .venv/bin/python

Trains what is not trained yet, one thing at a time, and goes on where it was stopped; what is done
stands in experiments/results/detectron2_baselines.json. --trained NAME FILE takes a checkpoint that
is there instead.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dynamicdet.errors import UsageError
from dynamicdet.files import latest_checkpoint, write_atomically

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / 'work_dirs' / 'detectron2_baselines'
RESULT = ROOT / 'experiments' / 'results' / 'detectron2_baselines.json'
PICTURE = ROOT / 'docs' / 'images' / 'detectron2_baselines.png'
CONFIGS = 'configs/detectron2'
DYNAMIC = f'{CONFIGS}/dy_faster_rcnn_R_18_digits.yaml'
PLAIN = {f'R-{depth}': f'{CONFIGS}/faster_rcnn_R_{depth}_digits.yaml' for depth in (18, 50, 101)}
MMDET, MMDET_ROUTER = 'configs/dy_faster_rcnn_digits.py', 'configs/dy_faster_rcnn_digits_router.py'
#: Training images of step 1, and of step 2; a batch.
IMAGES, ROUTER_IMAGES, BATCH = 2400, 600, 8


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--epochs', type=int, default=5, help='of plain detectors and step 1: 5')
    parser.add_argument('--router-epochs', type=int, default=4, help='of step 2: 4')
    parser.add_argument('--seeds', type=int, default=3, help='of the dynamic detectors: 3')
    parser.add_argument(
        '--plain', nargs='+', choices=[*PLAIN], default=[*PLAIN], help='which plain detectors: all'
    )
    parser.add_argument(
        '--mmdet-python', help="python of MMDetection's environment; without, what is there counts"
    )
    parser.add_argument(
        '--trained',
        nargs=2,
        action='append',
        default=[],
        metavar=('NAME', 'FILE'),
        help=f'a plain detector that is trained already: {", ".join(PLAIN)}',
    )
    parser.add_argument('--only-draw', action='store_true', help='train and measure nothing')
    args = parser.parse_args()
    if min(args.epochs, args.router_epochs, args.seeds) < 1:
        parser.error('--epochs, --router-epochs and --seeds must be 1 or more')
    if {name for name, _ in args.trained} - {*PLAIN}:
        parser.error(f'--trained takes one of {", ".join(PLAIN)}')
    return args


def run(python: str, *command: object, log: Path) -> None:
    """Run a tool in the repository's root, its output into a file; end with it if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(log, 'a') as file:
        code = subprocess.run(
            [python, *map(str, command)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT / 'projects')},
        ).returncode
    if code:
        raise UsageError(f'{command[0]} failed with status {code}: see the end of {log}')
    print(f'{log.parent.name}: {command[0]}, {(time.monotonic() - begin) / 60:.1f} min', flush=True)


def steps(images: int, epochs: int) -> int:
    """Iterations of so many epochs."""
    return images * epochs // BATCH


def plain_detector(name: str, args: argparse.Namespace) -> str:
    """A plain detector's checkpoint, trained if need be."""
    given = dict(args.trained).get(name)
    folder = WORK / f'plain-{name}'
    checkpoint = folder / 'model_final.pth'
    if given or checkpoint.is_file():
        return given or str(checkpoint)
    run(
        sys.executable, 'tools/detectron2/train_net.py', '--config-file', PLAIN[name], '--resume',
        'OUTPUT_DIR', folder, 'SOLVER.MAX_ITER', steps(IMAGES, args.epochs),
        'SOLVER.CHECKPOINT_PERIOD', 100, log=folder / 'log.txt',
    )  # fmt: skip
    return str(checkpoint)


def dynamic_detector(seed: int, args: argparse.Namespace) -> str:
    """Both steps and a calibration of a seed; the checkpoint."""
    folder = WORK / f'dynamic-{seed}'
    options = ['OUTPUT_DIR', folder, 'SEED', seed, 'SOLVER.CHECKPOINT_PERIOD', 100]
    options += ['SOLVER.MAX_ITER', steps(IMAGES, args.epochs)]
    options += ['SOLVER.ROUTER.MAX_ITER', steps(ROUTER_IMAGES, args.router_epochs)]
    train = ['tools/detectron2/train_net.py', '--config-file', DYNAMIC, '--resume']
    if not (folder / 'model_final.pth').is_file():
        run(sys.executable, *train, *options, log=folder / 'log.txt')
    router = folder / 'router' / 'model_final.pth'
    if not router.is_file():
        run(sys.executable, *train, '--step', 'router', *options, log=folder / 'log.txt')
    calibrated = folder / 'calibrated.pth'
    if not calibrated.is_file():
        run(
            sys.executable, 'tools/detectron2/calibrate.py', DYNAMIC, router, '--dataset',
            'digits_val', '--out', calibrated, log=folder / 'log.txt',
        )  # fmt: skip
    return str(calibrated)


def analyze(seed: int, checkpoint: str, plain: dict[str, str], args: argparse.Namespace) -> None:
    """The report of a seed; beside the first, the plain detectors."""
    folder = WORK / f'dynamic-{seed}'
    baselines = [word for name, path in plain.items() for word in ('--baseline', PLAIN[name], path)]
    run(
        sys.executable, 'tools/detectron2/report.py', DYNAMIC, checkpoint, '--out-dir',
        folder / 'report', *baselines, log=folder / 'log.txt',
    )  # fmt: skip


def mmdet_detector(seed: int, args: argparse.Namespace) -> None:
    """The same detector, schedule and data on the MMDetection side, and its report."""
    folder, python = WORK / f'mmdet-{seed}', args.mmdet_python
    if not python or (folder / 'report' / 'routing.json').is_file():
        return
    begin = ['--no-data-check', '--resume', '--cfg-options', f'randomness.seed={seed}']
    run(
        python, 'tools/train.py', MMDET, f'--work-dir={folder / "cascade"}', *begin,
        f'train_cfg.max_epochs={args.epochs}', f'param_scheduler.1.T_max={args.epochs}',
        log=folder / 'log.txt',
    )  # fmt: skip
    run(
        python, 'tools/train.py', MMDET_ROUTER, f'--work-dir={folder / "router"}', *begin,
        f'train_cfg.max_epochs={args.router_epochs}',
        f'load_from={latest_checkpoint(str(folder / "cascade"))}', log=folder / 'log.txt',
    )  # fmt: skip
    checkpoint = latest_checkpoint(str(folder / 'router'))
    run(python, 'tools/record.py', MMDET_ROUTER, checkpoint, '--split', 'test', '--view', 'none',
        '--out', folder / 'record.npz', log=folder / 'log.txt')  # fmt: skip
    run(python, 'tools/analyze_routing.py', folder / 'record.npz', '--out-dir', folder / 'report',
        log=folder / 'log.txt')  # fmt: skip


def summarize(args: argparse.Namespace) -> dict:
    """What is there: points of plain detectors, and each seed's curve on either side."""
    summary = dict(
        schedule=dict(
            epochs=args.epochs,
            router_epochs=args.router_epochs,
            iterations=steps(IMAGES, args.epochs),
            batch=BATCH,
        ),
        plain=[],
        detectron2={},
        mmdet={},
    )
    for side, name in (('detectron2', 'dynamic'), ('mmdet', 'mmdet')):
        for seed in range(args.seeds):
            path = WORK / f'{name}-{seed}' / 'report' / 'routing.json'
            if not path.is_file():
                continue
            analysis = json.loads(path.read_text())
            wanted = ('hard_share', 'ap', 'random_ap', 'gflops', 'latency')
            summary[side][str(seed)] = [
                {key: row[key] for key in wanted} for row in analysis['rows']
            ]
            if analysis['baselines']['points']:
                summary['plain'] = analysis['baselines']['points']
            facts = analysis['provenance']
            summary['machine'] = {key: facts.get(key) for key in ('device', 'threads', 'torch')}
            summary['images'] = analysis['images']
    return summary


def draw(summary: dict) -> None:
    """AP against GFLOPs, and against milliseconds."""
    from matplotlib.figure import Figure

    from dynamicdet.reports.figures import PLAIN_COLOR, png

    figure = Figure((7.6, 3.6), dpi=150, layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost, factor, label in (
        (left, 'gflops', 1, 'GFLOPs per image'),
        (right, 'latency', 1000, 'ms per image'),
    ):
        for side, color in (('detectron2', '#222222'), ('mmdet', '#0072b2')):
            for number, rows in enumerate(summary[side].values()):
                rows = sorted(rows, key=lambda row: row['hard_share'])
                axes.plot(
                    [factor * row[cost] for row in rows],
                    [row['ap'] for row in rows],
                    '.-',
                    color=color,
                    linewidth=1,
                    label=f'dynamic, {side}' if number == 0 else None,
                )
        points = summary['plain']
        axes.plot(
            [factor * point[cost] for point in points],
            [point['ap'] for point in points],
            'D',
            color=PLAIN_COLOR,
            label='plain, detectron2',
        )
        for point in points:
            place = (factor * point[cost], point['ap'])
            axes.annotate(short(point['name']), place, (5, -4), textcoords='offset points')
        axes.set_xlabel(label)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='#dddddd', linewidth=0.7)
    left.set_ylabel('AP (%)')
    left.legend(frameon=False, fontsize=8)
    write_atomically(png(figure), PICTURE)


def short(name: str) -> str:
    """``R-18`` of ``faster_rcnn_R_18_digits``."""
    return next((known for known, path in PLAIN.items() if Path(path).stem == name), name)


def publish(args: argparse.Namespace) -> None:
    """Write what is known so far."""
    summary = summarize(args)
    if summary['detectron2']:
        write_atomically(json.dumps(summary, indent=1).encode() + b'\n', RESULT)
        draw(summary)


def measure(seeds: Sequence[int], args: argparse.Namespace) -> None:
    """Everything, the first seed with the plain detectors first."""
    from dynamicdet.datasets.digits import make_digits

    if not (ROOT / 'data' / 'digits').is_dir():
        make_digits(ROOT / 'data' / 'digits')
    dynamic = dynamic_detector(0, args)
    plain = {name: plain_detector(name, args) for name in args.plain}
    analyze(0, dynamic, plain, args)
    publish(args)
    for seed in seeds:
        mmdet_detector(seed, args)
        publish(args)
        if seed:
            analyze(seed, dynamic_detector(seed, args), {}, args)
            publish(args)


def main() -> None:
    """Train, measure, write."""
    args = parse_args()
    try:
        if not args.only_draw:
            measure(range(args.seeds), args)
        publish(args)
    except UsageError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
