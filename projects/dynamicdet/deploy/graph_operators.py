"""NMS and RoIAlign: mmcv's operators in torch, ONNX's in a graph."""

from typing import Any

import torch
from mmcv import ops
from torch import Tensor
from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import parse_args

from .graphs import OPSET

#: Boxes that NMS may leave: what an int32 holds.
_NO_LIMIT = 2**31 - 1

# As operators of torch: the exporter would trace what is in a function of autograd.
_LIBRARY = torch.library.Library('dynamicdet', 'DEF')
_LIBRARY.define('nms(Tensor boxes, Tensor scores, float threshold) -> Tensor')
_LIBRARY.define(
    'roi_align(Tensor values, Tensor regions, int height, int width, float scale, int samples, '
    'bool aligned) -> Tensor'
)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of boxes, (K, 4), by scores, (K,), that stay where those are dropped that overlap a
    better one by more than an IoU; best first."""
    return torch.ops.dynamicdet.nms(boxes, scores, float(threshold))


def roi_align(values: Tensor, regions: Tensor, layer: ops.RoIAlign) -> Tensor:
    """What a layer pools of a map, (1, C, H, W), in regions, (R, 4): (R, C, h, w)."""
    return torch.ops.dynamicdet.roi_align(
        values,
        regions,
        *layer.output_size,
        float(layer.spatial_scale),
        int(layer.sampling_ratio),
        bool(layer.aligned),
    )


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return ops.nms(boxes, scores, threshold)[1]


def _roi_align(
    values: Tensor,
    regions: Tensor,
    height: int,
    width: int,
    scale: float,
    samples: int,
    aligned: bool,
) -> Tensor:
    if not len(regions):
        return values.new_zeros(0, values.shape[1], height, width)
    rois = torch.cat([torch.zeros_like(regions[:, :1]), regions], dim=1)
    return ops.roi_align(values, rois, (height, width), scale, samples, 'avg', aligned)


_LIBRARY.impl('nms', _nms, 'CPU')
_LIBRARY.impl('roi_align', _roi_align, 'CPU')


def _constant(g: Any, *values: float) -> Any:
    return g.op('Constant', value_t=torch.tensor(values))


@parse_args('v', 'v', 'f')
def _nms_in_graph(g: Any, boxes: Any, scores: Any, threshold: float) -> Any:
    selected = g.op(
        'NonMaxSuppression',
        g.op('Unsqueeze', boxes, _constant(g, 0)),
        g.op('Unsqueeze', scores, _constant(g, 0, 1)),
        _constant(g, _NO_LIMIT),
        _constant(g, threshold),
    )
    # Of image, class and box.
    return g.op('Squeeze', g.op('Gather', selected, _constant(g, 2), axis_i=1), _constant(g, 1))


@parse_args('v', 'v', 'i', 'i', 'f', 'i', 'b')
def _roi_align_in_graph(
    g: Any,
    values: Any,
    regions: Any,
    height: int,
    width: int,
    scale: float,
    samples: int,
    aligned: bool,
) -> Any:
    count = g.op('Slice', g.op('Shape', regions), _constant(g, 0), _constant(g, 1))
    return g.op(
        'RoiAlign',
        values,
        regions,
        g.op('ConstantOfShape', count, value_t=torch.zeros(1, dtype=torch.int64)),
        mode_s='avg',
        output_height_i=height,
        output_width_i=width,
        sampling_ratio_i=samples,
        spatial_scale_f=scale,
        # Pixels are areas, of which the middle counts; before Detectron2 they were points.
        coordinate_transformation_mode_s='half_pixel' if aligned else 'output_half_pixel',
    )


register_custom_op_symbolic('dynamicdet::nms', _nms_in_graph, OPSET)
register_custom_op_symbolic('dynamicdet::roi_align', _roi_align_in_graph, OPSET)
