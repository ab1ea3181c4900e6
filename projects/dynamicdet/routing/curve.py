"""What a hard share buys: AP and cost of a router's choice, against a choice at random.

All functions work on a *record* of one pass in which every image went through all exits; see
`record`. So the model runs once, and a share costs milliseconds. AP is COCO's, in percent.
Intervals hold 95 % of the AP over bootstrap resamples of the images.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO

from ..errors import UsageError
from .bootstrap import RESAMPLES, bootstrap_weights, confidence_interval
from .budget_report import share_prediction_interval
from .evaluation import Mixtures, check_record, difficulties_of
from .record import RoutingRecord
from .thresholds import ALL_EASY, ALL_HARD, threshold_for_share

SHARES = tuple(tenth / 10 for tenth in range(11))
#: Draws of random routing: on 1,000 images one has a standard deviation of some 0.4 AP, their mean
#: of 0.06.
DRAWS = 40

#: APs closer than this, in percent, are equal: only rounding parts them.
SAME_AP = 1e-9


def choose_exits(difficulties: Sequence[float], thresholds: Sequence[float]) -> np.ndarray:
    """The exit of each image where K exits are parted by K - 1 thresholds.

    Args:
        difficulties (Sequence[float]): (n,).
        thresholds (Sequence[float]): (K - 1,), each at least the one before. An image leaves at the
            first exit whose threshold its difficulty does not exceed, or at the last exit.

    Returns:
        np.ndarray: (n,), ints in [0, K).

    Raises:
        UsageError: If a threshold is smaller than the one before, or NaN.
    """
    thresholds = np.asarray(thresholds, np.float32)
    if np.isnan(thresholds).any() or (np.diff(thresholds) < 0).any():
        raise UsageError(f'thresholds must not fall from exit to exit, got {thresholds.tolist()}')
    return np.searchsorted(thresholds, np.asarray(difficulties, np.float32), side='left')


def split_by_share(scores: Sequence[float], share: float) -> tuple[float, np.ndarray]:
    """The hardest images, by any scores: `threshold_for_share` for scores of any range.

    Args:
        scores (Sequence[float]): (n,), finite, large is hard.
        share (float): Wanted share of hard images, in [0, 1].

    Returns:
        tuple: The threshold, in the scores' own unit, and which images are hard, (n,) bools.

    Raises:
        UsageError: If a score is not finite, or the share out of range.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise UsageError('some scores of the router are not finite: was it trained?')
    # Difficulties, in [0, 1], stay as they are.
    low, high = 0, 1
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        # By their own range, or large scores that hardly differ would all be one in float32.
        low, high = scores.min(), scores.max() + (scores.max() == scores.min())
    scaled = ((scores - low) / (high - low)).astype(np.float32)
    threshold = threshold_for_share(scaled, share)
    return low + threshold * (high - low), scaled > np.float32(threshold)


