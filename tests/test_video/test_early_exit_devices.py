"""An early-exit detector on a device that is not the CPU: one wait an exit."""

import pytest
import torch
from exit_cases import frames, tiny
from far_device import counted

from dynamicdet.video.frames import no_detections

PROPAGATION = dict(type='Propagation', size=2, gaps=3)


def run(model, device='cpu', steps=3):
    """Three frames of two streams each: exits, and what was waited for."""
    model.reset()
    results = []
    with torch.no_grad(), counted() as seen:
        for step in range(steps):
            images, samples = frames((1, 'a', step), (2 + step, 'b', step))
            results += model.predict(images.to(device), samples)
    return results, seen


@pytest.mark.parametrize(
    'gate',
    [
        dict(type='AgreementGate'),
        dict(type='HaltingGate', looks_at_detections=True),
        dict(type='TemporalGate', gate=dict(type='ScoreGate'), nothing=dict(type='Presence')),
    ],
    ids=lambda gate: gate['type'],
)
def test_frames_leave_where_they_do_on_the_cpu(gate, far):
    model = tiny(gate=gate, propagation=PROPAGATION, cut=0.3)
    model.set_budget(threshold=0.55)
    expected, _ = run(model)
    got, _ = run(model.to(far), far)
    assert [one.exit for one in got] == [one.exit for one in expected]
    for one, two in zip(got, expected):
        assert one.pred_instances.bboxes.device.type == far
        assert len(one.pred_instances) == len(two.pred_instances)
        torch.testing.assert_close(
            one.pred_instances.scores.cpu(), two.pred_instances.scores, rtol=1e-4, atol=1e-4
        )


def test_one_wait_an_exit(far):
    """A gate that learned nothing lets no frame leave: four exits, an early map, and, once, the
    thresholds."""
    plain, steps = tiny().to(far), 3
    _, without = run(plain, far, steps)
    model = tiny(gate=dict(type='TemporalGate', gate=dict(type='HaltingGate')), cut=0.9).to(far)
    model.set_budget(threshold=[-1, 0, 0, 0, 0])
    results, seen = run(model, far, steps)
    assert {one.exit for one in results} == {4}
    extra = seen - without
    assert dict(extra) == {'to host': 5 * steps + 1}
    # Where all leave at once there is one.
    model.set_budget(threshold=1.0)
    results, seen = run(model, far, 1)
    assert (
        {one.exit for one in results} == {-1}
        and seen['to host'] == 2
        and '_local_scalar_dense' not in seen
    )


def test_frames_part_without_being_waited_for(far):
    """Of two frames one leaves at exit 0, by a gate that goes by features: the rest goes on, and is
    the same."""
    model = tiny(gate=dict(type='HaltingGate'))
    torch.nn.init.normal_(
        model.gate.go[0].weight, std=5.0, generator=torch.Generator().manual_seed(1)
    )
    images, samples = frames((1,), (2,))
    with torch.no_grad():
        pooled = model.predict_all(images, samples).pooled
        values = model.gate.logits(pooled)[0].sigmoid()
    model.set_budget(threshold=[-1, float(values.mean()), -1, -1, -1])
    with torch.no_grad():
        expected = model.predict(*frames((1,), (2,)))
    assert sorted(one.exit for one in expected) == [0, 4]
    model.to(far)
    images, samples = frames((1,), (2,))
    with torch.no_grad():
        got = model.predict(images.to(far), samples)
    assert [one.exit for one in got] == [one.exit for one in expected]
    for one, two in zip(got, expected):
        torch.testing.assert_close(
            one.pred_instances.scores.cpu(), two.pred_instances.scores, rtol=1e-4, atol=1e-4
        )


def test_training_elsewhere(far):
    """Clips with cuts and propagation, and a gate that learns: no more than mmdet's own heads wait
    for."""
    model = tiny(gate=dict(type='GumbelGate'), propagation=PROPAGATION, cut=0.2).to(far).train()
    images, samples = frames((1, 'a', 0), (2, 'a', 1), (1, 'b', 0), (1, 'b', 1))
    for sample, step in zip(samples, (0, 1, 0, 1)):
        sample.set_metainfo(dict(clip_step=step))
        sample.gt_instances = sample.gt_instances.to(far)
        sample.ignored_instances = sample.ignored_instances.to(far)
    total, _ = model.parse_losses(model.loss(images.to(far), samples))
    total.backward()
    assert total.isfinite()
    assert not [
        key for key, value in model.named_parameters() if value.requires_grad and value.grad is None
    ]


def test_nothing_found_is_where_the_frames_are(far):
    assert {value.device.type for value in no_detections(torch.device(far)).values()} == {far}


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_gates_and_thresholds_stay_in_float32(dtype):
    model = tiny(
        gate=dict(type='TemporalGate', gate=dict(type='HaltingGate'), nothing=dict(type='Presence'))
    )
    model.set_budget(threshold=0.50006)
    before = {key: value.clone() for key, value in model.gate.state_dict().items()}
    model.to(dtype)
    assert all(torch.equal(value, before[key]) for key, value in model.gate.state_dict().items())
    assert (
        model.thresholds.dtype == torch.float32
        and model.detector.bbox_head.convs[0].weight.dtype == dtype
    )
    images, samples = frames((1, 'a', 0), (1, 'a', 1))
    with torch.no_grad():
        every = model.predict_all(images.to(dtype), samples, rescale=False)
    assert all(one.dtype == torch.float32 for one in every.pooled)
    with torch.no_grad():
        difficulties = model.gate.gate.logits(every.pooled).sigmoid()
    # It has learned nothing.
    assert difficulties.dtype == torch.float32 and (difficulties == 0.5).all()
