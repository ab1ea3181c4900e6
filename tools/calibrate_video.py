"""Choose the thresholds of an early-exit detector's gate on a record of validation videos
(tools/record_video.py), for a wished cost or an allowed loss of AP, and write them into the
checkpoint; a gate that learns can be fitted to a record first. Needs no pass over the data:
seconds.

The gate is the config's: --cfg-options model.gate.type=AgreementGate takes another.
"""

import argparse

from dynamicdet_options import add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of an EarlyExitDetector with a gate')
    parser.add_argument('checkpoint', help='its checkpoint file')
    add_common_arguments(parser)
    parser.add_argument('--record', required=True, help='record of the validation videos')
    parser.add_argument('--ann-file', help='its annotations: what was recorded by default')
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument(
        '--max-drop', type=float, help='AP that may be lost against the last exit: 1 by default'
    )
    wish.add_argument(
        '--target-gflops', type=float, help='mean GFLOPs per frame, 2 x multiply-adds'
    )
    wish.add_argument('--target-latency', type=float, help='mean seconds per frame')
    parser.add_argument(
        '--by',
        choices=['gflops', 'latency'],
        default='latency',
        help='the cost that --max-drop makes least: latency',
    )
    parser.add_argument(
        '--fit-record', help='record to fit a gate to that learns; other videos than --record'
    )
    parser.add_argument('--fit-ann-file', help='its annotations')
    parser.add_argument('--seed', type=int, default=0, help='of the fit: 0')
    parser.add_argument('--out', help='write here instead of into the checkpoint')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.cascade.weights import exits_digest
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.routing.record import require_of_detector
from dynamicdet.video.calibration import calibrate_gate, put_calibration
from dynamicdet.video.gate_analysis import decision_seconds, load_truth
from dynamicdet.video.gate_fitting import fit_gate_parts, untrained_gate_parts
from dynamicdet.video.gate_simulation import evidence_by_exit
from dynamicdet.video.gates import name_of
from dynamicdet.video.record import read_video_record
from dynamicdet.video.recording import load_early_exit_detector


def wish_of(args: argparse.Namespace) -> dict:
    """What is wished for, as `calibrate_gate` takes it."""
    given = {name: getattr(args, name) for name in ('max_drop', 'target_gflops', 'target_latency')}
    return {name: value for name, value in given.items() if value is not None} or dict(max_drop=1.0)


def main() -> None:
    """Choose the thresholds of a gate and write the checkpoint."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    out = args.out or args.checkpoint
    if '://' in out:
        raise UsageError('a checkpoint from a URL is not written back: name a file by --out')
    cli.require_writable(out)
    record = read_video_record(args.record)
    coco = load_truth(record, args.ann_file)
    model, checkpoint = load_early_exit_detector(cfg, args.checkpoint, fused=False)
    if model.gate is None:
        raise UsageError(
            "the config's model has no gate: --cfg-options model.gate.type=AgreementGate"
        )
    untrained = untrained_gate_parts(model.gate, checkpoint['state_dict'])
    if untrained and not args.fit_record:
        raise UsageError(
            f'the checkpoint has no trained {name_of(model.gate)}: fit it by --fit-record'
        )
    digest = exits_digest(checkpoint['state_dict'])
    identity = (model.num_exits, args.checkpoint, digest)
    require_of_detector(record['provenance'], len(record['gflops']), *identity)
    facts = dict(
        record=args.record,
        wish=wish_of(args),
        config=args.config,
        frames=len(record['images']),
        device=str(record['provenance'].get('device', '')),
    )
    if args.fit_record:
        other = read_video_record(args.fit_record)
        require_of_detector(other['provenance'], len(other['gflops']), *identity)
        # What was trained with the detector stays, if there is something else to fit.
        fits = fit_gate_parts(
            model.gate,
            other,
            load_truth(other, args.fit_ann_file),
            seed=args.seed,
            parts=untrained or ('gate', 'nothing'),
            progress=cli.counter('fits'),
        )
        if not fits:
            raise UsageError(f'{name_of(model.gate)} does not learn: leave out --fit-record')
        facts.update(
            fit={
                name: dict(fit._asdict(), record=args.fit_record, seed=args.seed)
                for name, fit in fits.items()
            }
        )
    seconds = decision_seconds(model.gate, record, evidence_by_exit(record))
    calibration = calibrate_gate(
        record, coco, model.gate, facts['wish'], args.by, seconds, progress=cli.counter('settings')
    )
    write_checkpoint(
        put_calibration(
            checkpoint, calibration, model.gate, dict(facts, decision_seconds=list(seconds))
        ),
        out,
    )
    row, last, thresholds = (
        calibration.row,
        calibration.last,
        ', '.join(f'{threshold:.4f}' for threshold in calibration.thresholds),
    )
    print(
        f'{type(model.gate).__name__} on {len(record["images"])} frames: AP {row["ap"]:.2f} (last '
        f'exit {last["ap"]:.2f}), per frame {row["gflops"]:.3f} GFLOPs ({last["gflops"]:.3f}) and '
        f'{1e3 * row["latency"]:.2f} ms ({1e3 * last["latency"]:.2f}); thresholds {thresholds}; '
        f'written to {out}'
    )


if __name__ == '__main__':
    cli.run(main)
