"""Plain detectors beside a router: points, their front, and who has more AP at equal cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pycocotools.coco import COCO

from ..errors import UsageError
from ..routing.bootstrap import confidence_interval
from ..routing.curve import SHARES, RandomRouting, costs_of
from ..routing.evaluation import Mixtures
from ..routing.record import RoutingRecord
from .routing_analysis_estimates import Estimate

#: What may be equal.
_COSTS = ('gflops', 'latency')
#: Costs this near, as a share, are equal: means are rounded.
_ROUNDING = 1e-9


def compare_with_baselines(
    record: RoutingRecord,
    coco: COCO,
    random_routing: RandomRouting,
    choices: Sequence[np.ndarray],
    baselines: Mapping[str, RoutingRecord],
) -> dict[str, list[dict]]:
    """A router and plain detectors on the same pictures and the same resamples.

    The front of plain detectors is made of those that no cheaper one equals, with straight lines
    between; above the dearest it is level, and below the cheapest there is none.

    Args:
        record (RoutingRecord): Of two exits.
        coco (COCO): Its ground truth.
        chance (RandomRouting): Of the record.
        choices (Sequence[np.ndarray]): The router's, at each of `SHARES`; see
            `routing_analysis_curves`.
        baselines (Mapping[str, RoutingRecord]): Name -> record of the same pictures, in the same
            order; its first exit counts.

    Returns:
        dict: ``points``, by GFLOPs: ``name``, ``ap``, ``low``, ``high``, ``gflops``, ``latency``
            (seconds). ``leads``, one per share: ``share``, ``hard_share``, ``ap``, ``gflops``,
            ``latency`` of the router, and ``lead_gflops`` and ``lead_latency``: by how much its AP
            is above the front at equal cost, (value, low, high), or None.

    Raises:
        UsageError: If a baseline is of other pictures.
    """
    for name, baseline in baselines.items():
        if baseline.ids.tolist() != record.ids.tolist():
            raise UsageError(f"the baseline '{name}' is of other pictures than the record")
    plain = list(baselines.values())
    # A record has two exits at the least.
    mixtures = Mixtures(
        replace(
            record,
            detections=[baseline.detections[0] for baseline in [*plain, plain[0]]],
            view=None,
        ),
        coco,
    )
    everyone = [np.full(len(record), index) for index in range(len(plain))]
    # (baselines, 1 + B): of the record, and of each resample.
    aps = np.array([_aps(mixtures, choice, random_routing.weights) for choice in everyone])
    costs = dict(
        gflops=np.array([baseline.gflops[0] for baseline in plain]),
        latency=np.array([baseline.latencies[0] for baseline in plain]),
    )
    ends = [confidence_interval(resampled[1:]) for resampled in aps]
    points = [
        dict(name=name, ap=float(resampled[0]), low=low, high=high)
        | {cost: float(values[index]) for cost, values in costs.items()}
        for index, (name, resampled, (low, high)) in enumerate(zip(baselines, aps, ends))
    ]
    leads = []
    for share, is_hard in zip(SHARES, choices):
        choice, paid = random_routing.choice(is_hard), costs_of(record, is_hard)
        router = np.concatenate(
            [[random_routing.mixtures.ap(choice)], random_routing.resampled(choice)]
        )
        row = dict(share=share, hard_share=float(np.mean(is_hard)), ap=float(router[0]), **paid)
        for cost in _COSTS:
            row[f'lead_{cost}'] = _lead(router, aps, costs[cost], paid[cost])
        leads.append(row)
    return dict(points=sorted(points, key=lambda point: point['gflops']), leads=leads)


def baseline_front(aps: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Which of some detectors have more AP than all cheaper ones, by cost."""
    order, front = sorted(range(len(costs)), key=lambda index: (costs[index], -aps[index])), []
    for index in order:
        if not front or aps[index] > aps[front[-1]]:
            front.append(index)
    return front


def front_shares(costs: Sequence[float], cost: float) -> np.ndarray | None:
    """How much of each detector makes up the front at a cost, (m,), summing to 1; None below all.

    Args:
        costs (Sequence[float]): Rising, (m,).
        cost (float): In the same unit.
    """
    if cost < costs[0] * (1 - _ROUNDING):
        return None
    return np.array([np.interp(cost, costs, row) for row in np.eye(len(costs))])


def _aps(mixtures: Mixtures, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.array([mixtures.ap(choice), *(mixtures.ap(choice, counts) for counts in weights)])


def _lead(router: np.ndarray, aps: np.ndarray, costs: np.ndarray, paid: float) -> Estimate | None:
    """The front is that of the record itself on all resamples, too."""
    kept = baseline_front(aps[:, 0], costs)
    shares = front_shares(costs[kept], paid)
    if shares is None:
        return None
    leads = router - shares @ aps[kept]
    return (float(leads[0]), *confidence_interval(leads[1:]))
