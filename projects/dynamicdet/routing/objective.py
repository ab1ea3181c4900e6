"""What the router is trained on: an image's gain, and how the difficulty is fit to it.

Letters: ``K`` exits. ``g``: gain of an image, what the last exit brings over the first, without
gradient. ``q``: the 101 quantiles (0%, 1%, ... 100%) of the gains over the training set. ``z``: the
router's logit; ``phi = sigmoid(z)``: difficulty, in (0, 1).

An objective is a row of `GAINS` with a row of `FITS`; `OBJECTIVES` has names for those that matter.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..experimental import warn_if_experimental

#: A gain of more than the 99% quantile counts as that, and one of less than the 1% quantile as
#: that, where gains are regressed: a squared error would otherwise be about a few images.
_TAIL = 1


class Gain(NamedTuple):
    """What an image gains by the last exit.

    ``of``: function of one value per exit, (K, N), and of the objects' numbers, (N,). ``values``:
    what the values are, 'losses' (the detectors' own), 'ap' (the image's own COCO AP, percent) or
    'reward' (of a set).
    ``said``: for logs.
    """

    of: Callable
    values: str
    said: str


_LESS = 'the loss at the first exit less that at the last'
#: Name -> gain, (N,). Only differences between the first and the last exit count, however many are
#: between.
#:
#: * ``loss``: ``L1 - L2``, the paper's. mmdet's heads divide an image's loss by its positives or by
#:   a fixed number of samples, so an image with one object counts as much as one with ten.
#: * ``loss_sum``: that times the number of objects, which turns the average back into a sum over
#:   objects, as AP counts them. An image without objects has nothing to gain.
#: * ``ap``: difference of the per-image COCO AP. Costs a prediction by each exit; many images gain
#:   0.
#: * ``reward``: `rewards.marginal_rewards`, from a record alone. It counts classes as AP does.
GAINS = {
    'loss': Gain(lambda losses, objects: losses[0] - losses[-1], 'losses', _LESS),
    'loss_sum': Gain(
        lambda losses, objects: (losses[0] - losses[-1]) * objects,
        'losses',
        f'{_LESS}, times its objects',
    ),
    'ap': Gain(
        lambda aps, objects: aps[-1] - aps[0],
        'ap',
        'the AP at the last exit less that at the first, per image',
    ),
    'reward': Gain(
        lambda rewards, objects: rewards,
        'reward',
        "what the last exit's detections of an image add to the AP of a set",
    ),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the router is trained on. Build one by `build_objective`.

    Args:
        gain (str): A key of `GAINS`.
        fit (str): A key of `FITS`.
        share (float): The hard share, in [0, 1], at which ``linear`` and ``regression`` put a
            difficulty of 0.5: their offset is the (1 - share) quantile of the gains. Defaults to
            0.5, the paper's median.
        offset (float, optional): The offset itself, in units of the gain: what an image must gain
            to be worth the last exit, chosen by hand. Defaults to None: by ``share``.
        error (str): Of ``rank``: 'bce' or 'squared'. Defaults to 'bce'.
        weighted (bool): Of ``pairwise``: whether a pair counts by the difference of its gains.
            Defaults to True.
        by_class (bool): Whether an object counts by how rare its class is, as in AP, which is a
            mean over classes; see `class_weights`. Defaults to False: all objects alike.
    """

    gain: str = 'loss'
    fit: str = 'linear'
    share: float = 0.5
    offset: float | None = None
    error: str = 'bce'
    weighted: bool = True
    by_class: bool = False

    @property
    def counts_gains_as(self) -> str:
        """What gains are, for logs and checkpoints: a router resumes with gains of one kind."""
        return f'{self.gain} by class' if self.by_class else self.gain

    def gains(self, values: Tensor, objects: Sequence[int]) -> Tensor:
        """Gains, (N,), from ``values``, (K, N), of the kind that the gain asks for, and (N,)
        objects; not weighted by class."""
        return GAINS[self.gain].of(values, values.new_tensor(objects))

    def loss(self, logits: Tensor, gains: Tensor, quantiles: Tensor) -> Tensor:
        """What is minimized, averaged over images.

        Args:
            logits (Tensor): ``z``, (N,), float32, with gradient.
            gains (Tensor): ``g``, (N,).
            quantiles (Tensor): ``q``, (101,), of the training set.

        Returns:
            Tensor: Scalar.
        """
        # In float32 also under AMP: logits and gains span more than half precision holds.
        with torch.autocast(logits.device.type, enabled=False):
            return FITS[self.fit](self, logits.float(), gains.detach().float(), quantiles.float())


