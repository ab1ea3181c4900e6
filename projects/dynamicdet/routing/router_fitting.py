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
from .class_weights import class_weights, count_objects, mean_weights
from .evaluation import Mixtures
from .objective import GAINS, Objective, build_objective, quantiles_of, ranks_of, wanted_logits
from .record import RoutingRecord
from .rewards import marginal_rewards

#: Weight decays that cross-validation chooses among; AdamW shrinks a weight by ``lr * decay`` each
#: step.
WEIGHT_DECAYS = (0.01, 1.0, 10.0)
#: Numbers of updates that it chooses among.
STEPS = (10, 20, 40, 80, 160, 320)
#: Penalties that a ridge regression's chooses among, in units of images.
PENALTIES = tuple(10.0**power for power in range(-1, 7))
#: How routers are fitted, see `fit_by_method`.
METHODS = ('layers', 'linear', 'rule')
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


def gains_of_record(
    record: RoutingRecord, kind: str, coco=None, weights: Sequence[float] | None = None
) -> np.ndarray:
    """What each image of a record gains by the last exit.

    Args:
        record (RoutingRecord): See `record`.
        kind (str): A key of `GAINS`.
        coco (COCO, optional): Ground truth of the record; 'ap', 'reward' and gains by class need
            it. Defaults to None.
        weights (Sequence[float], optional): For gains by class: of each category's objects,
            (categories,), by sorted id; see `class_weights`. A gain in loss is multiplied by the
            mean weight of the image's objects, one in AP is taken category by category
            (`Mixtures.image_ap`). Defaults to all alike.

    Returns:
        np.ndarray: (n,), float64, in the record's order.

    Raises:
        UsageError: If the record lacks what the kind is made of, or the kind has no classes.
    """
    if kind not in GAINS:
        raise UsageError(f"a gain is one of {', '.join(GAINS)}; got '{kind}'")
    if not len(record):
        raise UsageError('the record has no images')
    values = GAINS[kind].values
    if coco is None and (values != 'losses' or weights is not None):
        name = kind if weights is None else f'{kind} by class'
        raise UsageError(f"gain '{name}' needs the annotation file of the record")
    if values == 'reward':
        return marginal_rewards(record, coco)
    objects = np.ones(len(record))
    if values == 'ap':
        aps = Mixtures(record, coco).image_ap(weights)
        return GAINS[kind].of(aps, objects)
    _require(record, 'losses')
    if kind == 'loss_sum':
        _require(record, 'objects')
        objects = record.objects.astype(np.float64)
    gains = GAINS[kind].of(record.losses.T, objects)
    if weights is not None:
        gains = gains * mean_weights(count_objects(coco, record.ids), weights)
    if not np.isfinite(gains).all():
        worst = int(np.flatnonzero(~np.isfinite(gains))[0])
        raise UsageError(
            f'the losses of image {record.ids[worst]} ({record.files[worst]}) are not finite'
        )
    return gains


def class_weights_of_records(records: Sequence[RoutingRecord], cocos: Sequence) -> np.ndarray:
    """Weights of each category's objects, (categories,), by sorted id, from all different images of
    some records.

    Args:
        records (Sequence[RoutingRecord]): An image that is in several counts once.
        cocos (Sequence[COCO]): Ground truth of each.

    Raises:
        UsageError: If the records' categories differ.
    """
    if len({tuple(sorted(coco.getCatIds())) for coco in cocos}) > 1:
        raise UsageError('the records are of annotation files with different categories')
    counts: dict[tuple[int, str], np.ndarray] = {}
    for record, coco in zip(records, cocos):
        names = zip(record.ids.tolist(), record.files)
        counts.update(zip(names, count_objects(coco, record.ids)))
    return class_weights(np.sum(list(counts.values()), axis=0))


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
    features, gains = _checked(features, gains)
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


