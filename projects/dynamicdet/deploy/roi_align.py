"""RoIAlign by what runs the graphs: on a CPU mmcv's takes twice as long as ONNX Runtime's, for the
same numbers."""

from functools import lru_cache

import numpy as np
from mmcv.ops import RoIAlign
from torch import Tensor, nn

from .graphs import Graph, need_for_deployment
from .runtimes import CPU


def place_roi_aligns(
    model: nn.Module, threads: int | None = None, runtime: str = 'onnxruntime'
) -> None:
    """Let a runtime, see `runtimes.open_graph`, compute a detector's RoIAligns on a CPU, where its
    operator is the same: means of each bin. Elsewhere maps would have to be copied, and mmcv's own
        is fast."""
    for module in model.modules():
        if isinstance(module, RoIAlign) and module.pool_mode == 'avg':
            module.forward = _Align(module, threads, runtime)


class _Align:
    """One of them."""

    def __init__(self, layer: RoIAlign, threads: int | None, runtime: str) -> None:
        need_for_deployment('onnx')

        def graph(channels: int) -> Graph:
            content = _graph_of(layer, channels if runtime == 'openvino' else 0)
            return Graph(
                content,
                ['tuple', [0]],
                threads,
                runtime=runtime,
                providers=CPU if runtime == 'onnxruntime' else None,
            )

        # How many channels maps have is known when they come.
        self._graph, self._size, self._own = lru_cache(graph), layer.output_size, layer.forward
        # There OpenVINO divides by no samples at all, where others give 0.
        self._spares_empty = runtime == 'openvino' and layer.aligned and layer.sampling_ratio == 0

    def __call__(self, maps: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W) and (K, 5) to (K, C, h, w)."""
        if maps.device.type != 'cpu':
            return self._own(maps, rois)
        if self._spares_empty:
            full = (rois[:, 3:] > rois[:, 1:3]).all(dim=1)
            if not full.all():
                pooled = maps.new_zeros(len(rois), maps.shape[1], *self._size)
                pooled[full] = self._aligned(maps, rois[full])
                return pooled
        return self._aligned(maps, rois)

    def _aligned(self, maps: Tensor, rois: Tensor) -> Tensor:
        if not len(rois):
            return maps.new_zeros(0, maps.shape[1], *self._size)
        (pooled,) = self._graph(maps.shape[1])(maps, rois[:, 1:], rois[:, 0].long())
        return pooled


def _graph_of(layer: RoIAlign, channels: int) -> bytes:
    """The operator as a graph. If there are so many channels, and not 0, a depthwise 1x1
    convolution with ones comes first: behind one OpenVINO keeps channels next to each other, and
        RoIAlign takes a tenth of the time."""
    onnx = need_for_deployment('onnx')
    make, kinds = onnx.helper, onnx.TensorProto
    copy = make.make_node('Conv', ['in0', 'ones'], ['maps'], group=channels, kernel_shape=[1, 1])
    ones = onnx.numpy_helper.from_array(np.ones((channels, 1, 1, 1), np.float32), 'ones')
    node = make.make_node(
        'RoiAlign',
        ['maps' if channels else 'in0', 'in1', 'in2'],
        ['out0'],
        mode='avg',
        output_height=layer.output_size[0],
        output_width=layer.output_size[1],
        sampling_ratio=layer.sampling_ratio,
        spatial_scale=layer.spatial_scale,
        # Pixels are areas, of which the middle counts; before Detectron2 they were points.
        coordinate_transformation_mode='half_pixel' if layer.aligned else 'output_half_pixel',
    )
    inputs = [
        make.make_tensor_value_info('in0', kinds.FLOAT, [None] * 4),
        make.make_tensor_value_info('in1', kinds.FLOAT, [None, 4]),
        make.make_tensor_value_info('in2', kinds.INT64, [None]),
    ]
    graph = make.make_graph(
        [copy, node] if channels else [node],
        'roi_align',
        inputs,
        [make.make_tensor_value_info('out0', kinds.FLOAT, None)],
        [ones] if channels else [],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid('', 17)], ir_version=8)
    return model.SerializeToString()
