"""Eight-bit integers, simulated in torch as an int8 graph of ONNX Runtime computes them.

Quantized are layers, that is convolutions and linear layers, with what enters and what leaves them:

* weights: symmetric, a scale for each output channel, integers in -127 ... 127 (-64 ... 64 where a
  processor adds products in 16 bits, see `deploy.int8.needs_reduced_range`);
* activations: one scale and zero point for a tensor, integers in 0 ... 255, for all who read the
  tensor;
* biases: integers of 32 bits, in steps of the product of both scales;
* a norm behind a convolution is part of it, and a ReLU behind both needs no integers of its own;
* layers that give predictions may stay float, see docs/deploying.md.

Where that is follows from the calls that torch sees in a pass (`trace_quantization`), not from
modules: sums and concatenations are no modules, and heads use one module at several levels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..private_torch import tree_leaves
from ..transfers import Followed

#: Share of a batch's range in the running one.
MOMENTUM = 0.1
_CONVS, _LINEARS, _NORMS = (torch.conv2d, F.conv2d), (F.linear,), (F.batch_norm,)
#: Norms that can be part of the convolution before them: their ``forward`` calls ``F.batch_norm``.
#: A framework with a kind of its own adds it.
NORM_KINDS: list[type[nn.Module]] = [_BatchNorm]
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def activation_scale(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and zero point, 0 to 255, of a range. Zero is always in it, and is an integer of its
    own.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), equation 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    # All zeros, or too close for float32.
    if not scale > np.finfo(np.float32).tiny:
        return np.float32(1), 0
    return scale, int(np.clip(np.rint(-low / float(scale)), 0, 255))


def activation_step(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """`activation_scale` of a range that is a tensor, (2, ), on its device; both are of no
    dimension."""
    if bounds.device.type != 'cpu':
        return step_on_device(bounds)
    scale, zero = activation_scale(*bounds.tolist())
    return torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)


def step_on_device(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """`activation_step` where the host would wait for each range: the same to the last bit, by more
    operations."""
    low, high = bounds.detach().double().unbind()
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).float()
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    return scale, (low / -scale.double()).round().clamp(0, 255).int()


def weight_scale(weight: Tensor, reduced: bool = False) -> Tensor:
    """A scale for each output channel, (C, ), of weights (C, ...)."""
    scale = weight.detach().flatten(1).abs().amax(1) / (64 if reduced else 127)
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)


def fake_quantize_weight(weight: Tensor, reduced: bool = False, noise: float = 1.0) -> Tensor:
    """Round weights, (C, ...), to what 8 bits hold; gradients pass as if nothing had happened.

    Args:
        weight (Tensor): float32.
        reduced (bool): Whether to -64 ... 64.
        noise (float): Share of the weights, by chance, that is rounded: quant-noise (Fan et al.
            2021). In [0, 1].
    """
    if noise <= 0:
        return weight
    scale = weight_scale(weight, reduced)
    most = 64 if reduced else 127
    # Zero points that are floats: those that are integers torch looks at on the host, two times a
    # layer.
    zeros = torch.zeros_like(scale)
    rounded = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -most, most)
    return rounded if noise >= 1 else torch.where(torch.rand_like(weight) < noise, rounded, weight)


def round_bias(bias: Tensor, step: Tensor) -> Tensor:
    """Round a bias, (C, ), to multiples of the scale of its channel's products, (C, ): integers of
    32 bits are added to those. Gradients pass."""
    return bias + (torch.round(bias / step) * step - bias).detach()


def fold_norm(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what the convolution and the norm (in eval mode)
    do."""
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = (0 if bias is None else bias) - norm.running_mean
    shift = shift * factor + (0 if norm.bias is None else norm.bias)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), shift


# Where integers are.


@dataclass(frozen=True)
class QuantizedLayer:
    """A call of a convolution or linear layer.

    Attributes:
        entering, leaving (str): Keys of the ranges of its input and its output.
        weight (Tensor): Its weight.
        norm (nn.Module, optional): The norm that is part of it.
        spared (bool): Whether it stays float.
    """

    entering: str
    leaving: str
    weight: Tensor
    norm: _BatchNorm | None
    spared: bool


@dataclass
class QuantizationPlan:
    """Which calls of a pass are of layers, and whose results become integers.

    Attributes:
        layers (dict[int, QuantizedLayer]): By number of the call, in order.
        norms (set[int]): Calls that are part of a layer.
        points (dict[int, str]): Call -> key of the range of its result.
        inputs (dict[int, str]): The same for what enters the pass.
    """

    layers: dict[int, QuantizedLayer] = field(default_factory=dict)
    norms: set[int] = field(default_factory=set)
    points: dict[int, str] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)


