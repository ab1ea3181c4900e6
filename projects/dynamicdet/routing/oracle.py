"""What the best router could reach: each image's exit chosen by what the exits really find.

Letters: K exits, n images; ``values``, (K, n), what each exit is worth on each image, for example
its per-image AP; ``costs``, (K,) or (K, n), what it costs.

* `allocate` maximizes the sum of values under a budget, with a bound that certifies the result.
* `oracle_choices` does so for two exits at several hard shares.
* `refine_choice` improves a choice on the AP of the whole set, which is no sum over images.
* `honest_choices` chooses on one view of the images, to be scored on another. An oracle that is
  scored on what it chose by wins where the exits differ by luck alone; an honest one does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO

from ..errors import UsageError
from .class_weights import class_weights, count_objects
from .evaluation import Mixtures
from .record import RoutingRecord

#: Sums over images are equal when they differ by less than this share of their size: rounding.
_ROUNDING = 1e-12
#: A budget may be passed by this share of one image's cost, or half of 1.1 + 2.3 would not buy
#: both.
_CREDIT = 1e-9
#: APs closer than this, in percent, are equal.
_SAME_AP = 1e-9


class Allocation(NamedTuple):
    """What `allocate` found.

    Attributes:
        choice (np.ndarray): Exit of each image, (n,), int.
        value (float): Sum of the chosen values.
        cost (float): Mean cost per image, at most the budget.
        price (float): Value per unit of cost at which images are upgraded; 0 if the budget does not
            bind.
        bound (float): Optimum of the linear program in which an image may be split between exits:
            no choice within the budget has a larger value.
    """

    choice: np.ndarray
    value: float
    cost: float
    price: float
    bound: float


class Refinement(NamedTuple):
    """What `refine_choice` found: ``choice``, (n,); its AP and its start's, in percent; how many
    APs it took."""

    choice: np.ndarray
    ap: float
    start_ap: float
    evaluations: int


def allocate(values: np.ndarray, costs: np.ndarray, budget: float) -> Allocation:
    """Choose one exit per image: the largest sum of values whose mean cost is within a budget.

    The linear program of the early-exit oracle (Gay 2022; a multiple-choice knapsack), by its
    dual. At a price p each image takes the exit with the largest ``value - p * cost`` by itself.
    The price is found by bisection between a choice over and one within the budget, with the slope
    of their chord as the next price, not its middle: that ends, after a few steps, at the
        program's own price. What the budget then
    leaves is filled greedily.

    Guaranteed, up to rounding: ``value <= bound``; ``bound`` is the program's optimum; and either
        the
    choice is optimal or ``bound - value`` is less than the difference between two values of one
    image. (At the price, all upgrades that the budget pays for in part are worth ``price`` per
    cost. What they leave unspent is less than one of them costs, and the gap is at most the price
    times that.) With costs (K,) for two exits and a budget that pays for a whole number of upgrades
    the gap is 0.

    For *no detection* pass a row of zeros in both.

    Args:
        values (np.ndarray): (K, n), finite.
        costs (np.ndarray): (K,) or (K, n), finite, in any order.
        budget (float): Mean cost per image.

    Returns:
        Allocation: Of exits that are worth the same, an image takes the cheapest.

    Raises:
        UsageError: If the budget is below the cheapest choice, or shapes or numbers are wrong.
    """
    values, costs = _checked(values, costs)
    images = np.arange(values.shape[1])
    room = budget * len(images) + _CREDIT * np.abs(costs).max()
    cheapest, best = _first(-costs, values), _first(values, -costs)
    least = costs[cheapest, images].sum()
    if not room >= least:  # also where the budget is NaN
        raise UsageError(
            f'a budget of {budget:g} per image is below the cheapest choice, '
            f'{least / len(images):g}: raise it'
        )
    if costs[best, images].sum() <= room:
        choice, price = best, 0.0
    else:
        within, price = _optimal_price(values, costs, room, cheapest, best)
        choice = _fill(values, costs, room, within, price)
    bound = (values - price * costs).max(0).sum() + price * room
    return Allocation(
        choice,
        float(values[choice, images].sum()),
        float(costs[choice, images].mean()),
        float(price),
        float(bound),
    )


def oracle_choices(
    values: np.ndarray, shares: Sequence[float], exact: bool = True, seed: int = 0
) -> np.ndarray:
    """Choices between two exits at several hard shares, the best by the sum of ``values``.

    Args:
        values (np.ndarray): (2, n), for example ``Mixtures.image_ap()``.
        shares (Sequence[float]): Hard shares, in [0, 1].
        exact (bool): Whether just that share is hard, as where a router's threshold cuts: curves of
            routers and oracle then compare at each share, and end in the same points. Otherwise the
            share is a budget, and an image is hard only where it gains by it. Defaults to True.
        seed (int): For order among images with the same gain, when ``exact``. Defaults to 0.

    Returns:
        np.ndarray: (shares, n), int. With ``exact``, the hard images of a share are hard in larger
        ones too.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or len(values) != 2:
        raise UsageError(
            f'hard shares are for two exits; values have shape {values.shape}: use allocate'
        )
    if any(not 0 <= share <= 1 for share in shares):
        raise UsageError(f'hard shares must be in [0, 1], got {list(shares)}')
    if not exact:
        return np.array([allocate(values, [0, 1], share).choice for share in shares])
    values, _ = _checked(values, [0, 1])
    # Not in the record's order, which may have to do with what is in the images.
    shuffled = np.random.default_rng(seed).permutation(values.shape[1])
    order = shuffled[np.argsort(values[0, shuffled] - values[1, shuffled], kind='stable')]
    choices = np.zeros((len(shares), len(order)), int)
    for choice, share in zip(choices, shares):
        choice[order[: round(share * len(order))]] = 1
    return choices


