"""Maps go from graph to graph in 8 bits, and nothing else changes; RoIAlign by a runtime is
mmcv's."""

import copy

import onnx
import pytest
import torch
from mmcv.ops import RoIAlign
from torch import nn

from conftest import RUNTIMES_TO_TRY
from dynamicdet.deploy.deployment import _place
from dynamicdet.deploy.graphs import Graph, example_inputs, export_stages
from dynamicdet.deploy.int8 import BETWEEN, Observer, Recipe, quantize_graph, watched
from dynamicdet.deploy.joins import Join, join_graphs, joined_ranges, joins_of
from dynamicdet.deploy.roi_align import place_roi_aligns
from dynamicdet.measuring.calibration import force_dynamic_exit
from dynamicdet.models.stages import find_stages
from dynamicdet.testing import randomize, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS

SETTINGS = {
    'plain': lambda: tiny_detector('faster_rcnn'),
    'one head, stages taken over': lambda: tiny_dynamic('faster_rcnn', shared=True),
    'one head': lambda: tiny_dynamic('faster_rcnn', shared=True, reuse_stages=0),
    'a head for each exit': lambda: tiny_dynamic('yolox', shared=False),
    # What its FPN does not take is no input of its graph.
    'maps that nobody takes': lambda: tiny_detector('retinanet'),
    'two stages taken over': lambda: tiny_dynamic('faster_rcnn', reuse_stages=2),
    'three exits': lambda: tiny_dynamic('faster_rcnn', shared=False, backbones=3),
}


def test_outputs_that_go_to_one_input_belong_together():
    sources = {
        ('second', 0): [('first', 0)],
        ('head', 0): [('first', 0), ('second', 0)],
        ('head', 1): [('first', 1)],
    }
    joins = joins_of(sources)
    assert joins == [
        Join((('first', 0), ('second', 0)), (('head', 0), ('second', 0))),
        Join((('first', 1),), (('head', 1),)),
    ]
    ranges = joined_ranges(
        joins, dict(first=dict(out0=(0, 2), out1=(0, 1)), second=dict(out0=(-1, 1)), head={})
    )
    assert ranges == dict(
        first=dict(out0=(-1, 2), out1=(0, 1)),
        second=dict(out0=(-1, 2), in0=(-1, 2)),
        head=dict(in0=(-1, 2), in1=(0, 1)),
    )


def in_8_bits(name):
    """A detector's stages, and its graphs in 8 bits, apart and joined."""
    model = randomize(MODELS.build(SETTINGS[name]()), seed=1).eval()
    exported = export_stages(copy.deepcopy(model), (64, 96))
    stages = find_stages(model)
    driven, ranges = copy.deepcopy(model), {}
    seen = example_inputs(driven, find_stages(driven), (64, 96))
    for stage in stages:
        observer = Observer()
        feed = {f'in{index}': one.numpy() for index, one in enumerate(seen[stage.name])}
        observer(
            {**feed, **Graph(watched(exported[stage.name].content), None).arrays(*seen[stage.name])}
        )
        ranges[stage.name] = observer.ranges('minmax')
    joins = joins_of(
        {
            (stage.name, index): stage.source(index)
            for stage in stages
            for index in range(len(seen[stage.name]))
            if stage.source(index)
        }
    )
    ends = joined_ranges(joins, ranges)
    apart = {
        stage.name: quantize_graph(
            exported[stage.name].content,
            Recipe(
                {**ranges[stage.name], **ends[stage.name]},
                between=BETWEEN,
                ends=tuple(ends[stage.name]),
            ),
        )
        for stage in stages
    }
    return model, exported, joins, apart, join_graphs(apart, joins)


@pytest.mark.parametrize('name', SETTINGS)
def test_joined_graphs_detect_the_same(name):
    model, exported, joins, apart, joined = in_8_bits(name)
    eight = {
        end
        for join in joins
        for end in (
            *((one, f'out{index}') for one, index in join.outputs),
            *((one, f'in{index}') for one, index in join.inputs),
        )
        if end[1] in {value.name for value in ends_of(apart[end[0]])}
    }
    assert eight and eight == {
        (one, value.name)
        for one, content in joined.items()
        for value in ends_of(content)
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    }
    detectors = []
    for contents in (apart, joined):
        detectors.append(copy.deepcopy(model))
        _place(find_stages(detectors[-1]), contents, exported)
    # Alone, and two of unlike sizes: there torch scores what is not padding.
    for sizes in ([(64, 96)], [(64, 64), (48, 96)]):
        for exit in range(getattr(model, 'num_exits', 1)):
            found = []
            for detector in detectors:
                if hasattr(model, 'num_exits'):
                    force_dynamic_exit(detector, exit)
                with torch.no_grad():
                    found.append(
                        [one for size in sizes for one in detector.test_step(batch_of(size))]
                        if len(sizes) == 1
                        else detector.test_step(batch_of(*sizes))
                    )
            assert sum(len(one.pred_instances) for one in found[0])
            for one, other in zip(*found):
                assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)
                assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)
                assert getattr(one, 'difficulty', 0) == pytest.approx(
                    getattr(other, 'difficulty', 0), abs=1e-5
                )


