"""Which layers are predictions: found in the graph, spared as far as their cost allows; and what is
between layers."""

import onnx
import pytest
import torch
from torch import nn

from dynamicdet.cascade.parts import DetectorPart
from dynamicdet.deploy.graphs import Graph, _export
from dynamicdet.deploy.int8 import (
    BETWEEN,
    Observer,
    Recipe,
    expose_layer_tensors,
    prediction_layers,
    quantize_graph,
    weighted_nodes,
)
from dynamicdet.models.detector_parts import find_parts
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
    content = _export(
        DetectorPart('head', head, lambda run: None, (head,)), (torch.rand(1, 3, 4, 4),)
    ).content
    names = [node.name for node in weighted_nodes(onnx.load_from_string(content))]
    assert [name.split('/')[-2] for name in names] == ['neck', 'body', 'score', 'box']
    return content, dict(zip(names, (192, 512, 256, 512)))


@pytest.mark.parametrize(
    'share, expected, spent',
    [(1.0, ['score', 'box'], 768), (0.5, ['score'], 256), (0.2, ['score'], 256), (0.1, [], 0)],
)
def test_what_no_layer_reads_is_a_prediction_the_cheapest_first(graph, share, expected, spent):
    """The neck's map is an output too, but the body reads it."""
    content, costs = graph
    names, part = prediction_layers(content, costs, share)
    assert [name.split('/')[-2] for name in names] == expected and part == pytest.approx(
        spent / 1472
    )


def test_costs_that_are_not_known_are_nothing(graph):
    """Such as of a head that no image has reached."""
    names, part = prediction_layers(graph[0], {}, 0.1)
    assert len(names) == 2 and part == 0


def test_heads_predict_and_backbones_do_not():
    parts = find_parts(MODELS.build(tiny_detector('faster_rcnn')))
    assert [part.name for part in parts if part.predicts] == ['branch0.bbox_head0']
    assert [part.name for part in parts if not part.predicts] == ['first', 'branch0']


class Between(nn.Module):
    """SiLU, a sum, pooling, a join and an enlargement between convolutions; at the end a score of
    what is in float."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(16, 4, 1),
        )

    def forward(self, x):
        one = nn.functional.silu(self.first(x))
        two = one + nn.functional.silu(self.second(one))
        pooled = nn.functional.max_pool2d(two, 3, 2, 1)
        large = nn.functional.interpolate(pooled, scale_factor=2, mode='nearest')
        return self.last(torch.cat([two, large], dim=1)), two.mean(dim=(2, 3)).sigmoid()


def test_what_is_between_layers_stays_in_8_bits():
    torch.manual_seed(0)
    module, images = Between().eval(), torch.randn(2, 3, 8, 8)
    content = _export(
        DetectorPart('between', module, lambda run: None, (module,)), (images,)
    ).content
    observer = Observer()
    observer(dict(in0=images.numpy(), **Graph(expose_layer_tensors(content), None).arrays(images)))
    ranges = observer.ranges('minmax')
    found = {
        between: quantize_graph(content, Recipe(ranges, between=BETWEEN if between else ()))
        for between in (False, True)
    }
    assert kinds_in_float(found[False]) >= {'Sigmoid', 'Mul', 'Add', 'MaxPool', 'Concat', 'Resize'}
    # The score is none of it: no layer reads it.
    assert kinds_in_float(found[True]) & {
        'Sigmoid',
        'Mul',
        'Add',
        'MaxPool',
        'Concat',
        'Resize',
    } == {'Sigmoid'}
    exact = list(Graph(content, None).arrays(images).values())
    for one in found.values():
        for got, wanted in zip(Graph(one, None).arrays(images).values(), exact):
            assert 0 < ((got - wanted) ** 2).sum() / (wanted**2).sum() < 1e-3
    # A layer that stays float, and what it gives.
    names = [node.name for node in weighted_nodes(onnx.load_from_string(content))]
    spared = quantize_graph(content, Recipe(ranges, tuple(names[1:2]), between=BETWEEN))
    assert {'Add', 'Concat'} <= kinds_in_float(spared)


def kinds_in_float(content):
    """Operators that take what was not in 8 bits before."""
    model = onnx.load_from_string(content)
    whole = {
        name
        for node in model.graph.node
        if node.op_type == 'DequantizeLinear'
        for name in node.output
    }
    constants = {one.name for one in model.graph.initializer} | {
        name for node in model.graph.node if node.op_type == 'Constant' for name in node.output
    }
    return {
        node.op_type
        for node in model.graph.node
        if node.op_type not in ('QuantizeLinear', 'DequantizeLinear')
        and any(name not in whole and name not in constants for name in node.input if name)
    }


class Sized(nn.Module):
    """What reads a map for its size alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        small = self.one(x)
        return self.two(nn.functional.interpolate(small, size=x.shape[-2:], mode='nearest'))


def test_nothing_is_made_float_for_its_size():
    module, images = Sized().eval(), torch.randn(1, 3, 8, 8)
    content = _export(DetectorPart('sized', module, lambda run: None, (module,)), (images,)).content
    observer = Observer()
    observer(dict(in0=images.numpy(), **Graph(expose_layer_tensors(content), None).arrays(images)))
    small = quantize_graph(content, Recipe(observer.ranges('minmax'), between=BETWEEN))
    nodes = onnx.load_from_string(small).graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    sizes = [node for node in nodes if node.op_type == 'Shape']
    assert sizes and all(makers.get(node.input[0]) != 'DequantizeLinear' for node in sizes)
    one, other = (Graph(each, None).arrays(images)['out0'] for each in (small, content))
    assert 0 < abs(one - other).max() < 0.1
