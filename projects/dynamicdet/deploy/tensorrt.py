"""What in a graph TensorRT would refuse, or compute less well, as far as the graph tells. TensorRT
itself is not asked: nothing of it is needed.

The rules are some of those of its ONNX parser's table of operators, of version 8.4, with the opsets
of later ones. That nothing is named proves nothing.
"""

from typing import Any

from .graphs import need_for_deployment
from .standalone_parts import inputs_of

#: Versions of operators that its parser knows.
_OPSETS = range(9, 21)
#: Branches: those of unlike shapes cannot be built, and none is where it can be avoided.
_BRANCHES = ('If', 'Loop', 'Scan')
_UNKNOWN = (
    *('BitShift', 'Compress', 'ConvInteger', 'Det', 'DynamicQuantizeLinear', 'MatMulInteger'),
    *('MaxUnpool', 'Multinomial', 'NegativeLogLikelihoodLoss', 'QLinearConv', 'QLinearMatMul'),
    *('RandomNormal', 'RandomNormalLike', 'SoftmaxCrossEntropyLoss', 'StringNormalizer'),
    *('TfIdfVectorizer', 'Unique'),
)
_ARITHMETIC = ('Add', 'Sub', 'Mul', 'Div', 'Mod', 'Neg', 'Abs', 'Pow', 'Min', 'Max', 'CumSum')
#: What may read uint8: pictures that are made float, and what 8 bits are told by.
_OF_UINT8 = ('Cast', 'QuantizeLinear', 'DequantizeLinear')
#: The most that TopK may take.
_MOST = 3840


def refused_by_tensorrt(content: bytes) -> list[str]:
    """What stands against building an ONNX file with TensorRT, a line each; none if nothing does.

    Args:
        content (bytes): The file.

    Returns:
        list[str]: Operators that it has not, branches, float64, integers of 8 bits that are not
        symmetric, uint8 that is not made float at once, arithmetic on int64 but that on sizes, and
        TopK of too many.
    """
    onnx = need_for_deployment('onnx')
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    graph, kinds = model.graph, onnx.TensorProto
    types = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in (*graph.input, *graph.output, *graph.value_info)
    }
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Constant' and node.attribute[0].HasField('t'):
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    types.update({one.name: one.data_type for one in graph.initializer})
    said = [
        f'opset {one.version}'
        for one in model.opset_import
        if one.domain in ('', 'ai.onnx') and one.version not in _OPSETS
    ]
    sizes = set(constants)
    for node in graph.node:
        of_sizes = node.op_type in ('Shape', 'Size', 'Constant') or (
            bool(node.input) and sizes.issuperset(filter(None, inputs_of(node)))
        )
        sizes.update(node.output if of_sizes else ())
        read = {types.get(name) for name in node.input}
        given = {types.get(name) for name in node.output}
        what = f'{node.op_type} ({node.name})'
        if node.domain not in ('', 'ai.onnx') or node.op_type in _UNKNOWN:
            said.append(f'{what} is no operator that it has')
        if node.op_type.startswith(('Sequence', 'Optional', 'SplitToSequence')):
            said.append(f'{what} is of sequences')
        if node.op_type in _BRANCHES:
            said.append(f'{what} is a branch')
        if kinds.DOUBLE in read | given:
            said.append(f'{what} is in float64')
        if kinds.UINT8 in read and node.op_type not in _OF_UINT8:
            said.append(f'{what} reads uint8')
        if 'QuantizeLinear' in node.op_type and not _is_symmetric(node, constants):
            said.append(f'{what} has a zero point')
        if node.op_type in _ARITHMETIC and kinds.INT64 in given and not of_sizes:
            said.append(f'{what} is arithmetic on int64')
        if node.op_type == 'TopK' and (most := _bound(graph, constants, node.input[1])) > _MOST:
            said.append(f'{what} takes {most}, more than {_MOST}')
    return said


def _is_symmetric(node: Any, constants: dict[str, Any]) -> bool:
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and zero.dtype.name in ('int8', 'int32') and not zero.any()


def _bound(graph: Any, constants: dict[str, Any], name: str) -> int:
    """The largest that a number can be, as far as constants tell; else 0."""
    if name in constants:
        return int(constants[name].max(initial=0))
    makers = {output: node for node in graph.node for output in node.output}
    node = makers.get(name)
    if node is None or node.op_type not in ('Min', 'Reshape', 'Cast', 'Unsqueeze', 'Identity'):
        return 0
    bounds = [
        _bound(graph, constants, one) for one in node.input[: None if node.op_type == 'Min' else 1]
    ]
    return min((bound for bound in bounds if bound), default=0)
