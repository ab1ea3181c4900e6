"""Routers that see exit 0's detections: they run after exit 0's neck and heads, which run once."""

import json

import numpy as np
import pytest
import torch

from dynamicdet.errors import UsageError
from dynamicdet.measuring.calibration import detection_arrays, exit_states
from dynamicdet.measuring.flops import measure_costs
from dynamicdet.measuring.router_from_records import fit_router_to_records
from dynamicdet.models.raw_outputs import detector_outputs
from dynamicdet.routing import build_objective
from dynamicdet.routing.detection_features import WIDTH, features
from dynamicdet.routing.evaluation import read_truth
from dynamicdet.routing.record import Detections, RoutingRecord
from dynamicdet.routing.router import Router
from dynamicdet.testing import randomize, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS


def build(name='fcos', sees='both', **settings):
    cfg = tiny_dynamic(name, router=dict(type='Router', sees=sees), **settings)
    model = randomize(MODELS.build(cfg)).eval()
    if sees != 'maps':
        model.router.class_weights.copy_(torch.tensor([0.5, 1.0, 3.0]))
    return model


def found_by(samples):
    return [
        [sample.pred_instances[key] for key in ('bboxes', 'scores', 'labels')] for sample in samples
    ]


@pytest.mark.parametrize('sees', ['detections', 'both'])
@pytest.mark.parametrize(
    'name, settings',
    [
        ('fcos', dict(shared=False)),
        ('faster_rcnn', {}),
        ('fcos', dict(shared=False, first_scale=0.5, reuse_stages=0)),
    ],
)
@torch.no_grad()
def test_exits_find_what_they_find_under_any_router(name, settings, sees):
    """Also where all is hard: exit 0's detections are then looked at, and forgotten."""
    model, plain = build(name, sees, **settings), build(name, 'maps', **settings)
    state = {key: value for key, value in model.state_dict().items() if 'router' not in key}
    plain.load_state_dict(state, strict=False)
    for threshold in (-1.0, 1.0):
        for one in (model, plain):
            one.set_budget(threshold=threshold)
        batches = [tiny_batch((2, 1, 3)) for _ in range(2)]
        own, others = (one.test_step(batch) for one, batch in zip((model, plain), batches))
        assert [sample.exit for sample in own] == [int(threshold < 0)] * 3
        for left, right in zip(found_by(own), found_by(others)):
            assert all(torch.equal(a, b) for a, b in zip(left, right))
        assert sum(len(scores) for _, scores, _ in found_by(own)) > 10


@pytest.mark.parametrize('scale', [1.0, 0.5])
@torch.no_grad()
def test_difficulties_follow_from_the_detections(scale):
    """In the frame of the original image, which is twice as large as the delivered one."""
    model = build(sees='both', shared=False, first_scale=scale, reuse_stages=0)
    data = model.data_preprocessor(tiny_batch((2, 1, 3)), False)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(0.5, 0.5), ori_shape=(192, 256)))
    inputs, samples = data['inputs'], data['data_samples']
    first = next(exit_states(model, inputs, samples))
    phi = model.score(inputs, samples)
    assert phi.tolist() == first.difficulties
    joined = Detections.join(detection_arrays(model.finish(first), [0, 1, 2]))
    weights = np.array([0.5, 1.0, 3.0])[joined.categories]
    found = torch.from_numpy(features(joined, weights)).float()
    maps, _ = model._first_maps(inputs)
    seen = torch.cat([model.router.pool(maps), found], dim=1)
    torch.testing.assert_close(model.router.score(seen), phi)
    assert seen.shape[1] == len(model.router.mean) and phi.unique().numel() == 3
    # Boxes that are not wanted in the original frame change nothing about it.
    model.predict(inputs, samples, rescale=False)
    assert [sample.difficulty for sample in samples] == pytest.approx(phi.tolist(), abs=1e-5)


