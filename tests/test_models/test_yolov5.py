"""YOLOv5's parts, by hand-made cases and by its published sizes."""

import math

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from torch import nn

from conftest import ROOT, instances
from dynamicdet.measuring.flops import (
    build_detector,
    count_flops,
    count_parameters,
    measure_costs,
    stated_shape,
)
from dynamicdet.models import YOLOV5PAFPN, YOLOV5Backbone, YOLOV5Head, can_fuse, fuse
from dynamicdet.models.yolo import concatenate_maps
from dynamicdet.models.yolov5 import SIZES, yolov5_architecture
from dynamicdet.testing import randomize, shrink, tiny_batch
from mmdet.registry import MODELS

#: Parameters of all, and GFLOPs, of the published networks with 80 classes at 640 pixels.
PUBLISHED = dict(
    n=(1_872_157, 4.5),
    s=(7_235_389, 16.5),
    m=(21_190_557, 49.0),
    l=(46_563_709, 109.1),
    x=(86_749_405, 205.7),
)
#: Per layer of YOLOv5s: parameters in whole thousands, and GFLOPs (seed 000).
SEED = (
    (3, 0.72),
    (18, 0.95),
    (18, 0.96),
    (73, 0.95),
    (115, 1.48),
    (295, 0.95),
    (625, 2.00),
    (1180, 0.94),
    (1182, 0.95),
    (656, 0.53),
    (131, 0.11),
    (361, 1.16),
    (33, 0.11),
    (90, 1.16),
    (147, 0.47),
    (296, 0.95),
    (590, 0.47),
    (1182, 0.95),
)
TEST_CFG = dict(
    score_thr=0.001, nms_pre=30000, nms=dict(type='nms', iou_threshold=0.6), max_per_img=300
)


def detector(arch='s', classes=80, **size) -> dict:
    return dict(
        type='SingleStageDetector',
        data_preprocessor=dict(type='DetDataPreprocessor', std=[255.0] * 3, mean=[0.0] * 3),
        backbone=dict(type='YOLOV5Backbone', arch=arch, **size),
        neck=dict(type='YOLOV5PAFPN', arch=arch, **size),
        bbox_head=dict(
            type='YOLOV5Head', arch=arch, num_classes=classes, width=size.get('width', 1.0)
        ),
        test_cfg=TEST_CFG,
    )


def tiny():
    return randomize(MODELS.build(detector('n', 3, width=0.5))).eval()


def by_table(model, images):
    """Maps of all layers, in order."""
    maps = []
    for layer in model.neck.architecture.layers():
        inputs = [maps[position] for position in layer.inputs] or [images]
        maps.append(model.get_submodule(layer.name)(concatenate_maps(inputs)))
    return maps


@pytest.mark.parametrize('arch', SIZES)
def test_published_sizes(arch):
    parameters, gflops = PUBLISHED[arch]
    with torch.device('meta'), torch.no_grad():
        model = MODELS.build(detector(arch)).eval()
        flops, _ = count_flops(lambda: model._forward(torch.zeros(1, 3, 640, 640)))
    assert count_parameters(model) == parameters
    assert flops / 1e9 == pytest.approx(gflops, rel=0.01)


def test_the_tools_figures_of_the_config():
    """YOLOv5s as `tools/get_flops.py` counts it, fused, too."""
    cfg = Config.fromfile(ROOT / 'configs/yolov5_s.py')
    model = build_detector(cfg)
    whole = measure_costs(model, stated_shape(cfg)).exits[0]
    assert whole.parameters == pytest.approx(7_235_000, rel=1e-3)
    assert whole.flops / 1e9 == pytest.approx(16.5, rel=0.01)
    fused = measure_costs(fuse(model), stated_shape(cfg)).exits[0]
    # The norms' two parameters per channel became one bias.
    assert fused.flops == whole.flops and 0 < whole.parameters - fused.parameters < 10_000


