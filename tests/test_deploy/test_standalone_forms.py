"""Standalone graphs in float16, as one file, in OpenVINO and for TensorRT, and on how many pictures
they are torch's; 8 bits are in test_exported_ap.py."""

import os

import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from scipy.optimize import linear_sum_assignment
from standalone_cases import (
    DYNAMIC,
    PIPELINE,
    PLAIN,
    SIZES,
    by_torch,
    delivered,
    differences,
    require_same,
    settings,
    written,
)

from dynamicdet.datasets.digits import make_digits
from dynamicdet.deploy import standalone_runtime
from dynamicdet.deploy.deployment import deploy, graph_parts
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.deploy.tensorrt import refused_by_tensorrt
from dynamicdet.measuring.latencies import force_dynamic_exit

#: How many pictures of the built-in data are looked at. With PICTURES=100 in the environment, so
#: are all kinds of detectors, in some minutes.
PICTURES = int(os.environ.get('PICTURES', 4))
KINDS = (*PLAIN, *DYNAMIC) if 'PICTURES' in os.environ else ('dynamic yolox', 'dy_dino_r50')


def config(name):
    dataset = dict(type='x', pipeline=PIPELINE)
    return Config(dict(model=settings(name), test_dataloader=dict(dataset=dataset)))


def one_file(name, folder, **options):
    """The same detector in another form."""
    checkpoint = str(folder.with_suffix('.pth'))
    out = folder.with_name(f'{folder.name}_{"_".join(options)}')
    export_standalone(config(name), checkpoint, str(out), **options)
    return standalone_runtime.Detector(out, threads=1), out


def test_one_file_is_both_halves():
    name = 'dynamic yolox'
    model, halves, folder = written(name)
    joined, out = one_file(name, folder, one_file=True)
    assert {path.name for path in out.iterdir()} == {'detector.onnx', 'detector.json', 'runtime.py'}
    graph = onnx.load(out / 'detector.onnx').graph
    assert [node.op_type for node in graph.node].count('If') == 1
    for size in SIZES[::2]:
        batch, given = delivered(model, size)
        for exit, threshold in enumerate((1.0, -1.0)):
            force_dynamic_exit(model, exit)
            found = joined.run(*given, threshold)
            assert found.exit == exit
            assert found.difficulty == pytest.approx(halves.run(*given, 1.0).difficulty, abs=1e-6)
            require_same(found, by_torch(model, batch), given[1])
    # TensorRT wants two files.
    said = refused_by_tensorrt((out / 'detector.onnx').read_bytes())
    assert len(said) == 1 and 'If' in said[0]
    with pytest.raises(ValueError, match='hard share is in'):
        joined.threshold_for(hard_share=2)


def test_float16_is_half_as_large_and_near():
    name = 'dynamic yolox'
    model, whole, folder = written(name)
    graphed = graph_parts(config(name), str(folder.with_suffix('.pth')), half=True)
    half, out = one_file(name, folder, graphed=graphed)
    assert half.about['precision'] == 'float16' and whole.about['precision'] == 'float32'
    for path in folder.glob('*.onnx'):
        content = (out / path.name).read_bytes()
        assert len(content) < 0.7 * path.stat().st_size
        graph = onnx.load_from_string(content).graph
        weights = [one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT16]
        assert weights
        # Decoding and NMS are float32.
        made = {name: node.op_type for node in graph.node for name in node.output}
        suppressed = [node for node in graph.node if node.op_type == 'NonMaxSuppression']
        assert suppressed and all(made[node.input[0]] != 'Cast' for node in suppressed)
        assert [entry.type.tensor_type.elem_type for entry in graph.output[:2]] == [1, 1]
    _, given = delivered(model, SIZES[2])
    for threshold in (1.0, -1.0):
        found, wanted = (one.run(*given, threshold) for one in (half, whole))
        assert found.exit == wanted.exit
        assert found.difficulty == pytest.approx(wanted.difficulty, abs=0.01)
        near = np.abs(found.boxes[:, None] - wanted.boxes).max(-1) < 3
        near &= np.abs(found.scores[:, None] - wanted.scores) < 0.02
        assert near.any(1).mean() > 0.8


