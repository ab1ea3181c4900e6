"""Fit what a gate learns to a recorded video run: seconds, no detector.

Letters: n frames, E exits. What a gate learns from is each exit's AP on each frame by itself.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from torch import Tensor

from ..errors import UsageError
from ..routing.evaluation import Mixtures
from ..routing.oracle import allocate, object_count
from .gate_simulation import evidence_by_exit, exit_costs, frames_by_video
from .gates import Gate
from .learned_gates import HaltingGate, LearnedGate, detection_features, goes_on
from .part_building import learned_part
from .presence import Presence
from .record import detections_of

#: Weight decays and numbers of updates that cross-validation chooses among.
WEIGHT_DECAYS, STEPS = (0.01, 1.0), (10, 20, 40, 80, 160)
#: Frames per update, AdamW's learning rate, and how many budgets the oracle has by default.
_BATCH, _LR, _BUDGETS = 256, 1e-2, 8
#: Share of frames with objects that a `Presence` may take for empty; frames that its moments are
#: of.
MISSED, _MOMENTS = 0.01, 2048
#: Frames in a row that stay together in cross-validation where there are too few videos.
_BLOCK = 25


class GateFit(NamedTuple):
    """How a gate was fitted: ``loss`` on frames that it was not fit to, ``untrained`` that of a
    gate that always says 0.5; ``steps`` (updates) and ``weight_decay``: what cross-validation
    chose."""

    loss: float
    untrained: float
    steps: int
    weight_decay: float


def oracle_targets(
    values: np.ndarray,
    costs: Sequence[float],
    budgets: Sequence[float] | None = None,
    prices: Sequence[float] | None = None,
) -> np.ndarray:
    """At each exit, the share of oracles that go on, (E - 1, n), in [0, 1].

    Args:
        values (np.ndarray): (E, n), what each exit is worth on each frame.
        costs (Sequence[float]): (E,).
        budgets (Sequence[float], optional): Mean cost per frame of each oracle, see `allocate`.
            Defaults to 8 evenly between the cheapest exit and the dearest.
        prices (Sequence[float], optional): Instead of budgets: value per cost, each frame taking
            the exit with the largest ``value - price * cost``, the cheapest of equals.
    """
    values, costs = np.asarray(values, float), np.asarray(costs, float)
    if prices is not None:
        if budgets is not None:
            raise UsageError('a gate learns from budgets or from prices, not from both')
        order = np.argsort(costs, kind='stable')
        choices = [
            order[(values - price * costs[:, None])[order].argmax(axis=0)] for price in prices
        ]
    else:
        if budgets is None:
            budgets = np.linspace(costs.min(), costs.max(), _BUDGETS + 2)[1:-1]
        choices = [allocate(values, costs, budget).choice for budget in budgets]
    if not choices:
        raise UsageError('a gate learns from one budget or price at least')
    went = [goes_on(torch.from_numpy(np.asarray(choice)), len(costs)) for choice in choices]
    return torch.stack(went).mean(dim=0).numpy()


def fit_halting_gate(
    gate: HaltingGate,
    record: Mapping,
    coco: COCO,
    budgets: Sequence[float] | None = None,
    prices: Sequence[float] | None = None,
    kind: str = 'gflops',
    by_objects: bool = False,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> GateFit:
    """Fit a `HaltingGate` to what an oracle does on a record; see `oracle_targets` and `fit_gate`.

    Args:
        gate (HaltingGate): It is changed.
        record (Mapping): Of videos that the detector was not trained on.
        coco (COCO): Its ground truth.
        budgets, prices (Sequence[float], optional): As of `oracle_targets`, per frame in the unit
            of ``kind``.
        kind (str): 'gflops' or 'latencies'. Defaults to 'gflops'.
        by_objects (bool): Whether to multiply a frame's AP by its number of objects. Defaults to
            False.
        seed (int): Of weights, order and folds. Defaults to 0.
        steps (Sequence[int]): Numbers of updates to choose among, rising. Defaults to 10, 20, ...
            160.
        progress (Callable, optional): Called with (fits done, fits in all) after each.
    """
    values = Mixtures(detections_of(record), coco).image_ap()
    if by_objects:
        values = values * [object_count(coco, image['id']) for image in record['images']]
    costs = exit_costs(record, kind, gate.looks_at_detections)[1:]
    targets = torch.from_numpy(oracle_targets(values, costs, budgets, prices))

    def loss(
        learner: LearnedGate, rows: Tensor, pooled: list[Tensor], looks: list[Tensor] | None
    ) -> Tensor:
        return learner.target_loss(pooled, targets[:, rows], looks)

    return fit_gate(gate, record, loss, seed, steps, progress=progress)


def fit_gumbel_gate(
    gate: LearnedGate,
    record: Mapping,
    coco: COCO,
    kind: str = 'gflops',
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> GateFit:
    """Fit a `GumbelGate` to a record alone, the detector as it is: an exit's loss on a frame is ``1
    - AP``, AP in [0, 1]. Arguments as of `fit_halting_gate`."""
    values = Mixtures(detections_of(record), coco).image_ap()
    losses = torch.from_numpy(1 - values / 100).float()
    costs = torch.from_numpy(exit_costs(record, kind, gate.looks_at_detections)[1:])

    def loss(
        learner: LearnedGate, rows: Tensor, pooled: list[Tensor], looks: list[Tensor] | None
    ) -> Tensor:
        gate_losses = learner.loss(pooled, losses[:, rows], costs, looks)
        return sum(value for name, value in gate_losses.items() if 'loss' in name)

    return fit_gate(gate, record, loss, seed, steps, progress=progress)


def fit_gate_parts(
    gate: Gate,
    record: Mapping,
    coco: COCO,
    kind: str = 'latencies',
    seed: int = 0,
    parts: Sequence[str] = ('gate', 'nothing'),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NamedTuple]:
    """Fit those parts of a gate that learn: how each was fitted; nothing where none does. Other
    arguments as of `fit_halting_gate`."""
    fits: dict[str, NamedTuple] = {}
    learner = learned_part(gate) if 'gate' in parts else None
    nothing = getattr(gate, 'nothing', None) if 'nothing' in parts else None
    if learner is not None:
        fit = fit_halting_gate if isinstance(learner, HaltingGate) else fit_gumbel_gate
        fits['gate'] = fit(learner, record, coco, kind=kind, seed=seed, progress=progress)
    if nothing is not None:
        fits['nothing'] = fit_presence(nothing, record, coco, seed, progress=progress)
    return fits


def untrained_gate_parts(gate: Gate, state: Mapping[str, Tensor]) -> list[str]:
    """Parts of a detector's gate that its checkpoint has no trained weights of: 'gate',
    'nothing'."""
    missing = gate.state_dict().keys() - {
        key.removeprefix('gate.') for key in state if key.startswith('gate.')
    }
    kinds = {'nothing' if key.startswith('nothing.') else 'gate' for key in missing}
    # Trained with the detector, it is there, but was never fitted.
    if getattr(gate, 'nothing', None) is not None and gate.nothing.level < 0:
        kinds.add('nothing')
    return sorted(kinds)


class PresenceFit(NamedTuple):
    """How a `Presence` was fitted: its ``level``; and at that level, on frames that it was not fit
    to, the shares of frames with objects that it ``missed``, and of frames without that it
    ``spared``."""

    level: float
    missed: float
    spared: float


def fit_presence(
    presence: Presence,
    record: Mapping,
    coco: COCO,
    seed: int = 0,
    missed: float = MISSED,
    folds: int = 3,
    steps: int = STEPS[-1],
    progress: Callable[[int, int], None] | None = None,
) -> PresenceFit:
    """Fit a `Presence`: its weights, anew, by cross entropy; and its level, as the highest at which
    no more than a share of the frames with objects would be taken for empty by one fitted to other
    videos.

    The same seed gives the same.

    Args:
        presence (Presence): On the CPU. It is changed.
        record (Mapping): Of a video run.
        coco (COCO): Its ground truth. Annotations that are ``iscrowd`` are no objects.
        seed (int): Of weights and folds. Defaults to 0.
        missed (float): The share, in [0, 1). Defaults to 0.01.
        folds (int): 2 or more, of whole videos (shorter stretches where there are few). Defaults to
            3.
        steps (int): Updates, each on 256 frames. Defaults to 160.
        progress (Callable, optional): Called with (fits done, fits in all) after each.

    Raises:
        UsageError: If all frames show objects or none does, or there are too few.
    """
    shown = shows_objects(record, coco)
    if shown.all() or not shown.any():
        raise UsageError(
            'whether a frame shows nothing is learned from frames with objects and frames without: '
            f"{int(shown.sum())} of the record's {len(shown)} have some"
        )
    early = torch.from_numpy(np.stack([image['early'] for image in record['images']]))
    labels = torch.from_numpy(shown).float()
    chances, everyone = np.empty(len(shown), np.float32), np.arange(len(shown))
    parts = _folds(record, folds, seed)
    for done, part in enumerate(parts, 1):
        rest = torch.from_numpy(np.setdiff1d(everyone, part))
        fitted = _train_presence(copy.deepcopy(presence), early[rest], labels[rest], steps, seed)
        with torch.no_grad():
            chances[part] = np.concatenate(
                [fitted(early[rows]).numpy() for rows in torch.from_numpy(part).split(_BATCH)]
            )
        if progress:
            progress(done, folds + 1)
    presence.load_state_dict(
        _train_presence(copy.deepcopy(presence), early, labels, steps, seed).state_dict()
    )
    of_shown = np.sort(chances[shown])
    # Just below the first that must not be missed.
    level = np.nextafter(of_shown[int(missed * len(of_shown))], np.float32(-1))
    presence.level.fill_(float(level))
    if progress:
        progress(folds + 1, folds + 1)
    return PresenceFit(
        float(level), float((of_shown <= level).mean()), float((chances[~shown] <= level).mean())
    )


def shows_objects(record: Mapping, coco: COCO) -> np.ndarray:
    """Whether each frame has an annotation that is not ``iscrowd``, (n,), bool."""
    by_image = [coco.loadAnns(coco.getAnnIds(imgIds=[image['id']])) for image in record['images']]
    return np.array(
        [
            any(not annotation.get('iscrowd', 0) for annotation in annotations)
            for annotations in by_image
        ]
    )


def _train_presence(
    presence: Presence, early: Tensor, labels: Tensor, steps: int, seed: int
) -> Presence:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        presence.reset()
        # Of so many frames alone: moments need no more, and each frame has many parts.
        presence.standardize(early[:: max(1, len(early) // _MOMENTS)])
        weights = [parameter.requires_grad_(True) for parameter in presence.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=_LR, fused=True)
        for rows in itertools.islice(_batches(torch.arange(len(early))), steps):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(
                presence.logits(early[rows]), labels[rows]
            ).backward()
            optimizer.step()
    return presence.requires_grad_(False)


Loss = Callable[[LearnedGate, Tensor, list[Tensor], list[Tensor] | None], Tensor]


def fit_gate(
    gate: LearnedGate,
    record: Mapping,
    loss: Loss,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    folds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> GateFit:
    """Fit a gate, all its weights anew.

    Cross-validation over videos (stretches of 25 frames where there are fewer videos than two per
    fold) chooses the weight decay and when to stop; then all frames are used. The same seed gives
    the same gate.

    Args:
        gate (LearnedGate): On the CPU. It is changed.
        record (Mapping): Of a video run.
        loss (Callable): Of (gate, rows, the rows' pooled features, the rows' looks or None), a
            scalar tensor.
        seed (int): Of weights, order, folds and Gumbel noise. Defaults to 0.
        steps (Sequence[int]): Numbers of updates to choose among, rising.
        weight_decays (Sequence[float]): AdamW's, to choose among.
        folds (int): 2 or more. Defaults to 3.
        progress (Callable, optional): Called with (fits done, fits in all) after each.

    Raises:
        UsageError: If the record has other heads than the gate, or too few frames.
    """
    shown = evidence_by_exit(record)
    pooled = shown[-1].pooled
    if [x.shape[1] for x in pooled] != list(gate.in_channels):
        raise UsageError(
            f'the gate is for heads of {list(gate.in_channels)} channels, the record has '
            f'{[x.shape[1] for x in pooled]}: set the in_channels of the gate'
        )
    looks = (
        [detection_features(evidence) for evidence in shown] if gate.looks_at_detections else None
    )
    data = (pooled, looks, loss)
    parts = _folds(record, folds, seed)
    everyone = np.arange(len(record['images']))
    done, total = 0, folds * len(weight_decays) + 1

    def train(
        rows: np.ndarray, decay: float, stops: Sequence[int], watch: np.ndarray
    ) -> tuple[LearnedGate, list]:
        nonlocal done
        trained = _train(copy.deepcopy(gate), data, rows, decay, stops, watch, seed)
        done += 1
        if progress:
            progress(done, total)
        return trained

    # (decays, folds, steps): loss on the fold that was not seen; the first is of a gate that says
    # 0.5.
    curves = np.array(
        [
            [train(np.setdiff1d(everyone, part), decay, steps, part)[1] for part in parts]
            for decay in weight_decays
        ]
    ).mean(axis=1)
    best, last = np.unravel_index(curves[:, 1:].argmin(), curves[:, 1:].shape)
    fitted, _ = train(everyone, weight_decays[best], [steps[last]], everyone[:1])
    gate.load_state_dict(fitted.state_dict())
    return GateFit(
        float(curves[best, last + 1]),
        float(curves[:, 0].mean()),
        int(steps[last]),
        float(weight_decays[best]),
    )


def _folds(record: Mapping, folds: int, seed: int) -> list[np.ndarray]:
    """Frames of each fold."""
    groups = frames_by_video(record)
    if len(groups) < 2 * folds:
        groups = [
            group[start : start + _BLOCK]
            for group in groups
            for start in range(0, len(group), _BLOCK)
        ]
    if len(groups) < folds:
        raise UsageError(
            f'{len(record["images"])} frames are too few to fit a gate in {folds} folds: record '
            f'{folds} videos or more, or {folds * _BLOCK} frames'
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    return [
        np.concatenate([groups[index] for index in order[fold::folds]]) for fold in range(folds)
    ]


def _train(
    gate: LearnedGate,
    data: tuple,
    rows: np.ndarray,
    decay: float,
    stops: Sequence[int],
    watch: np.ndarray,
    seed: int,
) -> tuple[LearnedGate, list[float]]:
    """A gate fitted to some frames; and its loss on those that are watched, before the first update
    and at each stop."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        gate.reset()
        gate.train().requires_grad_(True)
        pooled, looks, loss = data

        def loss_on(subset: Tensor) -> Tensor:
            return loss(
                gate, subset, [x[subset] for x in pooled], looks and [x[subset] for x in looks]
            )

        def watched() -> float:
            with torch.no_grad():
                return float(loss_on(torch.from_numpy(watch)))

        gate.standardize([x[torch.from_numpy(rows)] for x in pooled])
        weights, others = [], []
        for name, parameter in gate.named_parameters():
            (weights if parameter.dim() > 1 else others).append(parameter)
        optimizer = torch.optim.AdamW(
            [dict(params=weights, weight_decay=decay), dict(params=others, weight_decay=0.0)],
            lr=_LR,
            fused=True,
        )
        batches, curve = _batches(torch.from_numpy(rows)), [watched()]
        for step in range(1, stops[-1] + 1):
            optimizer.zero_grad()
            loss_on(next(batches)).backward()
            optimizer.step()
            if step in stops:
                curve.append(watched())
    return gate.eval(), curve


def _batches(rows: Tensor) -> Iterator[Tensor]:
    """Rows in batches, in a new order each time around."""
    while True:
        yield from rows[torch.randperm(len(rows))].split(_BATCH)