@torch.no_grad()
def test_heads_of_exit_0_run_once_on_every_image():
    model = build(shared=False)
    calls = []
    for branch in model.branches:
        branch.bbox_head.register_forward_hook(
            lambda head, inputs, outputs, exit=len(calls): calls.append(len(inputs[0][0]))
        )
    batch = tiny_batch((2, 1, 3))
    data = model.data_preprocessor(batch, False)
    phi = model.score(data['inputs'], data['data_samples'])
    calls.clear()
    model.set_budget(threshold=float(phi.median()))
    results = model.test_step(batch)
    assert sorted(sample.exit for sample in results) == [0, 0, 1]
    assert calls == [3, 1]
    costs = measure_costs(model, (96, 128))
    plain = measure_costs(build(sees='maps', shared=False), (96, 128))
    heads = plain.parts['first neck and heads'].flops
    assert costs.exits[1].flops - plain.exits[1].flops == pytest.approx(heads, rel=0.01)


def make_record(model, images=40, seed=0):
    """What an image gains is told by how sure its one detection is, of a rare class."""
    rng = np.random.default_rng(seed)
    entries = []
    for index in range(images):
        score = rng.uniform(0.05, 0.95)
        entries.append(
            dict(
                id=index,
                file=f'{index}.jpg',
                difficulty=0.5,
                detections=[[dict(bbox=[0, 0, 9, 9], score=score, category_id=index % 3 + 1)], []],
                features=rng.random(sum(model.backbone.channels)).astype(np.float32),
                losses=[1.0 + score * (1 - score), 1.0],
                objects=1,
            )
        )
    facts = dict(categories=[3, 1, 2], classes=['c', 'a', 'b'])
    return RoutingRecord.from_images(entries, [1.0, 2.0], [0.1, 0.2], facts)


@pytest.mark.parametrize('method', ['linear', 'rule', 'layers'])
@pytest.mark.parametrize('sees', ['detections', 'both'])
def test_it_is_fitted_to_records(sees, method, tmp_path):
    model = build(sees=sees, shared=False)
    record = make_record(model)
    objects = [1] * 10 + [2] * 20 + [3] * 10
    truth = dict(
        images=[
            dict(id=index, file_name=f'{index}.jpg', width=64, height=64) for index in range(40)
        ],
        annotations=[
            dict(
                id=index + 1,
                image_id=index,
                bbox=[0, 0, 9, 9],
                area=81,
                iscrowd=0,
                category_id=category,
            )
            for index, category in enumerate(objects)
        ],
        categories=[dict(id=one, name=name) for one, name in zip((1, 2, 3), 'abc')],
    )
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    coco = read_truth(str(tmp_path / 'truth.json'))
    fit, images = fit_router_to_records(
        model.router, [record], build_objective('rank'), [coco], method=method
    )
    assert images == 40 and fit.correlation > 0.3
    model.router.load_state_dict(fit.state)
    # By label: categories 3, 1, 2 with 10, 10 and 20 objects.
    weights = model.router.class_weights.tolist()
    assert weights[0] == weights[1] == pytest.approx(weights[2] * 40 / 30)
    with pytest.raises(UsageError, match='needs the annotation files'):
        fit_router_to_records(model.router, [record], build_objective('rank'))


def test_the_rule_is_of_detections():
    model = build(sees='maps', shared=False)
    with pytest.raises(UsageError, match="model.router.sees='detections'"):
        fit_router_to_records(
            model.router, [make_record(model)], build_objective('rank'), method='rule'
        )


def test_what_is_refused():
    with pytest.raises(UsageError, match="sees 'maps', 'detections' or 'both'; got 'all'"):
        Router([8], sees='all')
    with pytest.raises(UsageError, match='is fitted to records, not trained'):
        build(shared=False, train_router=True)
    model = build(shared=False)
    assert len(model.router.mean) == sum(model.backbone.channels) + WIDTH
    data = model.data_preprocessor(tiny_batch((1,)), False)
    with pytest.raises(UsageError, match="not in mode='tensor'"):
        model(data['inputs'], data['data_samples'], mode='tensor')
    with pytest.raises(UsageError, match='remove them first'):
        detector_outputs(model, torch.zeros(1, 3, 96, 128))
