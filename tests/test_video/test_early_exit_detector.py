"""Frames leave where they should, streams remember what they should, and each mode trains its own
part."""

import copy

import pytest
import torch
from exit_cases import CHANNELS, LAYERS, base, counted, frames, same, tiny
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from dynamicdet.errors import UsageError
from dynamicdet.testing import randomize, tiny_batch
from dynamicdet.video import Gate
from dynamicdet.video.propagation import carry_on
from dynamicdet.video.streams import VideoStream
from mmdet.registry import MODELS
from mmdet.structures import TrackDataSample

PROPAGATION = dict(type='Propagation', size=2, truncate=2)


@MODELS.register_module()
class MarkedGate(Gate):
    """Lets images leave at exits of their own, by what it knows: first pooled features, (K, C), and
    their exits. Without it all go on. It notes what it was shown."""

    def __init__(self, looks=False):
        super().__init__()
        self.looks_at_detections = looks
        self.known, self.shown = None, []

    def difficulty(self, evidence):
        self.shown.append(evidence._replace(pooled=list(evidence.pooled)))
        if self.known is None:
            return torch.ones(len(evidence.pooled[0]))
        features, exits = self.known
        which = (evidence.pooled[0][:, None] - features[None]).abs().sum(dim=2).argmin(dim=1)
        return (torch.tensor(exits)[which] > evidence.exit).float()


def predict(model, images, samples, **options):
    with torch.no_grad():
        return model.predict(images, [copy.deepcopy(one) for one in samples], **options)


def names(model, until):
    """Layers up to a position."""
    return {layer.name for layer in model.table[: until + 1]}


# Exits.


def test_without_a_gate_it_is_the_plain_detector():
    model = tiny()
    seen = counted(model)
    images, samples = frames((1,), (2,), size=(64, 96), scale_factor=(0.5, 0.5))
    results = predict(model, images, samples)
    assert not [name for name in seen if name.startswith('head')]
    assert set(seen) == names(model, 17) | {'final'} and set(seen.values()) == {2}
    with torch.no_grad():
        plain = model.detector.predict(images, [copy.deepcopy(one) for one in samples])
    for own, other in zip(results, plain):
        assert same(own.pred_instances, other.pred_instances) and len(own.pred_instances)
        assert (own.exit, own.difficulty) == (4, 1.0)


@pytest.mark.parametrize('exit', [0, 1, 2, 3])
def test_nothing_behind_the_exit_is_computed(exit):
    model = tiny(gate=dict(type='FixedExit', exit=exit))
    images, samples = frames((1,), (2,), scale_factor=(0.5, 0.25))
    every = model.predict_all(images, samples)
    seen = counted(model)
    results = predict(model, images, samples)
    assert set(seen) == names(model, LAYERS[exit]) | {f'head {exit}'} and set(seen.values()) == {2}
    for own, wanted in zip(results, every.detections[exit]):
        assert same(own.pred_instances, wanted) and len(wanted)
        assert (own.exit, own.difficulty) == (exit, 0.0)
    # In the network's frame boxes are smaller.
    within = predict(model, images, samples, rescale=False)
    for own, other in zip(results, within):
        scaled = other.pred_instances.bboxes / torch.tensor([0.5, 0.25, 0.5, 0.25])
        assert torch.allclose(own.pred_instances.bboxes, scaled, atol=1e-4)


def test_each_image_of_a_batch_leaves_where_it_should():
    model = tiny(gate=dict(type='MarkedGate'))
    exits = [2, 4, 0, 2, 1]
    images, samples = frames(*((seed,) for seed in range(1, 6)))
    every = model.predict_all(images, samples)
    model.gate.known = every.pooled[0], exits
    seen = counted(model)
    results = predict(model, images, samples)
    assert [own.exit for own in results] == exits
    for index, (exit, own) in enumerate(zip(exits, results)):
        assert len(own.pred_instances)
        assert same(own.pred_instances, every.detections[exit][index], exact=False)
    # 5 images as far as exit 0's layer, 4 to the next, ...; of each head, those that leave there.
    assert [seen[f'head {exit}'] for exit in range(3)] == [1, 1, 2] and 'head 3' not in seen
    assert [seen[model.table[position].name] for position in (2, 3, 4, 5, 9, 10, 17)] == [
        5,
        4,
        4,
        3,
        3,
        1,
        1,
    ]
    assert seen['final'] == 1
    assert [tuple(one.pooled[-1].shape) for one in model.gate.shown] == list(
        zip((5, 4, 3, 1), CHANNELS)
    )


