"""Graphs in float32 against torch, and the simulation of 8 bits against the graphs in 8 bits."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from far_device import counted, far_device
from mmcv.ops import ModulatedDeformConv2dPack, RoIAlign, deform_conv2d
from mmengine.config import ConfigDict
from torch import nn

from conftest import RUNTIMES_TO_TRY, same_detections, spread_scores
from dynamicdet.cascade.parts import flatten, unflatten
from dynamicdet.compression.quantization import Int8Simulation
from dynamicdet.deploy.graphs import Graph, example_inputs, export_parts, release_weights
from dynamicdet.deploy.int8 import Recipe, quantize_graph, trained_ranges
from dynamicdet.deploy.roi_align import _graph_of, place_roi_aligns
from dynamicdet.deploy.runtimes import CPU, RUNTIMES, OnnxRuntime, OpenVino, open_graph
from dynamicdet.errors import UsageError
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.models.detector_parts import find_parts
from dynamicdet.routing.box_merging import Merge
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS

MODELS_TO_TRY = (
    'faster_rcnn',
    'mask_rcnn',
    'retinanet',
    'yolox',
    'dynamic faster_rcnn',
    'dynamic yolox',
    'rtmdet',
)


def settings(name):
    if name == 'rtmdet':
        from mmengine.hub import get_config

        return shrink(ConfigDict(get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model))
    if name.startswith('dynamic'):
        kind = name.split()[1]
        return tiny_dynamic(kind, shared=kind != 'yolox')
    return tiny_detector(name)


def build(name):
    """A detector with random weights, in eval mode; the same at each call."""
    return spread_scores(randomize(MODELS.build(settings(name)), seed=1)).eval()


@pytest.fixture(scope='module')
def exported():
    """Name -> graphs, made once."""
    kept = {}

    def get(name):
        if name not in kept:
            kept[name] = export_parts(build(name), (64, 96))
        return kept[name]

    return get


def close(one, other, tolerance=1e-4):
    """Within a share of the largest value."""
    return (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
@pytest.mark.parametrize('name', MODELS_TO_TRY)
def test_graphs_give_what_torch_gives_at_other_sizes_and_counts(name, runtime, exported):
    graphs, model = exported(name), build(name)
    parts = find_parts(model)
    assert [part.name for part in parts] == list(graphs)
    # Three images where two were traced, of another size.
    inputs = example_inputs(model, parts, (128, 64))
    for part in parts:
        given = tuple(torch.cat([one, one[:1]]) for one in inputs[part.name])
        with torch.no_grad():
            expected, form = flatten(part.run(*given))
        assert form == graphs[part.name].form
        got, _ = flatten(Graph(graphs[part.name].content, form, runtime=runtime)(*given))
        assert len(got) == len(expected)
        assert all(close(one, two) for one, two in zip(got, expected)), part.name


@pytest.mark.parametrize(
    'name', ('faster_rcnn', 'retinanet', 'dynamic yolox', 'dynamic faster_rcnn')
)
@pytest.mark.parametrize('padded', (False, True))
@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_a_detector_on_graphs_detects_the_same(name, padded, runtime, exported):
    model, deployed = build(name), build(name)
    parts = find_parts(deployed)
    for part in parts:
        part.place(
            Graph(
                exported(name)[part.name].content, exported(name)[part.name].form, runtime=runtime
            )
        )
    before = sum(one.numel() for one in deployed.parameters())
    release_weights(parts)
    assert sum(one.numel() for one in deployed.parameters()) < before / 2
    assert not any('running_mean' in key for key in deployed.state_dict())
    batch = tiny_batch((1, 2), (64, 96))
    if padded:
        batch['inputs'][1] = batch['inputs'][1][:, :40, :50]
        batch['data_samples'][1].set_metainfo(dict(img_shape=(40, 50), ori_shape=(40, 50)))
    for exit in range(getattr(model, 'num_exits', 1)):
        for one in (model, deployed):
            if hasattr(one, 'num_exits'):
                force_dynamic_exit(one, exit)
        with torch.no_grad():
            expected = model.test_step(copy.deepcopy(batch))
            got = deployed.test_step(copy.deepcopy(batch))
        for one, two in zip(got, expected):
            assert len(two.pred_instances)
            assert same_detections(one.pred_instances, two.pred_instances)
            if hasattr(model, 'num_exits'):
                assert one.exit == two.exit == exit
                assert one.difficulty == pytest.approx(two.difficulty, abs=1e-5)


@pytest.mark.parametrize('name', ('dynamic yolox', 'dynamic faster_rcnn'))
@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_merged_exits_on_graphs_are_the_same(name, runtime, exported):
    """Graphs end before detections are made; what is merged are these."""
    model, deployed = build(name), build(name)
    for one in (model, deployed):
        one.merge = Merge('wbf', 0.5)
        one.set_platt_scaling([(1.0, 0.5), (1.0, -0.5)])
        force_dynamic_exit(one, 1)
    for part in find_parts(deployed):
        graph = exported(name)[part.name]
        part.place(Graph(graph.content, graph.form, runtime=runtime))
    batch = tiny_batch((1, 2), (64, 96))
    with torch.no_grad():
        expected = model.test_step(copy.deepcopy(batch))
        got = deployed.test_step(copy.deepcopy(batch))
        model.merge = None
        second = model.test_step(copy.deepcopy(batch))
    for one, two, alone in zip(got, expected, second):
        assert len(two.pred_instances) > len(alone.pred_instances)
        assert same_detections(one.pred_instances, two.pred_instances)


def noise(got, expected):
    """Power of the difference over that of what is expected."""
    return (
        sum((one - two).double().square().sum() for one, two in zip(got, expected))
        / sum(two.double().square().sum() for two in expected)
    ).item()


@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
@pytest.mark.parametrize('name', MODELS_TO_TRY)
def test_the_simulation_is_what_the_int8_graph_computes(name, runtime, exported):
    """What remains are ties of rounding: sums in another order. Random weights make much of them,
    layer by layer. OpenVINO rounds less often, and is hardly further from float32."""
    graphs, model = exported(name), build(name)
    parts = find_parts(model)
    inputs = example_inputs(model, parts, (64, 96))
    for part in parts:
        given = inputs[part.name]
        simulation = Int8Simulation(
            part.run,
            part.modules,
            part.spared,
            reduced=True,
            float_share=0.1 if part.predicts else 0.0,
        )
        with torch.no_grad():
            exact, form = flatten(part.run(*given))
            simulation.active, simulation.ranges.observing = False, True
            watched, _ = flatten(simulation(*given))
            simulation.active, simulation.ranges.observing = True, False
            # By torch's own kernels: which ties there are would be a matter of oneDNN's.
            with torch.backends.mkldnn.flags(enabled=False):
                simulated, _ = flatten(simulation(*given))
        # With norms folded, and nothing rounded, nothing changes.
        assert noise(watched, exact) < 1e-9
        ranges, unknown = trained_ranges(
            graphs[part.name].content,
            simulation.plan(*given),
            {key: value.tolist() for key, value in simulation.ranges.values.items()},
        )
        content = quantize_graph(graphs[part.name].content, Recipe(ranges, unknown, True))
        got, _ = flatten(Graph(content, form, runtime=runtime)(*given))
        changed = noise(simulated, exact)
        assert changed > 1e-5
        assert noise(simulated, got) < (changed / 4 if runtime == 'onnxruntime' else changed)
        assert noise(got, exact) < 1.2 * changed


def test_nested_tensors_come_back_as_they_were():
    one, two = torch.zeros(1), torch.ones(2)
    nested = ([one, (two, None)], one)
    tensors, form = flatten(nested)
    # Each once, and as JSON holds it.
    assert len(tensors) == 2 and form == ['tuple', [['list', [0, ['tuple', [1, None]]]], 0]]
    assert unflatten(tensors, form) == nested
    with pytest.raises(UsageError, match='gives a dict'):
        flatten((one, dict(two=two)))


@pytest.mark.openvino
def test_no_object_is_proposed_or_many(exported):
    """The head on RoIs, of which an image may have none, and each has another number."""
    one = exported('faster_rcnn')['branch0.bbox_head0']
    graphs = [Graph(one.content, one.form, runtime=runtime) for runtime in RUNTIMES]
    for count in (0, 1, 300, 7, 17, 100, 101, 0):
        rois = torch.rand(count, *one.inputs[0].shape[1:])
        mine, its = (flatten(graph(rois))[0] for graph in graphs)
        assert [len(tensor) for tensor in its] == [count] * 2
        assert all(close(two, one) for one, two in zip(mine, its) if count)


@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_a_graph_serves_several_threads_and_keeps_what_it_gave(runtime, exported):
    one = exported('faster_rcnn')['first']
    graph = Graph(one.content, one.form, threads=1, runtime=runtime)
    images = [torch.rand(1, 3, 64, 32 * side) for side in (1, 2, 3, 4)]
    expected = [[tensor.clone() for tensor in flatten(graph(image))[0]] for image in images]

    def often(index):
        return [flatten(graph(images[index]))[0] for _ in range(10)]

    with ThreadPoolExecutor(len(images)) as pool:
        found = list(pool.map(often, range(len(images))))
    for own, wanted in zip(found, expected):
        assert all(torch.equal(got, want) for times in own for got, want in zip(times, wanted))


@pytest.mark.openvino
def test_of_many_sizes_the_last_are_kept(exported, monkeypatch):
    monkeypatch.setattr(OpenVino, 'KEPT', 2)
    one = exported('faster_rcnn')['first']
    graph, exact = (
        Graph(one.content, one.form, runtime=runtime) for runtime in ('openvino', 'onnxruntime')
    )
    for width in (32, 64, 96, 32, 32, 64):
        image = torch.rand(1, 3, 64, width)
        assert all(close(*both) for both in zip(flatten(graph(image))[0], flatten(exact(image))[0]))
    assert [sizes[0][-1] for sizes in graph._graph._requests] == [32, 64]


def test_a_runtime_that_is_not_there_is_one_line(exported, monkeypatch):
    content = exported('faster_rcnn')['first'].content
    with pytest.raises(
        UsageError, match="runtime must be one of onnxruntime, openvino, got 'tensorrt'"
    ):
        open_graph(content, 'tensorrt')
    with pytest.raises(UsageError, match='threads must not be negative, got -1'):
        open_graph(content, threads=-1)
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(UsageError, match="need 'openvino'.*requirements/openvino.txt"):
        open_graph(content, 'openvino')


def test_layers_without_an_operator_are_named_before_anything_runs(monkeypatch):
    model = build('dynamic yolox')
    for block in model.backbone.first.layer4:
        block.conv2 = ModulatedDeformConv2dPack(64, 64, 3, padding=1)
    monkeypatch.setattr(model, 'predict', None)
    with pytest.raises(UsageError) as caught:
        export_parts(model, (64, 96))
    said = str(caught.value)
    assert (
        'ModulatedDeformConv2dPack (backbone.first.layer4.0.conv2' in said
        and 'ONNX Runtime' in said
    )
    assert '\n' not in said


class Deformed(nn.Module):
    """Calls mmcv's operator as a function: no type of a layer tells."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8, 3, 3))

    def forward(self, x):
        return x + deform_conv2d(
            x, x.new_zeros(len(x), 18, *x.shape[2:]), self.weight, 1, 1, 1, 1, 1
        )


