"""What a compressed detector is worth: AP on the test set, and latency, beside the original's."""

import contextlib
from collections.abc import Mapping

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from torch import Tensor
from torch.utils.data import DataLoader

from mmdet.models.detectors import BaseDetector

from ..building import build_loader, load_detector
from ..compression.size_report import AccuracyAndLatency
from ..models import DynamicDetector
from ..models.budget_control import preserved_budget
from ..progress import Progress
from ..timing import time_in_turns
from .latencies import force_dynamic_exit

#: Images that are timed, and how often each, after one untimed round.
_IMAGES, _ROUNDS = 20, 5


def measure_detectors(
    cfg: Config, states: Mapping[str, Mapping[str, Tensor]], progress: Progress, device: str = 'cpu'
) -> dict[str, AccuracyAndLatency]:
    """Test detectors of one config, by the config's own evaluator, and time them in turns.

    Args:
        cfg (Config): With ``test_dataloader`` and ``test_evaluator``.
        states (Mapping[str, Mapping[str, Tensor]]): Name -> state dict.
        progress (Callable): Wraps what is iterated over.
        device (str): Where.

    Raises:
        UsageError: If a state dict does not fit the config, or the test set is empty.
    """
    models = {
        name: load_detector(cfg, dict(state_dict=state), device)[0]
        for name, state in states.items()
    }
    loader = build_loader(cfg.test_dataloader)
    tested = {
        name: evaluate_detector(cfg, model, loader, progress, name)
        for name, model in models.items()
    }
    seconds = exit_latencies(models, loader.dataset, progress)
    return {
        name: AccuracyAndLatency(
            box_ap(metrics, 'mAP', 'AP'),
            box_ap(metrics, 'mAP_50', 'AP50'),
            float(np.dot(shares, seconds[name])),
            shares if len(shares) > 1 else (),
        )
        for name, (metrics, shares) in tested.items()
    }


@torch.no_grad()
def evaluate_detector(
    cfg: Config, model: BaseDetector, loader: DataLoader, progress: Progress, name: str
) -> tuple[dict[str, float], list[float]]:
    """What the config's evaluator says of the test set; and the share of images that left at each
    exit, (K,)."""
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    counts = np.zeros(_exits(model))
    for batch in progress(loader, f'test set, {name}'):
        samples = model.test_step(batch)
        np.add.at(counts, [sample.exit if len(counts) > 1 else 0 for sample in samples], 1)
        evaluator.process(data_samples=samples, data_batch=batch)
    return evaluator.evaluate(len(loader.dataset)), (counts / counts.sum()).tolist()


def box_ap(metrics: Mapping[str, float], *names: str) -> float | None:
    """The box AP among an evaluator's figures, in percent, such as COCO's or VOC's."""
    for name in names:
        for key in (f'coco/bbox_{name}', f'pascal_voc/{name}'):
            if key in metrics:
                return 100 * metrics[key]
    return None


@torch.no_grad()
def exit_latencies(
    models: Mapping[str, BaseDetector], dataset, progress: Progress
) -> dict[str, list[float]]:
    """Median seconds of an image under each exit, (K,): batch 1, data in memory, detectors taking
    turns."""
    batches = [pseudo_collate([dataset[index]]) for index in range(min(_IMAGES, len(dataset)))]
    turns = [(name, exit) for name, model in models.items() for exit in range(_exits(model))]
    with contextlib.ExitStack() as stack:
        for model in models.values():
            if _exits(model) > 1:
                stack.enter_context(preserved_budget(model))
        medians = time_in_turns(
            {turn: models[turn[0]].test_step for turn in turns},
            batches,
            next(next(iter(models.values())).parameters()).device,
            progress,
            _ROUNDS,
            lambda turn: _force(models[turn[0]], turn[1]),
        )
    return {
        name: [medians[name, exit] for exit in range(_exits(model))]
        for name, model in models.items()
    }


def _exits(model: BaseDetector) -> int:
    """Exits among which a router chooses; 1 of a detector without one."""
    return model.num_exits if isinstance(model, DynamicDetector) else 1


def _force(model: BaseDetector, exit: int) -> None:
    if _exits(model) > 1:
        force_dynamic_exit(model, exit)