def test_what_a_gate_that_looks_is_shown():
    model = tiny(gate=dict(type='MarkedGate', looks=True))
    images, samples = frames((1,), (2,))
    seen = counted(model)
    every = model.predict_all(images, samples, rescale=False)
    results = predict(model, images, samples)
    assert seen['head 3'] == 4 and results[0].exit == 4 and results[0].difficulty == 1
    assert [one.exit for one in model.gate.shown] == [0, 1, 2, 3]
    before = None
    for one, wanted in zip(model.gate.shown, every.detections):
        assert all(map(same, one.detections, wanted))
        assert one.earlier is before and one.change is None
        before = one.detections
    for one, other in zip(model.gate.shown[-1].pooled, every.pooled):
        assert torch.equal(one, other)


@pytest.mark.parametrize('threshold, exit', [(-1, 4), (0.2, 4), (1, 0)])
def test_thresholds(threshold, exit):
    model = tiny(gate=dict(type='ScoreGate', kind='confidence'))
    images, samples = frames((1,), (2,))
    model.set_budget(threshold=threshold)
    assert model.thresholds.tolist() == pytest.approx([threshold] * 5)
    assert {one.exit for one in predict(model, images, samples)} == {exit}


def test_no_exit_is_asked_where_none_lets_leave():
    model = tiny(gate=dict(type='MarkedGate'))
    images, samples = frames((1,), (2,))
    model.set_budget(threshold=-1)
    results = predict(model, images, samples)
    assert [one.exit for one in results] == [4, 4] and [one.difficulty for one in results] == [1, 1]
    assert not model.gate.shown
    # But heads that are looked at are run, and paid.
    model = tiny(gate=dict(type='MarkedGate', looks=True), budget=dict(threshold=-1))
    predict(model, images, samples)
    assert len(model.gate.shown) == 4


# Streams.


def test_still_scenes_are_not_computed_again():
    model = tiny(gate=dict(type='TemporalGate'), budget=dict(threshold=[0.05, -1, -1, -1, -1]))
    seen = counted(model)
    first, still, moved = (
        predict(model, *frames(mark, scale_factor=(0.5, 0.5)))[0]
        for mark in ((1, 'a', 0), (1, 'a', 1), (2, 'a', 2))
    )
    assert [one.exit for one in (first, still, moved)] == [4, -1, 4]
    assert first.difficulty == 1 and still.difficulty == 0 and moved.difficulty > 0.05
    assert same(still.pred_instances, first.pred_instances) and len(first.pred_instances)
    assert seen['backbone.layers.0'] == 3 and seen['backbone.layers.1'] == seen['final'] == 2
    # The same in the network's frame.
    (again,) = predict(model, *frames((2, 'a', 3), scale_factor=(0.5, 0.5)), rescale=False)
    assert again.exit == -1
    assert torch.allclose(again.pred_instances.bboxes, moved.pred_instances.bboxes / 2)
    # Another stream, a new sequence, another size: nothing to give again.
    for mark, size in (((2, 'b', 4), (64, 64)), ((2, 'a', 0), (64, 64)), ((2, 'a', 1), (64, 96))):
        assert predict(model, *frames(mark, size=size))[0].exit == 4
    model.reset('a')
    assert predict(model, *frames((2, 'a', 2), size=(64, 96)))[0].exit == 4


def test_change_counts_from_the_frame_that_was_computed():
    """A slow drift: each frame changes little, but not against the one whose detections are
    given."""
    model = tiny(gate=dict(type='TemporalGate'), budget=dict(threshold=[0.03, -1, -1, -1, -1]))
    images, samples = frames(*((1, 'a', frame) for frame in range(5)))
    images = images * torch.linspace(1, 0.8, 5)[:, None, None, None]
    results = predict(model, images, samples)
    assert results[0].exit == 4 and results[1].exit == -1 and 4 in [one.exit for one in results[2:]]


