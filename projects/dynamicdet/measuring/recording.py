"""One pass of a dynamic detector over a data set, every image through every exit: a record.

All that a router is judged by, or trained on, follows from it; see `routing.record`.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..building import build_loader
from ..datasets.config_datasets import require_one_coco
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.budget_control import preserved_budget, whole_images
from ..models.kept_outputs import kept_outputs
from ..progress import Progress
from ..routing.record import RoutingRecord
from ..timing import now
from .calibration import (
    detection_arrays,
    exit_states,
    inference_settings,
    measure_gflops,
    provenance,
    score_facts,
)
from .flops import count_flops
from .latencies import force_dynamic_exit, measure_latencies, rows_by_size, rows_to_measure
from .record_parts import RecordParts, batches_from
from .views import VIEWS

#: Weights of red, green and blue in a gray level (ITU-R BT.601).
_GRAY = (0.299, 0.587, 0.114)


def require_recordable(cfg: Config, split: str) -> None:
    """Raise a `UsageError` unless a split of a config's data can be recorded, before a model is
    loaded."""
    for name in dict.fromkeys((split, _like(split))):
        if not cfg.get(f'{name}_dataloader'):
            raise UsageError(
                f"the config '{cfg.filename}' has no {name}_dataloader, which a record of its "
                f'{split} data needs'
            )
        require_one_coco(cfg, name, 'a record is made', file=False)


def _like(split: str) -> str:
    """The split whose pipeline a record takes."""
    return 'val' if split == 'train' else split


def build_record_loader(cfg: Config, split: str) -> DataLoader:
    """A loader of a config's data, as a record wants it: in order, each image once, as in a test,
    with its annotations in the frame of the delivered image.

    mmdet's test pipelines load annotations last, in the frame of the file: there losses would be
    wrong. So they are loaded first here. ``train`` means the training images under the test's
    pipeline.

    Args:
        cfg (Config): Of a dynamic detector.
        split (str): 'train', 'val' or 'test'.

    Raises:
        UsageError: If the config lacks the split's data, or they are empty, several or not in COCO
            format.
    """
    require_recordable(cfg, split)
    dataloader = copy.deepcopy(cfg[f'{_like(split)}_dataloader'])
    source = _plain_data_set(cfg[f'{split}_dataloader'].dataset)
    pipeline = _annotated_first(_plain_data_set(dataloader.dataset).pipeline, _loads_masks(cfg))
    dataloader.dataset = dict(copy.deepcopy(source), pipeline=pipeline)
    if split == 'train':
        dataloader.dataset = _held_out_alike(cfg.train_dataloader.dataset, dataloader.dataset)
    return build_loader(dataloader)


def record_data_set(
    model: DynamicDetector,
    cfg: Config,
    loader: DataLoader,
    progress: Progress,
    view: str = 'flip',
    checkpoint: str = '',
    losses: bool = True,
    parts: RecordParts | None = None,
) -> RoutingRecord:
    """Run every image of a data set through every exit, and measure what each exit costs.

    Args:
        model (DynamicDetector): In eval mode, on the device whose latencies count. Its budget stays
            as it is; losses are recorded as the heads average them, whatever the router learns.
        cfg (Config): Its config, for the provenance.
        loader (DataLoader): From `build_record_loader`. Under a pipeline without annotations, or
            with those of the image before it was resized, ``losses`` and ``objects`` are left out,
            with a warning.
        progress (Callable): Wraps what is iterated over.
        view (str): How each image is run a second time, for the honest oracle: a key of `VIEWS`, or
            'none'. Defaults to 'flip'.
        checkpoint (str): Path of the model's checkpoint, for the provenance.
        losses (bool): Whether to record losses, which only objectives that count AP do without.
            Defaults to True.
        parts (RecordParts, optional): Where parts are written, and those of a run that was stopped
            lie: these images are not run again. Defaults to none.

    Returns:
        RoutingRecord: With all that it can hold of what was asked for.
    """
    parts = RecordParts() if parts is None else parts
    # What regions would be worth follows from what is found on whole images.
    with whole_images(model):
        batches = batches_from(loader, parts.images)
        for images in record_images(model, loader.dataset, batches, progress, view, losses):
            parts.add(images)
        record = parts.join()
        costs = _costs_of(record.frame[:, :2].astype(int), model, loader.dataset, progress)
    device = str(model.threshold.device)
    facts = dict(
        provenance(cfg, checkpoint, loader.dataset, device),
        **inference_settings(model, loader),
        view=VIEWS[view].said if view in VIEWS else 'none',
        first_scale=model.first_scale,
        scales=list(model.scales),
        branch0_gflops=costs.branch[0],
        branch0_latency=costs.branch[1],
        **score_facts(model),
        router='trained' if torch.isfinite(model.delta) else 'NOT trained',
    )
    return replace(
        record,
        gflops=costs.gflops.mean(axis=0).tolist(),
        latencies=costs.latencies.mean(axis=0).tolist(),
        image_gflops=costs.gflops,
        image_latencies=costs.latencies,
        provenance={name: value for name, value in facts.items() if value is not None},
    )


@torch.no_grad()
def record_images(
    model: DynamicDetector,
    dataset,
    batches: Iterable[dict],
    progress: Progress,
    view: str,
    losses: bool = True,
) -> Iterator[list[dict]]:
    """The part of a record that every image takes part in, each backbone run once per view.

    Args:
        model (DynamicDetector): See `record_data_set`, also for ``progress``, ``view`` and
            ``losses``.
        dataset: The batches' data set.
        batches (Iterable[dict]): Its images, or those that are wanted.

    Yields:
        list[dict]: A batch's images, as `RoutingRecord.from_images` takes them.
    """
    annotated = _is_annotated(dataset)
    if not annotated:
        warnings.warn(
            'the record will have no losses and no objects: the pipeline must load annotations '
            'before it resizes (LoadAnnotations right after LoadImageFromFile)'
        )
    elif losses and not model.has_comparable_losses:
        warnings.warn(
            'the record will have no losses: those of different heads cannot be compared; '
            'objectives that count AP need none'
        )
    with preserved_budget(model):
        # A budget that waits for a calibration is not asked for here.
        force_dynamic_exit(model, 0)
        for batch in progress(batches, 'every exit'):
            yield _record_batch(model, batch, dataset.cat_ids, annotated, view, losses)


def _record_batch(
    model: DynamicDetector,
    batch: dict,
    category_ids: list[int],
    annotated: bool,
    view: str,
    losses: bool,
) -> list[dict]:
    """Entries of a batch's images."""
    pixels = batch['inputs']
    data = model.data_preprocessor(batch, False)
    inputs, samples = data['inputs'], data['data_samples']
    every, detections, outputs = [], [], []
    with _watched_features(model) as features:
        # Finished before the next exit, which else would run the heads where exits are merged.
        for state in exit_states(model, inputs, samples):
            with kept_outputs(model.branch(state.exit)) as kept:
                detections.append(detection_arrays(model.finish(state), category_ids))
            every.append(state)
            outputs.append(kept)
    seen_by_router = features[0].cpu().numpy()
    entries = [
        dict(
            id=int(sample.img_id),
            file=str(sample.img_path),
            difficulty=float(sample.difficulty),
            frame=(*sample.img_shape[:2], *sample.get('scale_factor', (1.0, 1.0))),
            detections=[per_image[row] for per_image in detections],
            features=seen_by_router[row].copy(),
            entropy=gray_entropy(pixels[row]),
        )
        for row, sample in enumerate(samples)
    ]
    if view != 'none':
        view_detections = [
            detection_arrays(model.finish(state), category_ids)
            for state in exit_states(model, VIEWS[view].make(inputs, samples), samples)
        ]
        for row, (entry, sample) in enumerate(zip(entries, samples)):
            entry['view'] = [
                (VIEWS[view].back(per_image[row][0], sample), *per_image[row][1:])
                for per_image in view_detections
            ]
    if annotated:
        # Last: some heads write into the annotations that they are given.
        for entry, sample in zip(entries, samples):
            entry['objects'] = len(sample.gt_instances)
        if losses and model.has_comparable_losses:
            image_losses = model.losses_of_states(every, outputs).T.tolist()
            for entry, exit_losses in zip(entries, image_losses):
                entry['losses'] = exit_losses
    return entries