class RandomRouting:
    """Random routing between two exits, on a record and on bootstrap resamples of it.

    Routers that are compared share one, and with it the draws and the resamples.

    Args:
        mixtures (Mixtures): Of the record.
        exits (tuple[int, int]): Where easy and hard images leave. Defaults to the first and the
            last.
        draws (int): Draws per number of hard images, at least 2. Defaults to 40.
        resamples (int): Bootstrap resamples of the images, 0 for no intervals. Defaults to 200.
        seed (int): Seed of draws and resamples. Defaults to 0.

    Attributes:
        mixtures (Mixtures): As given.
        exits (tuple[int, int]): As given, counted from the first.
        weights (np.ndarray): The resamples, (B, n): how often each image is drawn.

    Raises:
        UsageError: If there are too few draws or no such exits.
    """

    def __init__(
        self,
        mixtures: Mixtures,
        exits: tuple[int, int] = (0, -1),
        draws: int = DRAWS,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        if draws < 2:
            raise UsageError(f'a standard deviation needs 2 random draws or more, got {draws}')
        self.mixtures, self._draws, self._seed = mixtures, draws, seed
        self.exits = tuple(_exit(exit, mixtures.exits) for exit in exits)
        self.weights = bootstrap_weights(mixtures.images, resamples, seed)
        self._known: dict[int, tuple] = {}
        self._resampled: dict[bytes, np.ndarray] = {}

    def choice(self, is_hard: Sequence[bool]) -> np.ndarray:
        """The exit of each image, (n,), by whether it is hard."""
        return np.where(is_hard, self.exits[1], self.exits[0])

    def resampled(self, choice: Sequence[int]) -> np.ndarray:
        """AP of a choice on each resample, (B,), in percent. Kept: exits and oracles are asked for
        again and again."""
        key = np.asarray(choice, np.int8).tobytes()
        if key not in self._resampled:
            self._resampled[key] = np.array(
                [self.mixtures.ap(choice, counts) for counts in self.weights]
            )
        return self._resampled[key]

    def at(self, hard: int) -> tuple[float, float, np.ndarray]:
        """AP where so many images, drawn at random, are hard.

        Returns:
            tuple: Mean and standard deviation over the draws, and the mean on each resample, (B,).
        """
        if hard not in self._known:
            self._known[hard] = self._measure(hard)
        return self._known[hard]

    def _measure(self, hard: int) -> tuple[float, float, np.ndarray]:
        images = self.mixtures.images
        choice = self.choice(np.arange(images) < hard)
        # All or none: there is one way to draw them.
        if hard in (0, images):
            return self.mixtures.ap(choice), 0.0, self.resampled(choice)
        generator = np.random.default_rng([self._seed, hard])
        aps = [self.mixtures.ap(generator.permutation(choice)) for _ in range(self._draws)]
        return (
            float(np.mean(aps)),
            float(np.std(aps, ddof=1)),
            self._resampled_mean(choice, generator),
        )

    def _resampled_mean(self, choice: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The AP of expected counts follows the resample without the noise of a draw, but is a
        little below the mean of draws (precision is the best at a recall *or above*, and noise
        makes a best better). How much is the same for all resamples, and one draw on each tells."""
        if not len(self.weights):
            return np.zeros(0)
        probabilities = np.zeros((self.mixtures.images, self.mixtures.exits))
        for exit in self.exits:
            probabilities[:, exit] = (choice == exit).mean()
        expected = np.array(
            [self.mixtures.expected_ap(probabilities, counts) for counts in self.weights]
        )
        drawn = np.array(
            [self.mixtures.ap(generator.permutation(choice), counts) for counts in self.weights]
        )
        return expected + np.nanmean(drawn - expected)


def trade_off(
    record: RoutingRecord,
    coco: COCO,
    scores: Sequence[float] | None = None,
    shares: Sequence[float] = SHARES,
    random_draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    exits: tuple[int, int] = (0, -1),
    resamples: int = RESAMPLES,
    random_routing: RandomRouting | None = None,
) -> list[dict]:
    """AP and cost at several hard shares.

    Args:
        record (RoutingRecord): See `record`.
        coco (COCO): Its ground truth.
        scores (Sequence[float], optional): A router: (n,), large is hard, of any range. Defaults to
            the record's difficulties.
        shares (Sequence[float]): Wanted hard shares, in [0, 1]. Defaults to 0, 0.1, ... 1.
        random_draws (int): Draws of random routing per share, at least 2. Defaults to 40.
        seed (int): Seed of the draws and of the resamples. Defaults to 0.
        progress (Callable, optional): Called with (rows done, rows in all) after each.
        exits (tuple[int, int]): Where easy and hard images leave. Defaults to the first and the
            last.
        resamples (int): Bootstrap resamples, 0 for no intervals. Defaults to 200.
        random_routing (RandomRouting, optional): Of the same record, to share with other routers.
            It stands for ``random_draws``, ``seed``, ``exits`` and ``resamples``. Defaults to a new
            one.

    Returns:
        list[dict]: Per share:

        * ``share`` as asked, ``threshold``, ``hard_share`` that it gives,
        * ``ap`` and ``ap50`` in percent, ``gflops`` per image, ``latency`` in seconds per image,
        * ``random_ap`` and ``random_std``: mean and standard deviation of the AP where just as many
          images, drawn at random, are hard,
        * ``ap_low`` and ``ap_high``; ``random_low`` and ``random_high``; ``gain_low`` and
          ``gain_high``, of ``ap - random_ap``: ends of 95 % intervals over the images, on the same
          resamples. None without resamples.

    Raises:
        UsageError: If the record is empty, has difficulties that are not finite or images that
            ``coco`` lacks, if the images have no objects, or if the exits do not exist.
    """
    check_record(record, coco)
    if random_routing is None:
        random_routing = RandomRouting(Mixtures(record, coco), exits, random_draws, resamples, seed)
    scores = difficulties_of(record) if scores is None else np.asarray(scores)
    if scores.shape != (random_routing.mixtures.images,):
        raise UsageError(
            f'a router gives one score for each of {random_routing.mixtures.images} images, got '
            f'scores of shape {scores.shape}'
        )
    rows = []
    for share in shares:
        threshold, is_hard = split_by_share(scores, share)
        rows.append(
            dict(
                share=share,
                threshold=threshold,
                hard_share=float(is_hard.mean()),
                **costs_of(record, is_hard, random_routing.exits),
                **_worth(random_routing, is_hard),
            )
        )
        if progress:
            progress(len(rows), len(shares))
    return rows


def calibrated_trade_off(
    record: RoutingRecord,
    random_routing: RandomRouting,
    difficulties: Sequence[float],
    shares: Sequence[float] = SHARES,
) -> list[dict]:
    """AP and cost at several hard shares by the thresholds that a calibration gives for them, on
    images which it may not have seen: what is served, where `trade_off` takes the quantiles of the
    record itself.

    Args:
        record (RoutingRecord): See `record`.
        random_routing (RandomRouting): Of it; its exits and its evaluation are used.
        difficulties (Sequence[float]): The calibration's, (n,), n > 0.
        shares (Sequence[float]): Wanted hard shares, in [0, 1]. Defaults to 0, 0.1, ... 1.

    Returns:
        list[dict]: Per share ``share``, ``threshold``, ``hard_share`` that is served,
            ``chance_low`` and ``chance_high``, the shares that chance explains
            (`budget_report.share_prediction_interval`; of a forced threshold, which serves all or
            none, that one share), ``ap``, ``ap50``, ``gflops`` and ``latency`` as of `trade_off`.
    """
    test_difficulties, rows = difficulties_of(record), []
    for share in shares:
        threshold = threshold_for_share(difficulties, share)
        is_hard = test_difficulties > np.float32(threshold)
        served = float(is_hard.mean())
        above = int((np.asarray(difficulties, np.float32) > np.float32(threshold)).sum())
        low, high = share_prediction_interval(above, len(difficulties), len(test_difficulties))
        if threshold in (ALL_HARD, ALL_EASY):
            low = high = served
        rows.append(
            dict(
                share=share,
                threshold=threshold,
                hard_share=served,
                chance_low=low,
                chance_high=high,
                **costs_of(record, is_hard, random_routing.exits),
                **random_routing.mixtures.scores(random_routing.choice(is_hard), sizes=False),
            )
        )
    return rows


def gain_over_random(rows: Sequence[Mapping]) -> dict[str, float | None]:
    """How much a router is worth.

    Args:
        rows (Sequence[Mapping]): As `trade_off` gives them.

    Returns:
        dict: ``mean``: AP minus random routing's, in percent, averaged over the rows between the
        ends (None without any). ``half``: by how much the AP at half hard is above the straight
        line between the ends, as a share of the difference of the ends (None if a row of 0, 0.5 or
        1 is missing, or the ends do not differ). `merit` has both with intervals.
    """
    inner = [row['ap'] - row['random_ap'] for row in rows if 0 < row['hard_share'] < 1]
    by_asked = {row['share']: row for row in rows}
    half = None
    if {0, 0.5, 1} <= by_asked.keys():
        first, last, middle = by_asked[0]['ap'], by_asked[1]['ap'], by_asked[0.5]
        # Where images share a score, the share is not quite a half.
        chord = first + middle['hard_share'] * (last - first)
        if abs(last - first) > SAME_AP:
            half = (middle['ap'] - chord) / (last - first)
    return dict(mean=float(np.mean(inner)) if inner else None, half=half)


def _exit(exit: int, exits: int) -> int:
    if not -exits <= exit < exits:
        raise UsageError(f'there is no exit {exit}: the record has {exits}')
    return exit % exits


def costs_of(
    record: RoutingRecord, is_hard: np.ndarray, exits: tuple[int, int] = (0, -1)
) -> dict[str, float]:
    """What a choice costs per image: ``gflops`` and ``latency``, seconds; each image by its own
    where the record has that.

    Args:
        record (RoutingRecord): See `record`.
        is_hard (np.ndarray): (n,) bools; or, of images drawn at random, the share that is hard.
        exits (tuple[int, int]): Where easy and hard images leave. Defaults to the first and the
            last.
    """
    costs = {}
    for name, key in (('gflops', 'gflops'), ('latency', 'latencies')):
        easy, hard = _each(record, key)[:, list(exits)].T
        costs[name] = float((easy + (hard - easy) * is_hard).mean())
    return costs


def hardest_for_gflops(record: RoutingRecord, scores: Sequence[float], gflops: float) -> np.ndarray:
    """The hardest images that a router may send from the first to the last exit for so many GFLOPs
    per image.

    Args:
        record (RoutingRecord): See `record`.
        scores (Sequence[float]): (n,), large is hard.
        gflops (float): Per image, on average over all.

    Returns:
        np.ndarray: (n,) bools; all images where that costs less, none where nothing is left.
    """
    each, scores = _each(record, 'gflops'), np.asarray(scores)
    order = np.argsort(-scores, kind='stable')
    spent = each[:, 0].mean() + np.cumsum((each[:, -1] - each[:, 0])[order]) / len(scores)
    count = int((spent <= gflops * (1 + 1e-9)).sum())
    return split_by_share(scores, count / len(scores))[1]


def _each(record: RoutingRecord, key: str) -> np.ndarray:
    """(n, K): each image's own cost; the mean where the record has no other."""
    column = record.column(key)
    return np.tile(getattr(record, key), (len(record), 1)) if column is None else column


def _worth(random_routing: RandomRouting, is_hard: np.ndarray) -> dict:
    choice = random_routing.choice(is_hard)
    row = random_routing.mixtures.scores(choice, sizes=False)
    row['random_ap'], row['random_std'], at_random = random_routing.at(int(is_hard.sum()))
    router_aps = random_routing.resampled(choice)
    for name, values in dict(ap=router_aps, random=at_random, gain=router_aps - at_random).items():
        row[f'{name}_low'], row[f'{name}_high'] = confidence_interval(values)
    return row
