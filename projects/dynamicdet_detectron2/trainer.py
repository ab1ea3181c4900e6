"""Detectron2's default trainer for dynamic detectors, both steps."""

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm

from dynamicdet.errors import UsageError

from .branch import require_runnable
from .channel_removal_hook import ChannelRemovalHook
from .checkpointer import DynamicCheckpointer
from .data import every_training_image
from .exact_resume_hook import ExactResumeHook
from .launching import distributed
from .pruning_hook import PruningHook
from .quantization_hook import QuantizationHook
from .router_hook import RouterHook


class DynamicTrainer(DefaultTrainer):
    """Train step 1 or, where ``MODEL.DYNAMIC.TRAIN_ROUTER`` says so, step 2.

    Attributes:
        router_hook (RouterHook, optional): Of step 2.
    """

    router_hook: RouterHook | None = None

    def __init__(self, cfg) -> None:
        """As `DefaultTrainer`, with a checkpointer that reads what it loads in another way, and
        several processes on a CPU, too."""
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        require_runnable(model, training=True)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        kind = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = kind(distributed(model, broadcast_buffers=False), loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DynamicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's own, with those of the config before them."""
        cfg, hooks = self.cfg, []
        if cfg.SOLVER.get('EXACT_RESUME'):
            hooks.append(ExactResumeHook(require_seed(cfg.SEED)))
        if len(cfg.SOLVER.get('PRUNING', {}).get('BLOCKS', ())):
            hooks.append(PruningHook(**_arguments(cfg.SOLVER.PRUNING)))
        if len(cfg.SOLVER.get('REMOVAL', {}).get('BLOCKS', ())):
            hooks.append(ChannelRemovalHook(**_arguments(cfg.SOLVER.REMOVAL)))
        quantization = quantization_of(cfg)
        if quantization is not None:
            hooks.append(quantization)
        dynamic = cfg.MODEL.get('DYNAMIC')
        if dynamic is not None and dynamic.TRAIN_ROUTER:
            delta = cfg.SOLVER.ROUTER.DELTA
            self.router_hook = RouterHook(lambda: every_training_image(cfg), delta)
            hooks.append(self.router_hook)
        return hooks + super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        """Load weights, see `DefaultTrainer.resume_or_load`; refuse a step 2 without a cascade
        before anything runs."""
        super().resume_or_load(resume)
        if self.router_hook is not None:
            self.router_hook.require_cascade()

    def state_dict(self) -> dict[str, Any]:
        """With the optimizer's, which Detectron2 0.6 leaves out: a resumed run would begin with no
        momentum, at the rate of the first iteration."""
        return {**super().state_dict(), '_trainer': self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, or what Detectron2 0.6 did."""
        TrainerBase.load_state_dict(self, state_dict)
        if '_trainer' in state_dict:
            self._trainer.load_state_dict(state_dict['_trainer'])

    @classmethod
    def build_optimizer(cls, cfg, model: torch.nn.Module) -> torch.optim.Optimizer:
        """``SOLVER.OPTIMIZER``: Detectron2's SGD, or AdamW."""
        name = cfg.SOLVER.get('OPTIMIZER', 'SGD')
        if name == 'SGD':
            return super().build_optimizer(cfg, model)
        if name != 'ADAMW':
            raise UsageError(f"SOLVER.OPTIMIZER is 'SGD' or 'ADAMW', got '{name}'")
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            parameters,
            lr=cfg.SOLVER.BASE_LR,
            betas=tuple(cfg.SOLVER.BETAS),
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        )

    @classmethod
    def build_evaluator(
        cls, cfg, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """What a data set is judged by, with a count of the exits."""
        folder = output_folder or str(Path(cfg.OUTPUT_DIR) / 'inference')
        return DatasetEvaluators([*evaluators_of(dataset_name, folder), ExitEvaluator()])


def quantization_of(cfg) -> QuantizationHook | None:
    """The hook of ``SOLVER.QUANTIZATION``, if it is enabled."""
    settings = _arguments(cfg.SOLVER.get('QUANTIZATION', {}))
    return QuantizationHook(**settings) if settings.pop('enabled', False) else None


def require_seed(seed: int) -> int:
    """A seed by which a run can be repeated, or a `UsageError`."""
    if seed is None or seed < 0:
        raise UsageError('an exact resume takes a seed: set SEED (LazyConfig: train.seed) to 0')
    return seed


def _arguments(node) -> dict[str, Any]:
    """Arguments of a hook, from its settings."""
    return {name.lower(): value for name, value in node.items()}


def evaluators_of(dataset_name: str, folder: str) -> list[DatasetEvaluator]:
    """Detectron2's evaluators of a data set in COCO's format.

    Raises:
        UsageError: If it is of another kind.
    """
    kind = MetadataCatalog.get(dataset_name).get('evaluator_type')
    evaluators: list[DatasetEvaluator] = []
    if kind in ('sem_seg', 'coco_panoptic_seg'):
        evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
    if kind in ('coco', 'coco_panoptic_seg'):
        # The fast one needs Detectron2's extension.
        evaluators.append(COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=False))
    if kind == 'coco_panoptic_seg':
        evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
    if not evaluators:
        raise UsageError(
            f"'{dataset_name}' has the evaluator_type '{kind}': this tool evaluates 'coco', "
            "'sem_seg' and 'coco_panoptic_seg'; take Detectron2's own evaluators from Python"
        )
    return evaluators


class ExitEvaluator(DatasetEvaluator):
    """Which share of the images left at which exit, and the mean difficulty."""

    def reset(self) -> None:
        """Forget all images."""
        self._exits: Counter[int] = Counter()
        self._difficulty = 0.0

    def process(self, inputs: list[dict], outputs: list[dict[str, Any]]) -> None:
        """Count a batch."""
        for output in outputs:
            if 'exit' in output:
                self._exits[output['exit']] += 1
                self._difficulty += output['difficulty']

    def evaluate(self) -> dict:
        """``exits``: the share of each, percent, and the mean difficulty; nothing of a plain
        detector."""
        parts = comm.gather((self._exits, self._difficulty), dst=0)
        if not comm.is_main_process():
            return {}
        exits = sum((part for part, _ in parts), Counter())
        total = exits.total()
        if not total:
            return {}
        last = max(1, *exits)
        shares = {f'exit {exit}': 100 * exits[exit] / total for exit in range(last + 1)}
        difficulty = sum(difficulty for _, difficulty in parts) / total
        return dict(exits={**shares, 'difficulty': difficulty})
