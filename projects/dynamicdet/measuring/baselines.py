"""Plain detectors on the pictures of a record, by the same counters and the same clock as its
exits.

The question that a user asks first: what would a plain detector of another size have found, at what
cost?
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from torch import nn

from mmdet.models.detectors import BaseDetector
from mmdet.registry import DATASETS

from ..building import load_detector
from ..cascade.weights import exits_digest, is_plain
from ..checkpoints import read_checkpoint
from ..errors import UsageError
from ..models import DynamicDetector, fuse
from ..models.budget_control import preserved_budget
from ..progress import Progress
from ..routing.record import RoutingRecord, read_record, write_record
from ..timing import machine_of, time_in_turns
from .calibration import detection_arrays
from .flops import count_flops
from .latencies import force_dynamic_exit

#: Pictures of one padded size whose GFLOPs are counted, and whose latency is measured, at most; a
#: share of it by how many sizes there are, but two at the least. As of a record.
_COUNTED, _TIMED, _LEAST = 10, 20, 2


class Baseline(NamedTuple):
    """A plain detector, and the size at which it sees pictures.

    ``config`` (Config), ``checkpoint`` (str). ``size`` (int, optional): longer side of its test
    size; that of its config if None. ``name`` (str): of the config and the size, for tables.
    """

    config: Config
    checkpoint: str
    size: int | None
    name: str


def parse_baselines(
    given: Sequence[Sequence[str]] | None, read: Callable[[str], Config]
) -> list[Baseline]:
    """Baselines of a command line, ``CONFIG CHECKPOINT [SIZE ...]`` each: one for every size.

    Args:
        given (Sequence): The words of each; None counts as none.
        read (Callable): From the name of a config to the config.

    Raises:
        UsageError: If a word is missing, a size is none, or a config has no test pipeline.
    """
    baselines = []
    for words in given or ():
        if len(words) < 2:
            raise UsageError('--baseline takes CONFIG CHECKPOINT and, if you like, sizes')
        config, checkpoint, *sizes = words
        if any(not size.isdigit() or int(size) < 1 for size in sizes):
            raise UsageError(f'sizes of --baseline are whole numbers of pixels; got {sizes}')
        cfg = read(config)
        _pipeline_of(cfg)
        stem = Path(config).stem
        baselines += [
            Baseline(cfg, checkpoint, size, f'{stem} {size}' if size else stem)
            for size in ([int(size) for size in sizes] or [None])
        ]
    return baselines


def _pipeline_of(cfg: Config) -> list[dict]:
    dataset = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if not dataset.get('pipeline'):
        raise UsageError(f"the config '{cfg.filename}' has no test_dataloader with a pipeline")
    return dataset['pipeline']


def at_size(pipeline: Sequence[Mapping], size: int | None) -> list[dict]:
    """A test pipeline without annotations, its test size changed in proportion.

    Args:
        pipeline (Sequence[Mapping]): Steps of mmdet's or mmyolo's kind; they stay as they are.
        size (int, optional): Of the longer side of the new test size. Defaults to the old one.

    Raises:
        UsageError: If no step has a test size to change.
    """
    steps = [copy.deepcopy(dict(step)) for step in pipeline if 'Annotations' not in step['type']]
    if size is None:
        return steps
    resizes = [step for step in steps if 'Resize' in step['type'] and step.get('scale')]
    if not resizes:
        raise UsageError(
            'the test pipeline of a baseline has no Resize with a scale: no other sizes'
        )
    longest = max(max(step['scale']) for step in resizes)
    for step in steps:
        for key in ('scale', 'size'):
            if isinstance(step.get(key), (list, tuple)) and len(step[key]) == 2:
                step[key] = tuple(round(side * size / longest) for side in step[key])
    return steps


def record_baseline(
    baseline: Baseline,
    record: RoutingRecord,
    progress: Progress,
    device: str = 'cpu',
    folder: str | Path | None = None,
    beside: tuple[DynamicDetector, object] | None = None,
) -> RoutingRecord:
    """A plain detector on a record's pictures: a record of one exit, named twice.

    Pictures pass one at a time. Costs are measured as a record's, for each padded size.

    Args:
        baseline (Baseline): See there.
        record (RoutingRecord): Whose pictures, in its order; its ``provenance`` has their classes.
        progress (Callable): Wraps what is iterated over.
        device (str): Whose latencies count. Defaults to 'cpu'.
        folder (str or Path, optional): Where records are kept, and looked for. Defaults to none.
        beside (tuple, optional): The dynamic detector that was recorded, on the device, and its
            data
            set: its exits are timed again, in turns with the baseline, whose seconds are then those
            of the record's clock. Defaults to the baseline alone.

    Raises:
        UsageError: If the checkpoint does not fit, classes differ, or a picture is not there.
    """
    checkpoint = read_checkpoint(baseline.checkpoint)
    if not is_plain(checkpoint['state_dict']):
        raise UsageError(f"'{baseline.checkpoint}' is no plain detector's: a baseline is plain")
    pipeline = at_size(_pipeline_of(baseline.config), baseline.size)
    facts = dict(
        weights=exits_digest(checkpoint['state_dict']),
        model=str(baseline.config.model),
        pipeline=str(pipeline),
        pictures=hashlib.sha256(str((record.ids.tolist(), record.files)).encode()).hexdigest(),
        in_turns=beside is not None,
        **machine_of(device),
    )
    path = _path(folder, baseline, facts) if folder else None
    if path and path.is_file():
        return read_record(path)
    config = copy.deepcopy(baseline.config)
    # Only training has them, and they need a Runner.
    (config.model.get('data_preprocessor') or {}).pop('batch_augments', None)
    model, checkpoint = load_detector(config, checkpoint, device)
    categories = _categories(config, checkpoint, record)
    pictures = _Pictures(record, pipeline)
    images, shapes = _detect(fuse(model), pictures, categories, progress)
    _add_costs(images, shapes, model, pictures, record, beside, progress)
    costs = [
        np.mean([image[name] for image in images], axis=0).tolist()
        for name in ('gflops', 'latencies')
    ]
    facts.update(config=str(config.filename), checkpoint=baseline.checkpoint, name=baseline.name)
    plain_record = RoutingRecord.from_images(images, *costs, facts)
    if path:
        write_record(plain_record, path)
    return plain_record


def _path(folder: str | Path, baseline: Baseline, facts: Mapping) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder) / f'{re.sub("[^A-Za-z0-9_.-]", "-", baseline.name)}-{digest}.npz'


def _categories(cfg: Config, checkpoint: Mapping, record: RoutingRecord) -> np.ndarray:
    """Category id of each of a plain detector's labels, by the names of classes; -1 for classes
    that the record has not."""
    facts = record.provenance
    known = dict(zip(facts.get('classes', ()), facts.get('categories', ())))
    if not known:
        raise UsageError('the record does not say its classes: record anew by tools/record.py')
    dataset = cfg.test_dataloader.dataset
    kind = DATASETS.get(dataset.get('type', '')) if isinstance(dataset.get('type'), str) else None
    # The checkpoint says what it was trained on, unless it is older than such notes.
    for named in (
        (checkpoint.get('meta', {}).get('dataset_meta') or {}).get('classes') or (),
        (dataset.get('metainfo') or getattr(kind, 'METAINFO', {})).get('classes') or (),
    ):
        if set(known) <= set(named):
            return np.array([known.get(name, -1) for name in named])
    raise UsageError(
        f"the baseline '{cfg.filename}' does not know all classes of the record, such as "
        f"'{next(iter(known))}'"
    )


class _Pictures:
    """A record's pictures under a pipeline, as a data set has them."""

    def __init__(self, record: RoutingRecord, pipeline: Sequence[dict]) -> None:
        for file in record.files:
            if '://' not in file and not Path(file).is_file():
                raise UsageError(f"there is no picture '{file}', which the record is of")
        init_default_scope('mmdet')
        self._record, self._pipeline = record, Compose(pipeline)

    def __len__(self) -> int:
        return len(self._record)

    def __getitem__(self, row: int) -> dict:
        identity, file = int(self._record.ids[row]), self._record.files[row]
        return self._pipeline(dict(img_id=identity, img_path=file, instances=[]))


