"""Which layers are predictions: found in the graph, spared as far as their cost allows."""
import onnx
import pytest
import torch
from torch import nn

from dynamicdet.deploy.graphs import _export
from dynamicdet.deploy.int8 import layers_of, prediction_layers
from dynamicdet.deploy.stages import Stage, find_stages
from dynamicdet.testing import tiny_detector
from mmdet.registry import MODELS


class Head(nn.Module):
    """A map that is given as it is and read on; scores and boxes at its end. 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.neck, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.score, self.box = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        features = self.neck(x)
        hidden = self.body(features).relu()
        return features, self.score(hidden), self.box(hidden).exp()


@pytest.fixture(scope='module')
def graph():
    """ONNX file; name of a node -> multiply-adds, which for 16 pixels are 192, 512, 256 and 512."""
    head = Head().eval()
    content = _export(Stage('head', head, lambda run: None, (head, )), (torch.rand(1, 3, 4, 4), )).content
    names = [node.name for node in layers_of(onnx.load_from_string(content))]
    assert [name.split('/')[-2] for name in names] == ['neck', 'body', 'score', 'box']
    return content, dict(zip(names, (192, 512, 256, 512)))


@pytest.mark.parametrize('share, expected, spent', [
    (1.0, ['score', 'box'], 768), (0.5, ['score'], 256), (0.2, ['score'], 256), (0.1, [], 0)])
def test_what_no_layer_reads_is_a_prediction_the_cheapest_first(graph, share, expected, spent):
    """The neck's map is an output too, but the body reads it."""
    content, costs = graph
    names, part = prediction_layers(content, costs, share)
    assert [name.split('/')[-2] for name in names] == expected and part == pytest.approx(spent / 1472)


def test_costs_that_are_not_known_are_nothing(graph):
    """Such as of a head that no image has reached."""
    names, part = prediction_layers(graph[0], {}, 0.1)
    assert len(names) == 2 and part == 0


def test_heads_predict_and_backbones_do_not():
    stages = find_stages(MODELS.build(tiny_detector('faster_rcnn')))
    assert [stage.name for stage in stages if stage.predicts] == ['branch0', 'branch0.bbox_head0']
    assert [stage.name for stage in stages if not stage.predicts] == ['first']
