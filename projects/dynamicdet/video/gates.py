"""When to exit: from what an early-exit detector has seen so far to a difficulty, by rules that
need no training.

A gate is asked at each exit but the last. Letters: N images, E exits, D detections of one image.
Learned gates are in `learned_gates`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps

from ..errors import UsageError
from ..transfers import to_host
from .gate_inputs import Evidence
from .presence import Presence

#: Detections below this score are no evidence: exits report hundreds of them to fill the curve of
#: recall.
MIN_SCORE = 0.05
#: A gate looks at no more than so many detections of an image, the surest.
MOST = 100


class Gate(BaseModule):
    """From evidence to difficulty. An image leaves at an exit when ``difficulty <= threshold``.

    Attributes:
        looks_at_detections (bool): Whether each head that is passed must be evaluated; its cost is
            then paid.
        early (bool): Whether the gate also decides before the first exit, by change. The image then
            leaves with the last detections of its stream, or without any, see `sees_nothing`.
    """

    looks_at_detections = False
    early = False

    def difficulty(self, evidence: Evidence) -> Tensor:
        """How much it is worth to go on, (N,), float32, in [0, 1], large is hard; see `Evidence`.
        On the CPU where that is where it is known: the detector decides there."""
        raise NotImplementedError

    def sees_nothing(self, early: Tensor) -> Tensor:
        """Of a gate that decides early: which frames show no object, (N,), bool; from summaries of
        their early maps, (N, d). They leave before the first exit, without detections (*no
        detection*)."""
        return early.new_zeros(len(early), dtype=torch.bool)


def _images(evidence: Evidence) -> int:
    """N."""
    for seen in (evidence.change, *evidence.pooled[:1], evidence.detections):
        if seen is not None:
            return len(seen)
    raise ValueError('there is no evidence of any image')


def _require_detections(evidence: Evidence) -> list[InstanceData]:
    if evidence.detections is None:
        raise ValueError(f'the gate looks at detections, and exit {evidence.exit} came without')
    return evidence.detections


@MODELS.register_module()
class FixedExit(Gate):
    """Always leave at one exit: difficulty 1 before it, 0 from it on.

    That is for thresholds from 0 up to, not including, 1: at 1 every image leaves at once, below 0
    none does.

    Args:
        exit (int): 0 to E - 1.
        looks_at_detections (bool): Whether the heads on the way are evaluated, to measure what they
            cost. Defaults to False.
    """

    def __init__(self, exit: int, looks_at_detections: bool = False) -> None:
        super().__init__()
        if isinstance(exit, bool) or not isinstance(exit, int) or exit < 0:
            raise UsageError(f'a fixed exit is a whole number from 0 on, got {exit}')
        self.exit = exit
        self.looks_at_detections = looks_at_detections

    def difficulty(self, evidence: Evidence) -> Tensor:
        """1 before the exit, 0 from it on, (N,)."""
        return torch.full((_images(evidence),), float(evidence.exit < self.exit))


class GateDetections(NamedTuple):
    """Detections of an image, as gates look at them: the surest first."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def most_confident(
    detections: Sequence[InstanceData], min_score: float = MIN_SCORE
) -> list[GateDetections]:
    """Of each image the detections from a score on, at most `MOST`: boxes (D, 4), scores (D,) and
    labels (D,), on the CPU."""
    return [
        _surest(*(array.numpy() for array in instances), min_score)
        for instances in to_host(detections)
    ]


def _surest(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, min_score: float
) -> GateDetections:
    order = np.argsort(-scores, kind='stable')[:MOST]
    order = order[scores[order] >= min_score]
    return GateDetections(boxes[order], scores[order], labels[order])


def coin_entropy(scores: np.ndarray) -> np.ndarray:
    """Entropy of each score p as a coin's, ``-p log2 p - (1 - p) log2 (1 - p)``, bits, in [0,
    1]."""
    p = np.clip(np.asarray(scores, np.float64), 1e-12, 1 - 1e-12)
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


#: What a `ScoreGate` makes of each score.
DOUBTS = dict(entropy=coin_entropy, confidence=lambda scores: 1 - np.asarray(scores, np.float64))