#: Name -> settings of `Objective`. In a config ``objective='rank'``, or with numbers
#: ``objective=dict(type='rank', gain='ap')``.
#:
#: * ``paper``: DynamicDet, equation 12, its offset the median.
#: * ``no_offset``, ``cost_weight``: the paper's two naive ones. The second takes ``offset``, its
#: lambda. * ``loss_sum``: the paper's, on gains summed over objects.
#: * ``rank``, ``pairwise``: only the order of gains counts; ``ap``: the order of gains in AP.
#: * ``gain``: the expected gain per unit of compute.
OBJECTIVES: dict[str, dict] = {
    'paper': dict(gain='loss', fit='linear'),
    'no_offset': dict(gain='loss', fit='linear', offset=0.0),
    'cost_weight': dict(gain='loss', fit='linear'),
    'loss_sum': dict(gain='loss_sum', fit='linear'),
    'rank': dict(gain='loss_sum', fit='rank'),
    'pairwise': dict(gain='loss_sum', fit='pairwise'),
    'ap': dict(gain='ap', fit='rank'),
    'gain': dict(gain='loss_sum', fit='regression'),
}


def build_objective(config: str | Mapping | Objective) -> Objective:
    """An objective from a name, or from ``dict(type=name, ...)`` with settings of `Objective`.

    Raises:
        UsageError: If a name or setting is unknown, out of range, or missing (``cost_weight``'s
            offset).
    """
    if isinstance(config, Objective):
        return config
    if not isinstance(config, (str, Mapping)):
        raise UsageError(f'an objective is a name or dict(type=name, ...); got {config}')
    settings = dict(type=config) if isinstance(config, str) else dict(config)
    name = settings.pop('type', None)
    _one_of('objective', name, OBJECTIVES)
    warn_if_experimental('objective', name)
    known = [field.name for field in dataclasses.fields(Objective)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise UsageError(
            f"objective '{name}' has no setting {unknown[0]}; it takes {', '.join(known)}"
        )
    if name == 'cost_weight' and settings.get('offset') is None:
        raise UsageError(
            "objective 'cost_weight' needs its lambda: objective=dict(type='cost_weight', "
            'offset=...), in units of the loss'
        )
    return check_objective(Objective(**{**OBJECTIVES[name], **settings}))


def check_objective(objective: Objective) -> Objective:
    """The objective itself, or a `UsageError` if a setting is unknown or out of range."""
    _one_of('gain', objective.gain, GAINS)
    _one_of('fit', objective.fit, FITS)
    _one_of('error', objective.error, ('bce', 'squared'))
    if not _is_number(objective.share) or not 0 <= objective.share <= 1:
        raise UsageError(f"an objective's share must be in [0, 1], got {objective.share}")
    if not isinstance(objective.by_class, bool):
        raise UsageError(f"an objective's by_class is True or False, got {objective.by_class}")
    if objective.by_class and objective.gain == 'reward':
        raise UsageError("gain 'reward' counts classes as AP does: leave by_class away")
    if objective.offset is not None and not _is_number(objective.offset):
        raise UsageError(f"an objective's offset must be a number, got {objective.offset}")
    return objective


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _one_of(what: str, value: object, known) -> None:
    if value not in tuple(known):
        raise UsageError(f"{what} must be one of {', '.join(known)}; got '{value}'")


# The distribution of gains over the training set.


def quantiles_of(gains: Sequence[float]) -> Tensor:
    """``q``, (101,), float32, of (n,) gains, n > 0; the one in the middle is their median,
    delta."""
    return torch.from_numpy(
        np.quantile(np.asarray(gains, np.float64), np.linspace(0, 1, 101))
    ).float()


def offset_of(objective: Objective, quantiles: Tensor) -> Tensor:
    """What a gain must exceed for a difficulty above 0.5, a scalar in units of the gain."""
    if objective.offset is not None:
        return quantiles.new_tensor(objective.offset)
    return torch.quantile(quantiles, 1 - objective.share)


def ranks_of(gains: Tensor, quantiles: Tensor) -> Tensor:
    """Where gains, (N,), stand among the training set's, in [0, 1]: uniform over the training set.

    Gains that equal several quantiles, as 0 does where many images gain nothing, stand in their
    middle.
    """
    gains, last = gains.contiguous(), len(quantiles) - 1
    below = torch.searchsorted(quantiles, gains)
    up_to = torch.searchsorted(quantiles, gains, right=True)
    # Between two quantiles, or beyond the ends.
    low = (below - 1).clamp(0, last)
    high = below.clamp(0, last)
    width = (quantiles[high] - quantiles[low]).clamp(min=torch.finfo(gains.dtype).tiny)
    between = low + ((gains - quantiles[low]) / width).clamp(0, 1) * (high - low)
    return torch.where(up_to > below, (below + up_to - 1) / 2, between) / last


# The fits. Each takes (objective, logits (N,), gains (N,), quantiles (101,)) and gives a scalar.


def _linear(objective: Objective, logits: Tensor, gains: Tensor, quantiles: Tensor) -> Tensor:
    """``(1/2 - phi) * (g - offset)``.

    DynamicDet's equation 12, ``(1 - phi) * (L1 - delta/2) + phi * (L2 + delta/2)``, less ``(L1 +
    L2) / 2``, which has no gradient. Its gradient in phi is ``L2 - L1 + delta``: with the median as
    delta, half of the training images are pushed each way.
    """
    return ((0.5 - logits.sigmoid()) * (gains - offset_of(objective, quantiles))).mean()


def _rank(objective: Objective, logits: Tensor, gains: Tensor, quantiles: Tensor) -> Tensor:
    """Cross entropy of phi, or its squared error, against the gain's rank in [0, 1].

    Least for ``phi = E[rank | image]``, for either error.
    """
    ranks = ranks_of(gains, quantiles)
    if objective.error == 'squared':
        return F.mse_loss(logits.sigmoid(), ranks)
    return F.binary_cross_entropy_with_logits(logits, ranks)


def _pairwise(objective: Objective, logits: Tensor, gains: Tensor, quantiles: Tensor) -> Tensor:
    """``softplus(-(z_i - z_j))`` over the batch's pairs with ``g_i > g_j``: RankNet's (Burges et
    al., 2005).

    Weighted, a pair counts by ``g_i - g_j``, divided by the mean over the pairs. The level of the
    logits is left free; a batch without two different gains gives 0.
    """
    ahead = gains[:, None] - gains[None, :]
    pairs = ahead > 0
    if not pairs.any():
        return logits.sum() * 0
    losses = F.softplus(logits[None, :] - logits[:, None])[pairs]
    if not objective.weighted:
        return losses.mean()
    weights = ahead[pairs]
    return (losses * weights).sum() / weights.sum()


def _regression(objective: Objective, logits: Tensor, gains: Tensor, quantiles: Tensor) -> Tensor:
    """``(z - (g - offset) / s)^2``, with g clipped to its 1% and 99% quantiles, s the spread
    between them.

    Least for ``z = (E[g | image] - offset) / s``: the expected gain, above the price of compute
    that the offset is. Exits cost the same extra C for every image of one size, so the gain per
    GFLOP, ``g / C``, gives the same z: C cancels between it and its own offset and spread. Hard at
    difficulty 0.5 are images whose expected gain per GFLOP is above the (1 - share) quantile of
    gains per GFLOP.
    """
    return F.mse_loss(logits, wanted_logits(objective, gains, quantiles))


def wanted_logits(objective: Objective, gains: Tensor, quantiles: Tensor) -> Tensor:
    """``(g - offset) / s``, (N,), of gains, (N,): what 'regression' regresses."""
    inner = quantiles[_TAIL : len(quantiles) - _TAIL]
    spread = inner.std(correction=0).clamp(min=torch.finfo(gains.dtype).tiny)
    return (gains.clamp(inner[0], inner[-1]) - offset_of(objective, quantiles)) / spread


#: Name -> how z, and with it phi, is fit to gains.
FITS: dict[str, Callable[[Objective, Tensor, Tensor, Tensor], Tensor]] = {
    'linear': _linear,
    'rank': _rank,
    'pairwise': _pairwise,
    'regression': _regression,
}


# Per-image AP of a batch.


def image_aps(
    detections: Sequence[Sequence[Mapping]], truths: Sequence[Sequence[Mapping]]
) -> np.ndarray:
    """COCO AP of each image by itself under each exit.

    Args:
        detections (Sequence): By exit and image: dictionaries of arrays ``bboxes`` (m, 4) as x1,
            y1, x2, y2, ``scores`` (m,) and ``labels`` (m,).
        truths (Sequence): By exit and image, in the frames of the detections: ``bboxes`` (m, 4),
            ``labels`` (m,) and ``crowds`` (m,), bools.

    Returns:
        np.ndarray: (K, N), percent; 0 where an image has no objects but crowds.
    """
    return np.stack(
        [
            np.zeros(len(exit_truths)) if mixtures is None else mixtures.image_ap()[0]
            for exit_truths, mixtures in zip(truths, map(_mixtures, detections, truths))
        ]
    )


def class_aps(
    detections: Sequence[Sequence[Mapping]], truths: Sequence[Sequence[Mapping]], classes: int
) -> np.ndarray:
    """COCO AP of each class of each image by itself under each exit, summed over its objects.

    Args:
        detections, truths (Sequence): As of `image_aps`.
        classes (int): C; labels are below.

    Returns:
        np.ndarray: (K, N, C), percent times objects; 0 where an image has none of a class but
            crowds.
    """
    sums = np.zeros((len(truths), len(truths[0]), classes))
    for own_sums, exit_truths, mixtures in zip(sums, truths, map(_mixtures, detections, truths)):
        if mixtures is not None:
            labels = sorted({int(label) for truth in exit_truths for label in truth['labels']})
            own_sums[:, labels] = mixtures.category_ap()[0] * mixtures.objects
    return sums


def _mixtures(detections: Sequence[Mapping], truths: Sequence[Mapping]):
    """The evaluation of one exit's images; None where there are no objects but crowds."""
    from .evaluation import Mixtures
    from .record import RoutingRecord

    if not any((~np.asarray(truth['crowds'], bool)).any() for truth in truths):
        return None
    joined = joined_detections(detections)
    count = len(joined)
    # As a record of two equal exits: there are no fewer.
    record = RoutingRecord(
        np.arange(count), [''] * count, np.zeros(count), [joined] * 2, [0.0] * 2, [0.0] * 2
    )
    return Mixtures(record, as_coco(truths))


def joined_detections(detections: Sequence[Mapping]):
    """What an exit finds in images, as a record has it."""
    from .record import Detections

    return Detections.join(
        [(_xywh(image['bboxes']), image['scores'], image['labels']) for image in detections]
    )


def as_coco(truths: Sequence[Mapping]):
    """A COCO object of what the images hold."""
    from pycocotools.coco import COCO

    annotations = [
        dict(
            image_id=index,
            bbox=box,
            category_id=int(label),
            area=box[2] * box[3],
            iscrowd=int(crowd),
        )
        for index, image_truths in enumerate(truths)
        for box, label, crowd in zip(
            _xywh(image_truths['bboxes']), image_truths['labels'], image_truths['crowds']
        )
    ]
    labels = {annotation['category_id'] for annotation in annotations}
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=index) for index in range(len(truths))],
        categories=[dict(id=label, name=str(label)) for label in sorted(labels)],
        # From 1 on: pycocotools takes an id of 0 for no match.
        annotations=[dict(annotation, id=index) for index, annotation in enumerate(annotations, 1)],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _xywh(boxes) -> list:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist()