class _Counted(TorchFunctionMode):
    """Numbers the calls that make tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        number = self.calls
        result = self.call(number, function, args, kwargs or {})
        self.calls += any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        return result

    def call(self, number: int, function: Callable, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class _Tracer(_Counted):
    """Notes who makes and who reads each value. A value is a call, or an input: ('input',
    number)."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        # An object that is written to in place becomes another value.
        self.value_of: dict[int, Any] = {
            id(tensor): ('input', index) for index, tensor in enumerate(inputs)
        }
        self.readers: dict[Any, list[int]] = {}
        self.made: dict[int, tuple[Callable, tuple]] = {}
        self.sizes: dict[int, int] = {}
        # An id is not used again while its object lives.
        self.kept: list[Any] = list(inputs)

    def call(self, number: int, function: Callable, args: tuple, kwargs: dict) -> Any:
        read = [
            self.value_of.get(id(leaf))
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        ]
        first = self.value_of.get(id(args[0])) if args else None
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if tensors:
            for value in read:
                if value is not None:
                    self.readers.setdefault(value, []).append(number)
            self.made[number] = (function, (first, *args))
            self.sizes[number] = tensors[0].numel()
            self.kept.append((result, args))
            # Of several results, only a single one can become integers.
            for index, tensor in enumerate(tensors):
                self.value_of[id(tensor)] = number if len(tensors) == 1 else (number, index)
        return result

    def only_reader(self, value: Any, functions: Sequence[Callable]) -> int | None:
        readers = self.readers.get(value, [])
        if (
            len(readers) == 1
            and self.made[readers[0]][0] in functions
            and self.made[readers[0]][1][0] == value
        ):
            return readers[0]
        return None

    def is_layer(self, number: int) -> bool:
        function, (_, *args) = self.made[number]
        return function in _CONVS or function in _LINEARS and args[0].dim() == 2

    def predictions(self, layers: Sequence[int], share: float) -> tuple[int, ...]:
        """See `last_layers`."""
        read: dict[int, set[Any]] = {}
        for value, readers in self.readers.items():
            maker = value[0] if isinstance(value, tuple) else value
            for reader in readers:
                read.setdefault(reader, set()).add(maker)
        steps = [(number, read.get(number, ()), (number,)) for number in sorted(self.made)]
        costs = {
            number: self.sizes[number] * self.made[number][1][2][0].numel() for number in layers
        }
        return last_layers(steps, costs, share)[0]


def last_layers(
    steps: Sequence[tuple[Any, Iterable, Iterable]], costs: Mapping[Any, float], share: float
) -> tuple[tuple[Any, ...], float]:
    """Layers behind which there is no other, the cheapest first: what they give are scores and
    boxes.

    In 8 bits many scores become equal and boxes move in steps. That costs AP, though it is next to
    nothing of the outputs' power: background, whose logits are far below zero, makes ranges wide.
    See docs/deploying.md.

    Args:
        steps (Sequence[tuple]): Of a computation, in order: name, values that it reads, values that
            it makes.
        costs (Mapping): Multiply-adds of each layer, by the name of its step.
        share (float): Of them, what these layers may be.

    Returns:
        tuple[tuple, float]: Names, and the share that they are.
    """
    read, last = set(), []
    # What is read later comes later.
    for name, inputs, outputs in reversed(steps):
        further = not read.isdisjoint(outputs)
        if name in costs and not further:
            last.append(name)
        if name in costs or further:
            read.update(inputs)
    total, chosen, spent = sum(costs.values()) or 1, [], 0.0
    for name in sorted(last, key=lambda layer: (costs[layer], layer)):
        if spent + costs[name] / total <= share:
            chosen.append(name)
            spent += costs[name] / total
    return tuple(chosen), spent