@MODELS.register_module()
class ScoreGate(Gate):
    """How unsure the exit is of what it found.

    The doubt about a detection of score p is its entropy as a coin's, in bits, or ``1 - p``. The
    image's difficulty is the mean d of the doubts, or, by their sum s, ``s / (1 + s)``: many
    doubtful objects are then harder than one. (Classifiers exit early by the entropy of their one
    output: BranchyNet, arXiv 1709.01686. A detector has many outputs or none, hence the mean or
    sum.)

    Args:
        kind (str): 'entropy' or 'confidence'. Defaults to 'entropy'.
        over (str): 'mean' or 'sum'. Defaults to 'mean'.
        min_score (float): Detections below it count for nothing. Defaults to 0.05.
        empty (float): Difficulty of an image in which nothing is found, in [0, 1]. An early exit
            that finds nothing may be right or blind. Defaults to 1: go on and look.
    """

    looks_at_detections = True

    def __init__(
        self,
        kind: str = 'entropy',
        over: str = 'mean',
        min_score: float = MIN_SCORE,
        empty: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in DOUBTS or over not in ('mean', 'sum'):
            raise UsageError(
                f"a ScoreGate's kind is one of {', '.join(DOUBTS)} and it goes over mean or sum; "
                f"got '{kind}' and '{over}'"
            )
        _require_share('min_score', min_score)
        _require_share('empty', empty)
        self.kind, self.over, self.min_score, self.empty = kind, over, min_score, empty

    def difficulty(self, evidence: Evidence) -> Tensor:
        """How doubtful the exit's detections are, (N,), in [0, 1]; ``empty`` without any."""
        detections = most_confident(_require_detections(evidence), self.min_score)
        return torch.tensor(
            [self._of_image(image_detections.scores) for image_detections in detections]
        )

    def _of_image(self, scores: np.ndarray) -> float:
        if not len(scores):
            return self.empty
        doubts = DOUBTS[self.kind](scores)
        return float(doubts.mean()) if self.over == 'mean' else float(squash(doubts.sum()))


def squash(value: float) -> float:
    """``s / (1 + s)``: from [0, inf) to [0, 1), in the same order."""
    return value / (1 + value)


@MODELS.register_module()
class AgreementGate(Gate):
    """How much two successive exits disagree: ``1 - agreement``.

    Detections of both are paired greedily: of all pairs of one class whose boxes overlap by more
        than
    ``iou``, the one with the largest IoU first, each detection once. Then

        agreement = 2 * sum over pairs (a, b) of IoU(a, b) * min(p_a, p_b) / (sum of all p of both
        exits)

    with scores p: Dice's coefficient of two fuzzy sets. It is 1 where both found the same with the
        same
    scores, 0 where nothing pairs up; what only one of them is sure of counts by its score. Two
    exits that both found nothing agree. The first exit has none before it: difficulty 1.

    Args:
        iou (float): What pairs must exceed, in [0, 1). Defaults to 0.3.
        min_score (float): Detections below it count for nothing. Defaults to 0.05.
    """

    looks_at_detections = True

    def __init__(self, iou: float = 0.3, min_score: float = MIN_SCORE) -> None:
        super().__init__()
        if not 0 <= iou < 1:
            raise UsageError(f"an AgreementGate's iou is in [0, 1), got {iou}")
        _require_share('min_score', min_score)
        self.iou, self.min_score = iou, min_score

    def difficulty(self, evidence: Evidence) -> Tensor:
        """One minus the agreement with the exit before, (N,); 1 at the first exit."""
        detections = _require_detections(evidence)
        if evidence.earlier is None:
            return torch.ones(len(detections))
        confident = most_confident([*detections, *evidence.earlier], self.min_score)
        return torch.tensor(
            [
                1 - detection_agreement(now, before, self.iou)
                for now, before in zip(confident, confident[len(detections) :])
            ]
        )


def detection_agreement(first: GateDetections, other: GateDetections, iou: float = 0.3) -> float:
    """Agreement of two sets of detections, in [0, 1]; see `AgreementGate`."""
    total = float(first.scores.sum(dtype=np.float64) + other.scores.sum(dtype=np.float64))
    if total == 0:
        return 1.0
    if not len(first.scores) or not len(other.scores):
        return 0.0
    overlaps = bbox_overlaps(torch.from_numpy(first.boxes), torch.from_numpy(other.boxes)).numpy()
    overlaps = overlaps * (first.labels[:, None] == other.labels[None])
    rows, columns = np.nonzero(overlaps > iou)
    order = np.argsort(-overlaps[rows, columns], kind='stable')
    shared, used, taken = 0.0, set(), set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        if row not in used and column not in taken:
            used.add(row)
            taken.add(column)
            shared += float(overlaps[row, column]) * min(
                float(first.scores[row]), float(other.scores[column])
            )
    return min(1.0, 2 * shared / total)


@MODELS.register_module()
class TemporalGate(Gate):
    """Reuse: where the scene has not changed, a frame shows the previous frame's detections, and no
    exit is run. Before the first exit, difficulty is the change.

    The previous frame is the last one of the stream that was computed, or seen to show nothing. A
    stream's first frame has change 1. Frames that go on are for another gate.

    Where the early map changed, but shows nothing, there is no need to look either (*no
    detection*), if ``nothing`` says so: difficulty is then 0.

    Args:
        gate (dict, optional): Config of the gate for what goes on. Defaults to none: it runs to the
            last exit (difficulty 1).
        nothing (dict, optional): Config of a `Presence`. Defaults to none: a frame that changed is
            looked at.
    """

    early = True

    def __init__(self, gate: dict | None = None, nothing: dict | None = None) -> None:
        super().__init__()
        self.nothing: Presence | None = MODELS.build(nothing) if nothing else None
        self.gate: Gate | None = None
        if gate:
            self.wrap(MODELS.build(gate))

    def wrap(self, gate: Gate) -> None:
        """Leave what goes on to a gate."""
        if gate.early:
            raise UsageError(
                'a TemporalGate wraps a gate that decides at exits, not another TemporalGate'
            )
        self.gate, self.looks_at_detections = gate, gate.looks_at_detections

    def difficulty(self, evidence: Evidence) -> Tensor:
        """Change since the last frame before any exit, then that of the inner gate, (N,)."""
        if evidence.exit < 0:
            if evidence.change is None:
                raise ValueError('a TemporalGate decides by change, and was shown none')
            return evidence.change.float()
        if self.gate is None:
            return torch.ones(_images(evidence))
        return self.gate.difficulty(evidence)

    def sees_nothing(self, early: Tensor) -> Tensor:
        """Which frames show nothing, by the presence classifier, (N,) bool."""
        if self.nothing is None:
            return super().sees_nothing(early)
        return self.nothing(early) <= self.nothing.level


def name_of(gate: Gate | None) -> str:
    """What a gate is, with what it is made of: ``TemporalGate(AgreementGate)``."""
    if gate is None:
        return 'no gate'
    parts = [getattr(gate, name, None) for name in ('gate', 'nothing')]
    names = ', '.join(name_of(part) for part in parts if part is not None)
    return type(gate).__name__ + (f'({names})' if names else '')


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f'{name} of a gate is in [0, 1], got {value}')
