"""All that a record says about routing, as one dictionary, a text and a page."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from ..errors import UsageError
from ..files import write_atomically
from ..routing.curve import RandomRouting, calibrated_trade_off, trade_off
from ..routing.diagnosis import diagnose
from ..routing.evaluation import AREAS, Mixtures, check_record, check_truth, difficulties_of
from ..routing.record import RoutingRecord, require_columns
from ..routing.strata import by_difficulty, by_objects, by_size, rank_correlations
from . import routing_analysis_curves as curves
from . import routing_analysis_estimates as estimates
from .page import make_page
from .routing_analysis_baselines import compare_with_baselines
from .routing_analysis_curves import Validation
from .routing_analysis_gallery import make_gallery
from .routing_analysis_text import format_analysis

__all__ = ['analyze_routing', 'format_analysis', 'two_exit_record', 'write_analysis']


def two_exit_record(record: RoutingRecord, exits: tuple[int, int] = (0, -1)) -> dict:
    """The record of two of its exits.

    Args:
        record (RoutingRecord): See `routing.record`; K exits.
        exits (tuple[int, int]): Where easy and where hard images leave. Defaults to the first and
            the last.

    Returns:
        RoutingRecord: Of two exits; ``provenance`` has their numbers as ``exits``.

    Raises:
        UsageError: If there are no such exits, or the two are one.
    """
    count = record.exits
    if (
        any(not -count <= exit < count for exit in exits)
        or len({exit % count for exit in exits}) != 2
    ):
        raise UsageError(
            f'two different exits are wanted, 0 to {count - 1}; got {exits[0]} and {exits[1]}'
        )
    easy, hard = (exit % count for exit in exits)
    facts = dict(record.provenance, exits=f'{easy} and {hard}')
    if easy:
        # They are of exit 0, and peers would be charged for another one.
        for name in ('branch0_gflops', 'branch0_latency'):
            facts.pop(name, None)
    return replace(record.take_exits((easy, hard)), provenance=facts)


def analyze_routing(
    record: RoutingRecord,
    coco: COCO,
    validation: Validation = None,
    bootstrap: int = 200,
    seed: int = 0,
    training: RoutingRecord | None = None,
    say: Callable[[str], None] = lambda what: None,
    calibration: Sequence[float] = (),
    baselines: Mapping[str, RoutingRecord] | None = None,
    by_class: bool = False,
) -> dict:
    """What routing between two exits is worth, where, and against whom.

    Args:
        record (RoutingRecord): Of two exits; see `two_exit_record`. Without ``view`` there is no
            honest oracle and no efficacy, without ``losses`` or ``objects`` less to correlate with.
        coco (COCO): Its ground truth. Where all image entries have a ``difficulty``, as those of
            the built-in data, the router's is correlated with it.
        validation (tuple, optional): Record of the validation set by the same detector, of the same
            exits, and its ground truth: thresholds are chosen on it and tried on ``record``, and
            peers that learn learn from it. Defaults to None.
        bootstrap (int): Resamples of the images for 95 % intervals; 0 for none. Defaults to 200.
        seed (int): Seed of resamples and random routing. Defaults to 0.
        training (RoutingRecord, optional): Record of images that the detectors were trained on, for
            the diagnosis: whether the loss difference says the same there. Defaults to None.
        say (Callable): Called with what is done next.
        calibration (Sequence[float]): Difficulties of the calibration's images, (m,), whose
            thresholds are tried on ``record``. Defaults to those of ``validation``, if there is
            one.
        baselines (Mapping[str, RoutingRecord], optional): Name -> record of a plain detector on the
            same pictures; see `measuring.baselines`. Defaults to none.
        by_class (bool): Whether oracles and the diagnosis count an object by the weight of its
            class (`routing.class_weights`). Defaults to False: all objects alike.

    Returns:
        dict: Numbers, strings, lists and dictionaries, as JSON has them:

        * ``images``, their number; ``ends``: per exit ``exit``, ``ap``, ``ap50``, ``gflops``,
          ``latency``.
        * ``rows`` of `routing.curve.trade_off`: budgets by the record's own quantiles; and
          ``calibrated``, rows of `routing.curve.calibrated_trade_off`, none without a calibration.
        * ``curves``: of ``router``, ``random``, ``honest`` (oracle) and ``oracle``; and
          ``thresholds``, the router's at all percents of hard images: see
          `routing_analysis_curves`.
        * ``merit``: list of ``name``, ``value``, ``low``, ``high``, ``meaning``.
        * ``router``, and ``peers`` by name: ``curve``, ``half`` (its point at half hard), ``gain``
          (normalized, there), ``low``, ``high``, ``meaning``; ``left_out``: why a peer is not
          there, by name.
        * ``baselines``: ``points`` and ``leads`` of `routing_analysis_baselines`, both empty
          without.
        * ``certificate``: of the oracle's program; see
          `routing_analysis_curves.oracle_certificate`.
        * ``strata``: tables of ``title``, ``name``, ``counts`` and ``rows`` of ``name``, ``count``,
          ``aps``.
        * ``correlations``, like ``merit``; ``diagnosis``: sentences; ``provenance``: the record's.

    Raises:
        UsageError: If the record does not fit ``coco`` or has not two exits, or its images have no
            objects.
    """
    check_record(record, coco)
    check_truth(record, coco)
    if validation:
        check_truth(*validation)
        require_apart(record, validation[0], 'validation')
    if training:
        require_columns(training, 'losses', what='the training record')
        require_apart(record, training, 'training')
    if record.exits != 2:
        raise UsageError(f'routing is between two exits, the record has {record.exits}: choose two')
    say('matching detections with objects')
    random_routing = RandomRouting(Mixtures(record, coco), resamples=bootstrap, seed=seed)
    scores = difficulties_of(record)
    say('the curve and random routing')
    rows = trade_off(record, coco, random_routing=random_routing)
    say('oracles')
    oracles = curves.choices_by_oracle(record, coco, random_routing.mixtures, seed, by_class)
    drawn = {
        name: curves.curve_of(record, random_routing, choices) for name, choices in oracles.items()
    }
    merit = curves.merit_rows(random_routing, scores, rows, oracles.get('honest'))
    calibrated = len(calibration) > 0
    if validation and not calibrated:
        calibration = difficulties_of(validation[0])
    say('peers')
    gained, facts = (
        curves.all_benefits(record, coco, random_routing.mixtures),
        dict(record.provenance),
    )
    record = curves.with_class_objects(record, *(validation or (record, coco)))
    if validation:
        validation = curves.with_class_objects(validation[0], *validation), validation[1]
    peers, left_out = curves.score_peers(record, validation, gained, seed)
    judged = {
        curves.peer_title(name): curves.judge_peer(name, record, random_routing, peer_scores)
        for name, peer_scores in peers.items()
    }
    say('strata and correlations')
    correlations = _correlations(record, coco, scores, gained, bootstrap, seed)
    analysis = dict(
        images=len(record),
        ends=_ends(record, rows),
        rows=rows,
        calibrated=calibrated_trade_off(record, random_routing, calibration)
        if len(calibration)
        else [],
        curves=dict(
            router=curves.router_curve(rows), random=curves.random_curve(record, rows), **drawn
        ),
        thresholds=curves.threshold_points(record, random_routing, scores),
        merit=list(merit.values()),
        router=curves.judge_router(record, random_routing, curves.choices_of(scores)),
        peers=judged,
        left_out={curves.peer_title(name): why for name, why in left_out.items()},
        baselines=dict(points=[], leads=[]),
        certificate=curves.oracle_certificate(
            record, curves.image_values(record, coco, random_routing.mixtures, by_class)
        ),
        strata=_strata(record, coco, random_routing.mixtures, scores),
        correlations=list(correlations.values()),
        provenance=facts,
    )
    if baselines:
        say('plain detectors')
        analysis['baselines'] = compare_with_baselines(
            record, coco, random_routing, curves.choices_of(scores), baselines
        )
    say('diagnosis')
    figures = dict(
        images=len(record),
        bootstrap=bootstrap,
        first_scale=float(record.provenance.get('first_scale', 1.0)),
        exits=estimates.exit_estimates(random_routing),
        gap=estimates.exit_gap(random_routing),
        strata=estimates.strata_gaps(record, random_routing),
        correlation=_benefit_correlations(correlations, validation, bootstrap, seed, by_class),
        router_gain=_estimate(merit['gain']),
        half_share=rows[curves.HALF]['hard_share'],
        normalized_gain=_estimate(merit['normalized_gain']),
        spread=estimates.difficulty_spread(scores),
        peers=estimates.peer_leads(record, random_routing, scores, peers),
        class_gain=estimates.class_gain(random_routing, gained),
    )
    if baselines:
        at_half = analysis['baselines']['leads'][curves.HALF]
        figures['baselines'] = {cost: at_half[f'lead_{cost}'] for cost in ('gflops', 'latency')}
    if 'honest' in oracles:
        figures.update(
            honest_gain=estimates.over_random(random_routing, oracles['honest'][curves.HALF]),
            efficacy=_estimate(merit['efficacy']),
        )
    if training:
        figures['loss_shares'] = dict(
            train=estimates.share_gaining(training, bootstrap, seed),
            held_out=estimates.share_gaining(record, bootstrap, seed),
        )
    if len(calibration):
        transfer = estimates.threshold_transfer(np.asarray(calibration), scores, random_routing)
        figures['transfer'] = dict(transfer, calibrated=calibrated)
    return _plain(dict(analysis, diagnosis=diagnose(figures)))


def require_apart(record: RoutingRecord, other: RoutingRecord, name: str) -> None:
    """Refuse a record that shares images with the one that is judged."""
    files = set(record.files)
    shared = [file for file in other.files if file in files]
    if shared:
        raise UsageError(
            f"{len(shared)} images (such as '{shared[0]}') are in the record that is judged and in "
            'the '
            f'{name} record: routers that learn there would know the answers; record another split'
        )


def write_analysis(
    record: RoutingRecord,
    coco: COCO,
    analysis: Mapping,
    out_dir: str | Path,
    title: str = 'What routing is worth',
    name: str = 'routing',
) -> Path:
    """Write ``routing.html``, self-contained, and ``routing.json``.

    Args:
        record (RoutingRecord): What was analyzed.
        coco (COCO): Its ground truth.
        analysis (Mapping): As `analyze_routing` gives it.
        out_dir (str or Path): Where to; made if absent. What is there is replaced, the page last.
        title (str): Of the page.
        name (str): Of both files. Defaults to 'routing'.

    Returns:
        Path: The page.
    """
    page, path = make_page(title, analysis, make_gallery(record, coco)), Path(out_dir) / name
    write_atomically(json.dumps(analysis, indent=1).encode(), path.with_suffix('.json'))
    write_atomically(page.encode(), path.with_suffix('.html'))
    return path.with_suffix('.html')


def _ends(record: RoutingRecord, rows: Sequence[Mapping]) -> list[dict]:
    numbers = str(record.provenance.get('exits', '0 and 1')).split(' and ')
    by_share = {row['share']: row for row in rows}
    names = ('ap', 'ap50', 'gflops', 'latency')
    return [
        dict(exit=int(number), **{name: by_share[share][name] for name in names})
        for number, share in zip(numbers, (0.0, 1.0))
    ]


def _estimate(entry: Mapping) -> estimates.Estimate:
    return entry['value'], entry['low'], entry['high']


# Where and why.

_SIZES = dict(small='small: up to 32 x 32', medium='medium', large='large: from 96 x 96')


def _strata(
    record: RoutingRecord, coco: COCO, mixtures: Mixtures, scores: np.ndarray
) -> list[dict]:
    """Tables of both exits' AP."""
    annotation_ids = coco.getAnnIds(imgIds=record.ids.tolist(), iscrowd=False)
    areas = np.array([annotation['area'] for annotation in coco.loadAnns(annotation_ids)])
    counts = {
        size: int(((AREAS[size][0] <= areas) & (areas <= AREAS[size][1])).sum()) for size in _SIZES
    }
    tables = [
        dict(
            title='By size of object',
            name='size, pixels',
            counts='objects',
            rows=[
                dict(name=_SIZES[size], count=counts[size], aps=aps)
                for size, aps in by_size(mixtures).items()
            ],
        )
    ]
    if record.objects is not None:
        tables.append(
            dict(
                title='By number of objects',
                name='objects',
                counts='images',
                rows=[
                    dict(name=row['objects'], count=row['images'], aps=row['ap'])
                    for row in by_objects(record, mixtures)
                    if row['images']
                ],
            )
        )
    tables.append(
        dict(
            title="By the router's difficulty",
            name='difficulty',
            counts='images',
            rows=[
                dict(
                    name=f'{row["low"]:.3f} to {row["high"]:.3f}',
                    count=row['images'],
                    aps=row['ap'],
                )
                for row in by_difficulty(mixtures, scores)
            ],
        )
    )
    return tables


