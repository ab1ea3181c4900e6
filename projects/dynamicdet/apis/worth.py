"""What a compressed detector is worth: AP on the test set, and latency, beside the original's."""
import time
from typing import Dict, List, Mapping, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from torch import Tensor
from torch.utils.data import DataLoader

from mmdet.models.detectors import BaseDetector

from ..checkpoints import require_complete
from ..compression.report import Worth
from . import cli
from .calibration import Progress, build_loader

#: Images that are timed, and how often each, after one untimed round.
_IMAGES, _ROUNDS = 20, 5


def measure(cfg: Config,
            states: Mapping[str, Mapping[str, Tensor]],
            progress: Progress,
            device: str = 'cpu') -> Dict[str, Worth]:
    """Test detectors of one config, by the config's own evaluator, and time them in turns.

    Args:
        cfg (Config): With ``test_dataloader`` and ``test_evaluator``.
        states (Mapping[str, Mapping[str, Tensor]]): Name -> state dict.
        progress (Callable): Wraps what is iterated over.
        device (str): Where.

    Raises:
        UsageError: If a state dict does not fit the config, or the test set is empty.
    """
    models = {name: build(cfg, state, device) for name, state in states.items()}
    loader = build_loader(cfg.test_dataloader)
    found = {name: evaluate(cfg, model, loader, progress, name) for name, model in models.items()}
    seconds = latencies(models, loader.dataset, progress)
    return {name: Worth(metric(own, 'mAP', 'AP'), metric(own, 'mAP_50', 'AP50'), seconds[name])
            for name, own in found.items()}


def build(cfg: Config, state: Mapping[str, Tensor], device: str) -> BaseDetector:
    """A config's detector, filled, in eval mode.

    Raises:
        UsageError: If the state dict does not fit.
    """
    init_default_scope('mmdet')
    model = cli.build_model(cfg)
    require_complete(model, state)
    model.load_state_dict(state, strict=False)
    return model.to(device).eval()


@torch.no_grad()
def evaluate(cfg: Config, model: BaseDetector, loader: DataLoader, progress: Progress, name: str) -> dict:
    """What the config's evaluator says of the test set."""
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in progress(loader, f'test set, {name}'):
        evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    return evaluator.evaluate(len(loader.dataset))


def metric(found: Mapping[str, float], *names: str) -> Optional[float]:
    """The box AP among an evaluator's figures, in percent, such as COCO's or VOC's."""
    for name in names:
        for key in (f'coco/bbox_{name}', f'pascal_voc/{name}'):
            if key in found:
                return 100 * found[key]
    return None


@torch.no_grad()
def latencies(models: Mapping[str, BaseDetector], dataset, progress: Progress) -> Dict[str, float]:
    """Median seconds of an image: batch 1, data in memory, detectors taking turns."""
    batches = [pseudo_collate([dataset[index]]) for index in range(min(_IMAGES, len(dataset)))]
    times: Dict[str, List[float]] = {name: [] for name in models}
    for turn in progress(range(_ROUNDS + 1), 'latencies'):
        for batch in batches:
            for name, model in models.items():
                synchronise = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
                synchronise()
                start = time.perf_counter()
                model.test_step(batch)
                synchronise()
                times[name] += [time.perf_counter() - start] * bool(turn)
    return {name: float(np.median(own)) for name, own in times.items()}
