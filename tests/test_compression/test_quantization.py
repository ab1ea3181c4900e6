"""Eight bits, simulated: scales, rounding, and where they are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynamicdet.compression.quantization import (
    Int8Simulation,
    LearnedRange,
    Ranges,
    activation_scale,
    fake_quantize_weight,
    fold_norm,
    move_range,
    round_bias,
    trace_quantization,
    weight_scale,
)


@pytest.mark.parametrize(
    'low, high, scale, zero',
    [
        (0.0, 255.0, 1.0, 0),
        (-127.5, 127.5, 1.0, 128),
        # Zero is in every range.
        (5.0, 51.0, 0.2, 0),
        (-51.0, -5.0, 0.2, 255),
        # Nothing but zeros.
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_scale_and_zero_point_of_a_range(low, high, scale, zero):
    found, integer = activation_scale(low, high)
    assert found == pytest.approx(scale) and integer == zero


def test_weights_are_rounded_for_each_channel():
    weight = torch.tensor([[127.0, 0.4, -0.6], [0.0, 0.0, 0.0], [0.127, 0.0014, -0.127]])
    torch.testing.assert_close(
        fake_quantize_weight(weight),
        torch.tensor([[127.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.127, 0.001, -0.127]]),
    )
    # Of 7 bits: steps of 127 / 64.
    assert fake_quantize_weight(weight, reduced=True)[0, 1:].tolist() == [0, 0]
    assert weight_scale(weight, reduced=True)[0] == pytest.approx(127 / 64)


def test_gradients_pass_rounding():
    weight = torch.randn(3, 4, requires_grad=True)
    fake_quantize_weight(weight).sum().backward()
    assert weight.grad.tolist() == [[1.0] * 4] * 3
    bias = torch.tensor([0.26], requires_grad=True)
    rounded = round_bias(bias, torch.tensor([0.1]))
    rounded.sum().backward()
    assert rounded.item() == pytest.approx(0.3) and bias.grad.item() == 1


def test_quant_noise_rounds_a_share_by_chance():
    torch.manual_seed(0)
    weight = torch.randn(10, 1000)
    rounded = (fake_quantize_weight(weight, noise=0.3) != weight).float().mean()
    assert 0.27 < rounded < 0.33
    assert torch.equal(fake_quantize_weight(weight, noise=0), weight)


def test_a_folded_norm_is_the_norm():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
    for one in (norm.running_mean, norm.weight.data, norm.bias.data):
        one.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 5, 5)
    weight, bias = fold_norm(conv.weight, conv.bias, norm)
    torch.testing.assert_close(F.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """A residual block: a sum, which is no module, and a tensor with two readers."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.two, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm(self.one(x)))
        return self.relu(self.two(y) + x)


def test_integers_are_where_layers_read_and_write():
    block = Block().eval()
    plan = trace_quantization(block, [torch.randn(1, 3, 4, 4)], [block])
    one, two = plan.layers.values()
    assert one.norm is block.norm and two.norm is None
    # The ReLU's result, not the norm's; and the input, for all who read it.
    assert (one.entering, one.leaving, two.entering, two.leaving) == ('in0', 'out0', 'out0', 'out1')
    assert plan.inputs == {0: 'in0'} and sorted(plan.points.values()) == ['out0', 'out1']
    assert len(plan.norms) == 1
    # Spared layers have no integers, and those around them none on their behalf.
    spared = trace_quantization(block, [torch.randn(1, 3, 4, 4)], [block], spared=[block.one])
    assert sorted(spared.points.values()) == ['in1', 'out1'] and not spared.inputs


def test_predictions_stay_float_while_they_are_cheap():
    """Of the block's two layers, of 81 multiply-adds a place, the second has none behind it."""
    block, x = Block().eval(), [torch.randn(1, 3, 4, 4)]
    spared = [
        [
            layer.spared
            for layer in trace_quantization(block, x, [block], float_share=share).layers.values()
        ]
        for share in (0.0, 0.49, 0.5, 1.0)
    ]
    assert spared == [[False, False], [False, False], [False, True], [False, True]]