def test_what_shows_nothing_is_not_computed_and_remembered_as_empty():
    gate = dict(type='TemporalGate', nothing=dict(type='Presence'))
    model = tiny(gate=gate, budget=dict(threshold=[0.05, -1, -1, -1, -1]))
    assert model.gate.nothing.in_channels == model.table[0].channels
    # Told by the one number: what is below it is empty.
    early = {seed: model.predict_all(*frames((seed, 'x', 0))).early for seed in (1, 2)}
    model.reset()
    model.gate.nothing.level.fill_(1.0)
    model.gate.nothing.forward = lambda seen: torch.tensor(
        [0.0 if torch.allclose(one, early[2][0], atol=1e-5) else 2.0 for one in seen]
    )
    seen = counted(model)
    marks = ((1, 'a', 0), (2, 'a', 1), (2, 'a', 2), (1, 'a', 3), (1, 'a', 4), (2, 'b', 0))
    results = [predict(model, *frames(mark))[0] for mark in marks]
    assert [one.exit for one in results] == [4, -1, -1, 4, -1, -1]
    assert [len(one.pred_instances) > 0 for one in results] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert [one.difficulty for one in results] == [1, 0, 0, results[3].difficulty, 0, 0]
    assert seen['backbone.layers.1'] == seen['final'] == 2
    # All in one batch; and at a threshold of -1 all are computed.
    model.reset()
    batch = predict(model, *frames((2, 'a', 0), (1, 'b', 0), (2, 'c', 0)))
    assert [one.exit for one in batch] == [-1, 4, -1] and len(batch[1].pred_instances)
    model.set_budget(threshold=-1)
    assert predict(model, *frames((2, 'a', 1)))[0].exit == 4


def test_what_tells_nothing_is_not_trained_with_the_detector():
    """DDP waits for the gradient of every parameter that asks for one."""
    model = tiny(
        gate=dict(type='TemporalGate', gate=LEARNED, nothing=dict(type='Presence'))
    ).train()
    assert not any(own.requires_grad for own in model.gate.nothing.parameters())
    assert all(own.requires_grad for own in model.gate.gate.parameters())
    data = model.data_preprocessor(training(), True)
    model.parse_losses(model.loss(*data.values()))[0].backward()
    assert all(own.grad is None for own in model.gate.nothing.parameters())


def test_leaving_first_without_detections_gives_none():
    model = tiny(gate=dict(type='TemporalGate'), budget=dict(threshold=1))
    (own,) = predict(model, *frames((1, 'a', 0)))
    assert own.exit == -1 and len(own.pred_instances) == 0
    assert own.pred_instances.bboxes.shape == (0, 4)


def propagating(**settings):
    model = tiny(propagation=PROPAGATION, gate=dict(type='FixedExit', exit=1), **settings)
    for own in model.propagation:
        torch.nn.init.constant_(own.weigh.bias, 0)
    return model


def test_streams_in_a_batch_are_as_each_alone():
    marks = [(1, 'a', 0), (2, 'b', 0), (3, 'a', 1), (4, 'b', 1), (5, 'a', 2), (6, 'c', 9)]
    model = propagating()
    images, samples = frames(*marks)
    together = predict(model, images, samples)
    every = model.predict_all(images, [copy.deepcopy(one) for one in samples], rescale=False)
    model.reset()
    two = [
        one
        for part in (slice(0, 3), slice(3, 6))
        for one in predict(model, images[part], samples[part])
    ]
    model.reset()
    alone = [
        predict(model, images[index : index + 1], samples[index : index + 1])[0]
        for index in (5, 0, 2, 4, 1, 3)
    ]
    model.reset()
    memoryless = [
        predict(
            tiny(gate=dict(type='FixedExit', exit=1)),
            images[index : index + 1],
            samples[index : index + 1],
        )[0]
        for index in range(6)
    ]
    for index, own in enumerate(together):
        assert same(own.pred_instances, two[index].pred_instances, exact=False)
        assert same(
            own.pred_instances, alone[(1, 4, 2, 5, 3, 0)[index]].pred_instances, exact=False
        )
        # Only a first frame is as without memory.
        assert same(own.pred_instances, memoryless[index].pred_instances, exact=False) == (
            index in (0, 1, 5)
        )
    assert len(every.detections) == 5 and [len(found) for found in every.detections] == [6] * 5
    assert every.change[[0, 1, 5]].tolist() == [1, 1, 1] and 0 < every.change[2] < 1


