"""Train or test a dynamic Detectron2 detector by a yaml config: Detectron2's train_net.py with two
steps and a wanted speed."""

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


def setup(args: argparse.Namespace):
    """The config of a command line, frozen."""
    from detectron2.config import get_cfg
    from detectron2.engine import default_setup

    from dynamicdet_detectron2.config import (
        add_dynamicdet_config,
        merge_config_file,
        require_device,
        set_config_budget,
        take_router_step,
    )
    from dynamicdet_detectron2.data import register_digits

    register_digits()
    cfg = get_cfg()
    add_dynamicdet_config(cfg)
    merge_config_file(cfg, args.config_file)
    cfg.merge_from_list(args.opts)
    require_device(cfg.MODEL.DEVICE)
    set_config_budget(cfg, **budget_of(args))
    if args.step == 'router' and not args.eval_only:
        take_router_step(cfg, cfg.MODEL.WEIGHTS if 'MODEL.WEIGHTS' in args.opts else None)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace):
    """Train, or test with ``--eval-only``."""
    from dynamicdet_detectron2 import DynamicCheckpointer
    from dynamicdet_detectron2.branch import require_runnable
    from dynamicdet_detectron2.quantization_hook import round_by_checkpoint
    from dynamicdet_detectron2.trainer import DynamicTrainer, quantization_of

    cfg = setup(args)
    if args.eval_only:
        model = DynamicTrainer.build_model(cfg)
        require_runnable(model)
        checkpointer = DynamicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        quantization = quantization_of(cfg)
        if quantization is not None:
            round_by_checkpoint(model, checkpoint, quantization)
        return DynamicTrainer.test(cfg, model)
    trainer = DynamicTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == '__main__':
    run(main, parse_args())
