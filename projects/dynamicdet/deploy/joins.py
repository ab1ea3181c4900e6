"""Maps that go from one graph to the next in 8 bits, where both have them so: nothing is turned
into float and back.

A graph says in its metadata which of its outputs are in 8 bits, and what their numbers stand for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .graphs import need_for_deployment
from .int8 import Range

#: Scale and zero point.
Step = tuple[float, int]
#: A stage, and the number of an input or output.
End = tuple[str, int]
#: Input of a stage -> the outputs that it may be: several, where exits share what comes behind
#: them.
Sources = Mapping[End, Sequence[End]]


class Join(NamedTuple):
    """Outputs that go to the same inputs, so all of them have one scale and zero point."""

    outputs: tuple[End, ...]
    inputs: tuple[End, ...]


def joins_of(sources: Sources) -> list[Join]:
    """Outputs and inputs that belong together."""
    found: list[tuple[set, set]] = []
    for end, outputs in sources.items():
        together = [one for one in found if one[0].intersection(outputs)]
        found = [one for one in found if one not in together]
        found.append(
            (
                set(outputs).union(*(one[0] for one in together)),
                {end}.union(*(one[1] for one in together)),
            )
        )
    return [Join(tuple(sorted(outputs)), tuple(sorted(inputs))) for outputs, inputs in found]


def joined_ranges(
    joins: Sequence[Join], ranges: Mapping[str, Mapping[str, Range]]
) -> dict[str, dict[str, Range]]:
    """Of each stage, the range of its ends: that of all outputs of a join together.

    Args:
        joins (Sequence[Join]): Those of the detector.
        ranges (Mapping): Of each stage, lowest and highest value of its tensors.
    """
    found: dict[str, dict[str, Range]] = {name: {} for name in ranges}
    for outputs, inputs in joins:
        own = [ranges[name][f'out{index}'] for name, index in outputs]
        whole = min(low for low, _ in own), max(high for _, high in own)
        for kind, ends in (('out', outputs), ('in', inputs)):
            for name, index in ends:
                found[name][f'{kind}{index}'] = whole
    return found


def join_graphs(contents: Mapping[str, bytes], joins: Sequence[Join]) -> dict[str, bytes]:
    """Let graphs hand over maps in 8 bits.

    Args:
        contents (Mapping[str, bytes]): Graphs of all stages, with floats at their ends.
        joins (Sequence[Join]): Those of the detector. One of which an output is not made from 8
            bits, or not by the same scale and zero point as the others, stays as it is.

    Returns:
        dict[str, bytes]: Graphs that compute the same.
    """
    models = {
        name: need_for_deployment('onnx').load_from_string(content)
        for name, content in contents.items()
    }
    for outputs, inputs in joins:
        step, *others = {_step_of(models[name], f'out{index}') for name, index in outputs}
        if step is None or others:
            continue
        for name, index in outputs:
            _give(models[name], f'out{index}', step)
        for name, index in inputs:
            _take(models[name], f'in{index}', step)
    for model in models.values():
        _spare_shapes(model)
    return {name: model.SerializeToString() for name, model in models.items()}


def _step_of(model: Any, name: str) -> Step | None:
    """Scale and zero point by which a tensor was made from 8 bits."""
    maker = next((node for node in model.graph.node if name in node.output), None)
    if maker is None or maker.op_type != 'DequantizeLinear':
        return None
    return _constants(model, maker.input[1:])


def _constants(model: Any, names: list[str]) -> Step | None:
    """Scale and zero point, if they are of activations in U8."""
    onnx = need_for_deployment('onnx')
    arrays = [
        onnx.numpy_helper.to_array(one)
        for name in names
        for one in model.graph.initializer
        if one.name == name
    ]
    if len(arrays) != 2 or arrays[1].dtype != np.uint8 or arrays[0].size != 1:
        return None
    return float(arrays[0]), int(arrays[1])


def _give(model: Any, name: str, step: Step) -> None:
    """Let an output be what it is made from."""
    maker = next(node for node in model.graph.node if name in node.output)
    eight = maker.input[0]
    _rename(model, name, f'{name}_float')
    _rename(model, eight, name)
    _as_eight(next(one for one in model.graph.output if one.name == name))
    model.metadata_props.add(key=name, value=f'{step[0]!r} {step[1]}')


def _take(model: Any, name: str, step: Step) -> None:
    """Let an input be in 8 bits: for those who would make just these, and in float for all
    others."""
    onnx = need_for_deployment('onnx')
    value = next((one for one in model.graph.input if one.name == name), None)
    if value is None:  # it changes nothing there, so it is not in the graph
        return
    readers = [node for node in model.graph.node if name in node.input]
    others = []
    for node in readers:
        if node.op_type == 'QuantizeLinear' and _constants(model, node.input[1:]) == step:
            model.graph.node.remove(node)
            _rename(model, node.output[0], name)
        else:
            others.append(node)
    if others:
        whole, scale, zero = f'{name}_float', f'{name}_given_scale', f'{name}_given_zero'
        for node in others:
            node.input[:] = [whole if one == name else one for one in node.input]
        model.graph.initializer.extend(
            [
                onnx.numpy_helper.from_array(np.array(step[0], np.float32), scale),
                onnx.numpy_helper.from_array(np.array(step[1], np.uint8), zero),
            ]
        )
        model.graph.node.insert(
            0, onnx.helper.make_node('DequantizeLinear', [name, scale, zero], [whole])
        )
    _as_eight(value)


def _spare_shapes(model: Any) -> None:
    """Let sizes be read from 8 bits, and leave out what was made float for them alone."""
    makers = {
        node.output[0]: node for node in model.graph.node if node.op_type == 'DequantizeLinear'
    }
    for node in model.graph.node:
        if node.op_type == 'Shape' and node.input[0] in makers:
            node.input[0] = makers[node.input[0]].input[0]
    read = {name for node in model.graph.node for name in node.input} | {
        one.name for one in model.graph.output
    }
    for name, node in makers.items():
        if name not in read:
            model.graph.node.remove(node)


def _rename(model: Any, old: str, new: str) -> None:
    """A tensor, wherever nodes make or read it."""
    for node in model.graph.node:
        node.input[:] = [new if one == old else one for one in node.input]
        node.output[:] = [new if one == old else one for one in node.output]


def _as_eight(value: Any) -> None:
    value.type.tensor_type.elem_type = need_for_deployment('onnx').TensorProto.UINT8
