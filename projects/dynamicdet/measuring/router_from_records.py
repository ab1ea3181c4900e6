"""Fit the router of a trained cascade to records, in seconds, instead of training it for epochs."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..cascade.weights import missing_of, require_complete
from ..errors import UsageError
from ..routing import GAINS, Objective, build_objective, check_objective
from ..routing.detection_features import features as detection_features
from ..routing.evaluation import read_truth
from ..routing.record import RoutingRecord
from ..routing.router_fitting import (
    RouterFit,
    class_weights_of_records,
    features_of_record,
    fit_by_method,
    gains_of_record,
)

#: What follows from a router, and is stale where that is a new one.
_CALIBRATION = ('difficulties', 'gflops', 'latencies', 'threshold')


def fit_router_to_records(
    router: nn.Module,
    records: Sequence[RoutingRecord],
    objective: Objective,
    cocos: Sequence | None = None,
    features_from: Sequence[RoutingRecord] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    method: str = 'layers',
) -> tuple[RouterFit, int]:
    """Fit a router to records.

    The records may be of different images (a held-out part, or folds), or of the same ones in
    several augmented passes; an image's passes stay together in cross-validation.

    Args:
        router (nn.Module): A `Router` of the widths that are wanted; it stays as it is.
        records (Sequence[RoutingRecord]): Whose losses or detections give the gains; see
            `routing.record`.
        objective (Objective): What to fit.
        cocos (Sequence[COCO], optional): Ground truth of each record, for gains in AP and by
            class. Defaults to None.
        features_from (Sequence[RoutingRecord], optional): Records that give what the router sees,
            by image id, each image once: for cross-fitting, where ``records`` come from cascades
            that were trained without the images, and the features from the one that the router is
            for. Defaults to the records
            themselves.
        seed (int): See `fit_router`. Defaults to 0.
        progress (Callable, optional): See `fit_router`.
        method (str): See `fit_by_method`; 'rule' is of a router that sees detections. Defaults to
            'layers'.

    Returns:
        tuple[RouterFit, int]: The fit and the number of different images.

    Raises:
        UsageError: If a record lacks something, or its features are not as wide as the router's.
    """
    cocos = cocos or [None] * len(records)
    weights = class_weights_of_records(records, cocos) if objective.by_class else None
    gains = np.concatenate(
        [
            gains_of_record(record, objective.gain, coco, weights)
            for record, coco in zip(records, cocos)
        ]
    )
    if features_from is None:
        features = router_inputs(router, records, cocos)
    elif router.sees_detections:
        raise UsageError('a router that sees detections is fitted to records of its own cascade')
    else:
        features = _by_id(features_from, records)
    wanted = len(router.mean)
    if features.shape[1] != wanted:
        raise UsageError(
            f'the records have {features.shape[1]} features per image, and the router of this '
            f'config takes {wanted}: record with the same backbone and router pools'
        )
    files = [file for record in records for file in record.files]
    _, groups = np.unique(files, return_inverse=True)
    hidden = router.fc1.out_features
    if method == 'rule' and not router.sees_detections:
        raise UsageError("the rule is of exit 0's detections: give model.router.sees='detections'")
    fit = fit_by_method(
        method, features, gains, objective, hidden, groups=groups, seed=seed, progress=progress
    )
    if router.sees_detections:
        known, categories = (
            _weights_by_category(records, cocos),
            records[0].provenance['categories'],
        )
        fit.state['class_weights'] = torch.tensor([known[category] for category in categories])
    return fit, int(groups.max()) + 1


def router_inputs(
    router: nn.Module, records: Sequence[RoutingRecord], cocos: Sequence | None = None
) -> np.ndarray:
    """What a router sees of the images of some records, (n, d), float32.

    Args:
        router (nn.Module): A `Router`.
        records (Sequence[RoutingRecord]): With features; one after the other.
        cocos (Sequence[COCO], optional): Ground truth of each, by which detections are weighted.
            Defaults to None, which will do for a router that sees maps alone.

    Raises:
        UsageError: If a record lacks something.
    """
    weights = None
    if router.sees_detections:
        weights = _weights_by_category(records, cocos or [None] * len(records))
    return _stacked([_seen(router, record, weights) for record in records])


def _weights_by_category(records: Sequence[RoutingRecord], cocos: Sequence) -> dict[int, float]:
    if any(coco is None for coco in cocos):
        raise UsageError('a router that sees detections needs the annotation files of the records')
    weights = class_weights_of_records(records, cocos)
    return dict(zip(sorted(cocos[0].getCatIds()), weights.tolist()))


def _seen(
    router: nn.Module, record: RoutingRecord, weights: Mapping[int, float] | None
) -> np.ndarray:
    """What a router sees of a record's images, (n, d)."""
    if weights is None:
        return features_of_record(record)
    first = record.detections[0]
    features = detection_features(
        first, [weights[category] for category in first.categories.tolist()]
    )
    features = features.astype(np.float32)
    return (
        features
        if router.sees == 'detections'
        else np.hstack([features_of_record(record), features])
    )


