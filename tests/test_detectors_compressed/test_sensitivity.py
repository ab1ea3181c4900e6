"""Suggested allocations: hand-made curves, all choices tried, limits and refusals; and curves that
are measured."""

import itertools
import json

import numpy as np
import pytest
import torch

from conftest import load_small, on_findable
from dynamicdet.building import build_loader
from dynamicdet.compression.pruning_allocation import SensitivityCurve, allocate_pruning
from dynamicdet.errors import UsageError
from dynamicdet.files import latest_checkpoint
from dynamicdet.measuring.sensitivity import (
    blocks_of,
    draw_sensitivity,
    load_any_detector,
    measure_sensitivity,
    parts_of,
    sensitivity_table,
)
from dynamicdet.testing import tiny_detector
from mmdet.registry import MODELS

SHARES = (0.0, 0.5, 0.9)


def curve(name, weights, *losses, shares=SHARES):
    return SensitivityCurve(name, weights, shares, [50 - loss for loss in (0, *losses)])


def test_the_robust_part_is_pruned_first():
    curves = [curve('robust', 100, 0, 1), curve('fragile', 100, 10, 30)]
    # At no loss at all.
    assert allocate_pruning(curves, 1.0).shares == dict(robust=0.5, fragile=0.0)
    found = allocate_pruning(curves, 0.55)
    assert found.shares == dict(robust=0.9, fragile=0.0)
    assert found.left == pytest.approx(0.55) and found.loss == pytest.approx(1) == found.bound
    # 0.3 takes half of the fragile one: 10 + 1.
    assert allocate_pruning(curves, 0.3).shares == dict(robust=0.9, fragile=0.5)
    assert allocate_pruning(curves, 0.3).loss == pytest.approx(11)


def test_a_large_part_pays_more_for_the_same_loss():
    found = allocate_pruning([curve('large', 900, 1, 5), curve('small', 100, 1, 5)], 0.55)
    assert found.shares == dict(large=0.5, small=0.0) and found.loss == pytest.approx(1)


def test_a_rise_of_ap_is_no_gain():
    assert allocate_pruning([curve('lucky', 100, -3, 2), curve('other', 100, 0, 9)], 1.0).loss == 0


def test_against_all_choices():
    rng = np.random.default_rng(0)
    for _ in range(20):
        curves = [
            curve(str(index), int(rng.integers(1, 100)), *np.sort(rng.random(2) * 20))
            for index in range(5)
        ]
        size = rng.uniform(0.15, 1)
        found = allocate_pruning(curves, size)
        total = sum(one.weights for one in curves)
        best = min(
            sum(one.aps[0] - one.aps[pick] for one, pick in zip(curves, choice))
            for choice in itertools.product(range(3), repeat=5)
            if sum(one.weights * (1 - SHARES[pick]) for one, pick in zip(curves, choice))
            <= size * total
        )
        assert found.bound - 1e-6 <= best <= found.loss + 1e-6 and found.left <= size + 1e-9
        largest = max(abs(a - b) for one in curves for a, b in itertools.combinations(one.aps, 2))
        assert found.loss - found.bound < largest


@pytest.mark.parametrize(
    'size, reason', [(0.0, r'in \(0, 1\]'), (1.5, r'in \(0, 1\]'), (0.05, 'needs larger ones')]
)
def test_sizes_that_cannot_be(size, reason):
    with pytest.raises(UsageError, match=reason):
        allocate_pruning([curve('one', 10, 1, 2)], size)


def test_curves_of_unlike_shares():
    for curves in (
        [],
        [curve('a', 1, 1, 2), curve('b', 1, 1, shares=(0.0, 0.5))],
        [curve('a', 1, 1, 2, shares=(0.1, 0.5, 0.9))],
    ):
        with pytest.raises(UsageError, match='same shares'):
            allocate_pruning(curves, 0.5)


