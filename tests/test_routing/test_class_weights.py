import numpy as np
import pytest
from routing_cases import build_coco

from dynamicdet.routing.class_weights import class_weights, count_objects, mean_weights


def test_weights_by_hand():
    """1 / 30 and 1 / 50, in proportion: the ten and thirty objects weigh 1 on average."""
    weights = class_weights([10, 30])
    assert weights[0] / weights[1] == pytest.approx(5 / 3)
    assert 10 * weights[0] + 30 * weights[1] == pytest.approx(40)
    # Of a class without objects there is none in the mean; its weight is the largest.
    more = class_weights([10, 30, 0])
    assert more[:2] == pytest.approx(weights) and more[2] / more[0] == pytest.approx(1.5)


def test_limits():
    assert class_weights([0, 0]).tolist() == [1, 1] and class_weights([]).shape == (0,)
    assert class_weights([7, 7, 7]) == pytest.approx(1)
    # Next to a large constant all weigh the same, next to none a class weighs the same as another.
    assert class_weights([1, 99], smoothing=1e9) == pytest.approx(1, abs=1e-6)
    weights = class_weights([1, 99], smoothing=1e-9)
    assert weights[0] == pytest.approx(99 * weights[1])


def test_images_have_the_mean_weight_of_their_objects():
    counts = np.array([[2, 0], [1, 3], [0, 0]])
    assert mean_weights(counts, [3.0, 0.5]) == pytest.approx([3, (3 + 3 * 0.5) / 4, 1])


def test_objects_are_counted_without_crowds():
    box = [0, 0, 9, 9]
    coco = build_coco(
        [4, 7, 9],
        [
            dict(image_id=7, bbox=box, category_id=5),
            dict(image_id=7, bbox=box, category_id=5),
            dict(image_id=7, bbox=box, category_id=2, iscrowd=1),
            dict(image_id=4, bbox=box, category_id=2),
        ],
        categories=(5, 2),
    )
    assert count_objects(coco, [7, 4, 9]).tolist() == [[0, 2], [1, 0], [0, 0]]
