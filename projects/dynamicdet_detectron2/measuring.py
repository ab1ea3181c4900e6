"""Measure a trained dynamic detector: the calibration that thresholds follow from, and records, of
which reports are made."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynamicdet.cascade.weights import exits_digest
from dynamicdet.errors import UsageError
from dynamicdet.progress import Progress
from dynamicdet.routing.record import RoutingRecord, read_record
from dynamicdet.timing import dtype_of, machine_of, time_in_turns

from .dynamic_detector import DynamicDetector

#: How many images costs are measured on: two-stage heads cost by their proposals.
_COUNTED, _TIMED = 10, 20


@contextlib.contextmanager
def at_exit(model: DynamicDetector, exit: int) -> Iterator[None]:
    """While this is entered, every image goes to one exit: past all before it, and no further."""
    threshold, waits = model.threshold.clone(), model._budget_waits
    forced = [-1.0] * exit + [1.0] * (model.num_exits - 1 - exit)
    model.threshold.copy_(torch.tensor(forced).reshape(model.threshold.shape))
    model._budget_waits = False
    try:
        yield
    finally:
        model.threshold.copy_(threshold)
        model._budget_waits = waits


@torch.no_grad()
def calibrate(
    model: DynamicDetector, batches: Sequence[list[dict]], progress: Progress, hard_share: float
) -> dict[str, Any]:
    """Measure difficulties and costs of each exit, write them into the detector, and set its
    threshold.

    Args:
        model (DynamicDetector): In eval mode, on the device whose latencies count.
        batches (Sequence): The validation images, as a test sees them, one in each.
        progress (Callable): Wraps what is iterated over.
        hard_share (float): In [0, 1].

    Returns:
        dict: Facts for the checkpoint: costs, how many images, the machine.

    Raises:
        UsageError: If the router was not trained, or there is no image.
    """
    if not torch.isfinite(model.delta):
        raise UsageError(
            'the router of this checkpoint was not trained: train it by --step router first'
        )
    difficulties = []
    for batch in progress(batches, 'difficulties'):
        difficulties += difficulties_of(model, batch).tolist()
    if not difficulties:
        raise UsageError('there is no image to calibrate on')
    some = _first(batches, _TIMED)
    gflops, latencies = (
        count_gflops(model, some[:_COUNTED]),
        measure_latencies(model, some, progress),
    )
    model.difficulties = model.difficulties.new_tensor(sorted(difficulties))
    model.gflops.copy_(torch.tensor(gflops))
    model.latencies.copy_(torch.tensor(latencies))
    model.set_budget(hard_share=hard_share)
    costs = {f'lat{exit + 1}': seconds for exit, seconds in enumerate(latencies)}
    costs |= {f'g{exit}': value for exit, value in enumerate(gflops)}
    facts = dict(machine_of(model.device), dtype=dtype_of(model), hard_share=hard_share)
    return dict(costs, images=len(difficulties), **facts)


def difficulties_of(model: DynamicDetector, batch: Sequence[dict]) -> Tensor:
    """Difficulty of each image, (N,), by the first backbone and the router alone."""
    images = model.preprocess(batch)
    maps, _ = model.first_maps(images)
    return model.router(maps, model.valid_shares(images))


@torch.no_grad()
def count_gflops(model: DynamicDetector, batches: Sequence[list[dict]]) -> list[float]:
    """Mean GFLOPs per image of each exit, 2 x multiply-adds, by torch's counter, which follows what
    is really run and sees nothing of RoIAlign."""
    means = []
    for exit in range(model.num_exits):
        with at_exit(model, exit), FlopCounterMode(display=False) as counter:
            images = sum(len(model(batch)) for batch in batches)
        means.append(counter.get_total_flops() / images / 1e9)
    return means


@torch.no_grad()
def measure_latencies(
    model: DynamicDetector, batches: Sequence[list[dict]], progress: Progress, rounds: int = 3
) -> list[float]:
    """Median seconds per image of each exit, which take turns; batches are of one image."""
    runs: dict[int, Callable] = dict.fromkeys(range(model.num_exits), model)
    forcing = lambda exit: at_exit(model, exit)
    times = time_in_turns(runs, batches, model.device, progress, rounds, forcing)
    return [times[exit] for exit in range(model.num_exits)]


def _first(batches: Iterable[list[dict]], count: int) -> list[list[dict]]:
    return [batch for batch, _ in zip(batches, range(count))]


@torch.no_grad()
def record_exits(
    model: DynamicDetector,
    batches: Iterable[list[dict]],
    dataset_name: str,
    progress: Progress,
    checkpoint: str = '',
    config: str = '',
) -> RoutingRecord:
    """Run every image of a data set through every exit, each backbone once, and measure what each
    exit costs.

    Args:
        model (DynamicDetector): In eval mode, on the device whose latencies count.
        batches (Iterable): The images as a test sees them, one in each. Where they have
            ``instances``, losses and numbers of objects are recorded, too.
        dataset_name (str): In COCO's format; its metadata say where its annotations lie.
        progress (Callable): Wraps what is iterated over.
        checkpoint (str), config (str): Paths, for the provenance.
    """
    meta = MetadataCatalog.get(dataset_name)
    if not meta.get('json_file'):
        raise UsageError(f"a record is made of data in COCO's format; '{dataset_name}' is not")
    ids = meta.get('thing_dataset_id_to_contiguous_id') or {}
    categories = np.array(sorted(ids, key=ids.get), np.int32)
    entries: list[dict] = []
    for batch in progress(batches, 'every exit'):
        entries += _entries(model, batch, categories)
    some = _first(batches, _TIMED)
    gflops, latencies = (
        count_gflops(model, some[:_COUNTED]),
        measure_latencies(model, some, progress),
    )
    routing = _routing_gflops(model, some[:_COUNTED])
    provenance = dict(
        config=config,
        checkpoint=checkpoint,
        exits_digest=exits_digest(model.state_dict()),
        weights=_digest(model),
        ann_file=str(meta.json_file),
        categories=categories.tolist(),
        classes=list(meta.get('thing_classes', ())),
        images=len(entries),
        **machine_of(model.device),
        dtype=dtype_of(model),
        torch=str(torch.__version__),
        batch_size=1,
        latency_batch_size=1,
        view='none',
        first_scale=model.first_scale,
        scales=list(model.scales),
        branch0_gflops=max(0.0, gflops[0] - routing),
        router='trained' if torch.isfinite(model.delta) else 'NOT trained',
        framework='detectron2',
    )
    return RoutingRecord.from_images(entries, gflops, latencies, provenance)


def known_record(
    path: str | Path, model: DynamicDetector, dataset_name: str
) -> RoutingRecord | None:
    """The record in a file, if it is of the same weights and data; else None."""
    if not Path(path).is_file():
        return None
    facts = read_record(path)
    same = facts.provenance.get('weights') == _digest(model)
    annotations = str(MetadataCatalog.get(dataset_name).get('json_file'))
    return facts if same and facts.provenance.get('ann_file') == annotations else None


def _digest(model: DynamicDetector) -> str:
    """A hash of what detects and of the router, 16 hexadecimal digits."""
    state = model.state_dict()
    router = {f'with {key}': value for key, value in state.items() if key.startswith('router.')}
    return exits_digest({**state, **router})


def _entries(model: DynamicDetector, batch: list[dict], categories: np.ndarray) -> list[dict]:
    """What a record has of a batch's images."""
    state = model.start(batch)
    images = model.preprocess(batch)
    features = model.router.pool(state.maps, model.valid_shares(images)).cpu().numpy()
    every = [model.finish(state)]
    for _ in range(model.num_exits - 1):
        state = model.deepen(state)
        every.append(model.finish(state))
    entries = []
    for row, inputs in enumerate(batch):
        height, width = images.image_sizes[row]
        whole = inputs.get('height', height), inputs.get('width', width)
        entries.append(
            dict(
                id=int(inputs['image_id']),
                file=str(inputs['file_name']),
                difficulty=float(state.difficulties[row]),
                frame=(float(height), float(width), width / whole[1], height / whole[0]),
                detections=[_as_arrays(results[row], categories) for results in every],
                features=features[row].copy(),
            )
        )
    if all('instances' in inputs for inputs in batch):
        losses = model.exit_losses(batch)[0].T.tolist()
        for entry, exit_losses, inputs in zip(entries, losses, batch):
            entry.update(losses=exit_losses, objects=len(inputs['instances']))
    return entries


def _as_arrays(result: dict, categories: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections of an image as a record takes them: boxes (x, y, w, h), scores, category ids."""
    instances = result['instances'].to('cpu')
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    labels = instances.pred_classes.numpy()
    known = categories[labels] if len(categories) else labels
    return boxes.numpy(), instances.scores.numpy(), known


def _routing_gflops(model: DynamicDetector, batches: Sequence[list[dict]]) -> float:
    """Mean GFLOPs of the first backbone and the router."""
    with FlopCounterMode(display=False) as counter:
        images = sum(len(difficulties_of(model, batch)) for batch in batches)
    return counter.get_total_flops() / images / 1e9
