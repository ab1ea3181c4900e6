"""Figures of merit of a router: how much of what could be gained by choosing it gains.

Both compare a router's AP with what the same cost buys without a router, and have 95 % intervals
over bootstrap resamples of the images, on which router, exits, random routing and oracle are drawn
alike. They are None where there is nothing to gain: where the exits are equal, or the oracle no
better than chance.
"""

from collections.abc import Sequence

import numpy as np
from scipy.integrate import trapezoid

from .bootstrap import confidence_interval
from .curve import SAME_AP, RandomRouting


def normalized_gain(
    random_routing: RandomRouting, is_hard: Sequence[bool]
) -> dict[str, float | None]:
    """How far a router's AP lies above the straight line between its exits, the *chord*.

    ``(AP(s) - chord(s)) / (AP(1) - AP(0))`` with ``chord(s) = AP(0) + s (AP(1) - AP(0))`` and s the
    share of hard images that there really is. By the table of DynamicDet (arXiv 2304.05552): 0.18,
    0.22 and 0.18 at s = 0.5. Where exit 1 is the worse one, the sign turns: above 0 then means
    below the chord.

    Args:
        random_routing (RandomRouting): On the record; its exits are those of the chord.
        is_hard (Sequence[bool]): The router's choice, (n,).

    Returns:
        dict: ``hard_share``; ``ap``, ``chord`` and ``range`` (AP(1) - AP(0)) in percent; ``gain``,
        ``low`` and ``high``. The last three are None where the exits have the same AP; the ends
        also where, on more than one resample in forty, they are the other way round: then they are
            not told
        apart, and a ratio to their difference says nothing.
    """
    is_hard = np.asarray(is_hard, bool)
    share = float(is_hard.mean())
    choices = [random_routing.choice(np.full(len(is_hard), end)) for end in (False, True)]
    first, last, router_ap = (
        random_routing.mixtures.ap(choice) for choice in (*choices, random_routing.choice(is_hard))
    )
    chord = first + share * (last - first)
    row = dict(
        hard_share=share,
        ap=router_ap,
        chord=chord,
        range=last - first,
        gain=None,
        low=None,
        high=None,
    )
    if abs(last - first) <= SAME_AP:
        return row
    firsts, lasts, router_aps = map(
        random_routing.resampled, (*choices, random_routing.choice(is_hard))
    )
    with np.errstate(divide='ignore', invalid='ignore'):
        gains = (router_aps - firsts - share * (lasts - firsts)) / (lasts - firsts)
    row['gain'] = (router_ap - chord) / (last - first)
    row['low'], row['high'] = _ends(gains, (lasts - firsts) * np.sign(last - first))
    return row


def efficacy(
    random_routing: RandomRouting,
    router: Sequence[Sequence[bool]],
    oracle: Sequence[Sequence[bool]],
) -> dict[str, float | None]:
    """Which part of an oracle's area over random routing a router has.

    The area lies between the curve of AP by hard share, from none to all hard, and that of random
    routing at the same shares; trapezoids. An oracle's is 1, random routing's 0 on average, and
    that of a router which is worse than chance below 0. For a router to be judged by what can be
    known, the oracle is to be an honest one, chosen on another view of the images.

    Args:
        random_routing (RandomRouting): On the record.
        router (Sequence[Sequence[bool]]): Which images are hard, (n,), for each of some shares, in
            any order. The ends, none and all, are added: there every router is the same.
        oracle (Sequence[Sequence[bool]]): The oracle's, likewise; its shares may be others.

    Returns:
        dict: ``router_area`` and ``oracle_area`` in percent of AP; ``efficacy``, their ratio,
            ``low`` and ``high``. The last three are None unless the oracle's area is above 0; the
            ends also where it is not on more than one resample in forty.
    """
    router_area, router_areas = _area(random_routing, router)
    oracle_area, oracle_areas = _area(random_routing, oracle)
    row = dict(router_area=router_area, oracle_area=oracle_area, efficacy=None, low=None, high=None)
    if oracle_area <= SAME_AP:
        return row
    with np.errstate(divide='ignore', invalid='ignore'):
        ratios = router_areas / oracle_areas
    row['efficacy'] = router_area / oracle_area
    row['low'], row['high'] = _ends(ratios, oracle_areas)
    return row


def _area(random_routing: RandomRouting, choices: Sequence[Sequence[bool]]) -> tuple:
    """Area over random routing: on the record, and on each resample, (B,). At the ends it is 0
    high."""
    hard = [np.asarray(choice, bool) for choice in choices]
    counts = np.array([choice.sum() for choice in hard], int)
    # One choice per share is enough, and the ends need none.
    keep = [
        index
        for index in np.unique(counts, return_index=True)[1]
        if 0 < counts[index] < random_routing.mixtures.images
    ]
    shares, heights = [0.0], [np.zeros(1 + len(random_routing.weights))]
    for index in keep:
        choice = random_routing.choice(hard[index])
        mean, _, means = random_routing.at(int(counts[index]))
        shares.append(counts[index] / random_routing.mixtures.images)
        heights.append(
            np.append(
                random_routing.mixtures.ap(choice) - mean, random_routing.resampled(choice) - means
            )
        )
    shares.append(1.0)
    heights.append(np.zeros(1 + len(random_routing.weights)))
    areas = trapezoid(np.array(heights), shares, axis=0)
    return float(areas[0]), areas[1:]


def _ends(ratios: np.ndarray, denominators: np.ndarray) -> tuple:
    """The interval of ratios, unless that of their denominators is not above 0: what then is said
    of the denominators themselves, and what of the ratios, agree."""
    low, _ = confidence_interval(denominators)
    if low is None or low <= SAME_AP:
        return None, None
    return confidence_interval(ratios[denominators > SAME_AP])
