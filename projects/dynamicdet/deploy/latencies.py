"""How long a deployed detector takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate

from mmdet.models.detectors import BaseDetector

from ..measuring.latencies import measure_latencies
from ..models import DynamicDetector
from ..progress import Progress
from ..timing import machine_of, time_in_turns
from .runtimes import chosen_providers


@torch.no_grad()
def measure_latency(
    model: BaseDetector, dataset: Any, progress: Progress, images: int = 20, rounds: int = 5
) -> list[float]:
    """Median seconds per image of each exit, of a plain detector's one: batch 1, images in memory,
    from preprocessing to boxes.

    Args:
        model (BaseDetector): In eval mode.
        dataset: The data set; its first ``images`` are timed.
        progress (Callable): Wraps what is iterated over.
        images (int): How many images. Defaults to 20.
        rounds (int): How often each is timed, after one untimed round. Defaults to 5.
    """
    if isinstance(model, DynamicDetector):
        return list(measure_latencies(model, dataset, progress, images, rounds))
    batches = [pseudo_collate([dataset[index]]) for index in range(min(images, len(dataset)))]
    device = model.data_preprocessor.device
    return [*time_in_turns({0: model.test_step}, batches, device, progress, rounds).values()]


def timing_conditions(
    runtime: str = 'onnxruntime', threads: int | None = None, providers: Sequence[str] | None = None
) -> dict[str, object]:
    """What graphs are timed under: ``runtime``, of ONNX Runtime with its ``provider``, ``device``
    and ``threads``. Arguments as of `runtimes.open_graph`."""
    facts = dict(runtime=runtime, **machine_of('cpu', threads))
    return (
        dict(facts, provider=chosen_providers(providers)[0]) if runtime == 'onnxruntime' else facts
    )


def put_latencies(model: BaseDetector, seconds: Sequence[float]) -> None:
    """Let budgets in time go by latencies that were measured here; those of a dynamic detector's
    exits."""
    if isinstance(model, DynamicDetector):
        model.latencies.copy_(torch.tensor(seconds))
        model.timed_elsewhere = None


def describe_latencies(latencies: Mapping[str, Any]) -> str:
    """Latencies and what they were measured with, in one line; see `timing_conditions`."""
    each = ', '.join(
        f'exit {exit} {1e3 * seconds:.1f} ms' for exit, seconds in enumerate(latencies['seconds'])
    )
    return (
        f'latencies: {each}; {latencies["runtime"]}, threads {latencies["threads"]}, one image at '
        'a time'
    )
