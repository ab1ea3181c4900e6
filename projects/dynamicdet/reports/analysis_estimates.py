"""The estimates that the diagnosis rests on: values with 95 % intervals, all on the same
resamples."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..routing.curve import Chance, bootstrap_weights, costs_of, hard_for, interval, split
from ..routing.peers import PEERS, charge
from ..routing.record import RoutingRecord, require
from ..routing.strata import OBJECTS
from ..routing.thresholds import threshold_for_share

#: Costs this near to each other, as a share of what parts the exits, are equal.
_NEAR = 0.02

#: A value and the ends of its interval, None without.
Estimate = tuple[float, float | None, float | None]
#: Strata of fewer images are not spoken of.
_FEWEST = 20


def difference(chance: Chance, first: Sequence[int], second: Sequence[int]) -> Estimate:
    """AP of one choice minus that of another, on paired resamples.

    Args:
        chance (Chance): Of the record.
        first (Sequence[int]): Exit of each image, (n,).
        second (Sequence[int]): The same.
    """
    value = chance.mixtures.ap(first) - chance.mixtures.ap(second)
    return (value, *interval(chance.resampled(first) - chance.resampled(second)))


def exit_estimates(chance: Chance) -> list[Estimate]:
    """AP of the cheap and of the dear exit alone."""
    choices = _ends(chance)
    return [(chance.mixtures.ap(choice), *interval(chance.resampled(choice))) for choice in choices]


def gap(chance: Chance) -> Estimate:
    """By how much the dear exit is better."""
    easy, hard = _ends(chance)
    return difference(chance, hard, easy)


def strata_gaps(record: RoutingRecord, chance: Chance) -> list[dict]:
    """The same on images with few and with many objects: ``name``, ``gap``."""
    if record.objects is None:
        return []
    objects = record.objects
    easy, hard = _ends(chance)
    found = []
    for name, (fewest, most) in OBJECTS.items():
        inside = ((objects >= max(1, fewest)) & (objects <= most)).astype(int)
        if inside.sum() < _FEWEST:
            continue

        def gain(weights: np.ndarray) -> float:
            return chance.mixtures.ap(hard, weights) - chance.mixtures.ap(easy, weights)

        # A resample may have none of these images, and no AP then.
        drawn = [gain(weights * inside) for weights in chance.weights if (weights * inside).any()]
        label = f'images with {name} object{"s" * (name != "1")}'
        found.append(dict(name=label, gap=(gain(inside), *interval(drawn))))
    return found


def over_random(chance: Chance, is_hard: np.ndarray) -> Estimate:
    """AP of a choice minus that of random routing of as many images."""
    choice = chance.choice(is_hard)
    mean, _, means = chance.at(int(is_hard.sum()))
    return (chance.mixtures.ap(choice) - mean, *interval(chance.resampled(choice) - means))


def share_gaining(record: RoutingRecord, resamples: int, seed: int = 0) -> Estimate:
    """The share of images whose loss is smaller under the dear exit."""
    require(record, 'losses')
    gains = (record.losses[:, 0] > record.losses[:, -1]).astype(float)
    weights = bootstrap_weights(len(gains), resamples, seed)
    return (float(gains.mean()), *interval(weights @ gains / len(gains)))


def transfer(
    val_scores: np.ndarray, scores: np.ndarray, chance: Chance, share: float = 0.5
) -> dict:
    """The hard share that a threshold of the validation set really gives; both sets are
    resampled."""
    threshold = threshold_for_share(val_scores, share)
    hard = scores > np.float32(threshold)
    drawn = bootstrap_weights(len(val_scores), len(chance.weights), seed=1)
    shares = []
    for own, weights in zip(drawn, chance.weights):
        cut = threshold_for_share(np.repeat(val_scores, own), share)
        shares.append(np.average(scores > np.float32(cut), weights=weights))
    return dict(asked=share, got=(float(hard.mean()), *interval(shares)))


def peer_leads(
    record: RoutingRecord, chance: Chance, scores: np.ndarray, peers: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
    """How much more AP a peer has at half hard than the router at the same GFLOPs: for what a
    charged peer pays, the router may send more images on.

    Args:
        record (RoutingRecord): Of two exits.
        chance (Chance): Of the record.
        scores (np.ndarray): The router's difficulties, (n,).
        peers (Mapping[str, np.ndarray]): Key of `PEERS` -> scores, (n,). References are left out,
            and those whose cost the router cannot have, because many of its difficulties are equal.
    """
    leads = {}
    for name, own in peers.items():
        if PEERS[name].reference:
            continue
        is_hard = split(own, 0.5)[1]
        paid = costs_of(record, is_hard)['gflops'] + charge(name, record) * is_hard.mean()
        router = hard_for(record, scores, paid)
        # Equal difficulties go together: there may be no choice at that cost.
        spent, most = (costs_of(record, choice)['gflops'] for choice in (router, 1.0))
        if not router.all() and abs(spent - paid) > _NEAR * (
            most - costs_of(record, 0.0)['gflops']
        ):
            continue
        leads[name.replace('_', ' ')] = difference(
            chance, chance.choice(is_hard), chance.choice(router)
        )
    return leads


def class_gain(chance: Chance, gained: Mapping[str, np.ndarray]) -> Estimate:
    """AP at half hard where true gains in AP are weighted by class, minus AP where they are not:
    what classes matter here.

    Args:
        chance (Chance): Of the record.
        gained (Mapping[str, np.ndarray]): With ``ap`` and ``ap_class``, (n,) each.
    """
    choices = [chance.choice(split(gained[name], 0.5)[1]) for name in ('ap_class', 'ap')]
    return difference(chance, *choices)


def spread(scores: np.ndarray) -> float:
    """The range of difficulties that 90 % of the images lie in."""
    low, high = np.percentile(scores, (5, 95))
    return float(high - low)


def _ends(chance: Chance) -> tuple[np.ndarray, np.ndarray]:
    images = chance.mixtures.images
    return chance.choice(np.zeros(images, bool)), chance.choice(np.ones(images, bool))
