"""What is measured of a detector: FLOPs as Detectron2's counters have them, records with plain
detectors beside them, overheads."""

import argparse
import json

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from test_package import tool
from test_training import CONFIG, OPTIONS

from conftest import ROOT, build, images, tensors_of, wake
from dynamicdet.errors import UsageError
from dynamicdet.progress import progress
from dynamicdet_detectron2 import DynamicDetector
from dynamicdet_detectron2.building import load_any, load_model, load_plain
from dynamicdet_detectron2.measuring import (
    at_exit,
    count_costs,
    count_gflops,
    make_record,
    measure_overheads,
    stock_of,
)
from dynamicdet_detectron2.reporting import publish, run_baselines

PLAIN = 'configs/detectron2/faster_rcnn_R_18_digits.yaml'
ON_GPU = 'configs/detectron2/dy_faster_rcnn_R_50_FPN_1x.yaml'
#: fvcore's names of what has weights.
_LAYERS = ('conv', 'linear', 'addmm', 'matmul', 'bmm')


@pytest.mark.parametrize('kind', ['faster', 'mask', 'retinanet', 'panoptic'])
def test_flops_are_those_of_fvcore(kind):
    model = build(kind).eval()
    wake(model)
    batch = images()[:1]
    for exit, gflops in enumerate(count_gflops(model, [batch])):
        with at_exit(model, exit):
            counter = FlopCountAnalysis(_Traceable(model), (batch[0]['image'],))
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counted = counter.by_operator()
        layers = 2 * sum(counted[name] for name in _LAYERS) / 1e9
        assert gflops == pytest.approx(layers, rel=0.01)


class _Traceable(torch.nn.Module):
    """Tensors in, tensors out, for fvcore."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        result = self.model([dict(image=image, height=128, width=192)])[0]
        # All of them: what nobody asks for is not traced.
        return tuple(tensors_of(result).values())


def test_costs_of_exits_rise():
    model = build('faster', REUSE_STAGES=0, FIRST_SCALE=0.5).eval()
    costs = count_costs(model, (64, 96))
    assert [cost.exit for cost in costs] == [0, 1] and costs[0].gflops < costs[1].gflops
    # The router is in each, and of exit 1 all there is.
    assert costs[1].parameters == sum(p.numel() for p in model.parameters())
    plain = count_costs(build('faster', dynamic=False).eval(), (64, 96))
    router = sum(p.numel() for p in model.router.parameters())
    assert len(plain) == 1 and plain[0].parameters == costs[0].parameters - router


def test_a_report_with_plain_detectors(trained, tmp_path):
    path = str(trained / 'router/model_final.pth')
    cfg, model = load_model(CONFIG, path, [*OPTIONS, 'OUTPUT_DIR', str(tmp_path)])
    args = argparse.Namespace(dataset='tiny_test', losses=False, checkpoint=path, config=CONFIG)
    record = make_record(cfg, model, args, tmp_path / 'record.npz', progress)
    plain = tmp_path / 'plain.yaml'
    plain.write_text(f'_BASE_: "{ROOT}/{PLAIN}"\n' + _yaml_of(OPTIONS))
    torch.save(dict(model=model.as_plain()), tmp_path / 'plain.pth')
    words = [str(plain), str(tmp_path / 'plain.pth')]
    baselines = run_baselines([words], record, 'tiny_test', tmp_path / 'record')
    assert baselines['plain'].ids.tolist() == record.ids.tolist()
    # A second time it is read.
    kept = list((tmp_path / 'record_baselines').iterdir())
    before = kept[0].stat().st_mtime_ns
    again = run_baselines([words], record, 'tiny_test', tmp_path / 'record')
    assert len(kept) == 1 and kept[0].stat().st_mtime_ns == before
    assert np.array_equal(
        again['plain'].detections[0].boxes, baselines['plain'].detections[0].boxes
    )
    publish(record, tmp_path / 'page', 3, baselines=baselines)
    analysis = json.loads((tmp_path / 'page/routing.json').read_text())
    point = analysis['baselines']['points'][0]
    assert point['name'] == 'plain' and point['gflops'] > analysis['ends'][0]['gflops']
    assert (tmp_path / 'page/trade_off.png').stat().st_size > 1000
    # Given as what they are not.
    with pytest.raises(UsageError, match='takes CONFIG CHECKPOINT'):
        run_baselines([words[:1]], record, 'tiny_test', tmp_path)
    with pytest.raises(UsageError, match='a baseline is plain'):
        load_plain(CONFIG, path)
    deeper = f'{ROOT}/configs/detectron2/faster_rcnn_R_50_digits.yaml'
    with pytest.raises(UsageError, match='of another detector than the config says'):
        load_plain(deeper, str(tmp_path / 'plain.pth'))


def _yaml_of(options):
    """Pairs of options, those that a plain detector has, as yaml."""
    import yaml

    nested: dict = {}
    for name, value in zip(options[::2], options[1::2]):
        if not name.startswith('SOLVER.ROUTER'):
            *parents, last = name.split('.')
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = yaml.safe_load(value.replace("('", "['").replace("',)", "']"))
    return yaml.safe_dump(nested)


def test_overheads():
    cfg, model = load_any(CONFIG, None, OPTIONS)
    wake(model)
    assert isinstance(model, DynamicDetector)
    seconds = measure_overheads(model, stock_of(cfg, model), (64, 64), 1, progress)
    names = {'stock', 'exit0', 'exit1', 'all easy', 'half hard', 'all hard'}
    assert seconds.keys() == names and min(seconds.values()) > 0
    # The stock detector finds what exit 0 does.
    stock, whole = stock_of(cfg, model), build('faster').eval()
    assert whole.first_scale == 1
    for name, value in stock.state_dict().items():
        assert torch.equal(value, model.as_plain()[name])


@pytest.mark.parametrize(
    'words, said',
    [
        (('get_flops', CONFIG, '--shape', 128, 128, '--hard-share', 2), 'shares from 0 to 1'),
        (
            ('benchmark', 'configs/detectron2/faster_rcnn_R_18_digits.yaml'),
            'a dynamic detector is wanted',
        ),
        (('analyze_routing', 'nothing.npz'), 'nothing.npz'),
        (('get_flops', ON_GPU), 'torch sees no GPU: add MODEL.DEVICE cpu'),
        (('train_net', '--config-file', ON_GPU), 'torch sees no GPU: add MODEL.DEVICE cpu'),
        (('record', CONFIG, 'nothing.pth'), "there is no checkpoint at 'nothing.pth'"),
    ],
)
def test_mistakes_are_one_line(words, said):
    if ON_GPU in words and torch.cuda.is_available():
        words, said = ('get_flops', 'nothing.yaml'), "there is no config at 'nothing.yaml'"
    code, _, error = tool(*words)
    assert code == 2 and said in error.strip().splitlines()[-1]


def test_the_table_of_costs():
    code, output, _ = tool('get_flops', CONFIG, '--shape', 128, 128)
    assert code == 0 and 'exit 1' in output and '50% hard' in output
