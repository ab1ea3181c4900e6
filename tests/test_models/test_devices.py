"""Detectors on a device that is not the CPU: nothing is mixed, and next to nothing is waited
for."""

import copy
import runpy
import threading

import pytest
import torch
from far_device import counted
from mmengine.config import Config, ConfigDict
from torch import nn

from conftest import ROOT
from dynamicdet.cascade.batch_state import BatchState
from dynamicdet.compression import quantized_training
from dynamicdet.compression.coupling import example_image, raw_outputs
from dynamicdet.compression.quantization import (
    Int8Simulation,
    activation_scale,
    activation_step,
    move_range,
    step_on_device,
)
from dynamicdet.compression.weight_sharing import tie_gradient, tie_weights, weight_sharing_of
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_dynamic
from dynamicdet.transfers import Followed, take_rows, to_host
from mmdet.registry import MODELS


def settings(name):
    if name == 'yolov7':
        return shrink(ConfigDict(Config.fromfile(ROOT / 'configs/dy_yolov7_nano_digits.py').model))
    return tiny_dynamic(name, shared=name != 'yolox')


def test_the_device_is_another(far):
    """What torch refuses on a GPU is refused here, and what it waits for is counted."""
    here, there = torch.arange(3.0), torch.arange(3.0).to(far)
    for mix in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: there.copy_(here) + here,
        lambda: nn.functional.linear(there[None], torch.ones(2, 3)),
        lambda: nn.Linear(3, 2)(there),
    ):
        with pytest.raises(RuntimeError, match='same device'):
            mix()
    with pytest.raises(TypeError, match='numpy'):
        there.numpy()
    assert torch.equal(there.cpu(), here) and (there * 2 + 1).tolist() == [1, 3, 5]
    for act, seen in (
        (lambda: there.tolist(), 'to host'),
        (lambda: there.sum().item(), '_local_scalar_dense'),
        (lambda: bool((there > 1).any()), '_local_scalar_dense'),
        (lambda: there[[0, 1]], 'to device'),
        (lambda: there.new_tensor([1.0]), 'to device'),
        (lambda: there[there > 1], 'index by mask'),
        (lambda: there.nonzero(), 'nonzero'),
    ):
        with counted() as events:
            act()
        assert dict(events) == {seen: 1}
    with counted() as events:
        there[0] = 7
        there[there > 5] = 0
        take_rows(there, [2, 0])
        torch.zeros(3, device=far) + 1
    assert not events


@pytest.mark.parametrize('name', ['faster_rcnn', 'yolox', 'yolov7'])
def test_a_dynamic_detector_elsewhere(name, far):
    """It detects what it detects on the CPU, and adds one wait a batch to the plain detector's; its
    losses, and the router's, have gradients."""
    model = randomize(MODELS.build(settings(name))).eval()
    batch = tiny_batch((2, 1), size=(64, 64))
    scores = model.score(
        *(
            model.data_preprocessor(copy.deepcopy(batch), False)[key]
            for key in ('inputs', 'data_samples')
        )
    ).tolist()
    budgets = dict(easy=1, hard=-1, mixed=sum(scores) / 2)
    expected = {}
    for kind, threshold in budgets.items():
        model.set_budget(threshold=threshold)
        expected[kind] = model.test_step(copy.deepcopy(batch))
    assert {one.exit for one in expected['mixed']} == {0, 1}
    model.to(far)
    seen = {}
    for kind, threshold in budgets.items():
        model.set_budget(threshold=threshold)
        data = model.data_preprocessor(copy.deepcopy(batch), False)
        with counted() as seen[kind], torch.no_grad():
            results = model.predict(data['inputs'], data['data_samples'])
        for one, two in zip(results, expected[kind]):
            assert one.exit == two.exit and one.difficulty == pytest.approx(two.difficulty)
            assert len(one.pred_instances) == len(two.pred_instances)
            torch.testing.assert_close(one.pred_instances.scores.cpu(), two.pred_instances.scores)
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    with counted() as plain, torch.no_grad():
        model.branch(0).predict(
            model.backbone.select(model._first_maps(data['inputs'])[0]), data['data_samples']
        )
    assert seen['easy'] - plain == {'to host': 1} and not plain - seen['easy']
    for step_2 in (False, True):
        model.train_router = step_2
        for key, parameter in model.named_parameters():
            parameter.requires_grad = key.startswith('router.') == step_2
        model.train()
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        loss, _ = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
        loss.backward()
        assert loss.isfinite()
        assert not [
            key
            for key, value in model.named_parameters()
            if value.requires_grad and value.grad is None
        ]


