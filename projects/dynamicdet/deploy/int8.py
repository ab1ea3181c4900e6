"""Graphs in integers of 8 bits, by ONNX Runtime's QDQ quantizer: activations U8, weights S8 for
each channel.

Three steps, each on the graphs of all parts:

1. `Observer`: what range each tensor has, while images pass through the deployed detector;
2. `prediction_layers` stay float, and `choose_float`: which others cost too much in 8 bits, by
  trying each;
3. `quantize_graph`.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..cascade.parts import DetectorPart
from ..compression.quantization import (
    QuantizationPlan,
    QuantizedLayer,
    activation_scale,
    fold_norm,
    last_layers,
)
from ..errors import UsageError
from .graphs import Graph, is_output, need_for_deployment

#: Layers, that is what has weights, and what is part of them.
LAYERS = ('Conv', 'Gemm')
#: What may stay in 8 bits between layers: sums, joins, pooling, and SiLU, which is a sigmoid and a
#: product. In float, SiLU takes as long as the convolutions in 8 bits.
BETWEEN = ('Add', 'Concat', 'MaxPool', 'Mul', 'Resize', 'Sigmoid')
#: Without SiLU: a head's predictions are made of it. experiments/compression.md has what rounding
#: it costs there.
PLAIN_BETWEEN = tuple(kind for kind in BETWEEN if kind not in ('Mul', 'Sigmoid'))
#: Of these, what gives the values that it takes: scale and zero stay.
_SAME = ('MaxPool', 'Resize')
_BINS = 2048
Range = tuple[float, float]


def needs_reduced_range() -> bool:
    """Whether this processor adds two products of 8 bits in 16, which saturate: x86 without VNNI.
    Weights of 7 bits cannot (ONNX Runtime's documentation, "When and why do I need to try
    U8U8?")."""
    if platform.machine().lower() not in ('x86_64', 'amd64', 'i386', 'i686'):
        return False
    try:
        with open('/proc/cpuinfo') as file:
            flags = next((line for line in file if line.startswith('flags')), '')
    except OSError:
        return True
    return 'vnni' not in flags


# Ranges.


class Observer:
    """Range and histogram of tensors that pass by.

    Attributes:
        shares (dict[str, float]): Elements of each tensor for each row: an image, or a RoI.
    """

    def __init__(self) -> None:
        self._edges: dict[str, Range] = {}
        self._counts: dict[str, np.ndarray] = {}
        self.shares: dict[str, float] = {}

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the arrays of one run, by name, into the ranges and histograms."""
        for name, array in arrays.items():
            if array.size:
                self._add(name, array)

    def _add(self, name: str, array: np.ndarray) -> None:
        if not np.isfinite(array).all():
            raise UsageError(
                f"the tensor '{name}' has values that are not finite: this detector cannot be "
                'quantized'
            )
        self.shares[name] = array.size / len(array)
        low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
        if name in self._edges:
            low, high = min(low, self._edges[name][0]), max(high, self._edges[name][1])
        high = high if high > low else low + 1e-12
        counts = np.histogram(array, _BINS, (low, high))[0].astype(np.float64)
        if name in self._edges:
            counts += self._moved(name, low, high)
        self._edges[name], self._counts[name] = (low, high), counts

    def _moved(self, name: str, low: float, high: float) -> np.ndarray:
        """Earlier counts in wider bins."""
        middles = _middles(*self._edges[name])
        return np.histogram(middles, _BINS, (low, high), weights=self._counts[name])[0]

    def ranges(self, method: str = 'mse') -> dict[str, Range]:
        """Range of each tensor.

        Args:
            method (str): ``minmax``: all that was seen; ``mse``: the part of it that has the least
                squared error, with what lies outside at its ends.
        """
        if method == 'minmax':
            return dict(self._edges)
        if method != 'mse':
            raise UsageError(f"ranges are found by 'mse' or 'minmax', not by '{method}'")
        return {name: least_error(self._counts[name], *self._edges[name]) for name in self._edges}


def _middles(low: float, high: float) -> np.ndarray:
    edges = np.linspace(low, high, _BINS + 1)
    return (edges[1:] + edges[:-1]) / 2


def least_error(counts: np.ndarray, low: float, high: float) -> Range:
    """The range, shrunk at both ends by one factor, with the least squared error of rounding and
    clipping."""
    values, best = _middles(low, high), (np.inf, (low, high))
    for factor in np.linspace(1, 0.2, 33):
        scale, zero = activation_scale(low * factor, high * factor)
        rounded = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
        error = float((counts * (values - rounded) ** 2).sum())
        best = min(best, (error, (low * factor, high * factor)))
    return best[1]


def expose_layer_tensors(content: bytes) -> bytes:
    """A graph that also gives all tensors that enter or leave a layer."""
    onnx = need_for_deployment('onnx')
    model = onnx.load_from_string(content)
    for name in _activations(model):
        if not is_output(name):
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model.SerializeToString()


def _activations(model: Any) -> list[str]:
    """What enters and leaves layers, ReLUs behind them, and what is between; but what enters the
    graph is known already."""
    inputs, outputs = (
        {graph_input.name for graph_input in model.graph.input},
        [graph_output.name for graph_output in model.graph.output],
    )
    names: dict[str, None] = {}
    for node in _between(
        model, {*inputs, *(node.output[0] for node in weighted_nodes(model))}, outputs
    ):
        names.update(dict.fromkeys((*_data_of(model, node), *node.output)))
    for node in weighted_nodes(model):
        leaving = node.output[0]
        relu = only_relu(model, leaving)
        for name in (node.input[0], leaving, *([relu.output[0]] if relu is not None else [])):
            names[name] = None
    return [name for name in names if name not in inputs]


def weighted_nodes(model: Any) -> list[Any]:
    """Nodes with weights."""
    weights = {initializer.name for initializer in model.graph.initializer}
    return [
        node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in weights
    ]


def _data_of(model: Any, node: Any) -> list[str]:
    """What a node takes that is no constant; of an enlargement the map, not the size."""
    constants = {initializer.name for initializer in model.graph.initializer} | {
        name for node in model.graph.node if node.op_type == 'Constant' for name in node.output
    }
    taken = node.input[:1] if node.op_type == 'Resize' else node.input
    return [name for name in taken if name and name not in constants]


def _between(
    model: Any, eight: Iterable[str], wanted: Iterable[str] = (), kinds: Sequence[str] = BETWEEN
) -> list[Any]:
    """Nodes of some kinds, and ReLUs, that take nothing but tensors in 8 bits and from which a
    layer, or a tensor that is wanted, is reached; in order.

    Args:
        model: The graph.
        eight (Iterable[str]): What layers in 8 bits give, and what comes in so.
        wanted (Iterable[str]): Tensors.
        kinds (Sequence[str]): Operators.
    """
    eight, candidates = set(eight), []
    for node in model.graph.node:
        data = _data_of(model, node)
        if node.op_type in (*kinds, 'Relu') and data and all(name in eight for name in data):
            candidates.append(node)
            eight.update(node.output)
    wanted, kept = {*wanted, *(node.input[0] for node in weighted_nodes(model))}, []
    for node in reversed(candidates):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(_data_of(model, node))
    return kept[::-1]


def only_relu(model: Any, name: str) -> Any | None:
    """The ReLU that alone reads a tensor."""
    readers = [node for node in model.graph.node if name in node.input]
    alone = len(readers) == 1 and readers[0].op_type == 'Relu' and not is_output(name)
    return readers[0] if alone else None


# Quantizing.


@dataclass(frozen=True)
class Recipe:
    """How a part is quantized.

    Attributes:
        ranges (dict): Tensor -> lowest and highest value.
        float_layers (tuple[str]): Names of nodes that stay float.
        reduced (bool): Whether weights have 7 bits. Defaults to what this processor needs.
        between (tuple[str]): What is in 8 bits, too, between layers that are (of `BETWEEN`).
    """

    ranges: dict[str, Range]
    float_layers: tuple[str, ...] = ()
    reduced: bool = field(default_factory=needs_reduced_range)
    between: tuple[str, ...] = ()


def quantize_graph(content: bytes, recipe: Recipe) -> bytes:
    """A graph with all layers in 8 bits but those that a recipe spares."""
    need_for_deployment('onnxruntime')
    onnx = need_for_deployment('onnx')
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load_from_string(content)
    names = [
        node.name
        for node in weighted_nodes(model)
        if node.name not in recipe.float_layers and node.input[0] in recipe.ranges
    ]
    if not names:
        return content
    relus = [node.name for node in model.graph.node if node.op_type == 'Relu']
    outputs = {node.output[0] for node in weighted_nodes(model) if node.name in names}
    inputs = {graph_input.name for graph_input in model.graph.input}
    between = [
        node
        for node in _between(model, outputs, kinds=recipe.between)
        if node.op_type in recipe.between
    ]
    same = {name for node in between if node.op_type in _SAME for name in node.output}
    data, overrides = {}, {}
    # An input that changes nothing is not in the graph.
    known = inputs | {name for node in model.graph.node for name in node.output}
    for name, (low, high) in recipe.ranges.items():
        if name in same or name not in known:
            continue
        scale, zero = activation_scale(low, high)
        data[name] = TensorData(lowest=np.float32(low), highest=np.float32(high))
        overrides[name] = [dict(scale=np.array(scale), zero_point=np.array(zero, np.uint8))]
    quantizer = QDQQuantizer(
        model,
        True,
        recipe.reduced,
        QuantType.QInt8,
        QuantType.QUInt8,
        data,
        [*names, *relus, *(node.name for node in between)],
        [],
        [*LAYERS, 'Relu', *{node.op_type for node in between}],
        # Pooling and enlarging, also before a layer has made 8 bits of what they take.
        dict(TensorQuantOverrides=overrides, ForceQuantizeNoInputCheck=True),
    )
    quantizer.quantize_model()
    _spare_shapes(quantizer.model.model)
    return quantizer.model.model.SerializeToString()


def _spare_shapes(model: Any) -> None:
    """Let sizes be read from 8 bits, and leave out what was made float for them alone."""
    makers = {
        node.output[0]: node for node in model.graph.node if node.op_type == 'DequantizeLinear'
    }
    for node in model.graph.node:
        if node.op_type == 'Shape' and node.input[0] in makers:
            node.input[0] = makers[node.input[0]].input[0]
    read = {name for node in model.graph.node for name in node.input} | {
        graph_output.name for graph_output in model.graph.output
    }
    for name, node in makers.items():
        if name not in read:
            model.graph.node.remove(node)


def spared_layers(content: bytes, part: DetectorPart) -> tuple[str, ...]:
    """Nodes whose weights are of a part's spared modules."""
    onnx = need_for_deployment('onnx')
    model = onnx.load_from_string(content)
    weights = {
        initializer.name: onnx.numpy_helper.to_array(initializer)
        for initializer in model.graph.initializer
    }
    spared = [
        parameter.detach().cpu().numpy()
        for module in part.spared
        for parameter in module.parameters()
        if parameter.dim() > 1
    ]
    return tuple(
        node.name
        for node in weighted_nodes(model)
        if any(_equal(weights[node.input[1]], spared_weight) for spared_weight in spared)
    )


def _equal(weight: np.ndarray, other: np.ndarray) -> bool:
    return any(weight.shape == two.shape and np.allclose(weight, two) for two in (other, other.T))


def prediction_layers(
    content: bytes, costs: Mapping[str, float], share: float
) -> tuple[tuple[str, ...], float]:
    """`last_layers` of a float graph, where what a part gives are predictions. ``costs`` are of
    nodes that ran."""
    model = need_for_deployment('onnx').load_from_string(content)
    layer_costs = {node.name: costs.get(node.name, 0) for node in weighted_nodes(model)}
    return last_layers(
        [(node.name, node.input, node.output) for node in model.graph.node], layer_costs, share
    )


def noise_of(
    reference: Sequence[Sequence[np.ndarray]], graph: Graph, feeds: Sequence[Sequence[Tensor]]
) -> float:
    """Power of the error over that of the outputs, the mean over a part's outputs."""
    errors, powers = None, None
    for expected, inputs in zip(reference, feeds):
        got = graph.arrays(*inputs).values()
        error = np.array(
            [np.square(output - two, dtype=np.float64).sum() for output, two in zip(got, expected)]
        )
        power = np.array([np.square(two, dtype=np.float64).sum() for two in expected])
        errors, powers = (error, power) if errors is None else (errors + error, powers + power)
    return float((errors / np.maximum(powers, 1e-30)).mean())


@dataclass
class Sensitivity:
    """What 8 bits cost a part.

    Attributes:
        before, after (float): Noise over signal at its outputs, with all layers in 8 bits and with
            the chosen ones float.
        chosen (list[str]): Layers that stay float, the worst first.
        each (dict[str, float]): Noise with this layer alone in 8 bits.
        share (float): Of the multiply-adds, what stays float.
    """

    before: float
    after: float
    chosen: list[str] = field(default_factory=list)
    each: dict[str, float] = field(default_factory=dict)
    share: float = 0.0


def choose_float(
    content: bytes,
    recipe: Recipe,
    feeds: Sequence[Sequence[Tensor]],
    costs: Mapping[str, float],
    noise: float = 0.01,
    share: float = 0.1,
) -> Sensitivity:
    """Find the layers that must stay float, by measurement.

    Each layer is tried in 8 bits alone. Then the worst of them become float, one after the other,
    until the noise is low enough or too much would be float.

    Args:
        content (bytes): The float graph.
        recipe (Recipe): Its ranges; layers that it spares are not tried.
        feeds (Sequence): What reaches the part, for some batches.
        costs (Mapping[str, float]): Multiply-adds of each layer for an image or RoI.
        noise (float): Power of the error over that of the outputs that is wanted. 0.01 is 20 dB.
        share (float): Of the multiply-adds, what may stay float.
    """
    onnx = need_for_deployment('onnx')
    names = [
        node.name
        for node in weighted_nodes(onnx.load_from_string(content))
        if node.name not in recipe.float_layers
    ]
    exact = Graph(content, None)
    reference = [list(exact.arrays(*inputs).values()) for inputs in feeds]

    def measure(kept_float: Iterable[str]) -> float:
        quantized = quantize_graph(
            content, replace(recipe, float_layers=(*recipe.float_layers, *kept_float))
        )
        return noise_of(reference, Graph(quantized, None), feeds)

    before = measure(())
    sensitivity = Sensitivity(before, before)
    if before <= noise or not names:
        return sensitivity
    sensitivity.each = {name: measure(other for other in names if other != name) for name in names}
    total = sum(costs.get(name, 0) for name in names) or 1
    for name in sorted(names, key=lambda layer: -sensitivity.each[layer]):
        cost = costs.get(name, 0) / total
        if sensitivity.after <= noise:
            break
        if sensitivity.share + cost <= share:
            sensitivity.chosen.append(name)
            sensitivity.share += cost
            sensitivity.after = measure(sensitivity.chosen)
    return sensitivity


def multiply_adds(content: bytes, sizes: Mapping[str, float]) -> dict[str, float]:
    """Of each layer, for an image or RoI, by the elements of its output (`Observer.shares`)."""
    onnx = need_for_deployment('onnx')
    model = onnx.load_from_string(content)
    weights = {initializer.name: list(initializer.dims) for initializer in model.graph.initializer}
    # Of a convolution (out, in / groups, height, width), of a Gemm (out, in).
    return {
        node.name: sizes.get(node.output[0], 0) * float(np.prod(weights[node.input[1]][1:]))
        for node in weighted_nodes(model)
    }


# Ranges of a training.


def trained_ranges(
    content: bytes, plan: QuantizationPlan, ranges: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Range], tuple[str, ...]]:
    """Ranges that a training found, by the names of a graph's tensors; and the layers that have
    none.

    Args:
        content (bytes): The float graph of the same part.
        plan (QuantizationPlan): Where the training had integers.
        ranges (Mapping): Key of the plan -> lowest and highest value.

    Raises:
        UsageError: If the graph is of another detector.
    """
    onnx = need_for_deployment('onnx')
    model = onnx.load_from_string(content)
    weights = {
        initializer.name: onnx.numpy_helper.to_array(initializer)
        for initializer in model.graph.initializer
    }
    nodes, layers = weighted_nodes(model), list(plan.layers.values())
    # Calls and nodes are in one order; weights prove it.
    if len(nodes) != len(layers) or not all(
        _equal(weights[node.input[1]], _folded(layer)) for node, layer in zip(nodes, layers)
    ):
        raise UsageError(
            'the trained ranges are of another detector: its layers are not those of the graph'
        )
    range_by_name: dict[str, Range] = {}
    unknown = []
    for node, layer in zip(nodes, layers):
        relu = only_relu(model, node.output[0])
        leaving = node.output[0] if relu is None else relu.output[0]
        if layer.spared or layer.entering not in ranges or layer.leaving not in ranges:
            unknown.append(node.name)
            continue
        for name, key in (
            (node.input[0], layer.entering),
            (leaving, layer.leaving),
            (node.output[0], layer.leaving),
        ):
            range_by_name[name] = tuple(float(end) for end in ranges[key])
    return range_by_name, tuple(unknown)


def _folded(layer: QuantizedLayer) -> np.ndarray:
    weight = layer.weight if layer.norm is None else fold_norm(layer.weight, None, layer.norm)[0]
    return weight.detach().cpu().numpy()
