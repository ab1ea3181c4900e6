"""YOLOv7's parts, by hand-made cases and by their sizes."""

import copy
import pickle

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm

from conftest import ROOT, instances
from dynamicdet.measuring.flops import count_flops
from dynamicdet.models import Router, build_composite, can_fuse, fuse
from dynamicdet.models.resolution import reduce_samples
from dynamicdet.models.yolo.head import in_cells
from dynamicdet.models.yolov7 import ARCHITECTURES, YOLOV7PAFPN, YOLOV7Backbone, YOLOV7Head
from dynamicdet.models.yolov7.assigner import sim_ota
from dynamicdet.testing import randomize, shrink
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

TEST_CFG = dict(
    score_thr=0.001, nms_pre=30000, nms=dict(type='nms', iou_threshold=0.65), max_per_img=300
)


def tiny(arch: str) -> dict:
    size = dict(arch=arch, width=0.125, depth=0.5)
    return dict(
        type='SingleStageDetector',
        data_preprocessor=dict(type='DetDataPreprocessor', std=[255.0] * 3, mean=[0.0] * 3),
        backbone=dict(type='YOLOV7Backbone', **size),
        neck=dict(type='YOLOV7PAFPN', **size),
        bbox_head=dict(type='YOLOV7Head', arch=arch, width=0.125, num_classes=3),
        test_cfg=TEST_CFG,
    )


@pytest.mark.parametrize('arch, millions', [('v7', 80.62), ('x', 151.09), ('w6', 147.36)])
def test_parameters_of_the_dynamic_detectors(arch, millions):
    """Two backbones with connections, necks, heads and the router, as the paper's."""
    with torch.device('meta'):
        composite = build_composite(dict(type='YOLOV7Backbone', arch=arch), 0)
        parts = [composite, Router(composite.channels)]
        parts += [YOLOV7PAFPN(arch) for _ in range(2)] + [YOLOV7Head(80, arch) for _ in range(2)]
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_strides(arch):
    model = randomize(MODELS.build(tiny(arch))).eval()
    maps = model.backbone(torch.rand(2, 3, 128, 192))
    outputs = model.neck(maps)
    levels = 4 if arch == 'w6' else 3
    assert len(maps) == len(outputs) == levels
    for level, (own, out) in enumerate(zip(maps, outputs)):
        assert own.shape[2:] == out.shape[2:] == (128 // 2 ** (3 + level), 192 // 2 ** (3 + level))
    for part, channels in zip(model.bbox_head(outputs), (9, 12, 3)):
        assert [tuple(one.shape) for one in part] == [
            (2, channels, *out.shape[2:]) for out in outputs
        ]


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_fused_is_the_same(arch):
    model = randomize(MODELS.build(tiny(arch))).eval()
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        before = model._forward(images)
        assert can_fuse(model)
        parameters = sum(p.numel() for p in fuse(model).parameters())
        after = fuse(model)._forward(images)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert parameters < sum(p.numel() for p in MODELS.build(tiny(arch)).parameters())
    for old, new in zip(before, after):
        for one, other in zip(old, new):
            assert one.std() > 1e-4
            assert (other - one).abs().max() < 1e-3 * one.std()


def test_fused_convolutions_are_counted_and_follow_their_weights():
    """On a CPU they are another operation, with weights of their own that follow the model's."""
    model = fuse(randomize(MODELS.build(tiny('v7'))))
    images = torch.rand(1, 3, 64, 64)
    counts = []
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            counts.append(count_flops(lambda: model._forward(images))[0])
    assert counts[0] == counts[1] > 1e6
    with torch.no_grad():
        before = model._forward(images)[1][0]
        model.bbox_head.convs[0].conv.weight.mul_(2)
        torch.testing.assert_close(
            model._forward(images)[1][0]
            + model.bbox_head.convs[0].conv.bias.view(1, -1, 1, 1)[:, :12],
            2 * before,
        )
        half = model.bfloat16()._forward(images.bfloat16())[1][0]
    assert half.dtype == torch.bfloat16


def test_a_fused_model_is_copied_and_cast():
    """After a call, too: packed weights can be neither copied nor read as doubles."""
    model = fuse(randomize(MODELS.build(tiny('v7'))))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = model._forward(images)[1][0]
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied._forward(images)[1][0], want)
        torch.testing.assert_close(copied.double()._forward(images.double())[1][0].float(), want)
    fused = fuse(randomize(MODELS.build(tiny('v7'))))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        half = fused._forward(images)[1][0]
    assert half.dtype == torch.bfloat16 and (half - want).abs().max() < 0.05 * want.abs().max()
    with torch.inference_mode():
        built = fuse(randomize(MODELS.build(tiny('v7'))))
        torch.testing.assert_close(built._forward(images)[1][0], want)