#: What difficulty is correlated with: key -> name, meaning.
_BENEFITS = dict(
    ap=('per-image AP gained', 'What the image gains by the dear exit, in AP of that image alone.'),
    loss=('loss saved', 'As the heads average it over an image: one object counts as much as ten.'),
    loss_objects=('loss saved x objects', 'The same, summed over objects, which is how AP counts.'),
    loss_class=(
        'loss saved x objects, by class',
        'The same, each object by how rare its class is: AP is a mean over classes.',
    ),
    ap_class=(
        'per-image AP gained, by class',
        'Summed over objects, each by how rare its class is.',
    ),
    reward=(
        'reward by ORIC',
        'What the dear exit adds on this image to the AP of an ensemble of images.',
    ),
    objects=('number of objects', 'Annotated ones.'),
    entropy=('entropy of the image', 'Of its gray levels.'),
    difficulty=(
        'difficulty in the annotation file',
        'That the image was made with; the router never sees it.',
    ),
)


def _correlations(
    record: RoutingRecord,
    coco: COCO,
    scores: np.ndarray,
    gained: Mapping[str, np.ndarray],
    bootstrap: int,
    seed: int,
) -> dict[str, dict]:
    others = {
        name: record.column(name).astype(float)
        for name in ('objects', 'entropy')
        if record.column(name) is not None
    }
    entries = coco.loadImgs(record.ids.tolist())
    if all('difficulty' in entry for entry in entries):
        others['difficulty'] = np.array([entry['difficulty'] for entry in entries], float)
    correlations = rank_correlations(scores, {**gained, **others}, bootstrap, seed)
    return {
        name: dict(
            name=_BENEFITS[name][0],
            value=estimate['correlation'],
            low=estimate['low'],
            high=estimate['high'],
            meaning=_BENEFITS[name][1],
        )
        for name, estimate in correlations.items()
    }


def _benefit_correlations(
    correlations: Mapping[str, Mapping],
    validation: Validation,
    bootstrap: int,
    seed: int,
    by_class: bool,
) -> dict[str, estimates.Estimate]:
    """With what is saved over all objects or, without losses, the AP gained; here and on the
    validation set."""
    kind = '_class' if by_class else '_objects'
    name = f'loss{kind}' if f'loss{kind}' in correlations else 'ap_class' if by_class else 'ap'
    estimates_by_set = dict(test=_estimate(correlations[name]))
    if validation:
        gained = curves.all_benefits(*validation, Mixtures(*validation))
        if name in gained:
            val_correlations = rank_correlations(
                difficulties_of(validation[0]), {name: gained[name]}, bootstrap, seed
            )
            estimates_by_set = dict(
                val=(
                    val_correlations[name]['correlation'],
                    val_correlations[name]['low'],
                    val_correlations[name]['high'],
                ),
                **estimates_by_set,
            )
    return estimates_by_set


def _plain(value: object) -> object:
    """Numbers and lists of Python's own, as JSON takes them; what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value