@torch.no_grad()
def _detect(
    model: BaseDetector, pictures: _Pictures, categories: np.ndarray, progress: Progress
) -> tuple[list[dict], list[tuple]]:
    """Entries of each picture, and the padded size that the network sees of it."""
    images, shapes = [], []
    sizes: list[tuple] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:]))
    )
    try:
        for row in progress(range(len(pictures)), 'plain detector'):
            (sample,) = model.test_step(pseudo_collate([pictures[row]]))
            ((boxes, scores, labels),) = detection_arrays([sample], categories)
            kept = labels >= 0
            images.append(
                dict(
                    id=sample.img_id,
                    file=sample.img_path,
                    difficulty=0.5,
                    detections=[(boxes[kept], scores[kept], labels[kept])] * 2,
                )
            )
            shapes.append(sizes.pop())
            sizes.clear()
    finally:
        hook.remove()
    return images, shapes


@torch.no_grad()
def _add_costs(
    images: list[dict],
    shapes: list[tuple],
    model: BaseDetector,
    pictures: _Pictures,
    record: RoutingRecord,
    beside: tuple[DynamicDetector, object] | None,
    progress: Progress,
) -> None:
    """GFLOPs and seconds of each picture: those of its size."""
    rows: dict[tuple, list[int]] = {}
    for row, shape in enumerate(shapes):
        rows.setdefault(shape, []).append(row)
    for same_size in progress(list(rows.values()), 'costs of sizes'):
        counted, timed = (
            same_size[: max(number // len(rows), _LEAST)] for number in (_COUNTED, _TIMED)
        )
        batches = {row: pseudo_collate([pictures[row]]) for row in timed}
        runs: dict = {'plain': lambda row: model.test_step(batches[row])}
        if beside is not None:
            _add_exits(runs, *beside, timed)
        flops, _ = count_flops(
            lambda: [model.test_step(pseudo_collate([pictures[row]])) for row in counted]
        )
        seconds = _time(runs, timed, model, beside, record)
        for row in same_size:
            images[row].update(gflops=[flops / len(counted) / 1e9] * 2, latencies=[seconds] * 2)


def _add_exits(runs: dict, dynamic: DynamicDetector, dataset, rows: Sequence[int]) -> None:
    batches = {row: pseudo_collate([dataset[row]]) for row in rows}
    for exit in range(dynamic.num_exits):
        runs[exit] = lambda row: dynamic.test_step(batches[row])


def _time(
    runs: Mapping,
    rows: Sequence[int],
    model: nn.Module,
    beside: tuple[DynamicDetector, object] | None,
    record: RoutingRecord,
) -> float:
    """Median seconds of the plain detector; beside the exits, by the clock of the record: times
    what the record says of its exits over what they take now."""
    device = next(model.parameters()).device
    quiet = lambda steps, what: steps  # noqa: E731
    if beside is None:
        return time_in_turns(runs, rows, device, quiet)['plain']
    dynamic = beside[0]
    with preserved_budget(dynamic):
        medians = time_in_turns(
            runs,
            rows,
            device,
            quiet,
            forcing=lambda run: None if run == 'plain' else force_dynamic_exit(dynamic, run),
        )
    image_latencies = record.image_latencies
    then = record.latencies if image_latencies is None else image_latencies[rows].mean(axis=0)
    ratios = [then[exit] / medians[exit] for exit in range(dynamic.num_exits)]
    return medians['plain'] * float(np.mean(ratios))
