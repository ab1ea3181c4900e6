"""Curves, figures of merit and peers of the analysis: rows of numbers, ready to be shown.

A *choice* is a bool per image, (n,): whether it is hard. *Choices* are such for each of `SHARES`. A
*curve* is a list of points, one per share: ``share`` as asked, ``hard_share``, ``ap``, ``low`` and
``high`` (ends of an interval, or None), ``gflops`` and ``latency`` (seconds) per image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pycocotools.coco import COCO
from scipy.stats import rankdata

from ..errors import UsageError
from ..routing.bootstrap import confidence_interval
from ..routing.class_weights import class_weights, count_objects
from ..routing.curve import SHARES, RandomRouting, costs_of, split_by_share
from ..routing.evaluation import Mixtures
from ..routing.merit import efficacy, normalized_gain
from ..routing.oracle import allocate, honest_choices, object_count, oracle_choices, refine_choice
from ..routing.peers import PEERS, is_charged, peer_gflops, peer_scores
from ..routing.record import RoutingRecord
from ..routing.strata import exit_benefits, exit_benefits_by_class

#: The record of the validation set and its ground truth, if there is one.
Validation = tuple[RoutingRecord, COCO] | None

#: Thresholds that the slider of the page can take: hard shares 0, 0.01, ... 1.
_SLIDER = tuple(np.linspace(0, 1, 101))
#: APs that refining the oracle may take at each share: some seconds in all at 1,000 images.
_EVALUATIONS = 200
#: Where half of the images are hard.
HALF = SHARES.index(0.5)
#: What routers pay for each hard image that look at nothing of exit 0.
_NOTHING = dict(gflops=0.0, latency=0.0)


def choices_of(scores: Sequence[float]) -> list[np.ndarray]:
    """Which images are hard at all of `SHARES`, by a router's scores."""
    return [split_by_share(scores, share)[1] for share in SHARES]


def choices_by_oracle(
    record: RoutingRecord, coco: COCO, mixtures: Mixtures, seed: int = 0, by_class: bool = False
) -> dict[str, np.ndarray]:
    """Choices of ``honest`` and ``oracle``, (shares, n). The honest one only where images have
    views.

    Both choose by `image_values`; the oracle is then refined on the AP of the whole set, share by
    share.
    """
    values, choices_by_name = image_values(record, coco, mixtures, by_class), {}
    if record.view is not None:
        choices_by_name['honest'] = honest_choices(
            record, coco, SHARES, by_objects=True, seed=seed, by_class=by_class
        )
    choices_by_name['oracle'] = np.array(
        [
            refine_choice(mixtures, choice, _EVALUATIONS, seed, values).choice
            for choice in oracle_choices(values, SHARES, seed=seed)
        ]
    )
    return {name: choices.astype(bool) for name, choices in choices_by_name.items()}


def image_values(
    record: RoutingRecord, coco: COCO, mixtures: Mixtures, by_class: bool = False
) -> np.ndarray:
    """What each image is worth under each exit, (2, n): its AP, percent, times its number of
    objects, as in the AP of the set an image counts by its objects; ``by_class``, each by the
    weight of its class."""
    if by_class:
        return mixtures.image_ap(class_weights(count_objects(coco, record.ids).sum(axis=0)))
    objects = np.array([object_count(coco, identity) for identity in record.ids.tolist()])
    return mixtures.image_ap() * objects


def oracle_certificate(record: RoutingRecord, values: np.ndarray) -> dict[str, float]:
    """What the oracle's program comes to where half of the images may be hard: ``value`` per
    image, of whole images; ``bound``, the optimum of the linear program, in which an image may be
    split; ``price``, in value per GFLOP. The budget is what half of all images, drawn at random,
    cost; an image counts by its mean."""
    allocation = allocate(values, record.gflops, float(np.mean(record.gflops)))
    images = values.shape[1]
    return dict(
        value=allocation.value / images, bound=allocation.bound / images, price=allocation.price
    )