def test_a_simulated_block_is_the_block_by_hand():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 3, 4, 4)
    simulation = Int8Simulation(block, [block])
    simulation.active, simulation.ranges.observing = False, True
    expected = block.eval()(x)
    block.train()
    torch.testing.assert_close(simulation(x), expected)
    # Norms stay as they are.
    assert not block.norm.training and not block.norm.num_batches_tracked
    simulation.active, simulation.ranges.observing = True, False

    def rounded(key, value):
        low, high = simulation.ranges.values[key].tolist()
        scale, zero = activation_scale(low, high)
        return (torch.clamp(torch.round(value / float(scale)) + zero, 0, 255) - zero) * float(scale)

    def scale_of(key, weight):
        return float(activation_scale(*simulation.ranges.values[key].tolist())[0]) * weight_scale(
            weight
        )

    entering = rounded('in0', x)
    weight, bias = fold_norm(block.one.weight, None, block.norm)
    bias = round_bias(bias, scale_of('in0', weight))
    middle = rounded('out0', F.conv2d(entering, fake_quantize_weight(weight), bias).relu())
    bias = round_bias(block.two.bias, scale_of('out0', block.two.weight))
    leaving = rounded('out1', F.conv2d(middle, fake_quantize_weight(block.two.weight), bias))
    torch.testing.assert_close(simulation(x), (leaving + entering).relu())


def test_ranges_run_behind_the_activations():
    ranges = Ranges()
    ranges.observing = True
    ranges.observe('x', torch.tensor([-1.0, 3.0]))
    ranges.observe('x', torch.tensor([-2.0, 3.0]))
    # Nothing was seen of an empty batch.
    ranges.observe('x', torch.zeros(0, 4))
    assert ranges.values['x'].tolist() == pytest.approx([-1.1, 3.0])
    ranges.observing = False
    ranges.observe('x', torch.tensor([-9.0]))
    assert np.isclose(ranges.values['x'][0], -1.1)
    # Unknown tensors stay as they are.
    x = torch.randn(3)
    assert ranges.quantize('y', x) is x


def test_the_gradient_of_a_learned_range_by_hand():
    # Steps of 1, zero at 100.
    bounds = torch.tensor([-100.0, 155.0], requires_grad=True)
    x = torch.tensor([-150.0, -100.0, 0.25, 10.0, 155.0, 200.0], requires_grad=True)
    y = LearnedRange.apply(x, bounds, torch.tensor(1.0), torch.tensor(100, dtype=torch.int32))
    assert y.tolist() == [-100, -100, 0, 10, 155, 155]
    # Residual blocks add to it in place.
    y += 1
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]
    # What is below is low, what is above is high; what is rounded by -0.25 is that many steps'
    # share.
    error = 3 * -0.25 / 255
    assert bounds.grad.tolist() == pytest.approx([1 - error, 6 + error])


def test_a_range_moves_by_a_share_with_zero_in_it():
    bounds, up, down = (
        torch.tensor([-1.0, 3.0]),
        torch.tensor([-1e-7, -2.0]),
        torch.tensor([1e-7, 2.0]),
    )
    assert move_range(bounds, up, 0.01).tolist() == pytest.approx([-0.96, 3.04])
    assert move_range(bounds, down, 0.01).tolist() == pytest.approx([-1.04, 2.96])
    assert move_range(bounds, torch.zeros(2), 0.01).tolist() == [-1, 3]
    assert move_range(torch.tensor([-0.001, 3.0]), up, 0.01)[0] == 0
    # Nothing is below a ReLU's zero, and a range that lies above zero begins there.
    assert move_range(torch.tensor([0.0, 3.0]), down, 0.01).tolist() == pytest.approx([0, 2.97])
    assert move_range(torch.tensor([1.0, 3.0]), torch.zeros(2), 0.01).tolist() == [0, 3]


@pytest.mark.parametrize('high', (2.0, 50.0))
def test_a_range_learns_what_rounds_best(high):
    """Begun too narrow or too wide."""
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 10
    ranges = Ranges(dict(x=torch.tensor([0.0, high])))
    ranges.learning = True
    lost = []
    for _ in range(300):
        loss = (ranges.quantize('x', x) - x).square().sum()
        loss.backward()
        lost.append(loss.item())
        ranges.values['x'] = move_range(ranges.values['x'], ranges.values['x'].grad, 0.01)
    assert lost[-1] < lost[0] / 10 and abs(ranges.values['x'][1] - 10) < abs(high - 10) / 10
    # The value is that of running ranges, bit for bit.
    learned = ranges.quantize('x', x)
    ranges.learning = False
    assert torch.equal(ranges.quantize('x', x), learned)


def test_a_learned_range_begins_with_what_passes_first():
    ranges = Ranges()
    ranges.learning = True
    empty = torch.zeros(0, 4)
    assert ranges.quantize('x', empty) is empty and not ranges.values
    ranges.quantize('x', torch.tensor([-1.0, 3.0], requires_grad=True)).sum().backward()
    assert ranges.values['x'].tolist() == [-1, 3] and ranges.values['x'].grad.shape == (2,)