@pytest.mark.parametrize('images', [1, 8])
def test_who_goes_on_is_waited_for_once(images, far):
    """From the image to the end of the second backbone, whatever the number of images."""
    model = randomize(MODELS.build(tiny_dynamic('retinanet'))).eval()
    batch = tiny_batch([1] * images, size=(64, 64))
    data = model.data_preprocessor(batch, False)
    scores = model.score(data['inputs'], data['data_samples'])
    model.set_budget(threshold=float(scores.median()) if images > 1 else -1)
    model.to(far)
    inputs = data['inputs'].to(far)
    with counted() as seen, torch.no_grad():
        leaving, going_on = model.start(inputs, data['data_samples']).split()
        model.deepen(going_on)
    assert (
        dict(seen) == {'to host': 1}
        and len(going_on) == (images + 1) // 2
        and len(leaving) == images // 2
    )


def test_a_state_of_none_is_empty():
    state = BatchState(
        0, torch.ones(2, 3, 4, 4), (torch.ones(2, 8, 2, 2),), (1.0, 1.0), [0, 1], [0.1, 0.2], [0, 0]
    )
    empty = state.split()[1]
    assert (
        len(empty) == 0
        and empty.images.shape == (0, 3, 4, 4)
        and empty.maps[0].shape == (0, 8, 2, 2)
    )
    # Rows are copies, in the layout of the whole.
    maps = torch.arange(48.0).reshape(3, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    taken = take_rows(maps, [2, 0])
    assert torch.equal(taken, maps[[2, 0]]) and taken.is_contiguous(
        memory_format=torch.channels_last
    )
    taken.zero_()
    assert maps[2].any()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).relu())


@pytest.mark.parametrize('learning', [False, True])
def test_a_step_in_eight_bits_waits_for_nothing(learning, far):
    layers = Layers().to(far)
    simulation = Int8Simulation(layers, [layers])
    ranges, x = simulation.ranges, torch.randn(2, 3, 6, 6).to(far)
    simulation.active, ranges.observing = False, True
    simulation(x)
    simulation.active, ranges.observing, ranges.learning = True, not learning, learning
    with counted() as seen:
        simulation(x).square().mean().backward()
        if learning:
            for key, value in ranges.values.items():
                ranges.values[key] = move_range(value, value.grad, 0.01)
    assert not seen and layers.one.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'low, high',
    [(0.0, 255.0), (-127.5, 127.5), (5.0, 51.0), (-51.0, -5.0), (0.0, 0.0), (0.0, 1e-45)],
)
def test_steps_are_those_of_the_host(low, high):
    draws = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 10
    for bounds in (torch.tensor([low, high]), *draws.sort(dim=1).values):
        for scale, zero in (activation_step(bounds), step_on_device(bounds)):
            assert (scale.item(), zero.item()) == activation_scale(*bounds.tolist())
            assert (scale.dtype, zero.dtype) == (torch.float32, torch.int32)


def test_what_follows_a_tensor_is_computed_when_it_changes():
    calls = []
    follow = Followed(lambda tensor: calls.append(1) or tensor.tolist())
    values = torch.zeros(2)
    assert follow(values) == follow(values) == [0, 0] and len(calls) == 1
    values[0] = 1
    assert follow(values) == [1, 0] and follow(values.clone()) == [1, 0] and len(calls) == 3
    with torch.inference_mode():
        frozen = torch.zeros(1)
        assert follow(frozen) == [0]
        frozen += 1
        assert follow(frozen) == [1]


