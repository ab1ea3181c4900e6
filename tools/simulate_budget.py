"""Try an online budget on a stream that drifts, without a model: draw what the controller does.

Difficulty follows day and night, and twice the machine is under load. Without --record the stream
is made up; with one, as tools/record.py writes it, its images come in an order in which their
difficulties drift.
"""

import argparse
import io
import json
import math
import warnings
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='budget.png', help='the picture: budget.png')
    parser.add_argument('--record', help='a recorded pass (.npz): its difficulties and latencies')
    parser.add_argument(
        '--latencies',
        nargs='+',
        type=float,
        help='seconds of each exit; 0.010 0.030 without a record',
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        '--target-latency', type=float, help='mean seconds per image; half way by default'
    )
    group.add_argument('--throughput', type=float, help='images per second')
    group.add_argument('--hard-share', type=float, help='share of hard images, 0 to 1')
    parser.add_argument('--images', type=int, default=40000, help='length of the stream: 40000')
    parser.add_argument(
        '--period', type=float, default=10000, help='images from night to night: 10000'
    )
    parser.add_argument(
        '--load', type=float, default=1.5, help='what load multiplies latencies by: 1.5'
    )
    parser.add_argument('--batch-size', type=int, default=8, help='8')
    parser.add_argument(
        '--delay', type=int, default=2, help='after how many batches a time is known: 2'
    )
    parser.add_argument(
        '--window', type=int, default=256, help='difficulties that are remembered: 256'
    )
    parser.add_argument('--gain', type=float, default=0.01, help="the integral's, per image: 0.01")
    parser.add_argument(
        '--mean-over', type=int, default=1000, help='images of the running mean: 1000'
    )
    parser.add_argument('--seed', type=int, default=0, help='0')
    parser.add_argument('--json', help='write the trace here, too')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

import numpy as np

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.budget_controller import BudgetController
from dynamicdet.routing.budget_simulation import (
    drifting_difficulties,
    drifting_order,
    loaded_latencies,
    running_mean,
    simulate_controller,
)

#: Where load begins and ends, as shares of the stream: one in rising, one in falling difficulty.
LOADS = ((0.28, 0.38), (0.75, 0.85))


def check(args: argparse.Namespace) -> None:
    """Raise a `UsageError` for options that do not fit."""
    if min(args.images, args.batch_size, args.mean_over) < 1 or min(args.delay, args.seed) < 0:
        raise UsageError(
            '--images, --batch-size and --mean-over must be 1 or more, --delay and --seed 0 or more'
        )
    for name in ('period', 'load'):
        if not 0 < getattr(args, name) < math.inf:
            raise UsageError(f'--{name} must be above 0')
    if args.latencies and (
        len(args.latencies) < 2
        or sorted(args.latencies) != args.latencies
        or not 0 < args.latencies[0] < args.latencies[-1] < math.inf
    ):
        raise UsageError('--latencies must be two numbers above 0 or more, rising')
    if Path(args.out).suffix not in ('.png', '.svg', '.pdf'):
        raise UsageError(f"--out must be a .png, .svg or .pdf file, not '{args.out}'")
    for path in filter(None, (args.out, args.json)):
        cli.require_writable(path)


def make_stream(args: argparse.Namespace) -> tuple:
    """Difficulties, (n,), and the latency of each exit, (K,)."""
    if not args.record:
        return drifting_difficulties(args.images, args.period, seed=args.seed), args.latencies or [
            0.010,
            0.030,
        ]
    # Where it is used: a record takes more than numpy.
    from dynamicdet.routing.record import read_record

    record = read_record(args.record)
    scores = record.difficulty.astype(np.float32)
    order = drifting_order(scores, args.images, args.period, args.seed)
    return scores[order], args.latencies or list(record.latencies)


def build(args: argparse.Namespace, latencies: list) -> BudgetController:
    """The controller, of two exits or more with these latencies, seconds."""
    names = ('target_latency', 'throughput', 'hard_share')
    budget = Budget.parse({name: getattr(args, name) for name in names})
    if budget is None:
        budget = Budget('target_latency', (latencies[0] + latencies[-1]) / 2)
    return BudgetController(budget, costs=latencies, window=args.window, gain=args.gain)


def draw(
    trace: dict,
    controller: BudgetController,
    latencies: list,
    spikes: list,
    args: argparse.Namespace,
) -> None:
    """Draw thresholds, shares and latencies over the images."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    at = np.cumsum(trace['images'])
    count = max(1, args.mean_over // args.batch_size)
    figure, rows = pyplot.subplots(3, 1, figsize=(9, 7), sharex=True, constrained_layout=True)
    rows[0].plot(
        at, running_mean(trace['difficulty'], count), color='tab:orange', label='mean difficulty'
    )
    rows[0].plot(
        at, trace['threshold'].clip(0, 1), color='tab:blue', linewidth=0.8, label='threshold'
    )
    rows[1].plot(at, running_mean(trace['hard'], count), color='tab:red', label='hard share')
    rows[1].plot(at, trace['share'], color='tab:gray', linewidth=0.8, label='share aimed at')
    rows[2].plot(
        at, 1e3 * running_mean(trace['latency'], count), color='tab:green', label='mean latency'
    )
    if controller.measures:
        rows[2].axhline(
            1e3 * controller.target, color='black', linestyle='--', linewidth=0.8, label='target'
        )
    for row, label in zip(rows, ('difficulty', 'share', 'ms per image')):
        row.set_ylabel(label)
        row.set_ylim(0, 1.3 if row is not rows[2] else 1.1e3 * max(latencies))
        for number, (start, stop) in enumerate(spikes):
            row.axvspan(
                start,
                stop,
                color='tab:gray',
                alpha=0.15,
                linewidth=0,
                label=f'load: {args.load:g} times as slow'
                if row is rows[2] and not number
                else None,
            )
        row.legend(loc='upper right', ncols=3, frameon=False)
    rows[0].set_title(f'Means over the last {args.mean_over} images')
    rows[2].set_xlabel('images')
    file = io.BytesIO()
    figure.savefig(file, dpi=80, format=Path(args.out).suffix[1:] or 'png')
    write_atomically(file.getvalue(), args.out)


def main() -> None:
    """Simulate a controller on a drifting stream and draw it."""
    args = parse_args()
    check(args)
    warnings.simplefilter('always')
    difficulties, latencies = make_stream(args)
    spikes = [tuple(int(args.images * share) for share in load) for load in LOADS]
    controller = build(args, latencies)
    seconds = loaded_latencies(args.images, latencies, spikes, args.load, seed=args.seed)
    trace = simulate_controller(controller, difficulties, seconds, args.batch_size, args.delay)
    draw(trace, controller, latencies, spikes, args)
    name, unit = ('latency', 1e3) if controller.measures else ('hard', 1)
    means = unit * running_mean(trace[name], max(1, args.mean_over // args.batch_size))
    means = means[min(len(means) - 1, args.mean_over // args.batch_size) :]
    print(
        f'{args.images} images; {"ms per image" if controller.measures else "hard share"}, target '
        f'{unit * controller.target:.4g}: mean {unit * trace[name].mean():.4g}, over any '
        f'{args.mean_over} images {means.min():.4g} to {means.max():.4g}'
    )
    print(f'picture in {args.out}')
    if args.json:
        content = {key: values.tolist() for key, values in trace.items()}
        write_atomically(json.dumps(dict(options=vars(args), **content)).encode(), args.json)


if __name__ == '__main__':
    cli.run(main)
