"""Merged exits of an early-exit detector: what a frame finds at all heads on its way."""

import copy

import pytest
import torch
from exit_cases import counted, frames, same, tiny

from dynamicdet.models.merging import merge_instances
from dynamicdet.routing.box_merging import Merge
from dynamicdet.video.costs import exit_gflops

MERGES = [dict(type='nms', iou=0.4), dict(type='wbf', iou=0.4)]
PLACE = dict(size=(64, 96), scale_factor=(0.5, 0.5))


@torch.no_grad()
def predict(model, images, samples, **options):
    return model.predict(images, [copy.deepcopy(one) for one in samples], **options)


def alone(images, samples, merge, **options):
    """What each exit finds by itself, merged with what those before it found, (E, N)."""
    found = tiny().predict_all(images, samples, **options).detections
    images = list(zip(*found))
    return [
        merge_instances([image[: exit + 1] for image in images], Merge.parse(merge))
        for exit in range(len(found))
    ]


@pytest.mark.parametrize('merge', MERGES, ids=['nms', 'wbf'])
@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('exit', [0, 1, 3, 4])
def test_frames_have_what_all_heads_on_their_way_found(exit, rescale, merge):
    gate = dict(type='FixedExit', exit=exit) if exit < 4 else None
    model = tiny(gate=gate, merge=merge)
    images, samples = frames((1,), (2,), **PLACE)
    wanted = alone(images, samples, merge, rescale=rescale)[exit]
    seen = counted(model)
    found = predict(model, images, samples, rescale=rescale)
    assert [seen.get(f'head {head}', 0) for head in range(4)] == [
        2 * (head <= exit) for head in range(4)
    ]
    assert [own.exit for own in found] == [exit] * 2
    plain = tiny(gate=gate)
    own = predict(plain, images, samples, rescale=rescale)
    assert any(
        len(one.pred_instances) != len(two.pred_instances) for one, two in zip(found, own)
    ) == (exit > 0)
    for one, other in zip(found, wanted):
        assert same(one.pred_instances, other, exact=False) and len(other)


def test_each_frame_of_a_batch_leaves_with_its_own():
    merge = MERGES[0]
    model = tiny(gate=dict(type='ScoreGate', kind='confidence'), merge=merge)
    marks = [(seed,) for seed in range(1, 6)]
    images, samples = frames(*marks, **PLACE)
    shown = model.predict_all(images, samples).detections
    wanted = alone(images, samples, merge)
    for exit, (found, other) in enumerate(zip(shown, wanted)):
        for one, two in zip(found, other):
            assert same(one, two, exact=False), exit
    model.set_budget(threshold=[-1, 0.3, 0.3, 0.3, 0.3])
    together = predict(model, images, samples)
    for row, own in enumerate(together):
        assert same(own.pred_instances, wanted[own.exit][row], exact=False)
        (single,) = predict(model, images[row : row + 1], samples[row : row + 1])
        assert single.exit == own.exit
        assert same(single.pred_instances, own.pred_instances, exact=False)


def test_gates_look_at_what_is_merged():
    merge = MERGES[0]
    model = tiny(gate=dict(type='ScoreGate', kind='confidence'), merge=merge)
    shown, difficulty = [], model.gate.difficulty

    def note(evidence):
        shown.append(evidence)
        return difficulty(evidence)

    model.gate.difficulty = note
    model.set_budget(threshold=-1)
    images, samples = frames((1,), (2,), **PLACE)
    predict(model, images, samples)
    wanted = alone(images, samples, merge, rescale=False)
    assert [one.exit for one in shown] == [0, 1, 2, 3]
    for one, other in zip(shown, wanted):
        assert all(same(own, two, exact=False) for own, two in zip(one.detections, other))


def test_all_heads_on_the_way_are_paid():
    plain, looking, merged = (
        exit_gflops(tiny(**settings), (64, 64))
        for settings in (
            dict(),
            dict(gate=dict(type='ScoreGate', kind='confidence')),
            dict(merge='nms'),
        )
    )
    assert merged == looking
    assert merged[:2] == plain[:2] and merged[-1] > plain[-1]