def honest_choices(
    record: RoutingRecord,
    coco: COCO,
    shares: Sequence[float],
    exact: bool = True,
    by_objects: bool = False,
    seed: int = 0,
    by_class: bool = False,
) -> np.ndarray:
    """Choices of an oracle that saw another view of each image; score them on the record's own
    detections.

    What is luck in one view is not in the other, so with exits that differ by noise alone the gain
    over random routing is 0 on average. Where a view is noisy the oracle errs too: it is no upper
    bound, but what knowing each image, seen twice, is worth.

    Args:
        record (RoutingRecord): With ``view`` in its images; two exits.
        coco (COCO): Its ground truth.
        shares (Sequence[float]): Hard shares, in [0, 1].
        exact (bool): As in `oracle_choices`. Defaults to True.
        by_objects (bool): Whether to multiply an image's AP by its number of objects, as in the
            set's AP an image counts by its objects. Defaults to False.
        seed (int): As in `oracle_choices`. Defaults to 0.
        by_class (bool): Whether each object counts by the weight of its class, too
            (`class_weights`); then ``by_objects`` in any case. Defaults to False.

    Returns:
        np.ndarray: (shares, n), int.

    Raises:
        UsageError: If the record has no views.
    """
    if record.view is None:
        raise UsageError(
            'an honest oracle needs detections of a second view of each image: record them too'
        )
    weights = class_weights(count_objects(coco, record.ids).sum(axis=0)) if by_class else None
    values = Mixtures(record, coco, view=True).image_ap(weights)
    if by_objects and not by_class:
        values = values * [object_count(coco, identity) for identity in record.ids.tolist()]
    return oracle_choices(values, shares, exact, seed)


def object_count(coco: COCO, image_id: int) -> int:
    """Annotated objects of an image, without crowds."""
    return sum(not annotation.get('iscrowd', 0) for annotation in coco.imgToAnns.get(image_id, []))


