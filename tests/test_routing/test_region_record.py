"""Regions on records: targets, simulated crops and what they cost, by hand."""

import numpy as np
import pytest
import torch
from routing_cases import CATEGORY, build_coco, found, make_record

from dynamicdet.errors import UsageError
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.evaluation import evaluate, match_objects
from dynamicdet.routing.record import read_record, write_record
from dynamicdet.routing.region_cells import PLANES, kept_of_crop, kept_of_earlier
from dynamicdet.routing.region_fitting import fit_region_router
from dynamicdet.routing.region_maps import RegionRouter
from dynamicdet.routing.region_record import (
    cell_gains,
    objects_by_class,
    planes_of,
    region_gflops,
    share_of_pixels,
    simulate_regions,
)

SMALL, OTHER, LARGE = [10, 10, 20, 20], [150, 100, 20, 20], [0, 0, 180, 120]


@pytest.fixture
def case():
    """One image of 200 x 140 pixels: exit 1 finds two small objects, exit 0 one of them and a large
    one."""
    coco = build_coco(
        [1], [dict(image_id=1, bbox=box, category_id=CATEGORY) for box in (SMALL, OTHER, LARGE)]
    )
    first = [found(SMALL, score=0.4) + found(LARGE, score=0.8)]
    last = [found(SMALL, score=0.9) + found(OTHER, score=0.5) + found(LARGE, score=0.8)]
    record = make_record([0.5], first, last)
    record.frame = np.array([[140.0, 200.0, 1.0, 1.0]])
    record.provenance['branch0_gflops'] = 0.25
    return record, coco


def boxes_of(detections):
    return [(tuple(one['bbox']), round(one['score'], 3)) for one in detections[0]]


def test_gains_of_cells(case):
    record, coco = case
    gains = cell_gains(record, coco, [CATEGORY], np.array([2.0]))
    assert [own.shape for own in gains] == [(5, 7)]
    # Twice the weight, and scores are float32. The large object is found alike by both.
    wanted = np.zeros((5, 7))
    wanted[0, 0], wanted[3, 5] = 2 * 0.5, 2 * 0.5
    np.testing.assert_allclose(gains[0], wanted, atol=1e-6)
    # In a frame half as large.
    record.frame[:] = [70, 100, 0.5, 0.5]
    assert np.argwhere(cell_gains(record, coco, [CATEGORY], np.ones(1))[0]).tolist() == [
        [0, 0],
        [1, 2],
    ]


def test_matches_of_objects(case):
    record, coco = case
    first, last = (match_objects(record, coco, exit)[0] for exit in (0, 1))
    assert first == pytest.approx({1: 0.4, 3: 0.8})
    assert last == pytest.approx({1: 0.9, 2: 0.5, 3: 0.8})


def test_a_record_keeps_frames(case, tmp_path):
    record, _ = case
    write_record(record, tmp_path / 'record.npz')
    assert read_record(tmp_path / 'record.npz') == record
    assert record[0]['frame'] == [140, 200, 1, 1]
    record.frame = None
    with pytest.raises(UsageError, match='lacks frame'):
        planes_of(record, [CATEGORY], np.ones(1))


def test_simulated_crops(case):
    record, coco = case
    whole = [[(0, 0, 5, 7)]]
    # All of it, and nothing.
    assert boxes_of(simulate_regions(record, whole)) == boxes_of(record.detections[1])
    assert boxes_of(simulate_regions(record, [[]])) == boxes_of(record.detections[0])
    # A crop of the first cells: what is large is not in it, and stays as exit 0 found it.
    found_there = simulate_regions(record, [[(0, 0, 1, 1)]])
    assert sorted(boxes_of(found_there)) == [(tuple(LARGE), 0.8), (tuple(SMALL), 0.9)]
    both = simulate_regions(record, [[(0, 0, 1, 1)]], Merge.parse('nms'))
    assert sorted(boxes_of(both)) == [(tuple(LARGE), 0.8), (tuple(SMALL), 0.9)]
    # Merged, what lies in the halo counts, too.
    there = simulate_regions(record, [[(2, 4, 3, 5)]], Merge.parse('nms'))
    assert (tuple(OTHER), 0.5) in boxes_of(there)
    assert (tuple(OTHER), 0.5) not in boxes_of(simulate_regions(record, [[(2, 4, 3, 5)]]))
    results = [dict(one, image_id=1) for one in found_there[0]]
    # Two of three objects, without a mistake.
    assert evaluate(coco, results)['ap'] == pytest.approx(100 * 67 / 101)


def test_what_an_inner_edge_cuts_is_left_out():
    grid, rectangle = (5, 7), (1, 1, 2, 2)
    # With halo from 0 to 96: the image's edges at the left and above, inner ones at the others.
    boxes = np.array([[0, 0, 10, 10], [40, 40, 60, 60], [40, 40, 96, 60], [40, 60, 95.5, 95.5]])
    assert kept_of_crop(boxes, rectangle, grid).tolist() == [True, True, False, False]
    # The first one's center is in the halo.
    assert kept_of_crop(boxes, rectangle, grid, core=True).tolist() == [False, True, False, False]
    assert kept_of_earlier(boxes, rectangle, grid).tolist() == [True, False, True, True]
    assert kept_of_crop(boxes, (0, 0, 5, 7), grid, core=True).all()


def test_costs_of_regions(case):
    record, _ = case
    # Exit 0 costs 1 with its neck and heads; exit 1 takes 3, of which 0.75 are exit 0's.
    assert region_gflops(record, 0) == 1
    assert region_gflops(record, 1) == pytest.approx(1 + 2.25)
    assert share_of_pixels(record, [[(0, 0, 1, 1)]]) == 4 / 35
    del record.provenance['branch0_gflops']
    with pytest.raises(UsageError, match='branch0_gflops|neck and heads'):
        region_gflops(record, 1)


def test_objects_by_class():
    coco = build_coco(
        [1],
        [
            dict(image_id=1, bbox=SMALL, category_id=7),
            dict(image_id=1, bbox=OTHER, category_id=7, iscrowd=1),
            dict(image_id=1, bbox=OTHER, category_id=9),
        ],
        categories=(7, 8, 9),
    )
    assert objects_by_class(coco, [9, 8, 7]).tolist() == [1, 0, 1]


@pytest.mark.parametrize('hidden', [0, 16])
def test_fit_finds_what_gains(hidden):
    """A gain that is twice the doubt about small objects, and nothing else matters."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(PLANES, 4, 5 + row % 2, generator=generator) for row in range(40)]
    gains = [2 * own[0].numpy() for own in inputs]
    router = RegionRouter(hidden=hidden)
    assert fit_region_router(router, inputs[:30], gains[:30]) > 0.8
    with torch.no_grad():
        said = np.concatenate([router(own[None])[0].numpy().ravel() for own in inputs[30:]])
    wanted = np.concatenate([own.ravel() for own in gains[30:]])
    assert np.corrcoef(said, wanted)[0, 1] > 0.8
    # The same seed, the same map; and nothing of it is trained any more.
    again = RegionRouter(hidden=hidden)
    fit_region_router(again, inputs[:30], gains[:30])
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), again.parameters()))
    assert not any(one.requires_grad for one in router.parameters())
    with pytest.raises(UsageError, match='nothing to fit'):
        fit_region_router(router, inputs, [0 * own for own in gains])