def _by_id(sources: Sequence[RoutingRecord], records: Sequence[RoutingRecord]) -> np.ndarray:
    """Features of some records' images, (n, d), looked up in other records."""
    rows = _stacked([features_of_record(source) for source in sources])
    known: dict[int, tuple[int, str]] = {}
    for row, (identity, file) in enumerate(_names_of(sources)):
        if identity in known:
            raise UsageError(f'image {identity} ({file}) is twice in the records of features')
        known[identity] = row, file
    wanted = _names_of(records)
    missing = [identity for identity, _ in wanted if identity not in known]
    if missing:
        raise UsageError(
            f'{len(missing)} images (such as {missing[0]}) are not in the records of features'
        )
    for identity, file in wanted:
        if known[identity][1] != file:
            raise UsageError(
                f"image {identity} is '{file}', and '{known[identity][1]}' in the records of "
                'features: they are of other images'
            )
    return rows[[known[identity][0] for identity, _ in wanted]]


def _names_of(records: Sequence[RoutingRecord]) -> list[tuple[int, str]]:
    return [pair for record in records for pair in zip(record.ids.tolist(), record.files)]


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise UsageError(f'the records have features of different widths: {widths}')
    return np.concatenate(parts)


def insert_router(
    model: nn.Module, checkpoint: Mapping, fit: RouterFit, facts: Mapping[str, object]
) -> dict:
    """A checkpoint with a fitted router.

    Args:
        model (nn.Module): A dynamic detector as the config builds it.
        checkpoint (Mapping): Of a trained cascade, with or without a router; it stays as it is.
        fit (RouterFit): The router.
        facts (Mapping[str, object]): Strings, numbers and lists of them: where it comes from.

    Returns:
        dict: ``state_dict`` and ``meta``, without the optimizer and the like. Delta is the gains'
            median, the calibration of an older router is gone, and ``meta.router`` says where the
            router comes from.

    Raises:
        UsageError: If the checkpoint is of no cascade that fits the model.
    """
    state = {key.removeprefix('module.'): value for key, value in checkpoint['state_dict'].items()}
    if missing_of(state):
        if model.needs_step_one:
            raise UsageError(
                "this checkpoint is a plain detector's: train the cascade (step 1) first"
            )
        state = model.spread_plain_weights(state)
    state = {key: value for key, value in state.items() if not key.startswith('router.')}
    require_complete(model, state, optional=('router.',))
    fresh = model.state_dict()
    state.update({name: fresh[name].clone() for name in _CALIBRATION if name in fresh})
    state.update({f'router.{name}': value for name, value in fit.state.items()})
    state['delta'] = fit.quantiles[len(fit.quantiles) // 2].clone()
    require_complete(model, state)
    meta = {
        name: value for name, value in checkpoint.get('meta', {}).items() if name != 'calibration'
    }
    meta['router'] = dict(
        facts,
        correlation=fit.correlation,
        steps=fit.steps,
        weight_decay=fit.weight_decay,
        delta=float(state['delta']),
        torch=str(torch.__version__),
        date=datetime.datetime.now().isoformat(timespec='seconds'),
    )
    return dict(state_dict=state, meta=meta)


def ground_truths(
    records: Sequence[RoutingRecord], objective: Objective, router: nn.Module | None = None
) -> list | None:
    """A COCO object for each record, if the objective's gain, or the router, needs one.

    Raises:
        UsageError: If a record does not say its annotation file, or there is none.
    """
    needed = router is not None and router.sees_detections
    if GAINS[objective.gain].values == 'losses' and not objective.by_class and not needed:
        return None
    facts = [record.provenance for record in records]
    named = [
        (str(provenance.get('ann_file', '')), tuple(provenance.get('categories', ())))
        for provenance in facts
    ]
    cocos = {source: _ground_truth(*source) for source in set(named)}
    return [cocos[source] for source in named]


def _ground_truth(path: str, categories: Sequence[int]):
    if not Path(path).is_file():
        raise UsageError(
            f"there is no annotation file at '{path}', where the record is from; "
            'the objective needs it'
        )
    return read_truth(path, categories or None)


def objective_settings(objective: Objective) -> dict:
    """An objective's settings, as a dictionary of strings and numbers."""
    return {
        name: value for name, value in dataclasses.asdict(objective).items() if value is not None
    }


def wanted_objective(
    name: str | None, model: Mapping, gain: str | None = None, by_class: bool = False
) -> Objective:
    """The objective that is asked for by name, or else the one of a config's model; with another
    gain, or by class, where that is asked for."""
    objective = build_objective(name or model.get('objective', 'paper'))
    changes = {} if gain is None else dict(gain=gain)
    if by_class:
        changes['by_class'] = True
    return check_objective(dataclasses.replace(objective, **changes))
