"""The estimates that the diagnosis rests on: values with 95 % intervals, all on the same
resamples."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..routing.bootstrap import bootstrap_weights, confidence_interval
from ..routing.curve import RandomRouting, costs_of, hardest_for_gflops, split_by_share
from ..routing.peers import PEERS, peer_gflops
from ..routing.record import RoutingRecord, require_columns
from ..routing.strata import OBJECTS
from ..routing.thresholds import threshold_for_share

#: Costs this near to each other, as a share of what parts the exits, are equal.
_NEAR = 0.02

#: A value and the ends of its interval, None without.
Estimate = tuple[float, float | None, float | None]
#: Strata of fewer images are not spoken of.
_FEWEST = 20


def ap_difference(
    random_routing: RandomRouting, first: Sequence[int], second: Sequence[int]
) -> Estimate:
    """AP of one choice minus that of another, on paired resamples.

    Args:
        random_routing (RandomRouting): Of the record.
        first (Sequence[int]): Exit of each image, (n,).
        second (Sequence[int]): The same.
    """
    value = random_routing.mixtures.ap(first) - random_routing.mixtures.ap(second)
    return (
        value,
        *confidence_interval(random_routing.resampled(first) - random_routing.resampled(second)),
    )


def exit_estimates(random_routing: RandomRouting) -> list[Estimate]:
    """AP of the cheap and of the dear exit alone."""
    choices = _ends(random_routing)
    return [
        (random_routing.mixtures.ap(choice), *confidence_interval(random_routing.resampled(choice)))
        for choice in choices
    ]


def exit_gap(random_routing: RandomRouting) -> Estimate:
    """By how much the dear exit is better."""
    easy, hard = _ends(random_routing)
    return ap_difference(random_routing, hard, easy)


def strata_gaps(record: RoutingRecord, random_routing: RandomRouting) -> list[dict]:
    """The same on images with few and with many objects: ``name``, ``gap``."""
    if record.objects is None:
        return []
    objects = record.objects
    easy, hard = _ends(random_routing)
    gaps = []
    for name, (fewest, most) in OBJECTS.items():
        inside = ((objects >= max(1, fewest)) & (objects <= most)).astype(int)
        if inside.sum() < _FEWEST:
            continue

        def gain(weights: np.ndarray) -> float:
            return random_routing.mixtures.ap(hard, weights) - random_routing.mixtures.ap(
                easy, weights
            )

        # A resample may have none of these images, and no AP then.
        drawn = [
            gain(weights * inside) for weights in random_routing.weights if (weights * inside).any()
        ]
        label = f'images with {name} object{"s" * (name != "1")}'
        gaps.append(dict(name=label, gap=(gain(inside), *confidence_interval(drawn))))
    return gaps


def over_random(random_routing: RandomRouting, is_hard: np.ndarray) -> Estimate:
    """AP of a choice minus that of random routing of as many images."""
    choice = random_routing.choice(is_hard)
    mean, _, means = random_routing.at(int(is_hard.sum()))
    return (
        random_routing.mixtures.ap(choice) - mean,
        *confidence_interval(random_routing.resampled(choice) - means),
    )


def share_gaining(record: RoutingRecord, resamples: int, seed: int = 0) -> Estimate:
    """The share of images whose loss is smaller under the dear exit."""
    require_columns(record, 'losses')
    gains = (record.losses[:, 0] > record.losses[:, -1]).astype(float)
    weights = bootstrap_weights(len(gains), resamples, seed)
    return (float(gains.mean()), *confidence_interval(weights @ gains / len(gains)))


def threshold_transfer(
    val_scores: np.ndarray, scores: np.ndarray, random_routing: RandomRouting, share: float = 0.5
) -> dict:
    """The hard share that a threshold of the validation set really gives; both sets are
    resampled."""
    threshold = threshold_for_share(val_scores, share)
    hard = scores > np.float32(threshold)
    drawn = bootstrap_weights(len(val_scores), len(random_routing.weights), seed=1)
    shares = []
    for counts, weights in zip(drawn, random_routing.weights):
        cut = threshold_for_share(np.repeat(val_scores, counts), share)
        shares.append(np.average(scores > np.float32(cut), weights=weights))
    return dict(asked=share, got=(float(hard.mean()), *confidence_interval(shares)))


def peer_leads(
    record: RoutingRecord,
    random_routing: RandomRouting,
    scores: np.ndarray,
    peers: Mapping[str, np.ndarray],
) -> dict[str, Estimate]:
    """How much more AP a peer has at half hard than the router at the same GFLOPs: for what a
    charged peer pays, the router may send more images on.

    Args:
        record (RoutingRecord): Of two exits.
        random_routing (RandomRouting): Of the record.
        scores (np.ndarray): The router's difficulties, (n,).
        peers (Mapping[str, np.ndarray]): Key of `PEERS` -> scores, (n,). References are left out,
            and those whose cost the router cannot have, because many of its difficulties are equal.
    """
    leads = {}
    for name, peer_scores in peers.items():
        if PEERS[name].reference:
            continue
        is_hard = split_by_share(peer_scores, 0.5)[1]
        paid = costs_of(record, is_hard)['gflops'] + peer_gflops(name, record) * is_hard.mean()
        router = hardest_for_gflops(record, scores, paid)
        # Equal difficulties go together: there may be no choice at that cost.
        spent, most = (costs_of(record, choice)['gflops'] for choice in (router, 1.0))
        if not router.all() and abs(spent - paid) > _NEAR * (
            most - costs_of(record, 0.0)['gflops']
        ):
            continue
        leads[name.replace('_', ' ')] = ap_difference(
            random_routing, random_routing.choice(is_hard), random_routing.choice(router)
        )
    return leads


def class_gain(random_routing: RandomRouting, gained: Mapping[str, np.ndarray]) -> Estimate:
    """AP at half hard where true gains in AP are weighted by class, minus AP where they are not:
    what classes matter here.

    Args:
        random_routing (RandomRouting): On the record.
        gained (Mapping[str, np.ndarray]): With ``ap`` and ``ap_class``, (n,) each.
    """
    choices = [
        random_routing.choice(split_by_share(gained[name], 0.5)[1]) for name in ('ap_class', 'ap')
    ]
    return ap_difference(random_routing, *choices)


def difficulty_spread(scores: np.ndarray) -> float:
    """The range of difficulties that 90 % of the images lie in."""
    low, high = np.percentile(scores, (5, 95))
    return float(high - low)


def _ends(random_routing: RandomRouting) -> tuple[np.ndarray, np.ndarray]:
    images = random_routing.mixtures.images
    return random_routing.choice(np.zeros(images, bool)), random_routing.choice(
        np.ones(images, bool)
    )
