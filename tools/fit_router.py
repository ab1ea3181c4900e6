"""Fit the router of a trained cascade to records, in seconds: step 2 without a pass over the data.

Records (tools/record.py) of images that step 1 did not see make the best target: of a held-out part
of the training images, of several augmented passes over it, or of folds, each recorded by a cascade
that was trained without it, with --features-from a record of all of them by CHECKPOINT itself.
"""

import argparse

from dynamicdet_options import add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of step 2')
    parser.add_argument('checkpoint', help='checkpoint file of step 1 or step 2; it stays as it is')
    add_common_arguments(parser)
    parser.add_argument(
        '--records', nargs='+', required=True, help='files of tools/record.py to learn from'
    )
    parser.add_argument(
        '--features-from', nargs='+', help='records that give what the router sees instead'
    )
    parser.add_argument(
        '--objective',
        choices=['paper', 'no_offset', 'loss_sum', 'rank', 'pairwise', 'ap', 'gain'],
        help="what the router learns; by default the config's, where it can also have numbers",
    )
    parser.add_argument(
        '--gain',
        choices=['loss', 'loss_sum', 'ap', 'reward'],
        help="what an image gains, instead of the objective's own",
    )
    parser.add_argument(
        '--by-class',
        action='store_true',
        help='count an object by how rare its class is, as AP does',
    )
    parser.add_argument(
        '--method',
        choices=['layers', 'linear', 'rule'],
        default='layers',
        help="the router's two layers, by default; a linear router, by ridge regression; or, of a "
        "router that sees exit 0's detections, the rule that fits nothing: their p (1 - p), summed "
        'by class',
    )
    parser.add_argument('--seed', type=int, default=0, help='of weights, order and folds: 0')
    parser.add_argument('--out', required=True, help='checkpoint file to write')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.building import build_model, exits_of_plain, require_dynamic, whole_model
from dynamicdet.cascade.weights import exits_digest
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.measuring.region_calibration import fit_regions, insert_regions
from dynamicdet.measuring.router_from_records import (
    fit_router_to_records,
    ground_truths,
    insert_router,
    objective_settings,
    wanted_objective,
)
from dynamicdet.models import DynamicDetector
from dynamicdet.routing.record import RoutingRecord, read_record, require_of_detector
from dynamicdet.routing.router_fitting import RouterFit


def main() -> None:
    """Fit a router to a record and write the checkpoint."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    require_dynamic(cfg)
    if args.seed < 0:
        raise UsageError('--seed must be 0 or more')
    cli.require_writable(args.out)
    objective = wanted_objective(args.objective, whole_model(cfg), args.gain, args.by_class)
    records = [read_record(path) for path in args.records]
    seen = [read_record(path) for path in args.features_from] if args.features_from else None
    checkpoint = cli.require_checkpoint(args.checkpoint)
    model = build_model(cfg)
    # Folds' records are of other cascades: then those that give the features must be of this one.
    weights = exits_of_plain(model, checkpoint['state_dict'], args.checkpoint)
    digest = exits_digest(weights)
    for record in seen or records:
        require_of_detector(
            record.provenance, record.exits, model.num_exits, args.checkpoint, digest
        )
    if model.regions is not None:
        fit_region_map(args, model, records, dict(checkpoint, state_dict=weights))
        return
    with cli.silence():
        cocos = ground_truths(records, objective, model.router)
    fit, images = fit_router_to_records(
        model.router, records, objective, cocos, seen, args.seed, cli.counter('fits'), args.method
    )
    facts = dict(
        records=args.records,
        features_from=args.features_from or [],
        objective=objective_settings(objective),
        rows=sum(len(record) for record in records),
        images=images,
        seed=args.seed,
        method=args.method,
        cascade=args.checkpoint,
    )
    done = insert_router(model, dict(checkpoint, state_dict=weights), fit, facts)
    write_checkpoint(done, args.out)
    print(
        f'router fitted to {facts["rows"]} rows of {images} images ({_chosen(fit)}); correlation '
        'with the gain on images that it was not fit to: '
        f'{fit.correlation:.3f}; delta {done["meta"]["router"]["delta"]:.4f}; written to {args.out}'
    )


def fit_region_map(
    args: argparse.Namespace, model: DynamicDetector, records: list[RoutingRecord], checkpoint: dict
) -> None:
    """Fit the map of regions instead, and write the checkpoint."""
    odd = dict(
        objective=args.objective,
        features_from=args.features_from,
        gain=args.gain,
        by_class=args.by_class,
        method=args.method != 'layers',
    )
    for option, value in odd.items():
        if value:
            raise UsageError(
                f'--{option.replace("_", "-")} is of routers of whole images: leave it out'
            )
    with cli.silence():
        fit = fit_regions(model, records, args.seed, cli.counter('fit'))
    done = insert_regions(model, checkpoint, dict(fit, records=args.records, seed=args.seed))
    write_checkpoint(done, args.out)
    print(
        f'regions fitted to {fit["images"]} images, {fit["classes"]} classes; correlation of '
        f"the images' sums with their gains: {fit['correlation']:.3f}; written to {args.out}"
    )


def _chosen(fit: RouterFit) -> str:
    """What cross-validation chose."""
    if not fit.steps and not fit.weight_decay:
        return 'the rule'
    if not fit.steps:
        return f'penalty {fit.weight_decay:g}'
    return f'{fit.steps} steps, weight decay {fit.weight_decay:g}'


if __name__ == '__main__':
    cli.run(main)