@torch.no_grad()
def trace_quantization(
    run: Callable,
    inputs: Sequence[Tensor],
    modules: Sequence[nn.Module],
    spared: Sequence[nn.Module] = (),
    float_share: float = 0.0,
) -> QuantizationPlan:
    """Find the layers of a computation by running it once. Its norms must be in eval mode.

    Args:
        run (Callable): Tensors -> nested tensors.
        inputs (Sequence[Tensor]): What to run it on.
        modules (Sequence[nn.Module]): Where its norms are.
        spared (Sequence[nn.Module]): Whose layers stay float.
        float_share (float): Layers behind which there is no other stay float, too, the cheapest
            first, as long as they are at most this share of the multiply-adds; see `last_layers`.
    """
    norms = {
        id(norm.running_mean): norm
        for module in modules
        for norm in module.modules()
        if isinstance(norm, tuple(NORM_KINDS))
    }
    kept_float = {id(parameter) for module in spared for parameter in module.parameters()}
    inputs = [tensor.detach() for tensor in inputs]
    tracer = _Tracer(inputs)
    with tracer:
        outputs = run(*inputs)
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor):
            # Who computes with the outputs is none of the calls.
            tracer.readers.setdefault(tracer.value_of.get(id(output)), []).append(-1)
    tracer.made[-1] = (None, (None,))
    plan, keys, traced = QuantizationPlan(), {}, []
    layers = [number for number in sorted(tracer.made) if tracer.is_layer(number)]
    predictions = tracer.predictions(layers, float_share)
    for number in layers:
        value, _, weight = tracer.made[number][1][:3]
        leaving, norm = number, None
        norm_call = tracer.only_reader(number, _NORMS)
        if norm_call is not None and id(tracer.made[norm_call][1][2]) in norms:
            norm = norms[id(tracer.made[norm_call][1][2])]
            leaving = norm_call
            plan.norms.add(norm_call)
        relu = tracer.only_reader(leaving, _RELUS)
        traced.append(
            (
                number,
                value,
                leaving if relu is None else relu,
                weight,
                norm,
                number in predictions or id(weight) in kept_float,
            )
        )
    for index, (_, value, leaving, *_, spare) in enumerate(traced):
        if not spare:
            keys.setdefault(value, f'in{index}')
            keys.setdefault(leaving, f'out{index}')
    for number, value, leaving, weight, norm, spare in traced:
        plan.layers[number] = QuantizedLayer(
            keys.get(value, ''), keys.get(leaving, ''), weight, norm, spare
        )
    for value, key in keys.items():
        if isinstance(value, int):
            plan.points[value] = key
        elif value is not None and value[0] == 'input':
            plan.inputs[value[1]] = key
    return plan


class LearnedRange(torch.autograd.Function):
    """Round activations to what 8 bits hold, with gradients for the range, too.

    With steps s = (high - low) / 255 and the rounded y, in straight-through terms: what lies above
    ``high`` becomes it, so its gradient is ``high``'s, as in PACT (Choi et al. 2018, equation 3),
    and likewise below ``low``; what lies inside moves by its rounding error where the steps grow,
    dy/ds = (y - x) / s, as in LSQ (Esser et al. 2020, equation 3).

    Inputs: x, any shape; bounds (2, ), low and high; their scale and zero point.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, bounds: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Values of x rounded to integer steps and back; ``bounds`` get gradients alone."""
        # Not what it gives: residual blocks and pyramids add to that in place.
        context.save_for_backward(x, scale, zero)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple:
        """Gradients of x where it was not clipped, and of both bounds."""
        x, scale, zero = context.saved_tensors
        steps = torch.round(x / scale)
        below, above = steps + zero < 0, steps + zero > 255
        inside = gradient * ~(below | above)
        error = (inside * (steps - x / scale)).sum() / 255
        bounds = torch.stack([(gradient * below).sum() - error, (gradient * above).sum() + error])
        return inside, bounds, None, None