def ends_of(content):
    graph = onnx.load_from_string(content).graph
    return [*graph.input, *graph.output]


def batch_of(*sizes):
    """Images of these sizes."""
    parts = [tiny_batch((1,), size, seed=seed, masks=False) for seed, size in enumerate(sizes)]
    return dict(
        inputs=[one for part in parts for one in part['inputs']],
        data_samples=[one for part in parts for one in part['data_samples']],
    )


class Sized(nn.Module):
    """What reads a map for its size alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        small = self.one(x)
        return self.two(nn.functional.interpolate(small, size=x.shape[-2:], mode='nearest'))


def test_nothing_is_made_float_for_its_size():
    from dynamicdet.deploy.graphs import _export
    from dynamicdet.models.stages import Stage

    module, images = Sized().eval(), torch.randn(1, 3, 8, 8)
    content = _export(Stage('sized', module, lambda run: None, (module,)), (images,)).content
    observer = Observer()
    observer(dict(in0=images.numpy(), **Graph(watched(content), None).arrays(images)))
    before = quantize_graph(content, Recipe(observer.ranges('minmax'), between=BETWEEN))
    (after,) = join_graphs(dict(sized=before), []).values()
    makers = {
        name: node.op_type
        for node in onnx.load_from_string(after).graph.node
        for name in node.output
    }
    sizes = [node for node in onnx.load_from_string(after).graph.node if node.op_type == 'Shape']
    assert sizes and all(makers.get(node.input[0]) != 'DequantizeLinear' for node in sizes)
    one, other = (
        list(Graph(content, None).arrays(images).values())[0] for content in (before, after)
    )
    assert (one == other).all()


class Pooled(nn.Module):
    """A map that is pooled before a layer reads it, as an HRFPN does."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x, y):
        large = nn.functional.interpolate(y, scale_factor=2, mode='nearest')
        return self.one(torch.cat([nn.functional.max_pool2d(x, 2), large], dim=1)), self.two(x)


def test_what_comes_in_8_bits_may_be_pooled_first():
    from dynamicdet.deploy.graphs import _export
    from dynamicdet.models.stages import Stage

    torch.manual_seed(0)
    module, images = Pooled().eval(), (torch.randn(1, 4, 8, 8), torch.randn(1, 4, 2, 2))
    content = _export(Stage('pooled', module, lambda run: None, (module,)), images).content
    observer = Observer()
    observer(
        {
            **{f'in{index}': one.numpy() for index, one in enumerate(images)},
            **Graph(watched(content), None).arrays(*images),
        }
    )
    small = quantize_graph(
        content, Recipe(observer.ranges('minmax'), between=BETWEEN, ends=('in0', 'in1'))
    )
    for one, other in zip(
        Graph(small, None).arrays(*images).values(), Graph(content, None).arrays(*images).values()
    ):
        assert 0 < abs(one - other).max() < 0.05


@pytest.mark.parametrize('aligned', (True, False))
@pytest.mark.parametrize('ratio', (0, 2))
@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_roi_align_is_mmcvs(aligned, ratio, runtime):
    layer = RoIAlign((7, 5), 0.25, ratio, 'avg', aligned)
    model = nn.Sequential(copy.deepcopy(layer))
    place_roi_aligns(model, 1, runtime)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, 20, 24, generator=generator)
    corners = torch.rand(40, 2, generator=generator) * 110 - 10
    sizes = torch.rand(40, 2, generator=generator) * 60
    # No width, no height, neither.
    sizes[3, 0], sizes[5, 1], sizes[7] = 0, 0, 0
    rois = torch.cat([torch.arange(40)[:, None] % 2, corners, corners + sizes], dim=1).float()
    # ONNX Runtime's is the same to the last bit.
    for some in (rois, rois[:9], rois[30:], rois[3:4]):
        torch.testing.assert_close(
            model[0](maps, some),
            layer(maps, some),
            rtol=0,
            atol=1e-5 if runtime == 'openvino' else 0,
        )
    assert model[0](maps, rois[:0]).shape == (0, 6, 7, 5)


@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_rois_of_negative_size_are_0(runtime):
    """mmcv raises; OpenVINO by itself ends the process."""
    model = nn.Sequential(RoIAlign((7, 7), 0.25, 0, 'avg', True))
    place_roi_aligns(model, 1, runtime)
    found = model[0](
        torch.ones(1, 3, 20, 24), torch.tensor([[0, 50.0, 50, 20, 20], [0, 10.0, 10, 40, 40]])
    )
    assert (found[0] == 0).all() and torch.allclose(found[1], torch.ones(()))


def test_roi_align_of_maxima_stays_mmcvs():
    model = nn.Sequential(RoIAlign(7, 0.25, 2, 'max', True))
    place_roi_aligns(model)
    assert 'forward' not in vars(model[0])
