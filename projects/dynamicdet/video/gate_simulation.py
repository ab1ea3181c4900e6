"""What a gate does on a recorded video run, and what that costs and finds; without the detector.

The very gate is asked that the detector would ask, about the evidence that it would be shown, so a
simulation takes the same exits as a run. One thing it cannot know: with feature propagation, heads
that a run skips carry older features than the record's, where every head ran at every frame.

Letters: n frames in the record's order, E exits. ``difficulties``: (E - 1, n), of exits 0 to E - 2.
``thresholds``: (E,), of exit -1 (before the first; reuse the last detections when ``change <=
threshold``), then of exits 0 to E - 2. ``nothing``: (n,), whether the gate sees at the early map
that a frame shows nothing. ``source``: (n,), the frame whose detections are shown at a frame:
itself, or one before, or -1: none.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmengine.structures import InstanceData
from pycocotools.coco import COCO

from ..errors import UsageError
from ..routing.evaluation import Mixtures
from ..routing.record import RoutingRecord
from .gate_inputs import Evidence
from .gates import Gate
from .streams import early_change

#: Frames that a gate is shown at a time.
_BATCH = 256
#: Seconds that a gate takes: to see that there is nothing, and to decide at an exit.
Seconds = tuple[float, float]


class GateRun(NamedTuple):
    """What a gate did.

    Attributes:
        exits (np.ndarray): (n,), -1 where the last detections were reused, or nothing is shown.
        source (np.ndarray): (n,), see the top of this file.
        gflops (np.ndarray): (n,), of each frame; heads that were looked at are paid.
        latencies (np.ndarray): (n,), seconds, likewise.
    """

    exits: np.ndarray
    source: np.ndarray
    gflops: np.ndarray
    latencies: np.ndarray


# What is shown to a gate.


def evidence_by_exit(record: Mapping) -> list[Evidence]:
    """What a gate is shown of all frames at exits 0 to E - 2; boxes are in the frame of the
    image."""
    images, exits = record['images'], len(record['gflops'])
    pooled = [
        torch.from_numpy(np.stack([image['pooled'][head] for image in images]))
        for head in range(exits - 1)
    ]
    instances = [
        [_instances(image['detections'][exit]) for image in images] for exit in range(exits - 1)
    ]
    return [
        Evidence(
            exit, instances[exit], instances[exit - 1] if exit else None, pooled[: exit + 1], None
        )
        for exit in range(exits - 1)
    ]


def _instances(detections: Sequence[Mapping]) -> InstanceData:
    boxes = torch.tensor(
        [detection['bbox'] for detection in detections], dtype=torch.float32
    ).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return InstanceData(
        bboxes=boxes,
        scores=torch.tensor([detection['score'] for detection in detections], dtype=torch.float32),
        labels=torch.tensor(
            [detection['category_id'] for detection in detections], dtype=torch.long
        ),
    )


@torch.no_grad()
def gate_difficulties(gate: Gate, shown: Sequence[Evidence]) -> np.ndarray:
    """A gate's difficulties at exits 0 to E - 2, (E - 1, n), float32.

    Args:
        gate (Gate): On the CPU.
        shown (Sequence[Evidence]): See `evidence_by_exit`.

    Raises:
        UsageError: If they are not all in [0, 1].
    """
    gate.eval()
    difficulties = np.stack([gate.difficulty(evidence).float().numpy() for evidence in shown])
    # Not `found < 0 or ...`, which lets NaN pass.
    if not ((difficulties >= 0) & (difficulties <= 1)).all():
        raise UsageError(
            f'some difficulties of the {type(gate).__name__} are not in [0, 1]: was it trained?'
        )
    return difficulties


# Who leaves where.


def take_exits(difficulties: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The exit of each frame that goes on, (n,), 0 to E - 1: the first whose difficulty is at most
    its threshold.

    Args:
        difficulties (np.ndarray): (E - 1, n).
        thresholds (Sequence[float]): (E,); the first, for exit -1, is not looked at.
    """
    leaves = difficulties <= np.asarray(thresholds, np.float32)[1:, None]
    return np.where(leaves.any(axis=0), leaves.argmax(axis=0), len(difficulties))


def frames_by_video(record: Mapping) -> list[list[int]]:
    """The frames of each video, in their order: numbers of images of the record."""
    by_video: dict[int, list] = {}
    for index, image in enumerate(record['images']):
        by_video.setdefault(image['video'], []).append((image['frame'], index))
    return [[index for _, index in sorted(frames)] for frames in by_video.values()]


def nothing_seen(record: Mapping, gate: Gate) -> np.ndarray:
    """Where a gate that decides early sees that a frame shows nothing, (n,), bool."""
    images = record['images']
    if getattr(gate, 'nothing', None) is None:
        return np.zeros(len(images), bool)
    with torch.no_grad():
        return np.concatenate(
            [
                gate.sees_nothing(
                    torch.from_numpy(
                        np.stack([image['early'] for image in images[start : start + _BATCH]])
                    )
                ).numpy()
                for start in range(0, len(images), _BATCH)
            ]
        )