@pytest.mark.parametrize(
    'mark, cut, remembers',
    [
        ((2, 'a', 1), None, True),
        ((2, 'a', 0), None, False),
        ((2, 'b', 1), None, False),
        ((2, 'a', 1), 0.0, False),
        ((2, 'a', 1), 0.99, True),
    ],
    ids=['goes on', 'a sequence ends', 'another stream', 'a cut', 'no cut'],
)
def test_a_cut_resets(mark, cut, remembers):
    model = propagating(cut=cut)
    (fresh,) = predict(model, *frames((2, 'x', 0)))
    predict(model, *frames((1, 'a', 0)))
    (own,) = predict(model, *frames(mark))
    assert same(own.pred_instances, fresh.pred_instances) != remembers


def test_all_exits_are_in_order():
    """Frames of one stream, mixed with others, come back in the order in which they were given."""
    model = tiny()
    images, samples = frames((1, 'a', 0), (2, 'a', 1), (3, 'b', 0), (4, 'a', 2))
    every, alone = model.predict_all(images, samples), tiny()
    for index in range(4):
        one = alone.predict_all(images[index : index + 1], samples[index : index + 1])
        for exit in range(5):
            assert same(every.detections[exit][index], one.detections[exit][0], exact=False)
        for own, other in zip(every.pooled, one.pooled):
            assert torch.allclose(own[index], other[0], atol=1e-5)
        assert torch.allclose(every.early[index], one.early[0], atol=1e-5)
        assert every.change[index] == pytest.approx(one.change.item(), abs=1e-5)
    assert 'pred_instances' not in samples[0]


def test_memory_stays_flat_over_many_streams():
    model = propagating(max_streams=3)
    for video in range(12):
        predict(model, *frames((1, video, 0)))
    assert len(model._streams) == 3
    model.train()
    assert len(model._streams) == 0


def test_gradients_pass_through_so_many_frames_and_no_more():
    model = propagating()
    maps = [torch.randn(1, 16, 4, 4, requires_grad=True) for _ in range(4)]
    stream, outputs = VideoStream(), []
    for frame, own in enumerate(maps):
        stream.frame = frame
        outputs.append(carry_on(model.propagation[1], 1, own, [stream]))
    for frame, reached in ((0, {0}), (1, {0, 1}), (2, {2}), (3, {2, 3})):
        found = torch.autograd.grad(
            outputs[frame].sum(), maps, retain_graph=True, allow_unused=True
        )
        assert {
            at for at, one in enumerate(found) if one is not None and one.abs().sum() > 0
        } == reached


# Training.


def training(
    marks=((1, 'a', 0), (2, 'a', 1), (3, 'b', 0), (4, 'b', 1)), objects=(2, 0, 1, 3), size=(64, 96)
):
    """Two clips of two frames as a loader gives them; one frame without objects."""
    batch = tiny_batch(objects, size, masks=False)
    for (_, video, frame), sample in zip(marks, batch['data_samples']):
        sample.set_metainfo(dict(video_id=video, frame_id=frame, clip_step=frame))
    return batch


LEARNED = dict(type='GumbelGate', in_channels=CHANNELS)
KINDS = ('bbox', 'obj', 'cls')


