"""Fit a router to records: a supervised problem on pooled features, seconds instead of epochs.

Letters: n images (an image seen in several augmented passes counts several times), d features, g
gains; see `objective`. Nothing here knows a model: a router comes back as the entries of its state
dict.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from .objective import GAINS, Objective, build_objective, quantiles_of
from .record import RoutingRecord

#: Weight decays that cross-validation chooses among; AdamW shrinks a weight by ``lr * decay`` each
#: step.
WEIGHT_DECAYS = (0.01, 1.0, 10.0)
#: Numbers of updates that it chooses among.
STEPS = (10, 20, 40, 80, 160, 320)
#: Images per update: enough of them for pairs.
_BATCH = 128


class RouterFit(NamedTuple):
    """A fitted router.

    ``state``: entries of a `Router`'s state dict. ``quantiles``: (101,), of the gains.
    ``correlation``: of the difficulty's rank with the gain, on images that it was not fit to, in
    [-1, 1], see `rank_correlation`. ``steps`` (updates) and ``weight_decay``: what cross-validation
    chose.
    """

    state: dict[str, Tensor]
    quantiles: Tensor
    correlation: float
    steps: int
    weight_decay: float


def gains_of_record(record: RoutingRecord, kind: str, coco=None) -> np.ndarray:
    """What each image of a record gains by the last exit.

    Args:
        record (RoutingRecord): See `record`.
        kind (str): A key of `GAINS`.
        coco (COCO, optional): Ground truth of the record; 'ap' needs it. Defaults to None.

    Returns:
        np.ndarray: (n,), float64, in the record's order.

    Raises:
        UsageError: If the record lacks what the kind is made of.
    """
    if kind not in GAINS:
        raise UsageError(f"a gain is one of {', '.join(GAINS)}; got '{kind}'")
    if not len(record):
        raise UsageError('the record has no images')
    if GAINS[kind].values == 'ap':
        from .evaluation import Mixtures

        if coco is None:
            raise UsageError("gain 'ap' needs the annotation file of the record")
        values = Mixtures(record, coco).image_ap()
        objects = np.ones(len(record))
    else:
        _require(record, 'losses')
        values = record.losses.T
        objects = np.ones(len(record))
    if kind == 'loss_sum':
        _require(record, 'objects')
        objects = record.objects.astype(np.float64)
    gains = GAINS[kind].of(values, objects)
    if not np.isfinite(gains).all():
        worst = int(np.flatnonzero(~np.isfinite(gains))[0])
        raise UsageError(
            f'the losses of image {record.ids[worst]} ({record.files[worst]}) are not finite'
        )
    return gains


def features_of_record(record: RoutingRecord) -> np.ndarray:
    """What the router saw of each image, (n, d), float32, in the record's order."""
    _require(record, 'features')
    if not np.isfinite(record.features).all():
        raise UsageError('some features of the record are not finite')
    return record.features


def _require(record: RoutingRecord, name: str) -> None:
    if record.column(name) is None:
        raise UsageError(
            f'the record has no {name}: make it with tools/record.py, from a config whose test '
            'pipeline loads annotations'
        )


def rank_correlation(scores: Sequence[float], gains: Sequence[float]) -> float:
    """Pearson's correlation of the scores' ranks with the gains, in [-1, 1]; 0 where either is
    constant.

    It is what a router earns: averaged over all hard shares, the gain collected above a random
        choice of as
    many images is proportional to the covariance of ranks and gains. Ties share a rank.
    """
    from scipy.stats import rankdata

    ranks, gains = rankdata(scores), np.asarray(gains, np.float64)
    if np.ptp(ranks) == 0 or np.ptp(gains) == 0:
        return 0.0
    return float(np.corrcoef(ranks, gains)[0, 1])


