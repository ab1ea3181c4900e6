"""From plain detectors, their weights and a folder of pictures to a calibrated dynamic detector."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from torch.utils.data import DataLoader

from mmdet.registry import DATASETS

from ..building import build_model, exits_of_plain
from ..cascade.weights import SETTINGS, exits_digest
from ..errors import UsageError
from ..models import DynamicDetector
from ..progress import Progress
from ..routing import GAINS, Objective
from ..routing.cross_fitting import cross_fitted_difficulties
from ..routing.record import RoutingRecord
from ..routing.router_fitting import RouterFit, class_weights_of_records, gains_of_record
from .calibration import inference_settings, provenance
from .region_calibration import calibrate_regions, insert_regions
from .router_from_records import fit_router_to_records, insert_router, router_inputs

#: Parts of the pictures, each of which has difficulties by a router of the others.
FOLDS = 3
#: Pictures that it takes: two for each fold of each part's own cross-validation.
LEAST_PICTURES = 9
#: What a config of a dynamic detector takes over from the plain one's.
_KEPT = ('env_cfg', 'vis_backends', 'log_processor', 'log_level', 'default_hooks', 'backend_args')


def require_exit_sizes(sizes: Sequence[int], detectors: int) -> None:
    """Raise a `UsageError` unless sizes of exits, in pixels, fit so many detectors."""
    if any(size < 32 for size in sizes):
        raise UsageError(f'--exits takes sizes of 32 pixels or more; got {list(sizes)}')
    if detectors > 1 and len(sizes) != detectors:
        raise UsageError(
            f'--exits needs a size for each of the {detectors} detectors; got {list(sizes)}'
        )
    if detectors == 1 and (len(sizes) < 2 or list(sizes) != sorted(set(sizes))):
        raise UsageError(
            'one detector has exits where sizes differ: give --exits two or more, rising, such as '
            f'320 640; got {list(sizes)}'
        )


def require_enough(pictures: int) -> None:
    """Raise a `UsageError` unless there are so many pictures that a router can be fitted."""
    if pictures < LEAST_PICTURES:
        raise UsageError(
            f'a router needs at least {LEAST_PICTURES} pictures to be fitted to, better hundreds; '
            f'there are {pictures}'
        )


def require_router_options(
    sees: str, gain: str, method: str, regions: bool, exits: int, detectors: int
) -> None:
    """Raise a `UsageError` for options of a router that do not go together."""
    if method == 'rule' and sees != 'detections':
        raise UsageError("--method rule is of exit 0's detections: leave out --sees")
    if GAINS[gain].values == 'losses' and detectors > 1:
        raise UsageError(
            f"--gain {gain} compares losses, which a pair's heads do not share: take ap or reward"
        )
    if regions and exits != 2:
        raise UsageError(f'--regions takes two exits; got {exits}')
    if regions and (sees, gain, method) != ('detections', 'ap', 'linear'):
        raise UsageError('--regions fits no router: leave out --sees, --gain and --method')


def objective_config(gain: str, by_class: bool) -> dict:
    """What a router is fitted to: the gain itself, not its rank; in a config's form."""
    return dict(type='ap', gain=gain, fit='regression', by_class=by_class)