def test_the_layers_of_the_seeds_table():
    """Its FLOPs count norms, too, as four operations per value; here they count as none."""
    with torch.device('meta'), torch.no_grad():
        model = MODELS.build(detector('s')).eval()
        maps = by_table(model, torch.zeros(1, 3, 640, 640))
        layers = model.neck.architecture.layers()
        assert len(layers) == 18
        for layer, (thousands, gflops), own in zip(layers, SEED, maps):
            module = model.get_submodule(layer.name)
            assert count_parameters(module) // 1000 == thousands
            joined = concatenate_maps(
                [maps[position] for position in layer.inputs] or [torch.zeros(1, 3, 640, 640)]
            )
            flops, _ = count_flops(lambda: module(joined))
            normed = sum(
                norm.num_features for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)
            )
            flops += 4 * normed * own.shape[2] * own.shape[3]
            assert flops / 1e9 == pytest.approx(gflops, abs=0.0051)
            assert own.shape == (1, layer.channels, 640 // layer.stride, 640 // layer.stride)
    assert count_parameters(model.bbox_head) // 1000 == 229


@pytest.mark.parametrize('size', [(64, 96), (128, 64)])
def test_running_by_the_table_is_running(size):
    model = tiny()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        maps = by_table(model, images)
        outputs = model.extract_feat(images)
    table = model.neck.architecture
    for position, own in zip(table.output_layers, outputs):
        assert torch.equal(maps[position], own) and own.std() > 1e-3
    for layer, one in zip(table.layers(), maps):
        assert one.shape == (2, layer.channels, size[0] // layer.stride, size[1] // layer.stride)
    # Every layer reaches the head.
    used = {position for layer in table.layers() for position in layer.inputs} | set(
        table.output_layers
    )
    assert used == set(range(18))


def test_layers_are_named_by_the_published_numbers():
    names = [layer.name for layer in yolov5_architecture('s').layers()]
    assert names[:10] == [f'backbone.layers.{number}' for number in range(10)]
    assert names[10:] == [f'neck.layers.{number}' for number in (10, 13, 14, 17, 18, 20, 21, 23)]
    # Upwards 13 takes 10 doubled and 6; downwards 23 takes 21 and 10.
    layers = yolov5_architecture('s').layers()
    assert layers[11].inputs == (10, 6) and layers[17].inputs == (16, 10)


@pytest.mark.parametrize('width, depth', [(0.1, 0.1), (1.1, 1.5)])
@pytest.mark.parametrize('arch', ['n', 'x'])
def test_scaled_tables_fit_together(arch, width, depth):
    with torch.device('meta'):
        backbone = YOLOV5Backbone(arch, width, depth)
        neck, head = YOLOV5PAFPN(arch, width, depth), YOLOV5Head(3, arch, width)
        classes, boxes, objects = head(neck(backbone(torch.zeros(2, 3, 64, 64))))
    for level, parts in enumerate(zip(classes, boxes, objects)):
        assert [tuple(part.shape) for part in parts] == [
            (2, channels, 8 // 2**level, 8 // 2**level) for channels in (9, 12, 3)
        ]


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="n, s, m, l, x; got 'v7'"):
        YOLOV5Backbone('v7')


def test_anchors_must_have_the_levels():
    with pytest.raises(ValueError, match='3 levels'):
        YOLOV5Head(3, anchors=[[(8, 8)], [(16, 16)]])


def test_fused_is_the_same():
    model = tiny()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model._forward(images)
        assert can_fuse(model)
        after = fuse(model)._forward(images)
        maps = by_table(model, images)
        for position, own in zip(model.neck.architecture.output_layers, model.extract_feat(images)):
            assert torch.equal(maps[position], own)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for old, new in zip(before, after):
        for one, other in zip(old, new):
            assert one.std() > 1e-4 and (other - one).abs().max() < 1e-3 * one.std()


# The head.


def raw(head, size=64, images=1, value=0.0):
    """Outputs that are one value everywhere: class scores, boxes, objectness."""
    sides = [size // stride for stride in head.strides]
    return [
        [torch.full((images, head.num_anchors * k, side, side), value) for side in sides]
        for k in (head.num_classes, 4, 1)
    ]


def test_all_candidates_of_an_object_answer_for_it():
    """An object of 24 x 24 pixels, centered at (18, 30) in the second of two images."""
    head = YOLOV5Head(3, 'n', 0.5)
    levels = head._match(list(zip(*raw(head, images=2))), [instances(), instances([6, 18, 30, 42])])
    # Level 0: all of (10, 13), (16, 30), (33, 23) are within four times; cell (3, 2), those to the
    # left and below. Level 1: (30, 61) and (62, 45); cell (1, 1), those to the left and below.
    # Level 2: none.
    cells = [
        sorted(zip(own.anchor.tolist(), own.row.tolist(), own.column.tolist())) for own in levels
    ]
    assert cells[0] == [(a, r, c) for a in range(3) for r, c in ((3, 1), (3, 2), (4, 2))]
    assert cells[1] == [(a, r, c) for a in (0, 1) for r, c in ((1, 0), (1, 1), (2, 1))]
    assert cells[2] == []
    for own in levels:
        assert set(own.image.tolist()) <= {1} and set(own.labels.tolist()) <= {0}
        assert (own.boxes == torch.tensor([18.0, 30, 24, 24])).all()


def test_losses_by_hand():
    """One object that is one anchor in the middle of one cell, and outputs that put a box there
    exactly."""
    anchors = [[(8, 8)], [(64, 64)], [(512, 512)]]
    head = YOLOV5Head(2, 'n', 0.5, anchors=anchors)
    classes, boxes, _ = raw(head)
    objects = [torch.full_like(one[:, :1], 1.0) for one in boxes]
    losses = head.loss_by_feat(classes, boxes, objects, [instances([16, 8, 24, 16])], [{}])
    softplus = math.log(1 + math.e)
    # Its cell wants 1, all others 0: softplus(1) - target * 1, in the mean over 64 cells; levels 4,
    # 1, 0.4.
    objectness = 4 * (softplus - 1 / 64) + 1.4 * softplus
    assert losses['loss_bbox'].item() == pytest.approx(0, abs=1e-6)
    assert losses['loss_obj'].item() == pytest.approx(objectness * (64 / 640) ** 2, rel=1e-5)
    assert losses['loss_cls'].item() == pytest.approx(0.5 * 2 / 80 * math.log(2), rel=1e-5)
    # A third of the width: a third of the overlap, and what CIoU has for the shape.
    losses = head.loss_by_feat(
        classes, boxes, objects, [instances([16 + 8 / 3, 8, 24 - 8 / 3, 16])], [{}]
    )
    shape = 4 / math.pi**2 * (math.atan(1) - math.atan(1 / 3)) ** 2
    overlap = 1 / 3 - shape * shape / (shape + 2 / 3)
    assert losses['loss_bbox'].item() == pytest.approx(0.05 * (1 - overlap), rel=1e-4)
    objectness = 4 * (softplus - overlap / 64) + 1.4 * softplus
    assert losses['loss_obj'].item() == pytest.approx(objectness * (64 / 640) ** 2, rel=1e-4)


def test_images_without_objects_have_a_loss():
    model = MODELS.build(detector('n', 3, width=0.5))
    parts = model.bbox_head(model.extract_feat(torch.rand(2, 3, 64, 64)))
    losses = model.bbox_head.loss_by_feat(*parts, [instances(), instances()], [{}, {}])
    assert losses['loss_bbox'] == 0 and losses['loss_cls'] == 0 and losses['loss_obj'] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_predictions_by_hand():
    """One sure cell of level 1, and a second box on it that is suppressed, in the original's
    frame."""
    head = YOLOV5Head(2, 'n', 0.5, test_cfg=ConfigDict(TEST_CFG))
    classes, boxes, objects = raw(head)
    for part in classes + objects:
        part -= 20
    # Anchor 1 (62 x 45), row 2, column 1 of 16 pixels: center (24, 40). Its neighbor is put there,
    # too.
    for row, column, shift in ((2, 1, 0.0), (2, 2, -20.0)):
        objects[1][0, 1, row, column] = 20.0 + shift / 10
        classes[1][0, 1 * 2 + 1, row, column] = 20.0
        boxes[1][0, 4, row, column] = shift
    meta = dict(img_shape=(64, 64), scale_factor=(2.0, 2.0))
    (found,) = head.predict_by_feat(classes, boxes, objects, [meta], rescale=True)
    assert found.labels.tolist() == [1]
    torch.testing.assert_close(found.scores, torch.ones(1))
    # (24 +- 31, 40 +- 22.5), clipped, halved.
    torch.testing.assert_close(found.bboxes, torch.tensor([[0.0, 8.75, 27.5, 31.25]]))


@pytest.mark.parametrize(
    'name',
    [*(f'yolov5_{arch}' for arch in SIZES), 'video/yolov5_digits', 'video/yolov5_digits_video'],
)
def test_a_config_trains_a_step_and_predicts(name):
    """Shrunk, with its own optimizer."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    assert 'dynamicdet' in cfg.custom_imports.imports
    model = randomize(MODELS.build(shrink(cfg.model))).train()
    batch = tiny_batch((2, 1))
    before = [p.detach().clone() for p in model.parameters()]
    log = model.train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert {'loss_bbox', 'loss_obj', 'loss_cls'} < set(log)
    assert all(torch.isfinite(value).all() and value > 0 for value in log.values()), log
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    results = model.eval().test_step(tiny_batch((2, 1)))
    assert len(results) == 2 and all(len(sample.pred_instances) for sample in results)


def test_the_configs_are_the_published_hyper_parameters():
    gains, scales, ends = [], [], []
    for arch in SIZES:
        cfg = Config.fromfile(ROOT / f'configs/yolov5_{arch}.py')
        for part in (cfg.model.backbone, cfg.model.neck, cfg.model.bbox_head):
            assert part.arch == arch
        assert cfg.model.test_cfg == TEST_CFG
        with torch.device('meta'):
            gains.append(MODELS.build(cfg.model.bbox_head).loss_weights)
        (affine,) = (
            step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomAffine'
        )
        scales.append(tuple(affine.scaling_ratio_range))
        ends.append(cfg.param_scheduler[-1].end_factor)
        # The rate that a sum over 64 images has.
        assert cfg.optim_wrapper.optimizer.lr / cfg.auto_scale_lr.base_batch_size == pytest.approx(
            0.01
        )
        assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size
    assert (
        gains == [dict(bbox=0.05, obj=1.0, cls=0.5)] * 2 + [dict(bbox=0.05, obj=0.7, cls=0.3)] * 3
    )
    assert scales == [(0.5, 1.5)] * 2 + [(0.1, 1.9)] * 3 and ends == [0.01] * 2 + [0.1] * 3
