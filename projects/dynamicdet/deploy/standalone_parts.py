"""Whole graphs out of ready graphs of parts, such as those in 8 bits: one stands in for each part
while the whole is traced, and is put in its place afterwards.

What lies between parts, such as decoding, NMS and the router, is traced as it is, in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import _unpack_list, parse_args

from ..cascade.parts import DetectorPart, Form, unflatten
from ..private_torch import float_tensor_type
from .graphs import OPSET, Graph, is_output, need_for_deployment

_DOMAIN = 'dynamicdet'
#: What each part gave last, by its name.
_given: dict[str, list[Tensor]] = {}

_LIBRARY = torch.library.Library(_DOMAIN, 'FRAGMENT')
_LIBRARY.define('part(Tensor[] inputs, str name, int output, int[] sizes) -> Tensor')
_LIBRARY.impl('part', lambda inputs, name, output, sizes: _given[name][output].clone(), 'CPU')


@parse_args('v', 's', 'i', 'is')
def _part_in_graph(g: Any, inputs: Any, name: str, output: int, sizes: Sequence[int]) -> Any:
    value = g.op(f'{_DOMAIN}::Part', *_unpack_list(inputs), name_s=name, output_i=output)
    value.setType(float_tensor_type([None if size < 0 else size for size in sizes]))
    return value


register_custom_op_symbolic(f'{_DOMAIN}::part', _part_in_graph, OPSET)


def stand_in(
    parts: Sequence[DetectorPart], contents: Mapping[str, bytes], forms: Mapping[str, Form]
) -> None:
    """Let graphs of parts, by name, compute a detector, so that its trace names them."""
    for part in parts:
        part.place(_runner(part.name, Graph(contents[part.name], None), forms[part.name]))


def _runner(name: str, graph: Graph, form: Form) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        arrays = [one for key, one in graph.arrays(*inputs).items() if is_output(key)]
        _given[name] = [torch.from_numpy(array) for array in arrays]
        outputs = [
            # Channels are those of the part; all else is of the image.
            torch.ops.dynamicdet.part(
                list(inputs), name, index, [size if axis == 1 else -1 for axis, size in sizes]
            )
            for index, sizes in enumerate(list(enumerate(array.shape)) for array in arrays)
        ]
        return unflatten(outputs, form)

    return run


def put_parts(content: bytes, parts: Mapping[str, bytes]) -> bytes:
    """A traced graph with the graphs of parts, by name, in their places, and without what nothing
    reads."""
    need_for_deployment('onnxruntime')
    onnx = need_for_deployment('onnx')
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load_from_string(content)
    nodes, prefixes = [], {}
    for node in model.graph.node:
        if node.domain != _DOMAIN:
            nodes.append(node)
            continue
        about = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        name = about['name'].decode()
        key = name, tuple(node.input)
        if key not in prefixes:
            prefixes[key] = f'{name}.{len(prefixes)}/'
            part = onnx.load_from_string(parts[name]).graph
            nodes += _renamed(part, prefixes[key], node.input)
            for weight in part.initializer:
                weight.name = prefixes[key] + weight.name
                model.graph.initializer.append(weight)
        given = f'{prefixes[key]}out{about["output"]}'
        nodes.append(onnx.helper.make_node('Identity', [given], node.output, given + '/copy'))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    # Its shapes were those of the example.
    del model.graph.value_info[:]
    # In parts that were changed, what is made may stand behind what reads it.
    OnnxModel.graph_topological_sort(model.graph)
    prune(model.graph)
    standard = [one for one in model.opset_import if one.domain in ('', 'ai.onnx')]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    return model.SerializeToString()


def _renamed(part: Any, prefix: str, inputs: Sequence[str]) -> list[Any]:
    """The nodes of a part's graph, whose inputs are tensors of another."""
    names = {f'in{index}': name for index, name in enumerate(inputs)}
    nodes = list(part.node)
    for node in nodes:
        node.name = prefix + node.name
        for side in (node.input, node.output):
            side[:] = [names.get(name, prefix + name) if name else '' for name in side]
    return nodes


def prune(graph: Any) -> None:
    """Leave out of a graph the nodes, weights and inputs that no output depends on."""
    read, kept = {entry.name for entry in graph.output}, []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(inputs_of(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for entries in (graph.initializer, graph.input):
        remaining = [entry for entry in entries if entry.name in read]
        del entries[:]
        entries.extend(remaining)


def inputs_of(node: Any) -> list[str]:
    """What a node reads, with what its branches read."""
    branches = [one.g for one in node.attribute if one.HasField('g')]
    return [
        *node.input,
        *(name for branch in branches for inner in branch.node for name in inputs_of(inner)),
        *(entry.name for branch in branches for entry in branch.output),
    ]


def halved(content: bytes) -> bytes:
    """A graph whose layers have weights and maps in float16; its ends stay float32."""
    need_for_deployment('onnxruntime')
    onnx = need_for_deployment('onnx')
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load_from_string(content), keep_io_types=True)
    return model.SerializeToString()