class _Costs(NamedTuple):
    """What n images cost under K exits at batch 1.

    ``gflops``, ``latencies`` (np.ndarray): (n, K), seconds. ``branch`` (tuple): GFLOPs and seconds
    of exit 0's neck and heads, the mean over the images: what a router that looks at exit 0's
    detections pays for every image; where exits are merged, or the router sees detections, all
    images' costs have it already.
    """

    gflops: np.ndarray
    latencies: np.ndarray
    branch: tuple[float, float]


def _costs_of(shapes: np.ndarray, model: DynamicDetector, dataset, progress: Progress) -> _Costs:
    """Costs of images by their heights and widths as delivered, (n, 2): those of their size, of
    which some are measured, as by `calibration.mean_costs`."""
    gflops, latencies = np.zeros((2, len(shapes), model.num_exits))
    sizes, branch = rows_by_size(model, shapes.tolist()), np.zeros(2)
    for same_size in progress(sizes, 'costs of sizes'):
        counted, timed = rows_to_measure(same_size, len(sizes))
        gflops[same_size] = measure_gflops(model, dataset, rows=counted)
        latencies[same_size] = measure_latencies(
            model, dataset, lambda steps, what: steps, rows=timed
        )
        routing = _measure_routing(model, dataset, counted)
        row = same_size[0]
        exit_0 = gflops[row, 0], latencies[row, 0]
        branch += len(same_size) * np.maximum(0, np.subtract(exit_0, routing))
    return _Costs(gflops, latencies, tuple((branch / len(shapes)).tolist()))


