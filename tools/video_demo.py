"""Detect in a video, a folder of frames, a camera or a network stream, and show exits and costs.

Writes OUT.mp4 (boxes, the exit taken, the running cost), OUT.jsonl (a line per frame) and OUT.png
(exits and costs over time).
"""

import argparse
import sys
import warnings

from dynamicdet_options import ConfigOptions, positive


class GateOptions(ConfigOptions):
    """The first word may be the gate's type alone."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Read a type and its settings; the first word may leave out ``type=``."""
        head = values[0] if '=' in values[0] else f'type={values[0]}'
        super().__call__(parser, namespace, [head, *values[1:]], option_string)
        # gate.type=... is of a gate inside.
        from mmengine.config import Config

        nested = Config()
        nested.merge_from_dict(getattr(namespace, self.dest))
        setattr(namespace, self.dest, nested.to_dict())


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'video', help='video file, folder of frames, number of a camera, or URL such as rtsp://...'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', default='out.mp4', help='video to write: out.mp4')
    parser.add_argument(
        '--gate',
        nargs='+',
        action=GateOptions,
        metavar=('TYPE', 'KEY=VALUE'),
        help="another gate than the config's, such as: ScoreGate kind=confidence",
    )
    parser.add_argument(
        '--budget',
        nargs=1,
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='the wanted speed: target_gflops=2.5, target_latency=0.02 (seconds) or threshold=0.4',
    )
    parser.add_argument(
        '--online',
        action='store_true',
        help='hold the target on the frames that come: thresholds follow what frames really cost',
    )
    parser.add_argument('--device', help='such as cpu or cuda:0; the best that is there')
    parser.add_argument(
        '--pred-score-thr', type=float, default=0.3, help='leave out boxes of a lower score: 0.3'
    )
    parser.add_argument('--frames', type=positive, help='stop after so many frames')
    parser.add_argument('--fps', type=float, help='frames per second of a folder: 25')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: KEY=VALUE',
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget
from dynamicdet.video.demo import FrameDetector, Summary, require_film, run_demo
from dynamicdet.video.sources import open_source


def build_detector(args: argparse.Namespace) -> FrameDetector:
    """The detector that the options name."""
    cfg = cli.load_config(args)
    cli.require_settings(cfg, 'test_dataloader')
    cli.require_checkpoint(args.checkpoint)
    if args.device:
        cli.require_device(args.device)
    return FrameDetector(
        cfg, args.checkpoint, args.device, args.gate, args.budget, args.pred_score_thr, args.online
    )


def describe(summary: Summary, budget: Budget | None) -> str:
    """A line or two on what was done."""
    frames = summary.frames
    if not frames:
        return 'no frame could be read'
    parts = [f'{frames} frames, {1e3 * summary.seconds / frames:.1f} ms each']
    if budget and budget.kind == 'target_latency':
        parts[0] += f' ({1e3 * budget.value:.1f} wanted)'
    if summary.gflops is not None:
        parts.append(f'{summary.gflops:.3g} GFLOPs each')
        if budget and budget.kind == 'target_gflops':
            parts[-1] += f' ({budget.value:.3g} wanted)'
    parts += [f'exit {exit}: {count / frames:.0%}' for exit, count in sorted(summary.exits.items())]
    return f'{", ".join(parts)}\nwritten: {", ".join(summary.files)}'


def main() -> int:
    """Detect in a video; 1 if frames were lost, else 0."""
    args = parse_args()
    cli.prepare()
    # Nothing here draws with mmdet's visualizer.
    for message in ('palette does not exist.*', 'Failed to add .*'):
        warnings.filterwarnings('ignore', message=message)
    # First what takes no time to find out.
    budget = Budget.parse(args.budget)
    require_film(args.out)
    cli.require_writable(args.out)
    source = open_source(args.video, args.fps)
    detector = build_detector(args)
    length = min(filter(None, (source.length, args.frames)), default=None)
    with cli.progress(range(length) if length else iter(int, 1), 'frames') as bar:

        def say(line: str) -> None:
            bar.write(f'{source.name}: {line}', file=sys.stderr)

        summary = run_demo(
            detector, source, args.out, args.frames, say, lambda done: bar.update(done - bar.n)
        )
    if summary.ended:
        print(f'{source.name}: {summary.ended}', file=sys.stderr)
    print(('interrupted: ' if summary.stopped else '') + describe(summary, budget))
    budget_report = detector.budget_report(summary)
    cli.print_budget_report(budget_report)
    for above in summary.above(budget) if budget_report is None else []:
        print(f'warning: {above}', file=sys.stderr)
    if not summary.frames:
        raise UsageError(f"'{source.name}' has no frame that can be read")
    return 1 if summary.faults or summary.ended else 0


if __name__ == '__main__':
    cli.run(main)
