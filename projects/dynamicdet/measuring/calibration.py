"""Measure what the thresholds of a trained dynamic detector follow from."""

import datetime
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from ..annotations import original_of
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.online_control import kept_speed
from ..progress import Progress
from ..routing.thresholds import ALL_EASY, ALL_HARD
from ..timing import dtype_of, machine_of, now
from ..transfers import to_host
from .flops import count_flops


@torch.no_grad()
def measure_difficulties(
    model: DynamicDetector, loader: DataLoader, progress: Progress
) -> np.ndarray:
    """Difficulties of a data set, sorted, (n,), float32. Runs the first backbone and the router."""
    scores: list[float] = []
    for batch in progress(loader, 'difficulties'):
        data = model.data_preprocessor(batch, False)
        scores.extend(model.score(data['inputs'], data['data_samples']).tolist())
    return np.sort(np.asarray(scores, np.float32))


@torch.no_grad()
def measure_latencies(
    model: DynamicDetector,
    dataset,
    progress: Progress,
    images: int = 20,
    rounds: int = 5,
    rows: Sequence[int] | None = None,
) -> tuple[float, ...]:
    """Median seconds per image of each exit: batch 1, data in memory, exits taking turns.

    Args:
        model (DynamicDetector): In eval mode, on the device that counts.
        dataset: The data set; its first ``images`` are timed.
        progress (Callable): Wraps what is iterated over.
        images (int): How many images. Defaults to 20.
        rounds (int): How often each is timed, after one untimed round. Defaults to 5.
        rows (Sequence[int], optional): Which images instead of the first.
    """
    batches = _single_batches(dataset, images, rows)
    times: list[list[float]] = [[] for _ in range(model.num_exits)]
    device = model.threshold.device
    with kept_speed(model):
        for turn in progress(range(rounds + 1), 'latencies'):
            for batch in batches:
                for exit in range(model.num_exits):
                    force_dynamic_exit(model, exit)
                    start = now(device)
                    model.test_step(batch)
                    seconds = now(device) - start
                    if turn:
                        times[exit].append(seconds)
    return tuple(float(np.median(own)) for own in times)


@torch.no_grad()
def measure_gflops(
    model: DynamicDetector, dataset, images: int = 10, rows: Sequence[int] | None = None
) -> tuple[float, ...]:
    """Mean GFLOPs per image of each exit, 2 x multiply-adds, by torch's counter.

    It follows what is really run, and sees nothing of mmcv's own operators: RoIAlign counts as 0.
    The cost of two-stage heads varies with the proposals, hence the mean over some images: the
    first, or those of the given rows.
    """
    batches = _single_batches(dataset, images, rows)
    means = []
    with kept_speed(model):
        for exit in range(model.num_exits):
            force_dynamic_exit(model, exit)
            flops, _ = count_flops(lambda: [model.test_step(batch) for batch in batches])
            means.append(flops / len(batches) / 1e9)
    return tuple(means)


def _single_batches(dataset, images: int, rows: Sequence[int] | None) -> list[dict]:
    """Batches of one image: the first ones, or those of some rows."""
    return [
        pseudo_collate([dataset[row]])
        for row in (range(min(images, len(dataset))) if rows is None else rows)
    ]


def force_dynamic_exit(model: DynamicDetector, exit: int) -> None:
    """Send every image to one exit: past all exits before it, and no further."""
    thresholds = [ALL_HARD] * exit + [ALL_EASY] * (model.num_exits - 1 - exit)
    model.set_budget(threshold=thresholds[0] if len(thresholds) == 1 else thresholds)


@torch.no_grad()
def record_exits(model: DynamicDetector, loader: DataLoader, progress: Progress) -> list[dict]:
    """Each exit's detections of every image: all that a trade-off curve needs.

    Args:
        model (DynamicDetector): In eval mode.
        loader (DataLoader): Over a COCO-format data set.
        progress (Callable): Wraps what is iterated over.

    Returns:
        list[dict]: Per image ``id``, ``file``, ``difficulty`` and ``detections`` of each exit: COCO
            results without image id, boxes x, y, w, h in the image's own frame.
    """
    images = []
    with kept_speed(model):
        for batch in progress(loader, 'every exit'):
            both = []
            for exit in range(model.num_exits):
                force_dynamic_exit(model, exit)
                samples = model.test_step(batch)
                both.append([coco_results(sample, loader.dataset.cat_ids) for sample in samples])
            images.extend(
                dict(
                    id=sample.img_id,
                    file=sample.img_path,
                    difficulty=sample.difficulty,
                    detections=list(pair),
                )
                for sample, *pair in zip(samples, *both)
            )
    return images


def coco_results(sample, category_ids: list[int]) -> list[dict]:
    """Detections of an image as COCO has them; masks are left out, and left where they are."""
    ((boxes, scores, labels),) = to_host([sample.pred_instances])
    boxes[:, 2:] -= boxes[:, :2]
    return [
        dict(bbox=box, score=score, category_id=category_ids[label])
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist())
    ]


def provenance(cfg: Config, checkpoint: str, dataset, device: str) -> dict[str, object]:
    """Where figures come from: what was measured, on which data and which machine. See also
    `passed`."""
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


def passed(model: torch.nn.Module, loader: DataLoader) -> dict[str, object]:
    """How images passed through a model: in which numbers, and how many at a time. Latencies are of
    one at a time."""
    batch_size = getattr(loader.batch_sampler, 'batch_size', loader.batch_size)
    return dict(dtype=dtype_of(model), batch_size=batch_size, latency_batch_size=1)


def require_trained_router(model: DynamicDetector) -> None:
    """Raise a `UsageError` if a model is from step 1."""
    if model.delta.isnan():
        raise UsageError(
            'this checkpoint is from step 1: train the router (step 2) before calibrating'
        )


def calibrate(
    model: DynamicDetector, loader: DataLoader, progress: Progress, hard_share: float = 0.5
) -> dict:
    """Measure difficulties and costs, and set the model's calibration and threshold to them.

    Args:
        model (DynamicDetector): Trained, on the device whose latencies count.
        loader (DataLoader): Over the validation set.
        progress (Callable): Wraps what is iterated over.
        hard_share (float): What the checkpoint does when nothing is asked for. Defaults to 0.5.

    Returns:
        dict: ``threshold`` (a list for more than two exits), and of each exit ``lat1``, ``lat2``,
            ... in seconds and ``g0``, ``g1``, ... in GFLOPs.

    Raises:
        UsageError: If the router was not trained.
    """
    require_trained_router(model)
    difficulties = measure_difficulties(model, loader, progress)
    latencies = measure_latencies(model, loader.dataset, progress)
    gflops = measure_gflops(model, loader.dataset)
    model.difficulties = torch.from_numpy(difficulties).to(model.difficulties.device)
    model.latencies.copy_(torch.tensor(latencies))
    model.gflops.copy_(torch.tensor(gflops))
    threshold = model.set_budget(hard_share=hard_share)
    return dict(
        threshold=threshold,
        **{f'lat{exit}': seconds for exit, seconds in enumerate(latencies, 1)},
        **{f'g{exit}': count for exit, count in enumerate(gflops)},
    )
