"""Dynamic detectors in LazyConfig."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget

from .config import last_checkpoint
from .dynamic_detector import DynamicDetector

#: Step 2, as `config.add_dynamicdet_config` has it.
_LR, _BETAS, _DECAY, _WARMUP, _STEPS = 1e-5, (0.937, 0.999), 0.005, 1000, 14660


def make_dynamic(model: Any, **settings: Any) -> Any:
    """The config of a dynamic detector from that of a stock one.

    Args:
        model (DictConfig): LazyCall of the stock detector. Its settings are below
            ``model.detector.stock`` from here on.
        **settings: Arguments of `DynamicDetector`.

    Example:
        >>> model = make_dynamic(model_zoo.get_config('common/models/mask_rcnn_fpn.py').model)
        >>> model.detector.stock.roi_heads.num_classes = 10
    """
    # Without a target of its own, so that it is built when the dynamic detector asks for it, and as
    # often.
    return LazyCall(DynamicDetector)(detector=dict(stock=model), **settings)


def take_router_step(cfg: Any, weights: str | None = None) -> None:
    """Turn a LazyConfig of step 1 into that of step 2: its own optimizer and schedule, and an own
    folder, ``train.output_dir/router``. It starts from step 1's last checkpoint.

    A field ``router`` of the config changes numbers: ``router = dict(lr=1e-4, max_iter=300)``, of
    ``lr``, ``betas``, ``weight_decay``, ``warmup``, ``max_iter``, ``delta``.

    Args:
        cfg (DictConfig): Changed in place.
        weights (str, optional): Another checkpoint to start from.

    Raises:
        UsageError: If there is none, or the model is not dynamic.
    """
    require_dynamic(cfg)
    weights = weights or last_checkpoint(cfg.train.output_dir)
    if weights is None:
        raise UsageError(
            f"step 2 starts from step 1's result, and there is none in '{cfg.train.output_dir}': "
            'run step 1 first (the same command without --step router), or name its checkpoint by '
            'train.init_checkpoint=...'
        )
    numbers = {
        **dict(lr=_LR, betas=_BETAS, weight_decay=_DECAY, warmup=_WARMUP, max_iter=_STEPS),
        **cfg.get('router', {}),
    }
    cfg.model.train_router = True
    if 'removal' in cfg:
        # Gone already: the checkpoint says which.
        del cfg['removal']
    cfg.train.init_checkpoint = weights
    cfg.train.output_dir = str(Path(cfg.train.output_dir) / 'router')
    cfg.train.max_iter = numbers['max_iter']
    cfg.optimizer = LazyCall(torch.optim.AdamW)(
        params=LazyCall(get_default_optimizer_params)(
            base_lr=numbers['lr'], weight_decay=numbers['weight_decay'], weight_decay_bias=0.0
        ),
        lr=numbers['lr'],
        betas=tuple(numbers['betas']),
        weight_decay=numbers['weight_decay'],
    )
    cfg.lr_multiplier = LazyCall(WarmupParamScheduler)(
        # Constant; Detectron2 asks for one step beyond the last.
        scheduler=LazyCall(MultiStepParamScheduler)(
            values=[1.0, 1.0], milestones=[numbers['max_iter']], num_updates=numbers['max_iter'] + 1
        ),
        warmup_factor=0.001,
        warmup_length=min(0.999, numbers['warmup'] / numbers['max_iter']),
    )


def set_config_budget(cfg: Any, **named: float | None) -> None:
    """Write the wanted speed of a command line into a config; nothing where none is given."""
    budget = Budget.parse(None, **named)
    if budget is not None:
        require_dynamic(cfg)
        cfg.model.budget = budget.as_dict()


def require_dynamic(cfg: Any) -> None:
    """Raise a `UsageError` unless a config's model is a dynamic detector."""
    if 'detector' not in cfg.model:
        raise UsageError(
            'the model of this config is no dynamic detector: write model = make_dynamic(model) '
            'in it, of dynamicdet_detectron2'
        )