def move_range(bounds: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """A range after a step of descent: (2, ). Each bound moves against the sign of its gradient
    (signSGD, Bernstein et al. 2018), by a share of the width: widths and gradients differ by orders
    of magnitude between layers.

    Zero stays in the range, and a bound of zero stays zero: nothing is below a ReLU's.

    Args:
        bounds (Tensor): Low and high, (2, ).
        gradient (Tensor): From `LearnedRange`, (2, ).
        rate (float): The share, above 0.
    """
    low, high = bounds.detach().clamp(max=0)[0], bounds.detach().clamp(min=0)[1]
    step = rate * (high - low) * gradient.sign()
    return torch.stack(
        [
            torch.where(low < 0, (low - step[0]).clamp(max=0), 0.0),
            torch.where(high > 0, (high - step[1]).clamp(min=0), 0.0),
        ]
    )


# The simulation.


class Ranges:
    """Lowest and highest value of each tensor that becomes integers, as they run by or are learned.

    Attributes:
        values (dict[str, Tensor]): Key -> (2, ).
        observing (bool): Whether passes change them.
        rounding (bool): Whether activations are rounded by them.
        learning (bool): Whether they get gradients; then the first pass of a tensor gives its
            range.
    """

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = dict(values or {})
        self._steps: dict[str, Followed] = {}
        self.observing, self.rounding, self.learning = False, True, False

    @torch.no_grad()
    def observe(self, key: str, x: Tensor) -> None:
        """Start the range of a key with a tensor's extremes, or move it towards them."""
        if not (self.observing or self.learning and key not in self.values) or not x.numel():
            return
        now = torch.stack(x.detach().float().aminmax())
        before = self.values.get(key)
        self.values[key] = now if before is None else before.to(now.device).lerp_(now, MOMENTUM)

    def step(self, key: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a known range."""
        return self._steps.setdefault(key, Followed(activation_step))(self.values[key])

    def quantize(self, key: str, x: Tensor) -> Tensor:
        """Round activations to what 8 bits hold; as they are where no range is known."""
        self.observe(key, x)
        if key not in self.values or not self.rounding:
            return x
        scale, zero = self.step(key)
        if self.learning and torch.is_grad_enabled():
            return LearnedRange.apply(x, self.values[key].requires_grad_(), scale, zero)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


class _Simulator(_Counted):
    def __init__(self, plan: QuantizationPlan, ranges: Ranges, reduced: bool, noise: float) -> None:
        super().__init__()
        self.plan, self.ranges, self.reduced, self.noise = plan, ranges, reduced, noise

    def call(self, number: int, function: Callable, args: tuple, kwargs: dict) -> Any:
        # Calls that make no tensor have the number of the next that does.
        layer = self.plan.layers.get(number) if function in (*_CONVS, *_LINEARS) else None
        if layer is not None and not layer.spared:
            x, weight, *rest = args
            bias, rest = (rest[0], rest[1:]) if rest else (None, ())
            if layer.norm is not None:
                weight, bias = fold_norm(weight, bias, layer.norm)
            if bias is not None and layer.entering in self.ranges.values and self.ranges.rounding:
                step = self.ranges.step(layer.entering)[0] * weight_scale(weight, self.reduced)
                bias = round_bias(bias, step)
            result = function(
                x, fake_quantize_weight(weight, self.reduced, self.noise), bias, *rest, **kwargs
            )
        elif number in self.plan.norms and function in _NORMS:
            result = args[0]
        else:
            result = function(*args, **kwargs)
        key = self.plan.points.get(number)
        return (
            self.ranges.quantize(key, result)
            if key is not None and isinstance(result, Tensor)
            else result
        )


class Int8Simulation:
    """A computation as in 8 bits: runs in its place.

    Args:
        run (Callable): Tensors -> nested tensors.
        modules (Sequence[nn.Module]): What it computes with. Their norms stay in eval mode.
        spared (Sequence[nn.Module]): Whose layers stay float.
        reduced (bool): Whether weights are in -64 ... 64.
        noise (float): Share of the weights that is rounded in a pass while training, in (0, 1].
        float_share (float): See `trace_quantization`.
    """

    def __init__(
        self,
        run: Callable,
        modules: Sequence[nn.Module],
        spared: Sequence[nn.Module] = (),
        reduced: bool = False,
        noise: float = 1.0,
        float_share: float = 0.0,
    ) -> None:
        self.run, self.modules, self.spared = run, tuple(modules), tuple(spared)
        self.float_share = float_share
        self.reduced, self.noise = reduced, noise
        self.ranges = Ranges()
        #: Whether anything is rounded; if not, ranges are watched alone.
        self.active = True
        self._plans: dict[Any, QuantizationPlan] = {}

    @property
    def keys(self) -> list[str]:
        """Of all ranges, known or not, once something has passed."""
        return sorted(
            {
                key
                for plan in self._plans.values()
                for key in (*plan.points.values(), *plan.inputs.values())
            }
        )

    def plan(self, *inputs: Tensor) -> QuantizationPlan:
        """Where integers are. What a detector calls depends on sizes and on whether it trains, not
        on how many images there are."""
        key = (self.modules[0].training, tuple(tuple(tensor.shape[2:]) for tensor in inputs))
        if key not in self._plans:
            self._plans[key] = trace_quantization(
                self.run, inputs, self.modules, self.spared, self.float_share
            )
        return self._plans[key]

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the pass with rounded weights and results; inputs and results as ``run`` has them."""
        for norm in (norm for module in self.modules for norm in module.modules()):
            if isinstance(norm, tuple(NORM_KINDS)):
                norm.eval()
        plan = self.plan(*inputs)
        self.ranges.rounding = self.active
        inputs = [
            self.ranges.quantize(plan.inputs[index], x) if index in plan.inputs else x
            for index, x in enumerate(inputs)
        ]
        if not self.active:
            noise = 0.0
        else:
            noise = self.noise if self.modules[0].training else 1.0
        with _Simulator(plan, self.ranges, self.reduced, noise):
            return self.run(*inputs)
