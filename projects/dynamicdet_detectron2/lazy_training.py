"""Train and test by LazyConfig, both steps: what Detectron2's lazy trainer does, with a
checkpointer and a hook of ours."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm

from dynamicdet.errors import UsageError, reason_of

from .branch import require_runnable
from .channel_removal_hook import ChannelRemovalHook
from .checkpointer import DynamicCheckpointer
from .data import every_image
from .exact_resume_hook import ExactResumeHook
from .launching import distributed
from .pruning_hook import PruningHook
from .quantization_hook import QuantizationHook, round_by_checkpoint
from .router_hook import RouterHook
from .trainer import ExitEvaluator, require_seed


def load_config(path: str) -> Any:
    """Read a config file.

    Raises:
        UsageError: If it is missing or cannot be read.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no config at '{path}'")
    try:
        return LazyConfig.load(path)
    except Exception as error:
        # A config is a program: it may raise anything.
        raise UsageError(f"the config '{path}' cannot be read: {reason_of(error)}") from error


def load_model(cfg: Any) -> torch.nn.Module:
    """The model of a config with the weights of ``train.init_checkpoint``."""
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    checkpoint = DynamicCheckpointer(model).load(cfg.train.init_checkpoint)
    if 'quantization' in cfg:
        round_by_checkpoint(model, checkpoint, QuantizationHook(**cfg.quantization))
    return distributed(model)


def test(cfg: Any, model: torch.nn.Module) -> dict | None:
    """Test a model by a config's evaluator, with a count of the exits; nothing without one."""
    if 'evaluator' not in cfg.dataloader:
        return None
    evaluator = DatasetEvaluators([instantiate(cfg.dataloader.evaluator), ExitEvaluator()])
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    print_csv_format(results)
    return results


def every_training_image(cfg: Any) -> Iterable:
    """The training images of a config, each once, as the training sees them."""
    loader = cfg.dataloader.train
    return every_image(
        instantiate(loader.dataset), instantiate(loader.mapper), 8, loader.get('num_workers', 0)
    )


def train(cfg: Any, resume: bool = False) -> None:
    """Train step 1 or, where ``model.train_router`` says so, step 2.

    Args:
        cfg (DictConfig): With ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and
            ``train``, as Detectron2's lazy configs have them; ``pruning``, ``removal`` and
            ``quantization``, dicts, have arguments of `PruningHook`, `ChannelRemovalHook` and
            `QuantizationHook`, and
            ``train.exact_resume`` is for `ExactResumeHook`.
        resume (bool): Whether to go on from the last checkpoint. Defaults to False.
    """
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    require_runnable(model, training=True)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    kind = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = kind(distributed(model, **cfg.train.ddp), loader, optimizer)
    checkpointer = DynamicCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    router_hook = None
    if cfg.model.get('train_router', False):
        delta = cfg.get('router', {}).get('delta', 'exact')
        router_hook = RouterHook(lambda: every_training_image(cfg), delta)
    writes = comm.is_main_process()
    trainer.register_hooks(
        [
            ExactResumeHook(require_seed(cfg.train.get('seed')))
            if cfg.train.get('exact_resume')
            else None,
            PruningHook(**cfg.pruning) if 'pruning' in cfg else None,
            ChannelRemovalHook(**cfg.removal) if 'removal' in cfg else None,
            QuantizationHook(**cfg.quantization) if 'quantization' in cfg else None,
            router_hook,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if writes else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, trainer.model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if writes
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if router_hook is not None:
        router_hook.require_cascade()
    # A checkpoint has the iteration that was finished.
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
