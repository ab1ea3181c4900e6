"""Merged exits on real mmdet configs, shrunk: what an image finds at all exits up to its own."""

import copy

import pytest
import torch
from mmengine.hub import get_config
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import InstanceData

from conftest import same_detections, spread_scores
from dynamicdet.apis.stream import Stream
from dynamicdet.errors import UsageError
from dynamicdet.measuring.flops import count_flops, measure_costs
from dynamicdet.models.merging import merge_instances
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.thresholds import thresholds_for_share
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes

NMS = dict(type='nms', iou=0.5)
MERGES = [NMS, dict(type='wbf', iou=0.5)]
#: Each kind of detector in its smallest form: heads shared and not, masks, three exits, one
#: backbone at two resolutions.
KINDS = dict(
    two_stage=dict(name='faster_rcnn'),
    masks=dict(name='mask_rcnn'),
    smaller_first=dict(name='yolox', shared=False, reuse_stages=0, first_scale=0.5),
    three_exits=dict(name='retinanet', backbones=3),
    one_backbone=dict(name='retinanet', backbones=1, reuse_stages=0, first_scale=0.5),
)
COUNT = 6


def build(kind='two_stage', merge=NMS, share=0.5):
    """A detector whose router parts `batch` in about equal numbers for all exits."""
    model = spread_scores(randomize(MODELS.build(tiny_dynamic(**KINDS[kind], merge=merge)))).eval()
    with torch.no_grad():
        scores = model.score(*fresh(model)).tolist()
    model.threshold.copy_(torch.tensor(thresholds_for_share(scores, share, model.num_exits)))
    return model


def batch(count=COUNT):
    return tiny_batch((1,) * count, size=(64, 96), masks=False)


def fresh(model, data=None):
    data = model.data_preprocessor(copy.deepcopy(data or batch()))
    return data['inputs'], data['data_samples']


@torch.no_grad()
def exits_of(model):
    """What each exit finds by itself in the images of `batch`, (K, COUNT)."""
    merge, threshold, model.merge = model.merge, model.threshold.clone(), None
    found = []
    for exit in range(model.num_exits):
        forced = torch.full(model.threshold.shape, 1.0)
        forced.view(-1)[:exit] = -1
        model.threshold.copy_(forced)
        found.append([one.pred_instances for one in model.predict(*fresh(model))])
    model.merge = merge
    model.threshold.copy_(threshold)
    return found


@pytest.mark.parametrize('merge', MERGES, ids=['nms', 'wbf'])
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_results_are_the_exits_own_merged_in_order(kind, merge):
    model = build(kind, merge)
    alone = exits_of(model)
    assert all(sum(map(len, own)) for own in alone)
    found = model.predict(*fresh(model))
    assert [sample.img_id for sample in found] == list(range(COUNT))
    assert {sample.exit for sample in found} == set(range(model.num_exits))
    for row, sample in enumerate(found):
        exits = [own[row] for own in alone[: sample.exit + 1]]
        wanted, *_ = merge_instances([exits], Merge.parse(merge))
        assert same_detections(sample.pred_instances, wanted)
        assert set(sample.pred_instances.keys()) == set(exits[0].keys())


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_one_by_one_and_in_a_stream_it_is_the_same(kind):
    model = build(kind)
    wanted = model.predict(*fresh(model))
    singles = [
        {name: values[row : row + 1] for name, values in batch().items()} for row in range(COUNT)
    ]
    alone = [model.test_step(copy.deepcopy(one))[0] for one in singles]
    with Stream(model, batch_size=2, hard_batch=3, collect_easy=True) as stream:
        streamed = list(stream.run(copy.deepcopy(singles)))
    for found in (alone, streamed):
        for one, other in zip(found, wanted, strict=True):
            assert (one.img_id, one.exit) == (other.img_id, other.exit)
            assert same_detections(one.pred_instances, other.pred_instances)


