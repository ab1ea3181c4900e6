"""The auxiliary heads: costs of the seed's table, and losses and boxes by hand."""

import math

import pytest
import torch
from exit_cases import CHANNELS, LAYERS, tiny
from mmengine.config import Config
from mmengine.structures import InstanceData

from conftest import ROOT
from dynamicdet.errors import UsageError
from dynamicdet.video import ExitHead
from dynamicdet.video.costs import as_table, exit_gflops, final_flops, layer_costs, layer_seconds
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

#: Of the seed's table (spec, section 2), for YOLOv5s, 80 classes, 640 x 640: thousands of
#: parameters and GFLOPs.
SEED = list(
    zip(
        (80, 83, 83, 90, 90, 103, 103, 128, 128, 128, 103, 103, 90, 90, 90, 103, 103, 128),
        (
            1.03,
            1.07,
            1.07,
            1.16,
            1.16,
            0.33,
            0.33,
            0.10,
            0.10,
            0.10,
            0.08,
            0.33,
            0.29,
            1.16,
            0.29,
            0.33,
            0.08,
            0.10,
        ),
    )
)


@pytest.fixture(scope='module')
def yolov5s():
    base = Config.fromfile(ROOT / 'configs/yolov5_s.py').model
    return MODELS.build(
        dict(
            type='EarlyExitDetector',
            detector=base,
            heads=dict(),
            propagation=dict(type='Propagation'),
        )
    )


def test_the_seeds_table(yolov5s):
    rows = layer_costs(yolov5s, (640, 640))
    assert len(rows) == 18 == len(yolov5s.heads)
    for row, (thousands, gflops) in zip(rows, SEED):
        assert row.head.parameters // 1000 == thousands
        assert row.head.flops / 1e9 == pytest.approx(gflops, rel=0.03)
        # About 90 thousand parameters.
        assert row.propagation.parameters == pytest.approx(90_000, rel=0.01)
    heads = sum(row.head.flops for row in rows)
    mixing = sum(row.propagation.flops for row in rows)
    products = sum(row.products for row in rows)
    # About 40 % of the heads', by layers; attention's products are more than the layers.
    assert 0.35 < (mixing - products) / heads < 0.45 < products / heads
    costs = exit_gflops(yolov5s, (640, 640), rows)
    # The stem; the stem and its head; all but the heads, since no gate looks at them.
    assert costs[0] == rows[0].main.flops / 1e9
    assert costs[1] == pytest.approx(
        (rows[0].main.flops + rows[0].head.flops + rows[0].propagation.flops) / 1e9
    )
    assert costs[-1] == pytest.approx(16.5, rel=0.01)
    whole = sum(row.main.flops for row in rows) + final_flops(yolov5s, (640, 640))
    assert costs[-1] == pytest.approx(whole / 1e9)


def test_costs_with_a_gate_that_looks_at_each_head():
    plain, looking = tiny(), tiny(gate=dict(type='ScoreGate'))
    rows = layer_costs(plain, (64, 64))
    heads = [rows[position].head.flops / 1e9 for position in LAYERS]
    costs = (exit_gflops(model, (64, 64), rows) for model in (plain, looking))
    for exit, (one, other) in enumerate(zip(*costs), start=-1):
        # A head that an image leaves at is paid for in any case.
        assert other - one == pytest.approx(sum(heads[: max(exit, 0)]))
    assert all(row.head is None for position, row in enumerate(rows) if position not in LAYERS)


def test_the_printed_table():
    model = tiny(propagation=dict(size=2))
    rows = layer_seconds(model, layer_costs(model, (64, 64)), (64, 64), repeats=1)
    lines = as_table(model, rows, (64, 64)).splitlines()
    assert len(lines) == 1 + 18 + 2 + 6 + 1
    assert all(row.seconds[0] > 0 for row in rows)
    assert lines[3].startswith('2 backbone.layers.2') and lines[2].count('-') == 2