class Unknown(nn.Module):
    """torch's exporter knows no such operator either."""

    def forward(self, x):
        return torch.ops.aten.special_bessel_j0(x)


@pytest.mark.parametrize(
    'layer, said',
    [
        (Deformed, 'MMCVDeformConv2d (first: layer1/layer1.2)'),
        (Unknown, "the part 'first' cannot be exported"),
    ],
)
def test_operators_that_only_the_graph_shows_are_named(layer, said):
    model = build('retinanet')
    model.backbone.layer1.append(layer())
    with pytest.raises(UsageError) as caught:
        export_parts(model, (64, 96))
    assert said in str(caught.value) and '\n' not in str(caught.value)


def test_graphs_on_another_device(monkeypatch):
    """What a part is given may be elsewhere and of half the digits; RoIs are aligned where their
    maps are."""
    layer = RoIAlign(3, spatial_scale=0.5)
    maps, rois = torch.rand(2, 4, 8, 8), torch.tensor([[0, 1.0, 1, 9, 9], [1, 0, 0, 15, 7]])
    expected = layer(maps, rois)
    graph = Graph(_graph_of(layer, 0), ['tuple', [0]], 1)
    holder = torch.nn.ModuleList([layer])
    with far_device(monkeypatch) as far:
        (found,) = graph(maps.to(far), rois[:, 1:].double().to(far), rois[:, 0].long().to(far))
        assert found.device.type == far
        torch.testing.assert_close(found.cpu(), expected)
        place_roi_aligns(holder)
        with counted() as seen:
            found = layer(maps.to(far), rois.to(far))
        # There and not back: by mmcv's own.
        assert dict(seen) == {'to device': 2}
        torch.testing.assert_close(found.cpu(), expected)
    torch.testing.assert_close(layer(maps, rois), expected)


def test_providers_are_what_there_is(monkeypatch):
    content = _graph_of(RoIAlign(3), 0)
    import onnxruntime

    there = onnxruntime.get_available_providers()
    wanted = [one for one in ('CUDAExecutionProvider', 'CPUExecutionProvider') if one in there]
    graph = OnnxRuntime(content, 1)
    assert graph._session.get_providers() == wanted and wanted[-1] == 'CPUExecutionProvider'
    assert OnnxRuntime(content, 1, CPU)._session.get_providers() == list(CPU)
    for providers in (['NoSuchProvider'], []):
        with pytest.raises(UsageError, match='providers here are .*CPUExecutionProvider'):
            open_graph(content, providers=providers)
    with pytest.raises(UsageError, match='OpenVINO runs on the CPU'):
        RUNTIMES['openvino'](content, 1, CPU)
