"""RoIAlign by what runs the graphs: on a CPU mmcv's takes twice as long as ONNX Runtime's, for the same numbers."""
from functools import lru_cache
from typing import Optional

import numpy as np
import torch
from mmcv.ops import RoIAlign
from torch import Tensor, nn

from .graphs import Graph, need


def place_roi_aligns(model: nn.Module, threads: Optional[int] = None, runtime: str = 'onnxruntime') -> None:
    """Let a runtime, see `runtimes.open_graph`, compute a detector's RoIAligns, where its operator is the same: means of
    each bin."""
    for module in model.modules():
        if isinstance(module, RoIAlign) and module.pool_mode == 'avg':
            module.forward = _Align(module, threads, runtime)


class _Align:
    """One of them."""

    def __init__(self, layer: RoIAlign, threads: Optional[int], runtime: str) -> None:
        def graph(channels: int) -> Graph:
            content = _graph_of(layer, channels if runtime == 'openvino' else 0)
            return Graph(content, ['tuple', [0]], threads, runtime=runtime)

        self._graph, self._size = lru_cache(graph), layer.output_size

    def __call__(self, maps: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W) and (K, 5) to (K, C, h, w)."""
        if not len(rois):
            return maps.new_zeros(0, maps.shape[1], *self._size)
        found, = self._graph(maps.shape[1])(maps, rois[:, 1:], rois[:, 0].long())
        return found


def _graph_of(layer: RoIAlign, copied: int) -> bytes:
    """The operator as a graph. So many channels, where not 0, are copied by a convolution with ones first: behind one
    OpenVINO keeps channels next to each other, and RoIAlign takes a tenth of the time."""
    onnx = need('onnx')
    make, kinds = onnx.helper, onnx.TensorProto
    copy = make.make_node('Conv', ['in0', 'ones'], ['maps'], group=copied, kernel_shape=[1, 1])
    ones = onnx.numpy_helper.from_array(np.ones((copied, 1, 1, 1), np.float32), 'ones')
    node = make.make_node(
        'RoiAlign', ['maps' if copied else 'in0', 'in1', 'in2'], ['out0'], mode='avg', output_height=layer.output_size[0],
        output_width=layer.output_size[1], sampling_ratio=layer.sampling_ratio, spatial_scale=layer.spatial_scale,
        # Pixels are areas, of which the middle counts; before Detectron2 they were points.
        coordinate_transformation_mode='half_pixel' if layer.aligned else 'output_half_pixel')
    inputs = [make.make_tensor_value_info('in0', kinds.FLOAT, [None] * 4),
              make.make_tensor_value_info('in1', kinds.FLOAT, [None, 4]),
              make.make_tensor_value_info('in2', kinds.INT64, [None])]
    graph = make.make_graph([copy, node] if copied else [node], 'roi_align', inputs,
                            [make.make_tensor_value_info('out0', kinds.FLOAT, None)], [ones] if copied else [])
    model = make.make_model(graph, opset_imports=[make.make_opsetid('', 17)], ir_version=8)
    return model.SerializeToString()
