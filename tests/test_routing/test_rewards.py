import numpy as np
import pytest
from routing_cases import found, ground_truth, make_record, random_case

from dynamicdet.routing.evaluation import evaluate, mixed_results
from dynamicdet.routing.rewards import marginal_rewards


@pytest.mark.parametrize('ensemble', [500, 9])
def test_rewards_are_differences_of_pycocotools_aps(ensemble):
    """Of sets in which one image alone leaves at the last exit; each part of them by itself."""
    coco, record = random_case(images=20, seed=3)
    rewards = marginal_rewards(record, coco, ensemble, seed=1)
    order = np.random.default_rng(1).permutation(20)
    parts = [order] if ensemble == 500 else np.array_split(order, 2)
    for rows in parts:
        own = record.take(rows)
        ids = own.ids.tolist()
        easy = evaluate(coco, mixed_results(own, [0] * len(rows)), ids)['ap']
        for place, row in enumerate(rows):
            choice = [int(place == other) for other in range(len(rows))]
            ap = evaluate(coco, mixed_results(own, choice), ids)['ap']
            assert rewards[row] == pytest.approx(len(rows) * (ap - easy), abs=1e-6)
    assert np.abs(rewards).max() > 1


def test_a_false_alarm_costs_where_an_image_has_no_objects():
    """Its own AP is 0 at either exit; in the set its sure false alarm comes first."""
    coco = ground_truth([[[10, 10, 20, 20]], []])
    hit, ghost = found([10, 10, 20, 20], score=0.5), found([80, 80, 20, 20], score=0.9)
    record = make_record([0.5, 0.5], [hit, ghost], [hit, []])
    assert marginal_rewards(record, coco) == pytest.approx([0, 2 * 50])


def test_ensembles_without_objects_have_no_rewards():
    coco = ground_truth([[], [], [[10, 10, 20, 20]]])
    record = make_record([0.5] * 3, [[]] * 3, [found([10, 10, 20, 20])] * 3)
    # Each image by itself.
    assert marginal_rewards(record, coco, ensemble=0) == pytest.approx([0, 0, 100])