def fit_router(
    features: np.ndarray,
    gains: np.ndarray,
    objective: str | Mapping | Objective = 'paper',
    hidden: int | None = None,
    steps: Sequence[int] = STEPS,
    lr: float | None = None,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    folds: int = 3,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RouterFit:
    """Fit a router's two layers to gains.

    Cross-validation on the given images chooses the weight decay and when to stop: the pair whose
    difficulties rank the held-out gains best (`rank_correlation`, averaged over folds). Then all
    images are used. The last layer starts at zero, so a router that learns nothing says 0.5.

    Args:
        features (np.ndarray): (n, d), as `Router.pool` gives them, not standardized.
        gains (np.ndarray): (n,), see `gains_of_record`.
        objective (str or dict): As in a config. Defaults to the paper's.
        hidden (int, optional): Width between the layers. Defaults to d // 4, the paper's.
        steps (Sequence[int]): Numbers of updates, of 128 images each, to choose among; ascending.
            Defaults to 10, 20, 40, ... 320.
        lr (float, optional): AdamW's learning rate. Defaults to 1.5 / d, at most 0.01: AdamW moves
            each weight by about lr in a step, and so what d of them sum up by about d times that.
        weight_decays (Sequence[float]): AdamW's, to choose among; weights alone. Defaults to 0.01,
            1, 10.
        folds (int): Of the cross-validation, 2 or more. Defaults to 3.
        groups (Sequence[int], optional): (n,): rows of one group, such as views of one image, stay
            in one fold. Defaults to each row by itself.
        seed (int): Of weights, order and folds: the same seed gives the same router. Defaults to 0.
        progress (Callable, optional): Called with (fits done, fits in all) after each.

    Returns:
        Fit: The router and how well it ranks images that it has not seen.

    Raises:
        UsageError: If shapes do not fit, values are not finite, or images are too few for the
            folds.
    """
    objective = build_objective(objective)
    features, gains = np.asarray(features, np.float32), np.asarray(gains, np.float64)
    if features.ndim != 2 or gains.shape != (len(features),):
        raise UsageError(
            f'features must be (n, d) and gains (n,); got {features.shape} and {gains.shape}'
        )
    if not (np.isfinite(features).all() and np.isfinite(gains).all()):
        raise UsageError('features and gains must be finite')
    parts = _split(np.arange(len(gains)) if groups is None else np.asarray(groups), folds, seed)
    width = hidden or max(1, features.shape[1] // 4)
    lr = lr or min(1e-2, 1.5 / features.shape[1])
    mean, std = _moments(features)
    inputs = torch.from_numpy((features - mean) / std)
    done, total = 0, folds * len(weight_decays) + 1

    def train(rows: np.ndarray, decay: float, stops: Sequence[int], watch: np.ndarray):
        nonlocal done
        result = _train(inputs, gains, rows, objective, width, lr, decay, stops, seed, watch)
        done += 1
        if progress:
            progress(done, total)
        return result

    # (decays, folds, steps): how well each ranks the fold that it has not seen.
    everyone = np.arange(len(gains))
    curves = np.array(
        [
            [train(np.setdiff1d(everyone, part), decay, steps, part)[1] for part in parts]
            for decay in weight_decays
        ]
    )
    means = curves.mean(axis=1)
    best, last = np.unravel_index(means.argmax(), means.shape)
    layers, _ = train(everyone, weight_decays[best], [steps[last]], everyone)
    state = {name: value.clone() for name, value in layers.state_dict().items()}
    state.update(mean=torch.from_numpy(mean), std=torch.from_numpy(std))
    return RouterFit(
        state,
        quantiles_of(gains),
        float(means[best, last]),
        int(steps[last]),
        float(weight_decays[best]),
    )


def _split(groups: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Rows of each fold; groups stay together."""
    names, group = np.unique(groups, return_inverse=True)
    if folds < 2 or len(names) < 2 * folds:
        raise UsageError(
            f'{len(names)} images cannot be cross-validated in {folds} folds: take 2 folds or more '
            f'and 2 images for each, {2 * max(2, folds)} in all'
        )
    fold = np.random.default_rng(seed).permutation(len(names)) % folds
    return [np.flatnonzero(fold[group] == index) for index in range(folds)]


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, (d,), float32. One that is the same for all
    images says nothing, and must not be divided by 0."""
    double = features.astype(np.float64)
    return double.mean(axis=0).astype(np.float32), double.std(axis=0).clip(1e-6).astype(np.float32)


def _train(
    inputs: Tensor,
    gains: np.ndarray,
    rows: np.ndarray,
    objective: Objective,
    width: int,
    lr: float,
    decay: float,
    stops: Sequence[int],
    seed: int,
    watch: np.ndarray,
) -> tuple[nn.Module, list[float]]:
    """Layers fit to some rows; and, at each stop, how well they rank the rows that are watched."""
    quantiles = quantiles_of(gains[rows])
    wanted = torch.from_numpy(gains).float()
    batches = _batches(torch.from_numpy(rows), seed)
    layers = _layers(inputs.shape[1], width, seed)
    if objective.fit == 'regression':
        layers.fc2.bias.data.fill_(_best_constant(objective, wanted[rows], quantiles))
    optimizer = torch.optim.AdamW(
        [
            dict(params=[layers.fc1.weight, layers.fc2.weight], weight_decay=decay),
            dict(params=[layers.fc1.bias, layers.fc2.bias], weight_decay=0.0),
        ],
        lr=lr,
    )
    curve = []
    for step in range(1, stops[-1] + 1):
        batch = next(batches)
        optimizer.zero_grad()
        objective.loss(layers(inputs[batch]).squeeze(1), wanted[batch], quantiles).backward()
        optimizer.step()
        if step in stops:
            with torch.no_grad():
                curve.append(
                    rank_correlation(layers(inputs[watch]).squeeze(1).numpy(), gains[watch])
                )
    return layers, curve


def _best_constant(objective: Objective, gains: Tensor, quantiles: Tensor) -> float:
    """The logit that serves best where it is the same for all: updates are then about what differs.
    Of a squared error, half the slope at 0, with the other sign."""
    logit = torch.zeros((), requires_grad=True)
    objective.loss(logit.expand(len(gains)), gains, quantiles).backward()
    return -logit.grad.item() / 2


def _batches(rows: Tensor, seed: int) -> Iterator[Tensor]:
    """Rows in batches, in a new order each time around."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].split(_BATCH)


def _layers(features: int, width: int, seed: int) -> nn.Sequential:
    """A router's layers under the names that they have there; the generators stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = nn.Sequential()
        layers.add_module('fc1', nn.Linear(features, width))
        layers.add_module('relu', nn.ReLU())
        layers.add_module('fc2', nn.Linear(width, 1))
    nn.init.zeros_(layers.fc2.weight)
    nn.init.zeros_(layers.fc2.bias)
    return layers