@pytest.mark.parametrize(
    'mode, parts, heads',
    [
        (
            'joint',
            {'detector', 'heads', 'propagation', 'gate'},
            {'final', *(f'exit{exit}' for exit in range(4))},
        ),
        ('heads_only', {'heads', 'propagation'}, {f'exit{exit}' for exit in range(4)}),
        ('propagation', {'propagation'}, {f'exit{exit}' for exit in range(4)}),
        ('gate', {'gate'}, set()),
    ],
)
def test_each_mode_trains_its_own_part(mode, parts, heads):
    model = tiny(
        mode=mode, propagation=PROPAGATION, gate=LEARNED, distillation=dict(min_objectness=0.3)
    ).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05))
    )
    optimizer.zero_grad = lambda: None
    log = model.train_step(training(), optimizer)
    assert all(value.isfinite().all() for value in log.values())
    losses = {name for name in log if 'loss' in name and name != 'loss'}
    wanted = {f'{head}.loss_{kind}' for head in heads for kind in KINDS}
    wanted |= {f'{head}.loss_distill_{kind}' for head in heads - {'final'} for kind in KINDS}
    if 'gate' in parts:
        wanted |= {'loss_gate_task', 'loss_gate_cost'}
    assert losses == wanted
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.split('.')[0] in parts)
        assert (parameter.grad is not None) == parameter.requires_grad, name
    moved = {
        name.split('.')[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value.nan_to_num(), before[name].nan_to_num())
    }
    assert moved == parts


def test_the_frozen_detectors_output_stays_as_it_is():
    model = tiny(mode='heads_only', distillation=dict(min_objectness=0.3))
    images, samples = frames((5,), (6,))
    before = model.predict_all(images, samples)
    optimizer = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=0.01))
    )
    for step in range(3):
        model.train()
        assert not model.detector.training and model.heads.training
        model.train_step(training(), optimizer)
    model.eval()
    after = model.predict_all(images, samples)
    for index in range(2):
        assert len(after.detections[-1][index])
        assert same(before.detections[-1][index], after.detections[-1][index])
        assert not same(before.detections[0][index], after.detections[0][index])
    with torch.no_grad():
        for one, other in zip(tiny().detector._forward(images), model.detector._forward(images)):
            assert all(map(torch.equal, one, other))


def _learn(model, data):
    """A copy with gradients of all losses: zeros, not nothing, where DDP would wait."""
    model = copy.deepcopy(model)
    model.parse_losses(model.loss(*data.values()))[0].backward()
    return model


def test_losses_of_single_images_do_not_remember():
    """Without ``clip_step`` frames are images, in whatever order they come."""
    model = tiny(propagation=PROPAGATION).train()
    batch = training()
    for sample in batch['data_samples']:
        del sample.clip_step
    data = model.data_preprocessor(batch, True)
    with_memory = copy.deepcopy(model).loss(*data.values())
    assert all((own.grad == 0).all() for own in _learn(model, data).propagation.parameters())
    model.propagation = None
    assert with_memory == model.loss(*data.values())