def router_curve(rows: Sequence[Mapping]) -> list[dict]:
    """The router's curve, with ``threshold``, from `routing.curve.trade_off`'s rows."""
    return [
        dict(
            share=row['share'],
            hard_share=row['hard_share'],
            threshold=row['threshold'],
            ap=row['ap'],
            ap50=row['ap50'],
            low=row['ap_low'],
            high=row['ap_high'],
            gflops=row['gflops'],
            latency=row['latency'],
        )
        for row in rows
    ]


def random_curve(record: RoutingRecord, rows: Sequence[Mapping]) -> list[dict]:
    """Random routing at the same shares; ends are two standard deviations away: how far a draw may
    fall. It pays the mean over all images, whatever those cost that a router calls hard."""
    return [
        dict(
            share=row['share'],
            hard_share=row['hard_share'],
            ap=row['random_ap'],
            low=row['random_ap'] - 2 * row['random_std'],
            high=row['random_ap'] + 2 * row['random_std'],
            **costs_of(record, row['hard_share']),
        )
        for row in rows
    ]


def curve_of(
    record: RoutingRecord,
    random_routing: RandomRouting,
    choices: Sequence[np.ndarray],
    intervals: bool = True,
    extra: Mapping[str, float] = _NOTHING,
) -> list[dict]:
    """The curve of any choices; what is ``extra`` is paid for each hard image."""
    points = []
    for share, is_hard in zip(SHARES, choices):
        choice, got = random_routing.choice(is_hard), float(np.mean(is_hard))
        low, high = (
            confidence_interval(random_routing.resampled(choice)) if intervals else (None, None)
        )
        costs = {name: cost + got * extra[name] for name, cost in costs_of(record, is_hard).items()}
        points.append(
            dict(
                share=share,
                hard_share=got,
                ap=random_routing.mixtures.ap(choice),
                low=low,
                high=high,
                **costs,
            )
        )
    return points


def threshold_points(
    record: RoutingRecord, random_routing: RandomRouting, scores: np.ndarray
) -> list[dict]:
    """The router at every percent of hard images: each share that a threshold really gives, once.

    Returns:
        list[dict]: From all easy to all hard: ``threshold``, ``hard_share``, ``hard`` (images),
            ``ap``, ``gflops``, ``latency``.
    """
    points = {}
    for share in _SLIDER:
        threshold, is_hard = split_by_share(scores, share)
        count = int(is_hard.sum())
        if count not in points:
            points[count] = dict(
                threshold=float(threshold),
                hard_share=count / len(scores),
                hard=count,
                ap=random_routing.mixtures.ap(random_routing.choice(is_hard)),
                **costs_of(record, is_hard),
            )
    return [points[count] for count in sorted(points)]


def merit_rows(
    random_routing: RandomRouting,
    scores: np.ndarray,
    rows: Sequence[Mapping],
    oracle: Sequence[np.ndarray] | None,
) -> dict[str, dict]:
    """Figures of merit: ``gain``, ``normalized_gain`` and, given the honest oracle's choices,
    ``efficacy``.

    Returns:
        dict: Each ``name``, ``value``, ``low``, ``high`` (None where not defined) and ``meaning``.
            A ratio is not defined where intervals were asked for and what it is divided by cannot
            be told from zero.
    """
    choices, half = choices_of(scores), rows[HALF]
    gain = normalized_gain(random_routing, choices[HALF])
    resampled = bool(len(random_routing.weights))
    figures = dict(
        gain=dict(
            name='gain at half hard, AP',
            value=half['ap'] - half['random_ap'],
            low=half['gain_low'],
            high=half['gain_high'],
            meaning='AP above random routing of as many images.',
        ),
        normalized_gain=dict(
            name='normalized gain at half hard',
            value=_settled(gain, 'gain', resampled),
            low=gain['low'],
            high=gain['high'],
            meaning='How far the AP lies above the straight line between the exits, as a share of '
            'the AP '
            "between them. 0: no better than chance; the paper's own table implies 0.18 to 0.22.",
        ),
    )
    if oracle is not None:
        figure = efficacy(random_routing, choices, oracle)
        figures['efficacy'] = dict(
            name='efficacy',
            value=_settled(figure, 'efficacy', resampled),
            low=figure['low'],
            high=figure['high'],
            meaning='The area between router and random routing, over all shares, as a share of '
            'the honest '
            "oracle's. 1: as good as knowing another view of the image; 0: chance; below 0: worse.",
        )
    return figures