def test_the_table_has_the_most_sensitive_first():
    lines = sensitivity_table([curve('robust', 2_000_000, 0, 1), curve('fragile', 10, 10, 30)])
    assert [line.split()[0] for line in lines] == ['part', 'fragile', 'robust']
    assert lines[2].split()[1:] == ['2.00', 'M', '50.00', '50.00', '49.00']


def test_parts():
    model = MODELS.build(tiny_detector('faster_rcnn'))
    parts = parts_of(model, blocks_of(model), layers=True, structured=True, most=0.9)
    names = [part.name for part in parts]
    assert names[:4] == ['backbone', 'neck', 'rpn_head', 'roi_head']
    # Of 3 channels none would be left.
    assert 'rpn_head.rpn_conv' in names and 'rpn_head.rpn_cls' not in names
    assert sum(part.weights for part in parts[:4]) > sum(part.weights for part in parts[4:]) > 0
    with pytest.raises(UsageError, match='is in two blocks'):
        parts_of(model, dict(a=['backbone'], b=['backbone.layer1']))


@pytest.fixture(scope='module')
def detector(digits, findable, cascade):
    """(model, loader) of a small detector, dynamic, and images of which it finds something; all are
    easy."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        cascade,
        **{**on_findable(findable), 'model.budget': dict(threshold=1.0)},
    )
    return load_any_detector(cfg, latest_checkpoint(str(cascade)), 'cpu'), build_loader(
        cfg.test_dataloader
    )


def run(detector, path, calls=None, **changes):
    model, loader = detector
    settings = dict(
        shares=[0.5, 0.95], images=0, metric='AP50', identity=dict(weights='a'), **changes
    )
    parts = parts_of(model, dict(backbone=['backbone'], heads=['*.roi_head']))

    def progress(steps, what):
        for step in steps:
            if calls is not None:
                calls.append(step)
            yield step

    return measure_sensitivity(model, loader, parts, path=str(path), progress=progress, **settings)


def test_measured_curves_fall_resume_and_leave_the_model_as_it_was(detector, tmp_path):
    model, _ = detector
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path, calls = tmp_path / 'a.json', []
    curves = run(detector, path, calls)
    # Not a number: what was never calibrated.
    assert all(
        torch.equal(value.nan_to_num(-1), before[key].nan_to_num(-1))
        for key, value in model.state_dict().items()
    )
    assert len(calls) == 5  # nothing pruned once, two shares of two parts
    dense = curves[0].aps[0]
    assert dense == curves[1].aps[0] > 5 and curves[0].shares == [0.0, 0.5, 0.95]
    assert curves[0].aps[2] < 0.5 * dense
    # As after a kill: what is there is not measured again.
    saved = json.loads(path.read_text())
    saved['results'].pop('heads 0.95')
    path.write_text(json.dumps(saved))
    calls.clear()
    assert run(detector, path, calls) == curves
    assert [(part.name, share) for part, share in calls] == [('heads', 0.95)]
    assert draw_sensitivity(curves, allocate_pruning(curves, 0.9), 'AP50').startswith(b'\x89PNG')


def test_files_of_something_else(detector, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(dict(identity=dict(weights='b'), blocks={}, results={})))
    with pytest.raises(UsageError, match='with other weights'):
        run(detector, path)
    path.write_text('[]')
    with pytest.raises(UsageError, match='no measurement'):
        run(detector, path)


def test_a_part_of_the_images(detector, tmp_path):
    model, loader = detector
    parts = parts_of(model, dict(backbone=['backbone']))
    seen = []
    measure_sensitivity(
        model,
        loader,
        parts,
        [],
        2,
        'AP',
        str(tmp_path / 'b.json'),
        {},
        lambda steps, what: seen.append(what) or steps,
    )
    assert seen == ['AP of 2 images']
    with pytest.raises(UsageError, match='below 1'):
        measure_sensitivity(
            model,
            loader,
            parts,
            [1.0],
            2,
            'AP',
            str(tmp_path / 'c.json'),
            {},
            lambda steps, what: steps,
        )