def detection_sources(
    record: Mapping, threshold: float, nothing: np.ndarray | None = None
) -> np.ndarray:
    """Whose detections are shown where frames that changed by at most a threshold reuse the last
    ones, and others may show nothing: ``source``.

    Each frame is compared with the last one that was computed, or seen to show nothing, however
    long ago. A video's first frame has change 1, so at threshold 1 nothing is ever computed.
    """
    source = np.arange(len(record['images']))
    if threshold < 0:
        return source
    threshold = np.float32(threshold)
    nothing = np.zeros(len(source), bool) if nothing is None else nothing
    for frames in frames_by_video(record):
        last = -1
        for index in frames:
            if _change(record, index, last) <= threshold:
                source[index] = source[last] if last >= 0 else -1
            else:
                last = index
                source[index] = -1 if nothing[index] else index
    return source


def frame_changes(record: Mapping, lag: int = 1) -> np.ndarray:
    """Change of each frame that has one so long before it in its video against that one,
    float32."""
    return np.array(
        [
            _change(record, frames[place], frames[place - lag])
            for frames in frames_by_video(record)
            for place in range(lag, len(frames))
        ],
        np.float32,
    )


def _change(record: Mapping, index: int, last: int) -> np.float32:
    if last < 0:
        return np.float32(1)
    current, other = (torch.from_numpy(record['images'][at]['early'])[None] for at in (index, last))
    return np.float32(early_change(current, other).item())


def exit_costs(record: Mapping, kind: str, looks: bool) -> np.ndarray:
    """What a frame costs that leaves at exit -1, 0, ..., E - 1: (E + 1,).

    Args:
        record (Mapping): Of a video run.
        kind (str): 'gflops' or 'latencies'.
        looks (bool): Whether all heads on the way are run.
    """
    costs = record['costs'][kind]
    return np.array([costs['early'], *(costs['looked'] if looks else record[kind])])


def simulate_gate(
    record: Mapping,
    gate: Gate,
    difficulties: np.ndarray,
    thresholds: Sequence[float],
    seconds: Seconds = (0.0, 0.0),
    source: np.ndarray | None = None,
) -> GateRun:
    """Let a gate run through a record.

    Args:
        record (Mapping): Of a video run.
        gate (Gate): Says whether it decides early and looks at detections.
        difficulties (np.ndarray): Its own, see `gate_difficulties`.
        thresholds (Sequence[float]): (E,); the first is not looked at unless the gate decides
            early.
        seconds (tuple[float, float]): That the gate takes on each frame, and for each decision at
            an exit. Defaults to none.
        source (np.ndarray, optional): Of a gate that decides early, see `detection_sources`, which
            makes it otherwise.
    """
    if not gate.early:
        source = np.arange(difficulties.shape[1])
    elif source is None:
        source = detection_sources(record, thresholds[0], nothing_seen(record, gate))
    taken = take_exits(difficulties, thresholds)
    exits = np.where(source == np.arange(len(source)), taken, -1)
    decisions = np.where(exits < 0, 0, np.minimum(exits + 1, len(difficulties)))
    # As the detector, which asks at no exit where no threshold lets a frame leave, unless heads are
    # run anyway.
    decisions *= gate.looks_at_detections or max(thresholds[1:]) >= 0
    return GateRun(
        exits,
        source,
        exit_costs(record, 'gflops', gate.looks_at_detections)[exits + 1],
        exit_costs(record, 'latencies', gate.looks_at_detections)[exits + 1]
        + seconds[0]
        + seconds[1] * decisions,
    )


# What that finds.


class Replays:
    """AP of what is shown, frame by frame, where frames may show what was found at others.

    The matching is done once for each ``source``; the exits are then free. The last few are kept.

    Args:
        record (Mapping): Of a video run.
        coco (COCO): Its ground truth.
    """

    _KEPT = 24

    def __init__(self, record: Mapping, coco: COCO) -> None:
        self._record, self._coco = record, coco
        self._exits = len(record['gflops'])
        self._known: dict[bytes, Mixtures] = {}

    def mixtures(self, source: np.ndarray) -> Mixtures:
        """All exits of the frames that are shown; a last one, number E, finds nothing."""
        key = np.asarray(source, np.int64).tobytes()
        if key not in self._known:
            while len(self._known) >= self._KEPT:
                self._known.pop(next(iter(self._known)))
            images, nothing = self._record['images'], [[]] * self._exits
            shown = [
                dict(
                    id=image['id'],
                    file=image['file'],
                    difficulty=0.0,
                    detections=[*(images[at]['detections'] if at >= 0 else nothing), []],
                )
                for image, at in zip(images, source)
            ]
            self._known[key] = Mixtures(RoutingRecord.from_images(shown), self._coco)
        return self._known[key]

    def ap(self, run: GateRun, weights: Sequence[int] | None = None) -> float:
        """COCO's AP of a run, in percent; ``weights`` as of `Mixtures.ap`."""
        return self.mixtures(run.source).ap(shown_exits(run), weights)


def shown_exits(run: GateRun) -> np.ndarray:
    """The exit whose detections are shown, (n,): of frames that reuse, that of their source."""
    return np.where(run.source >= 0, run.exits[run.source], 0)


def curve_point(run: GateRun, ap: float, exits: int) -> dict:
    """A point of a curve: ``ap``, mean ``gflops`` and ``latency``, ``shares`` of exits -1, 0, ...,
    E - 1."""
    counts = np.bincount(run.exits + 1, minlength=exits + 1)
    return dict(
        ap=ap,
        gflops=float(run.gflops.mean()),
        latency=float(run.latencies.mean()),
        shares=(counts / len(run.exits)).tolist(),
    )