def _settled(ratio: Mapping, name: str, resampled: bool) -> float | None:
    """A ratio, unless resamples say that what it is divided by may be nothing: it then has no
    interval."""
    return None if resampled and ratio['low'] is None else ratio[name]


def score_peers(
    record: RoutingRecord, validation: Validation, gained: Mapping[str, np.ndarray], seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Scores of peers by key of `PEERS`, and why others have none.

    Those that learn learn from the validation set if there is one, else by cross-fitting.
    """
    training, source = None, gained
    if validation:
        training, source = validation[0], all_benefits(*validation, Mixtures(*validation))
    scores_by_peer, left_out = {}, {}
    for name, peer in PEERS.items():
        try:
            peer_gflops(name, record)
            target = _target(name, source if peer.fitted else gained) if peer.benefit else None
            scores_by_peer[name] = peer_scores(name, record, training, target, seed)
        except UsageError as error:
            left_out[name] = str(error)
    return scores_by_peer, left_out


def all_benefits(record: RoutingRecord, coco: COCO, mixtures: Mixtures) -> dict[str, np.ndarray]:
    """`benefits` and `exit_benefits_by_class`."""
    return {**exit_benefits(record, mixtures), **exit_benefits_by_class(record, coco, mixtures)}


def with_class_objects(record: RoutingRecord, source: RoutingRecord, coco: COCO) -> RoutingRecord:
    """A record whose provenance says how many objects of each category another, whose ground truth
    is given, has: what peers may know of classes."""
    counts = count_objects(coco, source.ids).sum(axis=0)
    facts = dict(categories=sorted(coco.getCatIds()), class_objects=counts.astype(int).tolist())
    return replace(record, provenance={**record.provenance, **facts})


def _target(name: str, gained: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What a peer learns, or is: a regression of losses their rank, whose tails are long."""
    benefit = PEERS[name].benefit
    if name != 'ridge':
        return gained.get(benefit)
    return rankdata(gained[benefit]) if benefit in gained else gained['ap']


def judge_router(
    record: RoutingRecord,
    random_routing: RandomRouting,
    choices: Sequence[np.ndarray],
    extra: Mapping[str, float] = _NOTHING,
) -> dict:
    """Any router's ``curve``, its point at ``half`` hard, its normalized ``gain`` there, ``low``
    and ``high``; ``gain`` None where not defined, see `merit_rows`."""
    curve = curve_of(record, random_routing, choices, intervals=False, extra=extra)
    gain = normalized_gain(random_routing, choices[HALF])
    settled = _settled(gain, 'gain', bool(len(random_routing.weights)))
    return dict(curve=curve, half=curve[HALF], gain=settled, low=gain['low'], high=gain['high'])


def judge_peer(
    name: str, record: RoutingRecord, random_routing: RandomRouting, scores: np.ndarray
) -> dict:
    """`judge_router` of a peer, with what it pays, and its ``meaning``."""
    # Records that do not say how long neck and heads take charge no time.
    charged = is_charged(name, record)
    seconds = record.provenance.get('branch0_latency', 0.0) if charged else 0.0
    extra = dict(gflops=peer_gflops(name, record), latency=float(seconds))
    return dict(
        judge_router(record, random_routing, choices_of(scores), extra),
        meaning=_meaning(name, charged),
    )


def peer_title(name: str) -> str:
    """What a peer is called: 'true' where it sees the annotations."""
    plain = name.replace('_objects', ' x objects').replace('_', ' ')
    return f'true {plain}' if PEERS[name].reference else plain


def _meaning(name: str, charged: bool) -> str:
    peer = PEERS[name]
    if peer.reference:
        return f'{peer.description}: sees the annotations, as no router can'
    return peer.description + ('; pays for the first exit on every image' if charged else '')
