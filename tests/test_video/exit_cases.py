"""A tiny early-exit detector, and frames for it."""

from collections.abc import Sequence

import torch
from mmengine.config import ConfigDict

from conftest import same_detections
from dynamicdet.testing import randomize, tiny_batch
from mmdet.registry import MODELS

#: Positions in YOLOv5's table: strides 4, 8, 32, 8.
LAYERS = (2, 4, 9, 13)
#: Width of their maps.
CHANNELS = (8, 16, 64, 16)


def base() -> ConfigDict:
    """A YOLOv5 of 8 to 64 channels, 3 classes."""
    small = dict(arch='n', width=0.25)
    return ConfigDict(
        type='SingleStageDetector',
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, pad_size_divisor=32
        ),
        backbone=dict(type='YOLOV5Backbone', depth=0.25, **small),
        neck=dict(type='YOLOV5PAFPN', depth=0.25, **small),
        bbox_head=dict(type='YOLOV5Head', num_classes=3, **small),
        test_cfg=dict(
            score_thr=0.2, nms_pre=50, nms=dict(type='nms', iou_threshold=0.6), max_per_img=10
        ),
    )


def tiny(seed: int = 0, **settings):
    """An EarlyExitDetector with random weights, in eval mode."""
    heads = settings.pop('heads', dict(layers=LAYERS, channels=16))
    model = MODELS.build(dict(type='EarlyExitDetector', detector=base(), heads=heads, **settings))
    # Not its buffers: thresholds are settings.
    for part in (model.detector, model.heads, model.propagation):
        if part is not None:
            randomize(part, seed)
    return model.eval()


def frames(*marks: tuple, size: Sequence[int] = (64, 64), **meta):
    """Preprocessed frames, (N, 3, H, W), and their samples. A mark is (seed of the pixels,
    video_id, frame_id); meta goes into each."""
    batch = tiny_batch([1 + seed % 2 for seed, *_ in marks], size, masks=False)
    pictures = {
        seed: torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))
        for seed, *_ in marks
    }
    for sample, (_, *place) in zip(batch['data_samples'], marks):
        sample.set_metainfo(
            dict(zip(('video_id', 'frame_id'), place), batch_input_shape=tuple(size), **meta)
        )
    return torch.stack([pictures[seed] for seed, *_ in marks]), batch['data_samples']


def counted(model) -> dict:
    """How many images each layer and head is given from now on, by name."""
    seen: dict = {}

    def watch(name):
        def note(module, inputs, output):
            seen[name] = seen.get(name, 0) + len(
                output[0] if isinstance(output, (list, tuple)) else output
            )

        return note

    for layer in model.table:
        model.detector.get_submodule(layer.name).register_forward_hook(watch(layer.name))
    for exit, head in enumerate(model.heads):
        head.reduce.register_forward_hook(watch(f'head {exit}'))
    model.detector.bbox_head.convs[0].register_forward_hook(watch('final'))
    return seen


def same(one, other, exact: bool = True) -> bool:
    """Whether two InstanceData hold the same detections; to the last bit, or as of batches of other
    sizes."""
    if not exact:
        return same_detections(one, other)
    return len(one) == len(other) and all(
        torch.equal(one[name], other[name]) for name in ('bboxes', 'scores', 'labels')
    )