def refine_choice(
    mixtures: Mixtures,
    choice: np.ndarray,
    evaluations: int = 400,
    seed: int = 0,
    values: np.ndarray | None = None,
) -> Refinement:
    """Improve a choice on the AP of the whole set: swap the exits of pairs of images while that
    gains.

    Greedy, in batches: a batch of swaps that gains is kept and the next is twice as large, one that
        does
    not is taken back and the next is half as large. Swaps that cost little by ``values`` are tried
    first. Each exit keeps its number of images, so with costs (K,) the cost stays too. The result
    is never worse than the start; it is a lower bound of the best choice, not the best.

    Args:
        mixtures (Mixtures): Gives the AP of a choice.
        choice (np.ndarray): Where to start, (n,), for example `oracle_choices`'.
        evaluations (int): APs to compute at most, at least 1. Defaults to 400.
        seed (int): Seed of the swaps. Defaults to 0.
        values (np.ndarray, optional): (K, n), what the start was chosen by. Defaults to
            ``mixtures.image_ap()``.

    Returns:
        Refinement: The choice and its AP.
    """
    values = np.asarray(mixtures.image_ap() if values is None else values, float)
    generator = np.random.default_rng(seed)
    current = np.array(choice, int)
    ap = start = mixtures.ap(current)
    pairs = (
        len(current) ** 2 - int((np.bincount(current) ** 2).sum())
    ) // 2  # of images with different exits
    used, size, failed = 1, max(1, len(current) // 16), set()
    while used < evaluations and len(failed) < pairs:
        first, second = _swaps(values, current, generator, size, failed)
        if not len(first):
            continue
        proposal = current.copy()
        proposal[first], proposal[second] = current[second], current[first]
        proposed = mixtures.ap(proposal)
        used += 1
        if proposed > ap + _SAME_AP:
            current, ap, size = proposal, proposed, 2 * len(first)
            failed.clear()  # what did not gain before may gain now
        else:
            if len(first) == 1:
                failed.add((int(first[0]), int(second[0])))
            size = max(1, len(first) // 2)
    return Refinement(current, ap, start, used)


def _checked(values: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, costs = np.asarray(values, float), np.asarray(costs, float)
    if values.ndim != 2 or not values.size:
        raise UsageError(f'values must be exits x images, (K, n), got {values.shape}')
    if costs.shape not in (values.shape, values.shape[:1]):
        raise UsageError(
            f'costs must be {values.shape[:1]} or {values.shape}, as values are, got {costs.shape}'
        )
    if not (np.isfinite(values).all() and np.isfinite(costs).all()):
        raise UsageError(
            'some values or costs are not finite: give an exit that is no option a low value'
        )
    costs = costs[:, None] if costs.ndim == 1 else costs
    return values, np.broadcast_to(costs, values.shape)


def _first(leading: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Exit of each image with the largest ``leading``, and among those the largest ``then``,
    (n,)."""
    return np.where(leading == leading.max(0), then, -np.inf).argmax(0)


def _optimal_price(
    values: np.ndarray, costs: np.ndarray, room: float, within: np.ndarray, over: np.ndarray
) -> tuple[np.ndarray, float]:
    """A choice within the budget, and the price at which it and one over the budget are both
    best."""
    images = np.arange(values.shape[1])
    scale = np.abs(values).max(0).sum(), np.abs(costs).max(0).sum()
    while True:
        (low, cheap), (high, dear) = (
            (values[choice, images].sum(), costs[choice, images].sum()) for choice in (within, over)
        )
        price = (high - low) / (dear - cheap)
        reduced = values - price * costs
        between = reduced.argmax(0)
        # No choice lies above the chord: both its ends are best at this price. Else there is one,
        # and a steeper or flatter chord; there are finitely many.
        if reduced.max(0).sum() - (low - price * cheap) <= _ROUNDING * (
            scale[0] + price * scale[1]
        ):
            return within, price
        if costs[between, images].sum() > room:
            over = between
        else:
            within = between


def _fill(
    values: np.ndarray, costs: np.ndarray, room: float, choice: np.ndarray, price: float
) -> np.ndarray:
    """Upgrade images while the budget lasts, those first that gain most per cost, then the
    dearest."""
    images = np.arange(values.shape[1])
    choice = choice.copy()
    left = room - costs[choice, images].sum()
    gains, extra = values - values[choice, images], costs - costs[choice, images]
    exits, who = np.nonzero((gains > 0) & (extra > 0) & (extra <= left))
    gains, extra = gains[exits, who], extra[exits, who]
    rates = gains / extra
    # No upgrade gains more per cost than the price; those that gain as much differ by rounding
    # only.
    rates[rates > price * (1 - _CREDIT)] = price
    order = np.lexsort((-extra, -rates))
    upgraded = set()
    for exit, image, cost in zip(exits[order].tolist(), who[order].tolist(), extra[order].tolist()):
        if cost <= left and image not in upgraded:
            choice[image] = exit
            upgraded.add(image)
            left -= cost
    return choice


def _swaps(
    values: np.ndarray, choice: np.ndarray, generator: np.random.Generator, size: int, failed: set
) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``size`` disjoint pairs of images with different exits, at random, cheap ones
    likelier."""
    order = generator.permutation(len(choice))
    half = len(order) // 2
    first, second = order[:half], order[half : 2 * half]
    first, second = np.minimum(first, second), np.maximum(first, second)
    differ = choice[first] != choice[second]
    first, second = first[differ], second[differ]
    if failed:
        fresh = [pair not in failed for pair in zip(first.tolist(), second.tolist())]
        first, second = first[fresh], second[fresh]
    change = (
        values[choice[second], first]
        + values[choice[first], second]
        - values[choice[first], first]
        - values[choice[second], second]
    )
    # Gumbel noise: the largest keys are a draw without replacement, with odds exp(change / spread).
    spread = (change.std() if len(change) else 0) or 1.0
    keys = change / spread + generator.gumbel(size=len(change))
    kept = np.argsort(-keys, kind='stable')[:size]
    return first[kept], second[kept]
