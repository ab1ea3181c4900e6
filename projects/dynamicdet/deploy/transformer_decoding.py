"""DINO's transformer and what it makes boxes of, on tensors alone, so that a graph can hold them.

mmdet's own layers run; in their place stands alone what asks Python for the sizes of maps. Pictures
come one by one and without padding.

Letters: Q queries, L levels, P cells of all levels, S sampled points of a level, h heads.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor, nn

from mmdet.models.dense_heads import DINOHead
from mmdet.models.detectors import DINO
from mmdet.models.layers.transformer import inverse_sigmoid
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy

from ..errors import UsageError
from ..private_mmdet import decodes_as
from .decoding import Candidates, Frame, clip, split_index

#: Width and height of what the first level of maps proposes, as a share of the image; twice as
#: large at each further one (`DeformableDETR.gen_encoder_output_proposals`).
_PROPOSED = 0.05
#: Proposals whose middle or size is nearer to the image's ends than this are none (there).
_INSIDE = 0.01


def build_transformer_decoder(branch: nn.Module) -> Callable[[Sequence[Tensor], Frame], Candidates]:
    """What makes detections of DINO's neck maps, (1, C, H_i, W_i), as mmdet with ``rescale=True``.

    Args:
        branch (nn.Module): A DINO. It is of no other use afterwards.

    Returns:
        Callable: Maps and a `Frame` -> `Candidates`, best first, in the original image's frame.

    Raises:
        UsageError: If it is another transformer, or pads images.
    """
    head = branch.bbox_head
    if type(branch) is not DINO or not decodes_as(head, DINOHead) or not head.loss_cls.use_sigmoid:
        raise UsageError(
            f'{type(branch).__name__} cannot be exported with --standalone: of transformers only '
            'DINO can; export it without --standalone'
        )
    branch.encoder.get_encoder_reference_points = _reference_points
    branch.gen_encoder_output_proposals = lambda memory, mask, sizes: _proposals(
        branch, memory, sizes
    )
    for module in branch.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.forward = _Attention(module)
    most, layer = (
        head.test_cfg.get('max_per_img', branch.num_queries),
        branch.decoder.num_layers - 1,
    )

    def detect(maps: Sequence[Tensor], frame: Frame) -> Candidates:
        states, references = _transformed(branch, maps)
        raw = head.reg_branches[layer](states) + inverse_sigmoid(references)
        scores, at = head.cls_branches[layer](states).sigmoid()[0].reshape(-1).topk(most)
        rows, labels = split_index(at, head.num_classes)
        boxes = bbox_cxcywh_to_xyxy(raw.sigmoid()[0][rows])
        boxes = boxes * torch.stack([frame.width, frame.height]).repeat(2)
        boxes = clip(boxes, frame.height, frame.width) / frame.scale.repeat(2)
        return Candidates(boxes, scores, labels)

    return detect


def _transformed(branch: DINO, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The last layer's states of the queries, (1, Q, C), and the boxes that it began with, (1, Q,
    4), shares of the image."""
    whole = DetDataSample(metainfo=dict(batch_input_shape=(1, 1), img_shape=(1, 1)))
    encoder_inputs, decoder_inputs = branch.pre_transformer(maps, [whole])
    sizes = [values.shape[-2:] for values in maps]
    for inputs in (encoder_inputs, decoder_inputs):
        inputs['spatial_shapes'] = sizes
    encoded = branch.forward_encoder(**encoder_inputs)
    queries, _ = branch.pre_decoder(**encoded, batch_data_samples=[whole])
    outputs = branch.forward_decoder(**decoder_inputs, **queries)
    return outputs['hidden_states'][-1], outputs['references'][-2]


def _middles(size: Sequence[int]) -> Tensor:
    """Middles of a map's cells, (H * W, 2), x and y, as shares of the image."""
    height, width = size
    rows, columns = (torch.arange(side) + 0.5 for side in (height, width))
    rows, columns = torch.meshgrid(rows / height, columns / width, indexing='ij')
    return torch.stack([columns.reshape(-1), rows.reshape(-1)], dim=-1)


def _reference_points(sizes: Sequence[Sequence[int]], valid: Tensor, device: str) -> Tensor:
    """Middles of all cells for each level, (1, P, L, 2)."""
    points = torch.cat([_middles(size) for size in sizes])
    return points[None, :, None].expand(1, points.shape[0], len(sizes), 2)


def _proposals(
    branch: DINO, memory: Tensor, sizes: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """What is read of each cell, (1, P, C), and its box, (1, P, 4), before a sigmoid."""
    boxes = []
    for level, size in enumerate(sizes):
        middles = _middles(size)
        boxes.append(torch.cat([middles, torch.full_like(middles, _PROPOSED * 2.0**level)], dim=-1))
    proposals = torch.cat(boxes)[None]
    inside = ((proposals > _INSIDE) & (proposals < 1 - _INSIDE)).all(-1, keepdim=True)
    raw = (proposals / (1 - proposals)).log()
    read = torch.where(inside, memory, torch.zeros_like(memory))
    far = torch.full_like(raw, float('inf'))
    return branch.memory_trans_norm(branch.memory_trans_fc(read)), torch.where(inside, raw, far)


class _Attention:
    """Deformable attention of one image by ``grid_sample``."""

    def __init__(self, layer: MultiScaleDeformableAttention) -> None:
        self.layer = layer

    def __call__(
        self,
        query: Tensor,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Sequence[Sequence[int]] = (),
        **unused: object,
    ) -> Tensor:
        """Queries, (1, Q, C), after they looked at values, (1, P, C), near reference points, (1, Q,
        L, 2), or boxes, (1, Q, L, 4); arguments as of the layer."""
        layer = self.layer
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        heads, levels, points = layer.num_heads, layer.num_levels, layer.num_points
        values = layer.value_proj(value)[0].transpose(0, 1)
        # (Q, h, L, S, 2), and (h, Q, L, S).
        offsets = layer.sampling_offsets(query)[0].reshape(-1, heads, levels, points, 2)
        weights = layer.attention_weights(query)[0].reshape(-1, heads, levels * points)
        weights = weights.softmax(-1).reshape(-1, heads, levels, points).transpose(0, 1)
        seen, start = 0, 0
        for level, (height, width) in enumerate(spatial_shapes):
            near = reference_points[0, :, level][:, None, None]
            if reference_points.shape[-1] == 2:
                size = torch.stack([torch.as_tensor(width), torch.as_tensor(height)])
                at = near + offsets[:, :, level] / size.to(offsets)
            else:
                at = near[..., :2] + offsets[:, :, level] / points * near[..., 2:] * 0.5
            grid = at.transpose(0, 1) * 2 - 1
            maps = values[:, start : start + height * width].reshape(heads, -1, height, width)
            start = start + height * width
            # (h, C / h, Q, S)
            sampled = F.grid_sample(maps, grid, align_corners=False)
            seen = seen + (sampled * weights[:, None, :, level]).sum(-1)
        return layer.output_proj(seen.flatten(0, 1).transpose(0, 1)[None]) + identity