@pytest.mark.parametrize('kind', ['masks', 'smaller_first', 'three_exits'])
@torch.no_grad()
def test_without_merging_it_is_as_before(kind):
    """Bit by bit: each image has what its exit finds by itself."""
    model = build(kind, merge=None)
    alone, found = exits_of(model), model.predict(*fresh(model))
    for exit in range(model.num_exits):
        assert any(sample.exit == exit for sample in found)
    forced = build(kind, merge=None, share=0.0)
    whole = forced.predict(*fresh(forced))
    for row, (one, easy) in enumerate(zip(found, whole)):
        assert same_detections(one.pred_instances, alone[one.exit][row])
        for name in easy.pred_instances.keys():
            assert torch.equal(easy.pred_instances[name], alone[0][row][name])


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize('threshold, runs', [(1, (1, 0, 0)), (-1, (1, 1, 1)), (None, (1, 1, 1))])
@torch.no_grad()
def test_neck_and_heads_of_exit_0_run_once_on_all(threshold, runs):
    model = build('smaller_first')
    if threshold is not None:
        model.set_budget(threshold=threshold)
    counters = [
        count_calls(part)
        for part in (model.branches[0].neck, model.branches[1].neck, model.backbone.second.layer2)
    ]
    model.predict(*fresh(model))
    assert tuple(len(calls) for calls in counters) == runs


@torch.no_grad()
def test_masks_follow_the_boxes():
    """Each mask is the one that its box had at its exit."""
    for merge in MERGES:
        model = build('masks', merge, share=1.0)
        alone = exits_of(model)
        for row, sample in enumerate(model.predict(*fresh(model))):
            found = sample.pred_instances
            assert found.masks.shape == (len(found), 64, 96)
            every = InstanceData.cat([own[row] for own in alone])
            for one in range(len(found)):
                known = (every.scores - found.scores[one]).abs() < 1e-5
                assert (every.masks[known] == found.masks[one]).flatten(1).all(1).any()


@torch.no_grad()
def test_masks_of_a_single_stage_detector():
    """RTMDet-Ins, whose masks come from kernels of its own."""
    detector = shrink(get_config('mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py').model)
    detector.test_cfg.score_thr = 0
    cfg = dict(
        type='DynamicDetector',
        detector=detector,
        backbones=1,
        reuse_stages=0,
        first_scale=0.5,
        merge='nms',
    )
    model = spread_scores(randomize(MODELS.build(cfg))).eval()
    model.set_budget(threshold=-1)
    for sample in model.predict(*fresh(model, tiny_batch((1, 1), size=(128, 128), masks=False))):
        found = sample.pred_instances
        assert len(found) and found.masks.shape == (len(found), 128, 128)


def test_other_kinds_of_boxes_and_exits_that_differ():
    ones = [
        InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([[0.0, 0, 10, high]])),
            scores=torch.tensor([0.5]),
            labels=torch.tensor([1]),
        )
        for high in (10, 8)
    ]
    (fused,) = merge_instances([ones], Merge('wbf', 0.5))
    assert isinstance(fused.bboxes, HorizontalBoxes)
    torch.testing.assert_close(fused.bboxes.tensor, torch.tensor([[0.0, 0, 10, 9]]))
    ones[1].masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    with pytest.raises(UsageError, match='give masks: give merge=None'):
        merge_instances([ones], Merge('nms', 0.5))
    # Where one finds nothing, it is the other's, whatever it has.
    assert merge_instances([[ones[0][:0], ones[1]]], Merge('nms', 0.5)) == [ones[1]]
    nothing = [one[:0] for one in ones]
    assert merge_instances([nothing], Merge('nms', 0.5)) == [nothing[1]]


@torch.no_grad()
def test_boxes_that_are_not_rescaled_are_in_the_delivered_frame():
    model = build('smaller_first')
    inputs, samples = fresh(model)
    for one in samples:
        one.set_metainfo(dict(scale_factor=(2.0, 2.0), ori_shape=(32, 48)))
    rescaled = model.predict(inputs, copy.deepcopy(samples))
    as_is = model.predict(inputs, copy.deepcopy(samples), rescale=False)
    for one, other in zip(as_is, rescaled):
        torch.testing.assert_close(one.pred_instances.bboxes, 2 * other.pred_instances.bboxes)


