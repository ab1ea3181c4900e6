"""Layers on demand."""

import pytest
import torch
from exit_cases import base
from torch import nn

from dynamicdet.models.yolo import YOLOLayer
from dynamicdet.models.yolov7.architecture import yolov7_architecture
from dynamicdet.testing import randomize
from dynamicdet.video.lazy_layers import LazyLayers
from mmdet.registry import MODELS


class Counting(nn.Module):
    """Adds one, and counts the images that it is given."""

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return x + 1


#: Of the layers b and c one is not needed for the other; d is given both.
TABLE = (
    YOLOLayer('a', (), 1, 1),
    YOLOLayer('b', (0,), 1, 1),
    YOLOLayer('c', (0,), 1, 1),
    YOLOLayer('d', (1, 2), 2, 1),
)


def diamond():
    return nn.ModuleDict({name: Counting() for name in 'abcd'})


def images(detector):
    return [detector[name].images for name in 'abcd']


def test_a_layer_runs_when_it_is_needed_and_once():
    detector = diamond()
    layers = LazyLayers(detector, TABLE, torch.zeros(3, 1, 2, 2), (0, 2, 3))
    assert images(detector) == [0, 0, 0, 0] and layers.held == [-1]
    assert (layers.take(2) == 2).all()
    assert images(detector) == [3, 0, 3, 0]
    # The image is let go; 0 is kept for b and because it is wanted.
    assert layers.held == [0, 2]
    assert layers.take(3).shape == (3, 2, 2, 2)
    assert images(detector) == [3, 3, 3, 3] and layers.held == [0]
    assert (layers.take(0) == 1).all() and layers.held == []


def test_a_part_of_the_images_goes_on():
    detector = diamond()
    x = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    layers = LazyLayers(detector, TABLE, x, (1, 3))
    layers.take(1)
    layers.keep(torch.tensor([2, 0]))
    assert layers.take(3)[:, 0, 0, 0].tolist() == [5, 3]
    assert images(detector) == [3, 3, 2, 2]


def test_what_is_not_wanted_or_was_taken_is_not_there():
    layers = LazyLayers(diamond(), TABLE, torch.zeros(1, 1, 2, 2), (1,))
    with pytest.raises(KeyError, match='layer 3'):
        layers.take(3)
    layers.take(1)
    with pytest.raises(KeyError, match='layer 1'):
        layers.take(1)


YOLOV7 = dict(
    type='SingleStageDetector',
    backbone=dict(type='YOLOV7Backbone', width=0.125, depth=0.25),
    neck=dict(type='YOLOV7PAFPN', width=0.125, depth=0.25),
    bbox_head=dict(type='YOLOV7Head', width=0.125, num_classes=3),
)


@pytest.mark.parametrize('config', [base(), YOLOV7], ids=['yolov5', 'yolov7'])
@pytest.mark.parametrize('size', [(64, 96), (32, 32)])
def test_it_computes_what_the_detector_does(config, size):
    detector = randomize(MODELS.build(config)).eval()
    table = detector.neck.architecture
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        layers = LazyLayers(detector, table.layers(), x, table.output_layers)
        taken = [layers.take(position) for position in table.output_layers]
        for own, wanted in zip(taken, detector.extract_feat(x)):
            assert torch.equal(own, wanted) and own.std() > 1e-3
    assert layers.held == []


@pytest.mark.parametrize('name', ['v7', 'x'])
def test_the_table_of_yolov7_has_its_maps(name):
    kinds = dict(arch=name, width=0.125, depth=0.25)
    detector = MODELS.build(
        dict(
            type='SingleStageDetector',
            backbone=dict(type='YOLOV7Backbone', **kinds),
            neck=dict(type='YOLOV7PAFPN', **kinds),
            bbox_head=dict(type='YOLOV7Head', arch=name, width=0.125, num_classes=3),
        )
    )
    rows = detector.neck.architecture.layers()
    with torch.no_grad():
        layers = LazyLayers(detector, rows, torch.zeros(1, 3, 64, 32), range(len(rows)))
        for position, row in enumerate(rows):
            assert layers.take(position).shape == (
                1,
                row.channels,
                64 // row.stride,
                32 // row.stride,
            )
    assert yolov7_architecture(name).output_layers == tuple(range(22, 25))


def test_yolov7_w6_says_why_it_has_none():
    with pytest.raises(ValueError, match='W6'):
        yolov7_architecture('w6').layers()