def classes_of(cfg: Config, checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a plain detector knows: its checkpoint's, or else its config's.

    Raises:
        UsageError: If neither says.
    """
    meta = checkpoint.get('meta') or {}
    told = meta.get('dataset_meta') or {}
    classes = told.get('classes') or told.get('CLASSES') or meta.get('CLASSES')
    for split in () if classes else ('test', 'val', 'train'):
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        kind = DATASETS.get(dataset['type']) if 'type' in dataset else None
        named = dataset.get('metainfo') or getattr(kind, 'METAINFO', {})
        classes = classes or named.get('classes')
    if not classes:
        raise UsageError(
            f"neither '{cfg.filename}' nor its checkpoint names the detector's classes: give its "
            'test_dataloader.dataset a metainfo=dict(classes=(...))'
        )
    return (classes,) if isinstance(classes, str) else tuple(classes)


def dynamic_config(
    cfgs: Sequence[Config],
    sizes: Sequence[int],
    classes: Sequence[str],
    sets: Mapping[str, tuple[str, str]],
    objective: str | dict = 'ap',
    batch_size: int = 4,
    workers: int = 2,
    **settings: str | dict | None,
) -> Config:
    """The config of a dynamic detector: one plain detector at several sizes, or several.

    Args:
        cfgs (Sequence[Config]): Of the plain detectors; the first one's test pipeline is taken.
        sizes (Sequence[int]): Of the picture's shorter side as the pipeline resizes it, at each
            exit, pixels. The largest is what is delivered.
        classes (Sequence[str]): As the annotation files have them.
        sets (Mapping): 'val' and 'test' -> annotation file and folder of pictures.
        objective (str or dict): What the router learns. Defaults to 'ap'.
        batch_size, workers (int): Of both data loaders. Default to 4 and 2.
        **settings: ``router``, ``merge`` and ``regions`` of `DynamicDetector`; None for its own.

    Raises:
        UsageError: If a config is of a dynamic detector, or its pipeline resizes nothing.
    """
    for cfg in cfgs:
        if cfg.model.type in ('DynamicDetector', 'PrunedDetector', 'EarlyExitDetector'):
            raise UsageError(
                f"'{cfg.filename}' is of a {cfg.model.type}: give the config of a plain detector"
            )
    detectors = [copy.deepcopy(cfg.model) for cfg in cfgs]
    for detector in detectors:
        # Weights are given; nothing is to be downloaded.
        for part in (detector, detector.get('backbone', {})):
            part.pop('init_cfg', None)
    several = len(detectors) > 1
    scales = tuple(size / max(sizes) for size in sizes)
    model = dict(
        type='DynamicDetector',
        detector=detectors if several else detectors[0],
        backbone=[detector.backbone for detector in detectors]
        if several
        else detectors[0].backbone,
        **({} if several else dict(backbones=1, reuse_stages=0)),
        scales=scales,
        objective=objective,
        **{name: value for name, value in settings.items() if value is not None},
    )
    pipeline = resized(test_pipeline_of(cfgs[0]), max(sizes))
    made = dict(
        default_scope='mmdet',
        custom_imports=_imports(cfgs),
        randomness=dict(seed=0),
        model=model,
        val_cfg=dict(type='ValLoop'),
        test_cfg=dict(type='TestLoop'),
        visualizer=dict(type='DynamicVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
        **{name: cfgs[0][name] for name in _KEPT if cfgs[0].get(name) is not None},
    )
    for split, (ann_file, pictures) in sets.items():
        made[f'{split}_dataloader'] = dict(
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            drop_last=False,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CocoDataset',
                metainfo=dict(classes=tuple(classes)),
                ann_file=ann_file,
                data_prefix=dict(img=pictures),
                test_mode=True,
                pipeline=copy.deepcopy(pipeline),
            ),
        )
        made[f'{split}_evaluator'] = dict(type='CocoMetric', ann_file=ann_file, metric='bbox')
    # Types may be classes, which a written config cannot hold.
    return Config(ConfigDict(made))


def _imports(cfgs: Sequence[Config]) -> dict:
    names = ['dynamicdet']
    for cfg in cfgs:
        names += (cfg.get('custom_imports') or {}).get('imports', [])
    return dict(imports=list(dict.fromkeys(names)), allow_failed_imports=False)


def test_pipeline_of(cfg: Config) -> list[dict]:
    """The pipeline under which a config tests.

    Raises:
        UsageError: If it has none.
    """
    for split in ('test', 'val'):
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        if dataset.get('pipeline'):
            return copy.deepcopy(dataset['pipeline'])
    raise UsageError(f"'{cfg.filename}' has no test_dataloader whose pipeline could be taken")


def resized(pipeline: Sequence[Mapping], size: int) -> list[dict]:
    """A test pipeline whose pictures are of another size.

    Args:
        pipeline (Sequence[Mapping]): With a ``Resize``; what is padded to a fixed size, then is to
            the new one.
        size (int): Of the shorter of the two sides that ``Resize`` is given, pixels.

    Raises:
        UsageError: If nothing is resized.
    """
    steps = [copy.deepcopy(dict(step)) for step in pipeline]
    scale = next((step['scale'] for step in steps if _resizes(step)), None)
    if scale is None:
        raise UsageError(
            'the test pipeline has no Resize with a scale of (width, height), by which --exits '
            'could be set'
        )
    factor = size / min(scale)
    for step in steps:
        for name in ('scale', 'size'):
            if isinstance(step.get(name), (list, tuple)):
                step[name] = tuple(round(side * factor) for side in step[name])
    return steps


def _resizes(step: Mapping) -> bool:
    return step['type'] == 'Resize' and isinstance(step.get('scale'), (list, tuple))


def fingerprint_of(
    cfg: Config, weights: Mapping[str, torch.Tensor], annotations: Mapping, **settings: object
) -> str:
    """A hash of all that a record follows from: detectors, pipeline, pictures, weights."""
    dataset = cfg.val_dataloader.dataset
    about = [
        cfg.model.to_dict(),
        dataset.to_dict()['pipeline'],
        dataset.data_prefix.to_dict(),
        exits_digest(weights),
        annotations,
        settings,
    ]
    # What the router learns is no part of what is recorded.
    about[0].pop('objective', None)
    content = json.dumps(about, sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:16]


class MadeRouter(NamedTuple):
    """A router that was fitted to a record.

    Attributes:
        fit (RouterFit): It.
        record (RoutingRecord): The record, with each image's difficulty by a router that was not
            fitted to the image.
    """

    fit: RouterFit
    record: RoutingRecord


def make_router(
    model: DynamicDetector,
    record: RoutingRecord,
    objective: Objective,
    coco=None,
    folds: int = FOLDS,
    seed: int = 0,
    progress: Callable[[str], Callable[[int, int], None]] = lambda what: lambda *done: None,
    method: str = 'linear',
) -> MadeRouter:
    """Fit a router to a record, and find out what routers like it say of images that they have not
    seen.

    Args:
        model (DynamicDetector): As the config builds it.
        record (RoutingRecord): With features.
        objective (Objective): What to learn.
        coco (COCO, optional): Ground truth, for gains in AP and by class.
        folds (int): Of the second part. Defaults to 3.
        seed (int): Defaults to 0.
        progress (Callable): Makes what is told how far a part is, from its name.
        method (str): See `fit_by_method`. Defaults to 'linear'.
    """
    cocos = None if coco is None else [coco]
    weights = class_weights_of_records([record], [coco]) if objective.by_class else None
    fit, _ = fit_router_to_records(
        model.router, [record], objective, cocos, None, seed, progress('fits'), method
    )
    gains = gains_of_record(record, objective.gain, coco, weights)
    difficulties = cross_fitted_difficulties(
        router_inputs(model.router, [record], cocos),
        gains,
        objective,
        model.router.fc1.out_features,
        folds,
        seed,
        progress('folds'),
        method,
    )
    facts = dict(record.provenance, router=f'fitted to the other pictures ({folds} folds)')
    return MadeRouter(
        fit, replace(record, difficulty=difficulties.astype(np.float64), provenance=facts)
    )


def calibrated_checkpoint(
    model: DynamicDetector,
    checkpoint: Mapping[str, Any],
    made: MadeRouter,
    facts: Mapping[str, object],
    classes: Sequence[str],
    hard_share: float = 0.5,
) -> dict[str, Any]:
    """The checkpoint of a dynamic detector: plain weights, the router, and its calibration by the
    record that it was fitted to.

    Difficulties are those of routers that did not see the image, as new images are to the one that
    is kept.

    Args:
        model (DynamicDetector): As the config builds it; its settings are changed.
        checkpoint (Mapping): Of the plain detectors, see `weights.join_checkpoints`.
        made (MadeRouter): From `make_router`.
        facts (Mapping): Where the router comes from.
        classes (Sequence[str]): Names, for who uses the checkpoint.
        hard_share (float): What it does when nothing is asked for. Defaults to 0.5.
    """
    record = made.record
    done = insert_router(model, checkpoint, made.fit, facts)
    model.difficulties = torch.from_numpy(np.sort(record.difficulty).astype(np.float32))
    model.latencies.copy_(torch.tensor(record.latencies))
    model.gflops.copy_(torch.tensor(record.gflops))
    threshold = model.set_budget(hard_share=hard_share)
    for name in ('difficulties', 'latencies', 'gflops', 'threshold'):
        done['state_dict'][name] = getattr(model, name).clone()
    done['meta'].setdefault('dataset_meta', dict(classes=tuple(classes)))
    done['meta']['calibration'] = dict(
        {name: value for name, value in record.provenance.items() if name != 'router'},
        threshold=threshold,
        hard_share=hard_share,
        **{f'lat{exit}': seconds for exit, seconds in enumerate(record.latencies, 1)},
        **{f'g{exit}': count for exit, count in enumerate(record.gflops)},
    )
    return done


def region_checkpoint(
    model: DynamicDetector,
    cfg: Config,
    loader: DataLoader,
    checkpoint: Mapping[str, Any],
    path: str,
    truth: str,
    hard_share: float,
    progress: Progress,
) -> dict[str, Any]:
    """The checkpoint of a dynamic detector that looks at regions again by the rule: plain weights,
    and prices calibrated by a data set.

    Args:
        model (DynamicDetector): With regions and these weights; its settings are changed.
        cfg (Config): Its config, for the provenance.
        loader (DataLoader): The data set.
        checkpoint (Mapping): Of the plain detectors, by the model's names.
        path (str): Where it is from.
        truth (str): What stands for the truth, for the provenance.
        hard_share (float): Share of the pixels when nothing is asked for.
        progress (Callable): Wraps what is iterated over.
    """
    done = insert_regions(model, checkpoint, dict(method='rule', truth=truth, cascade=path))
    calibration = calibrate_regions(model, loader, progress, hard_share)
    # Without delta: the router is not trained, and nobody asks it.
    names = tuple(name for name in SETTINGS if name != 'delta')
    done['state_dict'].update(
        {name: value.cpu() for name, value in model.state_dict().items() if name.startswith(names)}
    )
    done['meta']['calibration'] = dict(
        calibration,
        hard_share=hard_share,
        **provenance(cfg, path, loader.dataset, str(model.threshold.device)),
        **inference_settings(model, loader),
    )
    done['meta'].setdefault('dataset_meta', dict(classes=tuple(loader.dataset.metainfo['classes'])))
    return done


def plain_weights(
    cfg: Config, checkpoint: Mapping[str, Any], path: str
) -> tuple[DynamicDetector, dict[str, torch.Tensor]]:
    """A config's detector, not filled, and plain weights by its names.

    Raises:
        UsageError: If the weights do not fit.
    """
    model = build_model(cfg)
    return model, exits_of_plain(model, checkpoint['state_dict'], path)
