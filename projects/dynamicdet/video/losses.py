"""What an early-exit detector learns from. Letters: N images or frames, E exits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdet.models.utils import rename_loss_dict, unpack_gt_instances
from mmdet.structures import SampleList

from ..errors import UsageError
from ..models.yolo import AnchorHead
from ..transfers import take_rows
from .costs import exit_gflops
from .distillation import Distillation, distillation_losses, make_lesson
from .part_building import learned_part
from .propagation import carry_on
from .streams import VideoStream, clip_numbers, early_summary, is_cut


def training_losses(model: nn.Module, images: Tensor, samples: SampleList) -> dict[str, Tensor]:
    """Losses by the model's mode; see `EarlyExitDetector.loss`.

    The layers run once, on all frames; propagation goes through each clip in order.
    """
    layers = model.lazy(images)
    early = (
        early_summary(layers.take(model.early_layer).detach()) if model.cut is not None else None
    )
    maps = [layers.take(position) for position in model.exit_layers]
    outputs = [layers.take(position) for position in model.output_layers]
    features = _features(model, maps, samples, early)
    raws = [head((exit_features,)) for head, exit_features in zip(model.heads, features)]
    losses = {}
    if model.mode != 'gate':
        losses.update(_head_losses(model, raws, outputs, samples))
    if model.mode == 'joint':
        losses.update(rename_loss_dict('final.', model.detector.bbox_head.loss(outputs, samples)))
    if model.mode == 'gate' or model.mode == 'joint' and learned_part(model.gate):
        losses.update(_gate_losses(model, maps, raws, outputs, samples, images.shape[-2:]))
    return losses


def _head_losses(
    model: nn.Module, raws: Sequence, outputs: Sequence[Tensor], samples: SampleList
) -> dict[str, Tensor]:
    """Of all heads, from the annotations and from the detector's own output."""
    truths, ignored, metas = unpack_gt_instances(samples)
    lesson, losses = None, {}
    if model.distillation is not None:
        settings = Distillation(**model.distillation)
        lesson = make_lesson(_require_anchors(model.detector.bbox_head), outputs, settings)
    for exit, (head, raw, weight) in enumerate(zip(model.heads, raws, model.head_weights)):
        head_losses = head.loss_by_feat(*raw, truths, metas, ignored)
        if lesson is not None:
            head_losses.update(distillation_losses(head, raw, lesson, settings))
        losses.update(
            rename_loss_dict(
                f'exit{exit}.', {name: weight * value for name, value in head_losses.items()}
            )
        )
    return losses


def _require_anchors(head: nn.Module) -> AnchorHead:
    if not isinstance(head, AnchorHead):
        raise UsageError(
            'distillation needs a detector with the anchor head of YOLOv5 or YOLOv7, not '
            f'{type(head).__name__}'
        )
    return head


def _features(
    model: nn.Module, maps: Sequence[Tensor], samples: SampleList, early: Tensor | None
) -> list[Tensor]:
    """Of all heads, (N, C, H, W), carried on from frame to frame of each clip."""
    features = [head.features(layer_map) for head, layer_map in zip(model.heads, maps)]
    if model.propagation is None:
        return features
    numbers = clip_numbers(samples)
    streams = [VideoStream() for _ in range(max(numbers) + 1)]
    steps: list[list[int]] = []
    for index, number in enumerate(numbers):
        step = numbers[:index].count(number)
        steps += [[]] * (step == len(steps))
        steps[step] = steps[step] + [index]
    parts: list[list[Tensor]] = [[] for _ in features]
    cuts = _cuts(early, numbers, model.cut)
    for step, frames in enumerate(steps):
        step_streams = [streams[numbers[index]] for index in frames]
        for stream, index in zip(step_streams, frames):
            if cuts[index]:
                stream.forget()
            stream.frame = samples[index].metainfo.get('frame_id', step)
        rows = torch.tensor(frames, device=maps[0].device)
        for exit, whole in enumerate(features):
            x = whole if len(frames) == len(samples) else whole[rows]
            parts[exit].append(carry_on(model.propagation[exit], exit, x, step_streams))
    order = torch.tensor(
        [index for frames in steps for index in frames], device=maps[0].device
    ).argsort()
    # Where nothing was remembered, parameters still get a gradient, of 0: DDP waits for each.
    return [
        torch.cat(part)[order] + 0 * sum(parameter.sum() for parameter in mix.parameters())
        for part, mix in zip(parts, model.propagation)
    ]


def _cuts(early: Tensor | None, numbers: Sequence[int], cut: float | None) -> list[bool]:
    """Before which frames there is a cut, (N,): their clip's stream begins anew, as in
    `predict`."""
    cuts = [False] * len(numbers)
    # A clip's frames are in their order.
    later = [
        (at, at - 1 - numbers[:at][::-1].index(number))
        for at, number in enumerate(numbers)
        if number in numbers[:at]
    ]
    if early is not None and later:
        current, previous = (take_rows(early, rows) for rows in zip(*later))
        for (at, _), is_one in zip(later, is_cut(current, previous, cut).tolist()):
            cuts[at] = is_one
    return cuts


def _gate_losses(
    model: nn.Module,
    maps: Sequence[Tensor],
    raws: Sequence,
    outputs: Sequence[Tensor],
    samples: SampleList,
    shape: Sequence[int],
) -> dict[str, Tensor]:
    """What the gate learns from the loss of each image at each exit."""
    rows = []
    for index, sample in enumerate(samples):
        truths, ignored, metas = unpack_gt_instances([sample])
        frame_losses = [
            head.loss_by_feat(
                *([tensor[index : index + 1] for tensor in part] for part in raw),
                truths,
                metas,
                ignored,
            )
            for head, raw in zip(model.heads, raws)
        ]
        frame_losses.append(
            model.detector.bbox_head.loss([x[index : index + 1] for x in outputs], [sample])
        )
        rows.append(torch.stack([_total(losses) for losses in frame_losses]))
    return learned_part(model.gate).loss(
        [x.mean(dim=(2, 3), dtype=torch.float32) for x in maps],
        torch.stack(rows, dim=1),
        _costs(model, shape),
    )


def _costs(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """GFLOPs of the exits, (E,): as calibrated, or else counted once, at the first batch's size."""
    if not model.gflops[1:].isnan().any():
        return model.gflops[1:]
    if model.counted_gflops is None:
        model.counted_gflops = exit_gflops(model, shape)
    return model.gflops.new_tensor(model.counted_gflops[1:])


def _total(losses: dict[str, Tensor]) -> Tensor:
    """Sum of a head's losses, as mmengine's ``parse_losses``: some heads give lists."""
    return sum(
        value.mean() if isinstance(value, Tensor) else sum(tensor.mean() for tensor in value)
        for name, value in losses.items()
        if 'loss' in name
    )