@contextlib.contextmanager
def _watched_features(model: DynamicDetector) -> Iterator[list[Tensor]]:
    """What the router is shown while this is open: (N, d) for each time it is asked."""
    features: list[Tensor] = []

    def watch(router: nn.Module, arguments: tuple) -> None:
        if not arguments[0][0].is_floating_point():
            raise UsageError(
                'a deployed detector in 8 bits shows no features: record the one that it was made '
                'from'
            )
        features.append(router.pool(*arguments[:2]).float())

    hook = model.router.register_forward_pre_hook(watch)
    try:
        yield features
    finally:
        hook.remove()


@torch.no_grad()
def _measure_routing(
    model: DynamicDetector, dataset, rows: Sequence[int], rounds: int = 3
) -> tuple[float, float]:
    """What the first backbone and the router cost: mean GFLOPs and median seconds per image. What
    exit 0 costs beyond is its neck and heads."""
    batches = [pseudo_collate([dataset[row]]) for row in rows]
    device = model.threshold.device

    def run(batch: dict) -> float:
        start = now(device)
        data = model.data_preprocessor(batch, False)
        model.score(data['inputs'], data['data_samples'])
        return now(device) - start

    flops, _ = count_flops(lambda: [run(batch) for batch in batches])
    seconds = [run(batch) for _ in range(rounds) for batch in batches]
    return flops / len(batches) / 1e9, float(np.median(seconds))


def gray_entropy(pixels: Tensor) -> float:
    """Shannon entropy of an image's gray levels, in bits: 0 for a plain area, 8 for all levels
    alike.

    Args:
        pixels (Tensor): (3, H, W), blue, green, red, in [0, 255].
    """
    weights = pixels.new_tensor(_GRAY[::-1], dtype=torch.float32)
    gray = torch.einsum('c,chw->hw', weights, pixels.float()).round().clamp(0, 255).long()
    shares = torch.bincount(gray.flatten(), minlength=256).double() / gray.numel()
    return max(0.0, float(torch.special.entr(shares).sum() / np.log(2)))


# The data.


def _plain_data_set(dataset: dict) -> dict:
    """Config of the data set inside those that repeat, balance or mix it."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def _held_out_alike(wrapped: dict, dataset: dict) -> dict:
    """A data set cut to the part that `HoldOut` leaves of it in a config, if it is there."""
    while 'dataset' in wrapped:
        if wrapped['type'] == 'HoldOut':
            return dict(copy.deepcopy(wrapped), dataset=dataset)
        wrapped = wrapped['dataset']
    return dataset


def _annotated_first(pipeline: list[dict], masks: bool) -> list[dict]:
    """A pipeline with its annotations loaded right after the image."""
    steps = [copy.deepcopy(step) for step in pipeline if step['type'] != 'LoadAnnotations']
    names = [step['type'] for step in steps]
    at = 1 + next((at for at, name in enumerate(names) if name.startswith('LoadImage')), 0)
    load = dict(type='LoadAnnotations', with_bbox=True, **dict(with_mask=True) if masks else {})
    return steps[:at] + [load] + steps[at:]


def _loads_masks(cfg: Config) -> bool:
    """Whether the detector learns masks: its losses then need them."""
    training = cfg.get('train_dataloader')
    return bool(training) and any(
        step.get('with_mask') for step in _plain_data_set(training.dataset).get('pipeline', ())
    )


def _is_annotated(dataset) -> bool:
    """Whether images come with annotations in their own frame."""
    names = [type(step).__name__ for step in dataset.pipeline.transforms]
    return 'LoadAnnotations' in names and all(
        name.startswith('Load') for name in names[: names.index('LoadAnnotations')]
    )
