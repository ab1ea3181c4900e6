"""Measure what the thresholds of a trained dynamic detector follow from."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor
from torch.utils.data import DataLoader

from mmdet.structures import SampleList

from ..annotations import original_of
from ..cascade.batch_state import BatchState
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.budget_control import preserved_budget
from ..progress import Progress
from ..routing.evaluation import read_truth
from ..routing.merging import platt_scaling_of
from ..routing.record import Detections, RoutingRecord
from ..timing import dtype_of, machine_of
from ..transfers import to_host
from .flops import count_flops
from .latencies import (
    force_dynamic_exit,
    measure_latencies,
    rows_by_size,
    rows_to_measure,
    single_batches,
)


@torch.no_grad()
def measure_difficulties(
    model: DynamicDetector, loader: DataLoader, progress: Progress
) -> np.ndarray:
    """Difficulties of a data set, sorted, (n,), float32. Runs the first backbone and the router."""
    return np.sort(_scores_and_shapes(model, loader, progress)[0])


def _scores_and_shapes(
    model: DynamicDetector, loader: DataLoader, progress: Progress
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Difficulty of each image, float32, and its height and width as delivered."""
    scores: list[float] = []
    shapes: list[tuple[int, int]] = []
    for batch in progress(loader, 'difficulties'):
        data = model.data_preprocessor(batch, False)
        scores.extend(model.score(data['inputs'], data['data_samples']).tolist())
        shapes.extend(tuple(sample.img_shape[:2]) for sample in data['data_samples'])
    return np.asarray(scores, np.float32), shapes


@torch.no_grad()
def measure_gflops(
    model: DynamicDetector, dataset, images: int = 10, rows: Sequence[int] | None = None
) -> tuple[float, ...]:
    """Mean GFLOPs per image of each exit, 2 x multiply-adds, by torch's counter.

    It follows what is really run, and sees nothing of mmcv's own operators: RoIAlign counts as 0.
    The cost of two-stage heads varies with the proposals, hence the mean over some images: the
    first, or those of the given rows.
    """
    batches = single_batches(dataset, images, rows)
    means = []
    with preserved_budget(model):
        for exit in range(model.num_exits):
            force_dynamic_exit(model, exit)
            flops, _ = count_flops(lambda: [model.test_step(batch) for batch in batches])
            means.append(flops / len(batches) / 1e9)
    return tuple(means)


def mean_costs(
    model: DynamicDetector, dataset, shapes: Sequence[tuple[int, int]], progress: Progress
) -> tuple[list[float], list[float]]:
    """Mean GFLOPs and seconds per image of each exit, over images of all sizes: a record's mean.

    Args:
        model (DynamicDetector): In eval mode, on the device that counts.
        dataset: The images, (n,).
        shapes (Sequence[tuple]): Height and width of each as delivered. Some of each size are
            measured, and count for all of it.
        progress (Callable): Wraps what is iterated over.
    """
    sizes, costs = rows_by_size(model, shapes), np.zeros((2, model.num_exits))
    for rows in progress(sizes, 'costs of sizes'):
        counted, timed = rows_to_measure(rows, len(sizes))
        costs += len(rows) * np.array(
            [
                measure_gflops(model, dataset, rows=counted),
                measure_latencies(model, dataset, lambda steps, what: steps, rows=timed),
            ]
        )
    gflops, latencies = (costs / len(shapes)).tolist()
    return gflops, latencies


@torch.no_grad()
def record_exits(model: DynamicDetector, loader: DataLoader, progress: Progress) -> RoutingRecord:
    """Each exit's detections of every image: all that a trade-off curve needs but the costs. Each
    backbone runs once.

    Args:
        model (DynamicDetector): In eval mode.
        loader (DataLoader): Over a COCO-format data set.
        progress (Callable): Wraps what is iterated over.

    Returns:
        RoutingRecord: Its costs are NaN.
    """
    images = []
    with preserved_budget(model):
        # A budget that waits for a calibration is not asked for here.
        force_dynamic_exit(model, 0)
        for batch in progress(loader, 'every exit'):
            data = model.data_preprocessor(batch, False)
            samples = data['data_samples']
            every = [
                detection_arrays(model.finish(state), loader.dataset.cat_ids)
                for state in exit_states(model, data['inputs'], samples)
            ]
            images.extend(
                dict(
                    id=sample.img_id,
                    file=sample.img_path,
                    difficulty=sample.difficulty,
                    detections=list(by_exit),
                )
                for sample, *by_exit in zip(samples, *every)
            )
    return RoutingRecord.from_images(images)


def exit_states(
    model: DynamicDetector, inputs: Tensor, samples: SampleList
) -> Iterator[BatchState]:
    """A batch before each exit, whatever the difficulties say; each backbone runs once."""
    state = model.start(inputs, samples)
    yield state
    for _ in range(model.num_exits - 1):
        state = model.deepen(state)
        yield state


def detection_arrays(
    samples: SampleList, category_ids: Sequence[int]
) -> list[tuple[np.ndarray, ...]]:
    """Detections of each image as `Detections.join` takes them: boxes, (D, 4), x, y, w, h; scores
    and categories, (D,)."""
    categories, arrays = np.asarray(category_ids, np.int32), []
    for boxes, scores, labels in to_host([sample.pred_instances for sample in samples]):
        boxes[:, 2:] -= boxes[:, :2]
        arrays.append((boxes.numpy(), scores.numpy(), categories[labels.numpy()]))
    return arrays


