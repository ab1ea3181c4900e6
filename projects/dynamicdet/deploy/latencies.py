"""How long a deployed detector takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate

from mmdet.models.detectors import BaseDetector

from ..measuring.latencies import measure_latencies
from ..measuring.region_calibration import region_seconds
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


def measure_region_seconds(
    model: BaseDetector, dataset: Any, progress: Progress, images: int = 20, rounds: int = 3
) -> list[float] | None:
    """What budgets in time of calibrated regions go by, see `region_calibration.region_seconds`;
    None of other detectors."""
    regions = getattr(model, 'regions', None)
    if regions is None or not len(regions.curve):
        return None
    return region_seconds(model, dataset, progress, images, rounds)


def put_latencies(
    model: BaseDetector, seconds: Sequence[float], region_seconds: Sequence[float] | None = None
) -> None:
    """Let budgets in time go by latencies that were measured here: of a dynamic detector's exits on
    whole images, and of its regions (`measure_region_seconds`)."""
    if isinstance(model, DynamicDetector):
        model.latencies.copy_(torch.tensor(seconds))
        model.timed_elsewhere = None
        if region_seconds is not None:
            model.regions.put_seconds(region_seconds)


def describe_latencies(latencies: Mapping[str, Any]) -> str:
    """Latencies and what they were measured with, in one line; see `timing_conditions`."""
    each = ', '.join(
        f'exit {exit} {1e3 * seconds:.1f} ms' for exit, seconds in enumerate(latencies['seconds'])
    )
    if latencies.get('region_seconds'):
        names = ('an image', 'each region', 'all pixels again')
        each += ' on whole images; ' + ', '.join(
            f'{name} {1e3 * seconds:.1f} ms'
            for name, seconds in zip(names, latencies['region_seconds'])
        )
    return (
        f'latencies: {each}; {latencies["runtime"]}, threads {latencies["threads"]}, one image at '
        'a time'
    )