def fit_ridge_router(
    features: np.ndarray,
    gains: np.ndarray,
    objective: str | Mapping | Objective = 'paper',
    hidden: int | None = None,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 3,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RouterFit:
    """Fit a linear router to gains, by ridge regression: with some thousand images, less is learned
    by heart than in two layers.

    It has the two layers of any `Router`: a linear function is the difference of the ReLUs of
    itself and of its negative. What is regressed is what the objective's ``fit`` asks for: ranks of
    gains, or else gains, clipped and scaled as for 'regression'. Cross-validation chooses the
    penalty, as `fit_router` the weight decay.

    Args:
        features, gains, objective, folds, groups, seed, progress: As of `fit_router`.
        hidden (int, optional): Width between the layers, 2 or more. Defaults to d // 4, but 2.
        penalties (Sequence[float]): Of the squared weights of standardized features, in units of
            images, to choose among. Defaults to 0.1, 1, ... 1e6.

    Returns:
        RouterFit: Its ``weight_decay`` is the penalty; there are no ``steps``.

    Raises:
        UsageError: As `fit_router`; and if the layers are too narrow.
    """
    objective = build_objective(objective)
    features, gains = _checked(features, gains)
    width = hidden or max(2, features.shape[1] // 4)
    if width < 2:
        raise UsageError('a linear router takes two hidden channels or more: a smaller reduction')
    parts = _split(np.arange(len(gains)) if groups is None else np.asarray(groups), folds, seed)
    mean, std = _moments(features)
    inputs, everyone = ((features - mean) / std).astype(np.float64), np.arange(len(gains))
    curves = []
    for done, part in enumerate(parts):
        rest = np.setdiff1d(everyone, part)
        weights, biases = _ridge(inputs[rest], _wanted(objective, gains[rest]), penalties)
        scores = inputs[part] @ weights + biases
        curves.append([rank_correlation(column, gains[part]) for column in scores.T])
        if progress:
            progress(done + 1, folds + 1)
    means = np.mean(curves, axis=0)
    best = int(means.argmax())
    weights, biases = _ridge(inputs, _wanted(objective, gains), penalties[best : best + 1])
    if progress:
        progress(folds + 1, folds + 1)
    state = _as_layers(weights[:, 0], float(biases[0]), width)
    state.update(mean=torch.from_numpy(mean), std=torch.from_numpy(std))
    return RouterFit(state, quantiles_of(gains), float(means[best]), 0, float(penalties[best]))


def fit_by_method(
    method: str,
    features: np.ndarray,
    gains: np.ndarray,
    objective: str | Mapping | Objective = 'paper',
    hidden: int | None = None,
    **options,
) -> RouterFit:
    """Fit a router by a method's name.

    Args:
        method (str): 'layers', by `fit_router`; 'linear', by `fit_ridge_router`; or 'rule', by
            `rule_router`, which fits nothing.
        features, gains, objective, hidden: See `fit_router`.
        **options: ``groups``, ``seed`` and ``progress``, see there.

    Raises:
        UsageError: If there is no such method, or as that function.
    """
    if method not in METHODS:
        raise UsageError(f"a method is one of {', '.join(METHODS)}; got '{method}'")
    if method == 'rule':
        return rule_router(features, gains, hidden)
    fit = fit_ridge_router if method == 'linear' else fit_router
    return fit(features, gains, objective, hidden, **options)


def rule_router(features: np.ndarray, gains: np.ndarray, hidden: int | None = None) -> RouterFit:
    """A router that is one of its features, the last, standardized: nothing is fitted.

    Of a router that sees detections, that is the sum of p (1 - p) of exit 0's detections, each by
    the weight of its class.

    Args:
        features, gains (np.ndarray): As of `fit_router`; gains are for the quantiles alone.
        hidden (int, optional): Width between the layers, 2 or more. Defaults to d // 4, but 2.
    """
    features, gains = _checked(features, gains)
    width = hidden or max(2, features.shape[1] // 4)
    if width < 2:
        raise UsageError('a linear router takes two hidden channels or more: a smaller reduction')
    mean, std = _moments(features)
    weights = np.zeros(features.shape[1])
    weights[-1] = 1
    state = _as_layers(weights, 0.0, width)
    state.update(mean=torch.from_numpy(mean), std=torch.from_numpy(std))
    return RouterFit(state, quantiles_of(gains), rank_correlation(features[:, -1], gains), 0, 0.0)


def _wanted(objective: Objective, gains: np.ndarray) -> np.ndarray:
    """The logits that an objective asks for, (n,)."""
    quantiles, gains = quantiles_of(gains), torch.from_numpy(gains).float()
    if objective.fit == 'rank':
        # The logit of a rank is steep at the ends; this has its slope in the middle.
        return 4 * (ranks_of(gains, quantiles).double().numpy() - 0.5)
    return wanted_logits(objective, gains, quantiles).double().numpy()


def _ridge(
    inputs: np.ndarray, wanted: np.ndarray, penalties: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, (d, penalties), and biases, (penalties,), by one singular value decomposition."""
    center, level = inputs.mean(axis=0), wanted.mean()
    left, values, right = np.linalg.svd(inputs - center, full_matrices=False)
    shrunk = values[:, None] / (values[:, None] ** 2 + np.asarray(penalties))
    weights = right.T @ (shrunk * (left.T @ (wanted - level))[:, None])
    return weights, level - center @ weights


def _as_layers(weights: np.ndarray, bias: float, width: int) -> dict[str, Tensor]:
    """A linear function as a router's layers."""
    row = torch.from_numpy(weights).float()
    state = {
        'fc1.weight': torch.zeros(width, len(row)),
        'fc1.bias': torch.zeros(width),
        'fc2.weight': torch.zeros(1, width),
        'fc2.bias': torch.zeros(1),
    }
    for channel, sign in enumerate((1, -1)):
        state['fc1.weight'][channel] = sign * row
        state['fc1.bias'][channel] = sign * bias
        state['fc2.weight'][0, channel] = sign
    return state


def _checked(features: np.ndarray, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features, gains = np.asarray(features, np.float32), np.asarray(gains, np.float64)
    if features.ndim != 2 or gains.shape != (len(features),):
        raise UsageError(
            f'features must be (n, d) and gains (n,); got {features.shape} and {gains.shape}'
        )
    if not (np.isfinite(features).all() and np.isfinite(gains).all()):
        raise UsageError('features and gains must be finite')
    return features, gains


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