def test_a_model_without_parts_of_its_own_is_left_alone():
    """RTMDet has several norms for one convolution, which cannot hold them all."""
    cfg = shrink(Config.fromfile(ROOT / 'configs/dy_rtmdet_s.py').model)
    model = randomize(revert_sync_batchnorm(MODELS.build(cfg))).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = model._forward(images)
        got = fuse(model)._forward(images)
    assert not can_fuse(model)
    for exit, other in zip(want['exits'], got['exits']):
        assert all(torch.equal(a, b) for one, two in zip(exit, other) for a, b in zip(one, two))


def test_w6_in_half_of_an_odd_size():
    """Its stride is 64: 192 pixels become 128, not 96."""
    stock = tiny('w6')
    stock['data_preprocessor']['pad_size_divisor'] = 64
    model = MODELS.build(
        dict(type='DynamicDetector', detector=stock, shared=False, reuse_stages=0, first_scale=0.5)
    ).eval()
    with torch.no_grad():
        exits = model._forward(torch.rand(1, 3, 192, 192))['exits']
    assert [part.shape[-1] for part in exits[0][0]] == [16, 8, 4, 2]


def test_anchors_must_have_the_levels():
    with pytest.raises(ValueError, match='3 levels'):
        YOLOV7Head(3, anchors=[[(8, 8)], [(16, 16)]])


def test_second_backbone_starts_as_a_plain_one():
    plain = randomize(YOLOV7Backbone('w6', 0.125, 0.5)).eval()
    composite = build_composite(
        dict(type='YOLOV7Backbone', arch='w6', width=0.125, depth=0.5), 0
    ).eval()
    for net in (composite.first, composite.second):
        net.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        first = composite.first_maps(images)
        second = composite.deeper_maps(images, first)
        for one, want in zip(composite.select(second), plain(images)):
            assert torch.equal(one, want)
        # Stage 0 has no block and no connection; each other stage hears of itself and all deeper
        # ones.
        assert [len(c.projections) for c in composite.connections] == [5, 4, 3, 2, 1]
        randomize(composite.connections)
        changed = composite.deeper_maps(images, first)
    assert torch.equal(changed[0], second[0])
    assert all(not torch.allclose(a, b) for a, b in zip(changed[1:], second[1:]))


