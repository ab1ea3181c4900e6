"""What a run of the experiment on routing came to: from records to numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pycocotools.coco import COCO

from dynamicdet.reports.routing_analysis import two_exit_record
from dynamicdet.reports.routing_analysis_curves import choices_by_oracle
from dynamicdet.routing import build_objective
from dynamicdet.routing.curve import SHARES, RandomRouting, split_by_share
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.merit import efficacy, normalized_gain
from dynamicdet.routing.peers import PEERS, peer_gflops, peer_scores
from dynamicdet.routing.record import RoutingRecord
from dynamicdet.routing.router_fitting import (
    features_of_record,
    fit_router,
    gains_of_record,
    rank_correlation,
)
from dynamicdet.routing.strata import by_objects, by_size, exit_benefits, rank_correlations
from dynamicdet.routing.thresholds import shares_beyond

#: Bootstrap resamples, all with seed 0: AP on each is kept, so that runs compare on the same
#: images.
RESAMPLES = 100
#: Objectives that are compared; lambda of the hand-set cost in units of the loss.
OBJECTIVES = {
    'paper': 'paper',
    'no_offset': 'no_offset',
    'cost_weight': dict(type='cost_weight', offset=0.1),
    'loss_sum': 'loss_sum',
    'rank': 'rank',
    'pairwise': 'pairwise',
    'ap': 'ap',
    'gain': 'gain',
}
#: Name of the images that step 1 did not see: all objectives are fitted to them, some also to
#: others.
HELD_OUT = 'held out'
#: The shares at which routers are judged; the ends are the exits.
INNER = SHARES[1:-1]


def plain_results(record: RoutingRecord, coco: COCO) -> dict:
    """AP of a plain detector, with resamples, and what it costs. Its record has one exit, twice."""
    random_routing = RandomRouting(Mixtures(record, coco), resamples=RESAMPLES)
    return dict(
        gflops=record.gflops[0],
        latency=record.latencies[0],
        provenance=record.provenance,
        **_one_exit(random_routing, 0),
    )


def dynamic_results(
    test: RoutingRecord,
    test_coco: COCO,
    sources: Mapping[str, RoutingRecord],
    train_coco: COCO,
    seed: int,
) -> dict:
    """All figures of a dynamic detector whose router is still to be found.

    Args:
        test (RoutingRecord): Record of the test set, with views.
        test_coco (COCO): Its ground truth.
        sources (Mapping): Name -> record of what routers are fitted to.
        train_coco (COCO): Their ground truth.
        seed (int): Of the fits.
    """
    mixtures = Mixtures(test, test_coco)
    random_routing = RandomRouting(mixtures, resamples=RESAMPLES)
    exits = [_one_exit(random_routing, exit) for exit in range(mixtures.exits)]
    pair = two_exit_record(test)
    honest, luck = (
        choices[1:-1]
        for choices in map(
            choices_by_oracle(pair, test_coco, Mixtures(pair, test_coco)).get, ('honest', 'oracle')
        )
    )
    routers = {}
    for source, record in sources.items():
        for name, objective in OBJECTIVES.items():
            if source == HELD_OUT or name in ('paper', 'loss_sum', 'rank'):
                routers[f'{name}, {source}'] = _fitted(
                    record, train_coco, test, objective, seed, pools=1
                )
    routers['rank, more pools'] = _fitted(
        sources[HELD_OUT], train_coco, test, 'rank', seed, pools=3
    )
    gained = exit_benefits(test, mixtures)
    results = dict(
        gflops=test.gflops,
        latencies=test.latencies,
        provenance=test.provenance,
        exits=exits,
        random=[random_routing.at(round(share * mixtures.images))[0] for share in INNER],
        by_size=by_size(mixtures),
        by_objects=by_objects(test, mixtures),
        share_gaining={
            name: _share_gaining(record) for name, record in {**sources, 'test': test}.items()
        },
        honest=_judge(random_routing, honest, honest),
        oracle=dict(_judge(random_routing, luck, honest), refined=True),
        routers={
            name: _judge_scores(random_routing, scores, honest, gained)
            for name, scores in routers.items()
        },
        peers=_peers(test, sources, train_coco, random_routing, honest, gained, seed),
    )
    if mixtures.exits > 2:
        results['all_exits'] = {
            name: over_all_exits(mixtures, scores, test.gflops) for name, scores in routers.items()
        }
    return results


def over_all_exits(
    mixtures: Mixtures, scores: np.ndarray, gflops: Sequence[float]
) -> dict[str, list[float]]:
    """AP, and mean GFLOPs, where a threshold for each exit shares the images out as one hard share
    has it (see `shares_beyond`)."""
    rank = np.argsort(np.argsort(-np.asarray(scores), kind='stable'), kind='stable')
    points: dict[str, list[float]] = dict(ap=[], gflops=[])
    for share in INNER:
        counts = [round(beyond * len(rank)) for beyond in shares_beyond(share, mixtures.exits)]
        choice = sum((rank < count).astype(int) for count in counts)
        points['ap'].append(mixtures.ap(choice))
        points['gflops'].append(float(np.asarray(gflops)[choice].mean()))
    return points


def together(first: RoutingRecord, *others: RoutingRecord) -> RoutingRecord:
    """Records of the same images as one, for fits."""
    images = [image for record in (first, *others) for image in record]
    return RoutingRecord.from_images(images, first.gflops, first.latencies, first.provenance)


def with_losses_of(record: RoutingRecord, others: Sequence[RoutingRecord]) -> RoutingRecord:
    """A record with the losses that each of its images has in one of others: of detectors that were
    trained without it. What the router sees stays."""
    losses = {
        identity: image_losses
        for other in others
        for identity, image_losses in zip(other.ids.tolist(), other.losses)
    }
    return replace(record, losses=np.array([losses[identity] for identity in record.ids.tolist()]))


def _one_exit(random_routing: RandomRouting, exit: int) -> dict:
    choice = np.full(random_routing.mixtures.images, exit)
    return dict(
        ap=random_routing.mixtures.ap(choice), resampled=_short(random_routing.resampled(choice))
    )


def _fitted(
    record: RoutingRecord, coco: COCO, test: RoutingRecord, objective, seed: int, pools: int
) -> np.ndarray:
    """Difficulties of the test images by a router fitted to a record; ``pools`` of its three are
    seen."""
    objective = build_objective(objective)
    features, test_features = features_of_record(record), features_of_record(test)
    width = features.shape[1] // 3 * pools
    ids = record.ids.tolist()
    # Views of one image stay together.
    groups = ids if len(set(ids)) < len(ids) else None
    fit = fit_router(
        features[:, :width],
        gains_of_record(record, objective.gain, coco),
        objective,
        groups=groups,
        seed=seed,
    )
    state = {name: value.numpy() for name, value in fit.state.items()}
    inputs = (test_features[:, :width] - state['mean']) / state['std']
    hidden = np.maximum(inputs @ state['fc1.weight'].T + state['fc1.bias'], 0)
    # The logit: it ranks as the difficulty does, without the sigmoid's ends.
    return (hidden @ state['fc2.weight'].T + state['fc2.bias'])[:, 0]


def _judge_scores(
    random_routing: RandomRouting,
    scores: np.ndarray,
    honest: np.ndarray,
    gained: Mapping[str, np.ndarray],
) -> dict:
    choices = np.array([split_by_share(scores, share)[1] for share in INNER])
    return dict(
        _judge(random_routing, choices, honest),
        correlation={
            name: estimate['correlation']
            for name, estimate in rank_correlations(scores, gained, resamples=0).items()
        },
        earning={name: rank_correlation(scores, values) for name, values in gained.items()},
    )


def _judge(random_routing: RandomRouting, choices: np.ndarray, honest: np.ndarray) -> dict:
    """AP at each share; on each resample at half hard and in the mean over shares; both figures of
    merit."""
    half = choices[len(choices) // 2]
    resampled = [random_routing.resampled(random_routing.choice(choice)) for choice in choices]
    return dict(
        ap=[random_routing.mixtures.ap(random_routing.choice(choice)) for choice in choices],
        resampled_half=_short(random_routing.resampled(random_routing.choice(half))),
        resampled_mean=_short(np.mean(resampled, axis=0)),
        normalized_gain=normalized_gain(random_routing, half),
        efficacy=efficacy(random_routing, choices, honest),
    )


def _peers(
    test: RoutingRecord,
    sources: Mapping[str, RoutingRecord],
    train_coco: COCO,
    random_routing: RandomRouting,
    honest: np.ndarray,
    gained: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, dict]:
    """Other routers; those that are fitted are fitted to the held-out images, Adaptive Feeding to
    the AP that each gains, as published."""
    held = sources[HELD_OUT]
    results = {}
    for name in PEERS:
        target = 'ap' if name == 'adaptive_feeding' else 'loss_sum'
        scores = peer_scores(name, test, held, gains_of_record(held, target, train_coco), seed)
        results[name] = dict(
            _judge_scores(random_routing, scores, honest, gained),
            charge=peer_gflops(name, test),
            target=target,
        )
    return results


def _share_gaining(record: RoutingRecord) -> float:
    """Share of images whose loss is smaller under the last exit."""
    return float((record.losses[:, 0] > record.losses[:, -1]).mean())


def _short(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]
