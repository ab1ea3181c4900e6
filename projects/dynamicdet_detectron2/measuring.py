"""Measure a trained dynamic detector: the calibration that thresholds follow from, and records, of
which reports are made."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynamicdet.cascade.weights import exits_digest
from dynamicdet.errors import UsageError
from dynamicdet.progress import Progress
from dynamicdet.routing.record import RoutingRecord, read_record, write_record
from dynamicdet.timing import dtype_of, machine_of, time_in_turns

from .data import every_test_image
from .dynamic_detector import DynamicDetector

#: How many images costs are measured on: two-stage heads cost by their proposals.
_COUNTED, _TIMED = 10, 20


def at_exit(model: DynamicDetector, exit: int) -> contextlib.AbstractContextManager:
    """While this is entered, every image goes to one exit: past all before it, and no further."""
    return at_thresholds(model, _forced(model, exit))


@contextlib.contextmanager
def at_thresholds(model: DynamicDetector, thresholds: Sequence[float]) -> Iterator[None]:
    """While this is entered, these are the thresholds of the exits but the last."""
    threshold, waits = model.threshold.clone(), model._budget_waits
    model.threshold.copy_(torch.tensor(thresholds).reshape(model.threshold.shape))
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
        with at_exit(model, exit):
            means.append(mean_gflops(model, batches))
    return means


@torch.no_grad()
def mean_gflops(model: nn.Module, batches: Sequence[list[dict]]) -> float:
    """Mean GFLOPs per image of a detector as it stands."""
    with FlopCounterMode(display=False) as counter:
        images = sum(len(model(batch)) for batch in batches)
    return counter.get_total_flops() / images / 1e9


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
    meta, categories = _metadata(dataset_name)
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
        dataset=dataset_name,
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


def make_record(
    cfg, model: DynamicDetector, args: Any, path: str | Path, progress: Progress
) -> RoutingRecord:
    """The record that a tool was asked for, written to a file; one that is there already, of the
    same weights and data, is not made again.

    Args:
        cfg (CfgNode): Of the detector.
        model (DynamicDetector): See `record_exits`.
        args (Namespace): ``dataset``, the first of ``DATASETS.TEST`` if None, and is written back;
            ``losses``; ``checkpoint``; ``config``.
        path (str or Path): The file.
        progress (Callable): Wraps what is iterated over.
    """
    args.dataset = args.dataset or cfg.DATASETS.TEST[0]
    record = known_record(path, model, args.dataset)
    if record is None or args.losses and record.losses is None:
        batches = every_test_image(cfg, args.dataset, annotated=args.losses)
        record = record_exits(model, batches, args.dataset, progress, args.checkpoint, args.config)
        write_record(record, path)
    return record


@torch.no_grad()
def record_plain(
    model: nn.Module, batches: Iterable[list[dict]], dataset_name: str, progress: Progress
) -> RoutingRecord:
    """A plain detector on a data set: a record of one exit, named twice; see
    `dynamicdet.reports.routing_analysis_baselines`.

    Args:
        model (nn.Module): In eval mode, on the device whose latencies count.
        batches (Iterable): The images as a test sees them, one in each.
        dataset_name (str): In COCO's format.
        progress (Callable): Wraps what is iterated over.
    """
    _, categories = _metadata(dataset_name)
    entries = []
    for batch in progress(batches, 'plain detector'):
        for inputs, result in zip(batch, model(batch)):
            found = _as_arrays(result, categories)
            entries.append(
                dict(
                    id=int(inputs['image_id']),
                    file=str(inputs['file_name']),
                    difficulty=0.5,
                    detections=[found, found],
                )
            )
    some, device = _first(batches, _TIMED), next(model.parameters()).device
    gflops = mean_gflops(model, some[:_COUNTED])
    latency = time_in_turns(dict(plain=model), some, device, progress, 3)['plain']
    facts = dict(machine_of(device), dtype=dtype_of(model), framework='detectron2')
    return RoutingRecord.from_images(entries, [gflops] * 2, [latency] * 2, facts)


class Cost(NamedTuple):
    """What an exit costs: its parameters, those of exits before it included, and GFLOPs."""

    exit: int
    parameters: int
    gflops: float


def count_costs(model: nn.Module, shape: Sequence[int]) -> list[Cost]:
    """What each exit of a dynamic detector, or a plain one, costs for an image of noise.

    Args:
        model (nn.Module): In eval mode.
        shape (Sequence[int]): Height and width in pixels.
    """
    height, width = shape
    device = next(model.parameters()).device
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    batch = [[dict(image=noise.to(device), height=height, width=width)]]
    if not isinstance(model, DynamicDetector):
        return [Cost(0, _parameters(model), mean_gflops(model, batch))]
    return [
        Cost(
            exit,
            _parameters(
                model.router,
                *model.backbone.nets[: exit + 1],
                *_connections(model, exit),
                model.branch(exit),
            ),
            gflops,
        )
        for exit, gflops in enumerate(count_gflops(model, batch))
    ]


def _connections(model: DynamicDetector, exit: int) -> list[nn.Module]:
    """Those into the backbones that an exit runs."""
    connections, later = list(model.backbone.connections), len(model.backbone.names) - 1
    return connections[: len(connections) // later * exit] if later else []


def _parameters(*modules: nn.Module) -> int:
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())


@torch.no_grad()
def measure_overheads(
    model: DynamicDetector, stock: nn.Module, shape: Sequence[int], rounds: int, progress: Progress
) -> dict[str, float]:
    """What being dynamic costs: median seconds, of images of noise in memory, in turns.

    Args:
        model (DynamicDetector): In eval mode.
        stock (nn.Module): The plain detector with the weights of exit 0, see `stock_of`.
        shape (Sequence[int]): Height and width in pixels.
        rounds (int): How often each is timed.
        progress (Callable): Wraps the rounds.

    Returns:
        dict: ``stock``, ``exit0``, ..., of one image; ``all easy``, ``half hard``, ``all hard``, of
        a batch of 8.
    """
    height, width = shape
    noise = torch.rand(8, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    batch = [dict(image=image.to(model.device), height=height, width=width) for image in noise]
    difficulties = difficulties_of(model, batch)
    half = float(difficulties.sort().values[3:5].mean())
    small = _reduced(model, batch[:1])
    last = model.num_exits - 1
    thresholds = {f'exit{exit}': _forced(model, exit) for exit in range(model.num_exits)}
    thresholds |= {'all easy': _forced(model, 0), 'all hard': _forced(model, last)}
    thresholds['half hard'] = [half] + [-1.0] * (last - 1)
    runs: dict[str, Callable] = dict(stock=lambda _: stock(small))
    runs |= {f'exit{exit}': lambda _: model(batch[:1]) for exit in range(model.num_exits)}
    runs |= {name: lambda _: model(batch) for name in ('all easy', 'half hard', 'all hard')}

    def forcing(name: str) -> contextlib.AbstractContextManager | None:
        return None if name == 'stock' else at_thresholds(model, thresholds[name])

    return time_in_turns(runs, [None], model.device, progress, rounds, forcing)


def _forced(model: DynamicDetector, exit: int) -> list[float]:
    """Thresholds that send all images to one exit."""
    return [-1.0] * exit + [1.0] * (model.num_exits - 1 - exit)


def _reduced(model: DynamicDetector, batch: Sequence[dict]) -> list[dict]:
    """Images as large as exit 0 sees them."""
    if model.first_scale == 1:
        return list(batch)
    smaller = []
    for inputs in batch:
        size = [round(side * model.first_scale) for side in inputs['image'].shape[-2:]]
        image = F.interpolate(inputs['image'][None], size=size, mode='area')[0]
        smaller.append({**inputs, 'image': image})
    return smaller


def stock_of(cfg, model: DynamicDetector) -> nn.Module:
    """The plain detector that exit 0 is, with its weights, in eval mode.

    Args:
        cfg (CfgNode): Of the dynamic detector.
        model (DynamicDetector): Built by it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.DYNAMIC.META_ARCHITECTURE
    stock = build_model(cfg).eval()
    stock.load_state_dict(model.as_plain(), strict=False)
    return stock


def _metadata(dataset_name: str) -> tuple[Any, np.ndarray]:
    """Metadata of a data set in COCO's format, and the category id of each label."""
    meta = MetadataCatalog.get(dataset_name)
    if not meta.get('json_file'):
        raise UsageError(f"a record is made of data in COCO's format; '{dataset_name}' is not")
    ids = meta.get('thing_dataset_id_to_contiguous_id') or {}
    return meta, np.array(sorted(ids, key=ids.get), np.int32)


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