def test_sim_ota_by_hand():
    """Two objects and four candidates. The first takes the two that overlap it, the second its own;
    the far one is nobody's."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    predicted = torch.tensor(
        [[0.0, 0, 10, 10], [0.0, 0, 10, 10], [20, 20, 30, 29], [50, 50, 60, 60]]
    )
    probabilities = torch.full((4, 2), 0.25)
    index, owner = sim_ota(boxes, torch.tensor([0, 1]), predicted, probabilities)
    assert index.tolist() == [0, 1, 2] and owner.tolist() == [0, 0, 1]


def test_a_contested_candidate_goes_to_the_cheaper_object():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]])
    index, owner = sim_ota(
        boxes, torch.tensor([0, 1]), torch.tensor([[0.0, 0, 10, 9.9]]), torch.tensor([[0.5, 0.5]])
    )
    assert index.tolist() == [0] and owner.tolist() == [0]


def outputs(model, size=64, images=2):
    return model.bbox_head(model.neck(model.backbone(torch.rand(images, 3, size, size))))


def test_images_without_objects_have_a_loss():
    model = MODELS.build(tiny('v7'))
    losses = model.bbox_head.loss_by_feat(*outputs(model), [instances(), instances()], [{}, {}])
    assert losses['loss_bbox'] == 0 and losses['loss_cls'] == 0 and losses['loss_obj'] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.bbox_head.parameters())


def test_loss_of_a_batch_of_one_kind_is_that_of_one_image():
    """All are means: the same image twice has the loss of the image once."""
    model = randomize(MODELS.build(tiny('v7'))).eval()
    once = [[part[:1] for part in parts] for parts in outputs(model)]
    twice = [[part.repeat(2, 1, 1, 1) for part in parts] for parts in once]
    own = instances([4, 4, 30, 40], [20, 20, 60, 60])
    one = model.bbox_head.loss_by_feat(*once, [own], [{}])
    two = model.bbox_head.loss_by_feat(*twice, [own, own], [{}, {}])
    for name, value in one.items():
        assert value > 0
        torch.testing.assert_close(two[name], value)


def test_objectness_counts_alike_where_an_exit_sees_a_smaller_image():
    """Its scale is the delivered image's area, for both exits."""
    model = MODELS.build(tiny('v7'))
    parts = outputs(model)
    own = model.bbox_head.loss_by_feat(*parts, [instances()] * 2, [{}] * 2)
    larger = model.bbox_head.loss_by_feat(
        *parts, [instances()] * 2, [dict(delivered_shape=(128, 128))] * 2
    )
    torch.testing.assert_close(larger['loss_obj'], 4 * own['loss_obj'])
    sample = DetDataSample(metainfo=dict(img_shape=(128, 128), batch_input_shape=(128, 128)))
    (smaller,) = reduce_samples([sample], (0.5, 0.5))
    assert smaller.delivered_shape == (128, 128) and smaller.batch_input_shape == (64, 64)


def test_predictions_by_hand():
    """One sure cell: its box follows from the formulas, clipped to the image, in the original's
    frame."""
    head = YOLOV7Head(2, 'v7', 0.125, test_cfg=ConfigDict(TEST_CFG))
    sizes = [(8, 8), (4, 4), (2, 2)]
    classes = [torch.full((1, 6, *s), -20.0) for s in sizes]
    boxes = [torch.zeros(1, 12, *s) for s in sizes]
    objects = [torch.full((1, 3, *s), -20.0) for s in sizes]
    # Level 0, anchor 2 (40 x 28), row 1, column 7: center (7.5, 1.5) cells of 8 pixels.
    objects[0][0, 2, 1, 7] = classes[0][0, 2 * 2 + 1, 1, 7] = 20.0
    meta = dict(img_shape=(64, 64), scale_factor=(2.0, 2.0))
    (found,) = head.predict_by_feat(classes, boxes, objects, [meta], rescale=True)
    assert found.labels.tolist() == [1]
    torch.testing.assert_close(found.scores, torch.ones(1))
    torch.testing.assert_close(found.bboxes, torch.tensor([[20.0, 0, 32, 13]]))


@pytest.mark.parametrize('width, depth', [(0.0625, 0.3), (0.25, 1.0), (1.25, 1.5)])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_scaled_tables_fit_together(arch, width, depth):
    with torch.device('meta'):
        backbone = YOLOV7Backbone(arch, width, depth)
        neck, head = YOLOV7PAFPN(arch, width, depth), YOLOV7Head(3, arch, width)
        levels = head(neck(backbone(torch.zeros(2, 3, 64, 64))))
    assert len(levels[0]) == len(backbone.out_indices)


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match='v7, x, w6'):
        YOLOV7Backbone('v9')


def test_a_cell_of_several_objects_takes_the_last_ones_value():
    """As the published code on a CPU, on any device."""
    at = tuple(torch.tensor(one) for one in ([0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]))
    filled = in_cells(torch.tensor([0.9, 0.2, 0.5, 0.7]), at, torch.zeros(2, 2, 2))
    assert torch.equal(filled, torch.tensor([[[0, 0.5], [0.7, 0]], [[0.2, 0], [0, 0]]]))
    nothing = torch.zeros(0, dtype=torch.long)
    assert not in_cells(torch.zeros(0), (nothing,) * 3, torch.ones(2, 2, 2)).any()
