"""Train or test a dynamic Detectron2 detector by a LazyConfig: Detectron2's lazyconfig_train_net.py
with two steps and a wanted speed."""

import argparse

from detectron2_options import add_budget_arguments, add_step_argument, budget_of, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    # Detectron2's own has the rest; it takes seconds to import.
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser()
    parser.description = __doc__
    add_step_argument(parser)
    add_budget_arguments(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Train, or test with ``--eval-only``."""
    from detectron2.config import LazyConfig
    from detectron2.engine import default_setup

    from dynamicdet_detectron2 import lazy, lazy_training
    from dynamicdet_detectron2.config import require_device
    from dynamicdet_detectron2.data import register_digits

    register_digits()
    cfg = lazy_training.load_config(args.config_file)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    require_device(cfg.train.device)
    lazy.set_config_budget(cfg, **budget_of(args))
    if args.step == 'router' and not args.eval_only:
        named = any(option.startswith('train.init_checkpoint=') for option in args.opts)
        lazy.take_router_step(cfg, cfg.train.init_checkpoint if named else None)
    default_setup(cfg, args)
    if args.eval_only:
        lazy_training.test(cfg, lazy_training.load_model(cfg))
    else:
        lazy_training.train(cfg, resume=args.resume)


if __name__ == '__main__':
    run(main, parse_args())