def test_clips_in_a_batch_learn_as_each_alone():
    """In eval mode, in which norms do not see the batch. Losses are means, so those of two clips
    are of both."""
    model = propagating()
    data = model.data_preprocessor(training(objects=(2, 2, 2, 2)), True)
    both = model.loss(data['inputs'], data['data_samples'])
    parts = [
        model.loss(data['inputs'][part], data['data_samples'][part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    for name in ('exit0.loss_obj', 'exit3.loss_obj'):
        assert both[name].item() == pytest.approx(
            sum(own[name].item() for own in parts) / 2, rel=1e-4
        )


def test_a_cut_inside_a_clip_begins_anew_in_training():
    # Its second frame then learns as a first one does.
    model = propagating(cut=0.0)
    data = model.data_preprocessor(training(marks=((1, 'a', 0), (2, 'a', 1)), objects=(2, 1)), True)
    cut = model.loss(*copy.deepcopy(data).values())
    for sample in data['data_samples']:
        sample.set_metainfo(dict(clip_step=0))
    assert model.loss(*copy.deepcopy(data).values()) == cut
    for step, sample in enumerate(data['data_samples']):
        sample.set_metainfo(dict(clip_step=step))
    for other in (None, 0.99):
        model.cut = other
        assert model.loss(*copy.deepcopy(data).values()) != cut


def test_clips_of_mmdets_video_data_sets():
    model = propagating()
    data = model.data_preprocessor(training(), True)
    images, samples = data['inputs'], data['data_samples']
    flat = model.loss(images, copy.deepcopy(samples))
    clips = []
    for part in (samples[:2], samples[2:]):
        clips.append(TrackDataSample())
        clips[-1].video_data_samples = part
    wide = images.unflatten(0, (2, 2))
    assert flat == model.loss(wide, copy.deepcopy(clips))
    with torch.no_grad():
        results = model.predict(wide, clips)
    assert [frame.exit for clip in results for frame in clip.video_data_samples] == [1] * 4


def test_losses_of_each_head_are_weighted():
    batch = tiny().data_preprocessor(training(), True)
    models = (
        tiny(heads=dict(layers=LAYERS, channels=16, **own))
        for own in (dict(), dict(weights=[0, 1, 2, 0.5]))
    )
    plain, weighted = (model.loss(*copy.deepcopy(batch).values()) for model in models)
    for exit, weight in enumerate((0, 1, 2, 0.5)):
        name = f'exit{exit}.loss_obj'
        assert weighted[name].item() == pytest.approx(weight * plain[name].item())
    assert weighted['final.loss_obj'] == plain['final.loss_obj']


# Weights and budgets.


def test_a_plain_detectors_checkpoint_loads_as_it_is():
    plain = randomize(MODELS.build(base()), seed=3).eval()
    model = tiny()
    heads = copy.deepcopy(model.heads.state_dict())
    # As mmengine's `load_from` does.
    _load_checkpoint_to_model(model, dict(state_dict=plain.state_dict()))
    images, samples = frames((1,))
    with torch.no_grad():
        (wanted,) = plain.predict(images, copy.deepcopy(samples))
    assert same(predict(model, images, samples)[0].pred_instances, wanted.pred_instances)
    assert all(torch.equal(value, heads[name]) for name, value in model.heads.state_dict().items())
    named = model.spread_plain_weights({'backbone.layers.0.conv.weight': 0, 'unknown.weight': 1})
    assert named == {'detector.backbone.layers.0.conv.weight': 0, 'unknown.weight': 1}
    state = model.state_dict()
    assert model.spread_plain_weights(state).keys() == state.keys()


def test_budgets_of_a_calibrated_model():
    model = tiny(gate=dict(type='ScoreGate'), budget=dict(target_gflops=2.5))
    assert model.thresholds.tolist() == [0.5] * 5
    with pytest.raises(UsageError, match='calibrated'):
        predict(model, *frames((1,)))
    state = model.state_dict()
    for row, (level, gflops, seconds) in enumerate(((0.9, 1, 0.01), (0.4, 2, 0.03), (-1, 4, 0.05))):
        state['operating_points'][row] = torch.tensor([level] * 5 + [gflops, seconds])
    model = tiny(gate=dict(type='ScoreGate'), budget=dict(target_gflops=2.5))
    model.load_state_dict(state)
    assert model.thresholds.tolist() == pytest.approx([0.4] * 5)
    assert model.set_budget(target_gflops=4) == [-1] * 5
    assert model.set_budget(target_latency=0.02) == pytest.approx([0.9] * 5)
    with pytest.raises(UsageError, match='cost from 0.01 on'):
        model.set_budget(target_latency=0.005)


@pytest.mark.parametrize(
    'budget, said',
    [
        (dict(threshold=2), r'\[-1, 1\]'),
        (dict(threshold=[0.1, 0.2]), 'or 5'),
        (dict(threshold='high'), 'a number'),
        (dict(target_gflops=0), 'above 0'),
        (dict(hard_share=0.5), 'one of'),
        (dict(threshold=0.5, target_gflops=1), 'one of'),
    ],
)
def test_budgets_that_are_none(budget, said):
    with pytest.raises(UsageError, match=said):
        tiny(budget=budget)


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(mode='all'), 'mode is one of joint'),
        (dict(mode='propagation'), 'needs propagation='),
        (dict(mode='gate', gate=dict(type='ScoreGate')), 'a gate that learns'),
        (dict(early_layer=18), 'early_layer'),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(UsageError, match=said):
        tiny(**settings)


def test_a_detector_without_a_table_is_named():
    from dynamicdet.testing import tiny_detector

    with pytest.raises(UsageError, match='no table of its layers'):
        MODELS.build(
            dict(type='EarlyExitDetector', detector=tiny_detector('retinanet'), heads=dict())
        )