def test_shared_values_sum_the_same_way_each_time(far):
    """Bit for bit as on the CPU, in order, and without a look at the values."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 16, (5000,), dtype=torch.uint8, generator=generator)
    gradient = torch.randn(50, 100, generator=generator)
    own, there = weight_sharing_of(indices, True), weight_sharing_of(indices.to(far), True)
    for change in (tie_weights, tie_gradient):
        near, distant = gradient.clone(), gradient.clone().to(far)
        change(near, own)
        with counted() as seen:
            change(distant, there)
        assert torch.equal(distant.cpu(), near) and not seen


def test_examples_are_where_the_detector_is(far):
    model = randomize(MODELS.build(tiny_dynamic('faster_rcnn'))).to(far).eval()
    assert all(one.device.type == far for one in raw_outputs(model, example_image(model)))


def test_detections_come_at_once(far):
    model = randomize(MODELS.build(tiny_dynamic('yolox', shared=False))).eval()
    batch = tiny_batch((1, 1, 1), size=(64, 64))
    found = [one.pred_instances for one in model.test_step(batch)]
    with counted() as seen:
        hosted = to_host([one.to(far) for one in found[:2]])
    # To there each field of each image; back all of them.
    assert dict(seen) == {'to device': 6, 'to host': 1}
    for (boxes, scores, labels), one in zip(hosted, found):
        assert (
            torch.equal(boxes, one.bboxes)
            and torch.equal(scores, one.scores)
            and torch.equal(labels, one.labels)
        )
    assert to_host([]) == [] and labels.dtype == torch.int64


# Types.


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_decisions_stay_in_float32(dtype):
    model = randomize(MODELS.build(tiny_dynamic('retinanet'))).eval()
    model.threshold.fill_(0.50006)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = tiny_batch((1, 1), size=(64, 64))['data_samples']
    expected = model.score(images, samples)
    weights = copy.deepcopy(model.router.state_dict())
    model.to(dtype)
    assert {key: value.dtype for key, value in model._buffers.items()} == dict.fromkeys(
        model._buffers, torch.float32
    )
    assert all(torch.equal(value, weights[key]) for key, value in model.router.state_dict().items())
    assert model.backbone.first.conv1.weight.dtype == dtype
    # In half precision all three were 0.5.
    assert model._exits_of(torch.tensor([0.50003, 0.50006, 0.5001])).tolist() == [0, 0, 1]
    state = model.start(images.to(dtype), samples)
    assert state.difficulties == pytest.approx(
        expected.tolist(), abs=1e-6 if dtype == torch.float64 else 0.02
    )


# Ranks.


def test_without_processes_there_are_no_groups(monkeypatch):
    monkeypatch.delattr(torch.distributed, 'GroupMember')
    monkeypatch.setattr(torch.distributed, 'is_available', lambda: False)
    with runpy.run_module('dynamicdet.models.paired_losses')['without_other_ranks']():
        pass


class Ranks:
    """Two threads in the place of two processes: what all give, in order; other lengths are an
    error, as they are a hang or rubbish between processes."""

    def __init__(self):
        self.barrier, self.given, self.local = (
            threading.Barrier(2, timeout=300),
            [None, None],
            threading.local(),
        )

    def gather(self, value):
        self.given[self.local.rank] = value
        self.barrier.wait()
        every = list(self.given)
        self.barrier.wait()
        return every

    def reduce(self, tensor):
        every = self.gather(tensor.clone())
        assert every[0].shape == every[1].shape
        tensor.copy_(every[0] + every[1])


def test_ranks_that_know_other_ranges_agree():
    """One rank has come by a stage, and by a size of images, that the other has not."""
    ranks = Ranks()
    both = quantized_training.Ranks(2, ranks.gather, ranks.reduce)
    known = [
        dict(first=dict(in0=[-1.0, 1.0]), head={}),
        dict(first=dict(in0=[-3.0, 5.0], out9=[0.0, 2.0]), head=dict(in0=[0.0, 4.0])),
    ]
    trainings = []
    for own in known:
        training = quantized_training.QuantizedTraining()
        training.simulations = {
            name: Int8Simulation(layer, [layer])
            for name, layer in dict(first=Layers(), head=Layers()).items()
        }
        for name, values in own.items():
            training.simulations[name].ranges.values = {
                key: torch.tensor(value) for key, value in values.items()
            }
        trainings.append(training)
    failed = []

    def agree(rank):
        ranks.local.rank = rank
        try:
            trainings[rank]._agree(both)
        except BaseException as error:
            failed.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for training in trainings:
        assert {
            f'{name}/{key}': value.tolist()
            for name, one in training.simulations.items()
            for key, value in one.ranges.values.items()
        } == {'first/in0': [-2, 3], 'first/out9': [0, 2], 'head/in0': [0, 4]}