# Scores on one scale.


@torch.no_grad()
def test_scores_are_scaled_by_exit():
    model = build('two_stage', merge=None)
    before = model.predict(*fresh(model))
    model.set_platt_scaling([(0.5, 0.25), (2.0, -1.0)])
    after = model.predict(*fresh(model))
    for one, other in zip(before, after):
        scale, shift = (0.5, 0.25) if one.exit == 0 else (2.0, -1.0)
        logits = torch.logit(one.pred_instances.scores, 1e-6)
        wanted = torch.sigmoid(scale * logits + shift)
        torch.testing.assert_close(other.pred_instances.scores, wanted)
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)


@torch.no_grad()
def test_checkpoints_from_before_load():
    model = build()
    state = model.state_dict()
    assert state['platt_scale'].tolist() == [1, 1] and state['platt_shift'].tolist() == [0, 0]
    old = {name: value for name, value in state.items() if not name.startswith('platt_')}
    other = build(merge=None)
    assert not any(other.load_state_dict(old))
    state['platt_scale'] = torch.tensor([0.5, 2.0])
    load_state_dict(other, state)
    assert other.platt_scale.tolist() == [0.5, 2]
    # And count: as if they had been chosen.
    model.merge = None
    model.set_platt_scaling([(0.5, 0.0), (2.0, 0.0)])
    for one, two in zip(other.predict(*fresh(other)), model.predict(*fresh(model))):
        assert torch.equal(one.pred_instances.scores, two.pred_instances.scores)


# What it costs.


@pytest.mark.parametrize('kind', ['smaller_first', 'three_exits', 'one_backbone'])
@torch.no_grad()
def test_costs_count_what_ran(kind):
    costs = []
    for merge in (None, 'nms'):
        model = build(kind, merge)
        model.set_budget(threshold=-1 if model.num_exits == 2 else [-1] * (model.num_exits - 1))
        inputs, samples = fresh(model, batch(1))
        costs.append(
            (measure_costs(model, (64, 96)), count_flops(lambda: model.predict(inputs, samples))[0])
        )
    (plain, ran), (merged, ran_merged) = costs
    assert plain.parts == merged.parts and plain.exits[0] == merged.exits[0]
    heads = [part.flops for name, part in plain.parts.items() if name.endswith('heads')]
    for exit, (one, other) in enumerate(zip(plain.exits, merged.exits)):
        assert other.flops - one.flops == sum(heads[:exit])
    assert ran_merged - ran == sum(heads[:-1])
    own = merged.exits[-1].parameters - plain.exits[-1].parameters
    assert own == (plain.parts['first neck and heads'].parameters if kind == 'smaller_first' else 0)


# Step 2.


@pytest.mark.parametrize('name', ['faster_rcnn', 'yolox'])
def test_gains_in_ap_are_of_merged_exits(name):
    """Where exit 0 finds all objects, nothing that exit 1 adds below takes any of its AP."""
    settings = dict(train_router=True, objective='ap', first_scale=0.5, reuse_stages=0)
    shared = name == 'faster_rcnn'
    model = MODELS.build(tiny_dynamic(name, shared=shared, **settings))
    model = spread_scores(randomize(model)).eval()
    inputs, samples = fresh(model)
    model.set_budget(threshold=1)
    found = model.predict(inputs, copy.deepcopy(samples), rescale=False)
    for sample, own in zip(samples, found):
        surest = own.pred_instances[:3]
        assert len(surest)
        sample.gt_instances = InstanceData(bboxes=surest.bboxes, labels=surest.labels)
    plain, _ = model.exit_gains(inputs, samples)
    assert plain.max() < 0
    model.merge = Merge('nms', 0.5)
    # All of exit 0 is surer than anything of exit 1.
    model.set_platt_scaling([(1.0, 8.0), (1.0, -8.0)])
    merged, _ = model.exit_gains(inputs, samples)
    assert merged.abs().max() < 1e-6