@pytest.mark.parametrize('stride, side', [(2, 80), (4, 80), (8, 80), (16, 40), (32, 20)])
def test_outputs_are_no_finer_than_80_by_80_at_640(stride, side):
    with torch.device('meta'):
        head = ExitHead(80, 16, stride, [(8, 8)] * 9)
        classes, boxes, objects = head(
            (head.features(torch.zeros(1, 16, 640 // stride, 640 // stride)),)
        )
    assert [tuple(one[0].shape) for one in (classes, boxes, objects)] == [
        (1, 9 * own, side, side) for own in (80, 4, 1)
    ]


def head(**settings):
    return ExitHead(
        2,
        8,
        8,
        settings.pop('anchors', [(8, 8)]),
        channels=4,
        test_cfg=Config(
            dict(score_thr=0.5, nms_pre=10, nms=dict(type='nms', iou_threshold=0.9), max_per_img=10)
        ),
        **settings,
    )


def truth(*boxes):
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )


def raw(value=0.0, images=1):
    return [[torch.full((images, own, 8, 8), value, requires_grad=True)] for own in (2, 4, 1)]


def test_losses_by_hand():
    """Outputs of zero put a box of the anchor's size into the middle of each cell."""
    losses = head().loss_by_feat(*raw(), [truth([16, 8, 24, 16])], [{}])
    # One level counts three times, as levels are to count the same in all; area over 640 x 640.
    assert losses['loss_bbox'].item() == pytest.approx(0, abs=1e-5)
    assert losses['loss_obj'].item() == pytest.approx(3 * math.log(2) * 0.01, rel=1e-5)
    assert losses['loss_cls'].item() == pytest.approx(3 * 0.5 * 2 / 80 * math.log(2), rel=1e-5)


def test_without_objects_only_objectness_learns():
    outputs = raw(images=2)
    losses = head().loss_by_feat(*outputs, [truth(), truth()], [{}, {}])
    sum(losses.values()).backward()
    assert losses['loss_bbox'] == losses['loss_cls'] == 0 < losses['loss_obj']
    assert outputs[2][0].grad.abs().sum() > 0 == outputs[0][0].grad.abs().sum()


def test_boxes_by_hand():
    own = head(anchors=[(8, 16), (30, 10)]).eval()
    torch.nn.init.zeros_(own.convs[0].weight)
    torch.nn.init.zeros_(own.convs[0].bias)
    # Boxes of two anchors, their objectness, their two classes: the second anchor is sure of class
    # 1.
    own.convs[0].bias.data[8:] = torch.tensor([-20.0, 20, -20, -20, -20, 20])
    features = torch.zeros(1, 4, 1, 2)
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), scale_factor=(1.0, 1.0)))
    (found,) = own.predict((features,), [sample])
    assert found.labels.tolist() == [1, 1]
    # Centers at 4 and 12; clipped to the image at the left.
    assert sorted(found.bboxes.tolist()) == [[0, 0, 19, 9], [0, 0, 27, 9]]


def test_what_the_config_leaves_out_is_the_detectors():
    model = tiny()
    assert model.exit_layers == LAYERS and model.num_exits == 5
    assert [own.reduce.conv.in_channels for own in model.heads] == list(CHANNELS)
    for own in model.heads:
        assert own.anchors.tolist() == [model.detector.bbox_head.anchors.flatten(0, 1).tolist()]
        assert own.test_cfg == model.detector.bbox_head.test_cfg and own.num_classes == 3
    assert [own.strides for own in model.heads] == [[8], [8], [32], [8]]


@pytest.mark.parametrize(
    'heads, said',
    [
        (dict(layers=[]), 'positions from 0 to 17'),
        (dict(layers=[4, 2]), 'ascending'),
        (dict(layers=[2, 2]), 'once'),
        (dict(layers=[18]), 'positions'),
        (dict(layers=[-1]), 'positions'),
        (dict(weights=[1, 2]), 'each of 18'),
        (dict(layers=[2], weights=-1), 'from 0 on'),
    ],
)
def test_heads_that_do_not_fit_are_named(heads, said):
    with pytest.raises(UsageError, match=said):
        tiny(heads=heads)