def coco_results(sample, category_ids: Sequence[int]) -> list[dict]:
    """Detections of an image as COCO has them; masks are left out, and left where they are."""
    return Detections.join(detection_arrays([sample], category_ids))[0]


def provenance(cfg: Config, checkpoint: str, dataset, device: str) -> dict[str, object]:
    """Where figures come from: what was measured, on which data and which machine. See also
    `inference_settings`."""
    return dict(
        config=str(cfg.filename),
        checkpoint=str(checkpoint),
        ann_file=original_of(str(getattr(dataset, 'ann_file', ''))),
        categories=list(getattr(dataset, 'cat_ids', ())),
        classes=list(getattr(dataset, 'metainfo', {}).get('classes', ())),
        images=len(dataset),
        **machine_of(device),
        torch=str(torch.__version__),
        seed=cfg.get('randomness', {}).get('seed'),
        date=datetime.datetime.now().isoformat(timespec='seconds'),
    )


def inference_settings(model: torch.nn.Module, loader: DataLoader) -> dict[str, object]:
    """How images passed through a model: in which numbers, and how many at a time. Latencies are of
    one at a time."""
    batch_size = getattr(loader.batch_sampler, 'batch_size', loader.batch_size)
    return dict(dtype=dtype_of(model), batch_size=batch_size, latency_batch_size=1)


def score_facts(model: DynamicDetector) -> dict[str, object]:
    """How a model's exits are merged and their scores scaled; None where they are not."""
    scaling = list(zip(model.platt_scale.tolist(), model.platt_shift.tolist()))
    scaled = any(pair != (1.0, 0.0) for pair in scaling)
    return dict(
        merge=str(model.merge) if model.merge else None,
        platt_scaling=[list(pair) for pair in scaling] if scaled else None,
    )


@contextlib.contextmanager
def plain_exits(model: DynamicDetector) -> Iterator[None]:
    """While this is open, exits are not merged, and give their scores as they are."""
    merge, scale, shift = model.merge, model.platt_scale.tolist(), model.platt_shift.tolist()
    model.merge = None
    model.set_platt_scaling([(1.0, 0.0)] * model.num_exits)
    try:
        yield
    finally:
        model.merge = merge
        model.set_platt_scaling(list(zip(scale, shift)))


def calibrate_scores(model: DynamicDetector, loader: DataLoader, progress: Progress) -> None:
    """Bring the scores of all exits on one scale: fit chances to be right to the annotations of a
    data set, see `routing.merging.platt_scaling_of`, and set the model's scaling to them.

    Args:
        model (DynamicDetector): In eval mode.
        loader (DataLoader): Over a COCO-format data set.
        progress (Callable): Wraps what is iterated over.
    """
    dataset = loader.dataset
    truth = read_truth(dataset.ann_file, dataset.cat_ids)
    with plain_exits(model):
        record = record_exits(model, loader, progress)
    model.set_platt_scaling(platt_scaling_of(record, truth))


def require_trained_router(model: DynamicDetector) -> None:
    """Raise a `UsageError` if a model's router is as random as before step 2."""
    if model.delta.isnan():
        raise UsageError(
            'the router of this checkpoint is not trained: train the router (step 2), or fit it by '
            'tools/record.py and tools/fit_router.py, before calibrating'
        )


def calibrate(
    model: DynamicDetector,
    loader: DataLoader,
    progress: Progress,
    hard_share: float = 0.5,
    fit_scores: bool = False,
) -> dict:
    """Measure difficulties and costs, and set the model's calibration and threshold to them.

    Args:
        model (DynamicDetector): Trained, on the device whose latencies count.
        loader (DataLoader): Over the validation set.
        progress (Callable): Wraps what is iterated over.
        hard_share (float): What the checkpoint does when nothing is asked for. Defaults to 0.5.
        fit_scores (bool): Whether to fit the scaling of the exits' scores, too; see
            `calibrate_scores`. Defaults to False: it stays as it is.

    Returns:
        dict: ``threshold`` (a list for more than two exits), and of each exit ``lat1``, ``lat2``,
            ... in seconds and ``g0``, ``g1``, ... in GFLOPs.

    Raises:
        UsageError: If the router was not trained.
    """
    require_trained_router(model)
    if fit_scores:
        calibrate_scores(model, loader, progress)
    with torch.no_grad():
        scores, shapes = _scores_and_shapes(model, loader, progress)
    gflops, latencies = mean_costs(model, loader.dataset, shapes, progress)
    model.difficulties = torch.from_numpy(np.sort(scores)).to(model.difficulties.device)
    model.latencies.copy_(torch.tensor(latencies))
    model.gflops.copy_(torch.tensor(gflops))
    threshold = model.set_budget(hard_share=hard_share)
    return dict(
        threshold=threshold,
        **{f'lat{exit}': seconds for exit, seconds in enumerate(latencies, 1)},
        **{f'g{exit}': count for exit, count in enumerate(gflops)},
    )
