"""Deployed detectors whose tensors are not on the CPU, by a device that stands in for a GPU, and
what ONNX Runtime is bound to."""

import copy

import onnx
import pytest
import torch
from mmengine.config import Config
from standalone_cases import build, settings

from conftest import same_detections
from dynamicdet.deploy.deployment import deploy
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.graphs import Graph
from dynamicdet.deploy.runtimes import OnnxRuntime
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.testing import tiny_batch


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('placed')
    cfg = Config(dict(model=settings('dynamic faster_rcnn'), test_dataloader=None))
    torch.save(dict(state_dict=build(cfg.model).state_dict()), root / 'random.pth')
    deploy(cfg, str(root / 'random.pth'), str(root / 'folder'))
    return str(root / 'folder')


def detect(model, batch):
    with torch.no_grad():
        return model.test_step(copy.deepcopy(batch))


def test_a_folder_works_on_another_device(folder, far):
    """As a Runner moves it: difficulties, thresholds and RoIs are there, too."""
    batch = tiny_batch((1, 2), (64, 96), masks=False)
    near, distant = load_deployed(folder), load_deployed(folder).to(far)
    for exit in (0, 1):
        found = []
        for model in (near, distant):
            force_dynamic_exit(model, exit)
            found.append(detect(model, batch))
        for one, other in zip(*found):
            assert other.pred_instances.bboxes.device.type == far
            assert one.exit == other.exit == exit
            assert one.difficulty == pytest.approx(other.difficulty, abs=1e-5)
            assert len(one.pred_instances)
            assert same_detections(other.pred_instances.cpu(), one.pred_instances)


class Bound(OnnxRuntime):
    """Takes tensors of the CPU, too, and counts."""

    runs = 0

    def takes(self, device):
        return True

    def run_there(self, feed):
        self.runs += 1
        return super().run_there(feed)

    def run(self, feed):
        raise AssertionError('arrays were copied')


def test_bound_tensors_give_what_arrays_give(folder, monkeypatch):
    images = torch.rand(2, 3, 64, 96)
    content = open(f'{folder}/first.onnx', 'rb').read()
    graph = Graph(content, ['tuple', [0, 1]], threads=1)
    wanted = graph(images)
    monkeypatch.setattr(graph, '_graph', Bound(content, 1))
    # As a view that is not whole, and of another type.
    wide = torch.cat([images, images], dim=3)[..., :96]
    for given in (images, wide, images.double()):
        found = graph(given)
        assert len(found) == 2 and all(map(torch.equal, found, wanted))
        # They are ONNX Runtime's own memory, which lives as long as they do.
        found[0].add_(1)
    assert graph._graph.runs == 3


def test_no_rois_can_be_bound():
    make = onnx.helper
    info = make.make_tensor_value_info
    graph = make.make_graph(
        [make.make_node('Relu', ['in0'], ['out0'])],
        'relu',
        [info('in0', onnx.TensorProto.FLOAT, [None, 3])],
        [info('out0', onnx.TensorProto.FLOAT, [None, 3])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid('', 17)], ir_version=8)
    bound = OnnxRuntime(model.SerializeToString(), 1)
    (none,) = bound.run_there(dict(in0=torch.zeros(0, 3)))
    (some,) = bound.run_there(dict(in0=torch.tensor([[-1.0, 2.0, 3.0]])))
    assert none.shape == (0, 3) and some.tolist() == [[0, 2, 3]]
