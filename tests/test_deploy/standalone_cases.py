"""Detectors with random weights, exported to stand alone; what tests of them share."""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from scipy.optimize import linear_sum_assignment

from conftest import ROOT, spread_scores
from dynamicdet.deploy import standalone_runtime
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 120), keep_ratio=True),
    dict(type='PackDetInputs'),
]
#: The same, a shape that is not square, and one that is padded on both sides.
SIZES = ((96, 96), (64, 160), (77, 150))
#: Kinds of plain and dynamic detectors; and those plain ones that are exits of a dynamic one.
PLAIN = (
    'yolox',
    'rtmdet',
    'retinanet',
    'fcos',
    'atss',
    'gfl',
    'yolov5_n',
    'yolov7',
    'faster_rcnn',
    'mask_rcnn',
    'cascade_rcnn',
    'dino',
)
DYNAMIC = (
    'dynamic yolox',
    'dynamic fcos sees both',
    'dynamic faster_rcnn sees detections',
    'dy_mask_rcnn',
    'dy_yolox_s_scales',
    'dy_yolox_nano_yolov5_n',
    'dy_dino_r50',
)
IN_DYNAMIC = ('faster_rcnn', 'mask_rcnn', 'yolov5_n', 'dino')
#: Layers whose random weights make scores of 1, or boxes that are larger than numbers are exact.
TAMED = dict(
    multi_level_conv_reg=0.05, multi_level_conv_cls=0.03, multi_level_conv_obj=0.05, rpn_cls=0.03
)


def settings(name):
    if name == 'rtmdet':
        return shrink(get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model)
    if name == 'dino':
        return settings('dy_dino_r50').detector
    if name.startswith(('yolov', 'dy_')):
        return shrink(Config.fromfile(ROOT / 'configs' / f'{name}.py').model)
    if name.startswith('dynamic'):
        _, kind, *sees = name.split()
        router = dict(router=dict(type='Router', sees=sees[1])) if sees else {}
        return tiny_dynamic(kind, shared='yolox' not in name, **router)
    return tiny_detector(name)


def build(model):
    """With random weights whose boxes are as large as images, and whose scores are no matter of
    rounding, in eval mode; the same each time."""
    built = spread_scores(randomize(MODELS.build(copy.deepcopy(model)), seed=1)).eval()
    for name, weight in built.named_parameters():
        for layer, factor in TAMED.items():
            if layer in name:
                weight.data *= factor
    if getattr(getattr(built, 'router', None), 'sees_detections', False):
        built.router.class_weights.copy_(torch.tensor([0.5, 2.0, 1.5]))
        # Of sizes in pixels, too, difficulties between 0 and 1.
        built.router.std.fill_(20.0)
    return built


def write(model, out, pipeline=PIPELINE, difficulties=(), **meta):
    """Export a model's config with random weights; torch's detector, and the folder's."""
    cfg = Config(dict(model=model, test_dataloader=dict(dataset=dict(type='x', pipeline=pipeline))))
    built = build(model)
    if difficulties:
        built.difficulties = torch.tensor(difficulties)
    torch.save(dict(state_dict=built.state_dict(), meta=meta), out.with_suffix('.pth'))
    export_standalone(cfg, str(out.with_suffix('.pth')), str(out))
    return built, standalone_runtime.Detector(out, threads=1)


_place = tempfile.TemporaryDirectory(prefix='standalone')


@functools.cache
def written(name):
    """Torch's detector, the folder's, and the folder, made once."""
    difficulties = (0.3, 0.1, 0.2, 0.4) if name.startswith('dy') else ()
    folder = Path(_place.name) / name.replace(' ', '_')
    return *write(settings(name), folder, difficulties=difficulties), folder


def delivered(model, size, seed=0):
    """A batch as a pipeline delivers it, of an image twice as high and three times as wide; and
    what the folder's detector is given of it."""
    if model.data_preprocessor.pad_size_divisor == 1:
        # Its pipeline has to.
        size = [-(-side // 64) * 64 for side in size]
    batch = tiny_batch((1,), size, seed=seed)
    height, width = size
    original, scale = (2 * height, 3 * width), (1 / 3, 1 / 2)
    batch['data_samples'][0].set_metainfo(dict(ori_shape=original, scale_factor=scale))
    return batch, (batch['inputs'][0].numpy(), scale, original)


@torch.no_grad()
def by_torch(model, batch):
    return model.test_step(copy.deepcopy(batch))[0]


def require_same(found, sample, scale):
    """Boxes within 0.001 pixels of the delivered image, scores within 0.0001, labels alike."""
    wanted = sample.pred_instances.numpy()
    assert found.boxes.shape == wanted.bboxes.shape and len(found.labels) == len(wanted.labels)
    assert (np.diff(found.scores) <= 1e-6).all()
    apart = differences(found, wanted, scale)
    rows, columns = linear_sum_assignment(apart)
    assert not apart[rows, columns].any()
    assert (found.masks is not None) == ('masks' in wanted)
    if found.masks is not None:
        masks = np.array([pasted(found, row, sample.ori_shape) for row in rows])
        # Pixels that a mask's edge passes through.
        assert (masks != wanted.masks[columns]).mean() < 1e-3


def differences(found, wanted, scale):
    """Which detections of either side are unlike, (D, D')."""
    box = np.abs((found.boxes[:, None] - wanted.bboxes) * np.tile(scale, 2)).max(-1, initial=0)
    score = np.abs(found.scores[:, None] - wanted.scores)
    return (box > 1e-3) | (score > 1e-4) | (found.labels[:, None] != wanted.labels)


def pasted(found, row, size):
    return standalone_runtime.pasted(found.masks[row], found.boxes[row], *size) >= 0.5