def test_a_transformers_backbone_and_neck_are_graphs_of_a_folder(tmp_path):
    name = 'dy_dino_r50'
    model, _, folder = written(name)
    about = deploy(config(name), str(folder.with_suffix('.pth')), str(tmp_path / 'out'))
    deployed = load_deployed(str(tmp_path / 'out'))
    names = {path.name for path in (tmp_path / 'out').glob('*.onnx')}
    assert names == {'first.onnx', 'second.onnx', 'branch0.onnx'} and not about['int8']
    batch, given = delivered(model, SIZES[2])
    for exit in (0, 1):
        samples = []
        for one in (model, deployed):
            force_dynamic_exit(one, exit)
            samples.append(by_torch(one, batch))
        found, wanted = (sample.pred_instances.numpy() for sample in samples)
        box = np.abs(found.bboxes[:, None] - wanted.bboxes).max(-1)
        apart = (box > 3e-3) | (np.abs(found.scores[:, None] - wanted.scores) > 1e-4)
        assert not apart[linear_sum_assignment(apart)].any()


@pytest.mark.openvino
@pytest.mark.parametrize('name', ['dynamic yolox', 'faster_rcnn'])
def test_openvino_runs_the_same_graphs(name):
    import openvino

    model, _, folder = written(name)
    core, (batch, given) = openvino.Core(), delivered(model, SIZES[2])
    values = dict(image=given[0][None], scale=np.float32(given[1]), original=np.float32(given[2]))
    for exit, path in enumerate(sorted(folder.glob('*.onnx'))):
        graph = core.read_model(path)
        graph.reshape({one.any_name: values[one.any_name].shape for one in graph.inputs})
        compiled = core.compile_model(graph, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        outputs = compiled({one.any_name: values[one.any_name] for one in graph.inputs})
        # A tensor may have several names.
        for one in compiled.outputs:
            values.update(dict.fromkeys(one.names, outputs[one]))
        if hasattr(model, 'num_exits'):
            force_dynamic_exit(model, exit)
        found = standalone_runtime.Detections(
            *(values[name] for name in ('boxes', 'scores', 'labels')), None, None, exit
        )
        require_same(found, by_torch(model, batch), given[1])


def node(kind, inputs, output, **attributes):
    return onnx.helper.make_node(kind, inputs, output.split(), kind, **attributes)


def graph_of(nodes, inputs, output, kind, weights=(), opset=17):
    make = onnx.helper
    graph = make.make_graph(
        nodes,
        'graph',
        [make.make_tensor_value_info(name, kind, [4, 5]) for name in inputs],
        [make.make_empty_tensor_value_info(output)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid('', opset)])
    return model.SerializeToString()


FLOAT, INT64, DOUBLE, UINT8 = (
    getattr(onnx.TensorProto, name) for name in ('FLOAT', 'INT64', 'DOUBLE', 'UINT8')
)
SCALE = ('s', np.float32(0.1))
REFUSED = (
    ([node('Relu', ['x'], 'y')], FLOAT, (), None),
    ([node('Relu', ['x'], 'y')], DOUBLE, (), 'float64'),
    ([node('Add', ['x', 'x'], 'y')], INT64, (), 'arithmetic on int64'),
    ([node('Shape', ['x'], 's'), node('Add', ['s', 's'], 'y')], FLOAT, (), None),
    ([node('Transpose', ['x'], 'y')], UINT8, (), 'reads uint8'),
    ([node('Cast', ['x'], 'y', to=FLOAT)], UINT8, (), None),
    ([node('Unique', ['x'], 'y')], FLOAT, (), 'no operator'),
    (
        [node('QuantizeLinear', ['x', 's', 'z'], 'y')],
        FLOAT,
        (SCALE, ('z', np.uint8(3))),
        'zero point',
    ),
    ([node('QuantizeLinear', ['x', 's', 'z'], 'y')], FLOAT, (SCALE, ('z', np.int8(0))), None),
    ([node('TopK', ['x', 'k'], 'y at')], FLOAT, (('k', np.array([4000])),), 'takes 4000'),
    ([node('TopK', ['x', 'k'], 'y at')], FLOAT, (('k', np.array([4])),), None),
)


@pytest.mark.parametrize('nodes, kind, weights, said', REFUSED)
def test_what_tensorrt_refuses_is_named(nodes, kind, weights, said):
    found = refused_by_tensorrt(graph_of(nodes, ['x'], 'y', kind, weights))
    assert (len(found), said in found[0]) == (1, True) if said else found == []


def test_an_opset_that_tensorrt_does_not_know_is_named():
    content = graph_of([node('Relu', ['x'], 'y')], ['x'], 'y', FLOAT, opset=23)
    assert refused_by_tensorrt(content) == ['opset 23']


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Of the built-in data, with the noise of a camera: in plain background many scores would be
    equal but for rounding. (3, 96, 96) each."""
    counts = dict(train=PICTURES, val=1, test=1)
    root = make_digits(tmp_path_factory.mktemp('pictures') / 'digits', counts, image_size=96)
    rng, arrays = np.random.default_rng(0), []
    for path in sorted((root / 'train').iterdir()):
        image = standalone_runtime.read_image(path).transpose(2, 0, 1).astype(int)
        noise = rng.integers(-40, 41, image.shape)
        arrays.append((image + noise).clip(0, 255).astype(np.uint8))
    assert len(arrays) == PICTURES
    return arrays


@pytest.mark.parametrize('name', KINDS)
def test_pictures_are_alike_at_every_threshold(name, pictures):
    """Boxes within 0.001 pixels, scores within 0.0001; of a hundred detections one may be on one
    side alone, since scores and overlaps may be as near to their limits as rounding reaches."""
    model, detector, _ = written(name)
    dynamic, alone, count, scores = hasattr(model, 'num_exits'), 0, 0, []
    for start in range(0, PICTURES, 10):
        arrays = pictures[start : start + 10]
        batch, _ = delivered(model, (96, 96))
        batch['data_samples'][0].set_metainfo(dict(img_shape=(96, 96)))
        samples = [batch['data_samples'][0].clone() for _ in arrays]
        batch = dict(inputs=list(map(torch.from_numpy, arrays)), data_samples=samples)
        for exit in range(1 + dynamic):
            if dynamic:
                force_dynamic_exit(model, exit)
            threshold = (1.0, -1.0)[exit] if dynamic else None
            with torch.no_grad():
                wanted = model.test_step(dict(batch, data_samples=[one.clone() for one in samples]))
            for picture, sample in zip(arrays, wanted):
                given = picture, sample.scale_factor, sample.ori_shape
                found = detector.run(*given, threshold)
                apart = differences(found, sample.pred_instances.numpy(), sample.scale_factor)
                alone += sum(apart.shape) - 2 * (~apart[linear_sum_assignment(apart)]).sum()
                count += sum(apart.shape)
                if dynamic and not exit:
                    scores.append((found.difficulty, sample.difficulty))
    assert count > 5 * PICTURES and alone <= 1e-2 * count
    if dynamic:
        mine, torchs = map(np.array, zip(*scores))
        assert np.abs(mine - torchs).max() < 1e-5
        # Thresholds that part pictures, but for those that rounding does not tell apart.
        known = np.sort(torchs)
        for threshold in (known[1:] + known[:-1])[np.diff(known) > 1e-4] / 2:
            assert ((mine > threshold) == (torchs > threshold)).all()
