"""Exported detectors, in float32 and in 8 bits, find what torch finds: AP by the tool's path, and
by detection.

What torch is sure of is the ground truth: AP then tells how far an exported detector is from
torch's, however good that is.
"""

import json
import math
import runpy
import sys
from collections import Counter
from types import SimpleNamespace

import onnx
import pytest

from conftest import ROOT, call_tool, load_small, train
from dynamicdet import cli
from dynamicdet.building import build_loader, load_detector
from dynamicdet.deploy.deployment import deploy, graph_parts
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.files import latest_checkpoint
from dynamicdet.measuring.calibration import record_exits
from dynamicdet.testing import agreement
from mmdet.utils import register_all_modules

IMAGES = 2
#: Above it torch is sure.
SURE = 0.5
#: Thresholds that send every image to an exit.
FORCED = (1, -1)


def loader_of(cfg):
    with cli.silence():
        return build_loader(dict(cfg.test_dataloader, num_workers=0, persistent_workers=False))


def record(cfg, model):
    """All exits' detections of the images."""
    return record_exits(model, loader_of(cfg), lambda steps, what: steps)


def as_annotations(images, exit, source, path):
    """What an exit is sure of, as the annotations of its images."""
    sure = [
        (image['id'], one)
        for image in images
        for one in image['detections'][exit]
        if one['score'] > SURE
    ]
    assert len({image for image, _ in sure}) == IMAGES and len(sure) > IMAGES
    path.write_text(
        json.dumps(
            dict(
                source,
                images=[one for one in source['images'] if one['id'] <= IMAGES],
                annotations=[
                    dict(
                        id=number,
                        image_id=image,
                        bbox=one['bbox'],
                        category_id=one['category_id'],
                        iscrowd=0,
                        # As of a picture four times as wide: COCO's small, medium and large.
                        area=16 * one['bbox'][2] * one['bbox'][3],
                    )
                    for number, (image, one) in enumerate(sure, 1)
                ],
            )
        )
    )
    return path


@pytest.fixture(scope='module')
def exported(digits, cascade, tmp_path_factory):
    """A cascade that is sure of what it finds in two images; exported to the folders ``float32``
    and ``int8``, and to ``alone_float32``, ``alone_float16`` and ``alone_int8``."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('exported')
    options = {
        'test_dataloader.dataset.indices': IMAGES,
        'test_dataloader.dataset.data_prefix.img': 'train/',
        'test_dataloader.dataset.ann_file': 'annotations/instances_train.json',
        'test_evaluator.ann_file': f'{digits}/annotations/instances_train.json',
    }
    train(
        load_small(
            'dy_faster_rcnn_digits',
            digits,
            folder / 'work',
            **{
                'param_scheduler': [],
                'optim_wrapper.optimizer.lr': 3e-3,
                'train_dataloader.dataset.indices': IMAGES,
                'train_cfg.max_epochs': 40,
                'default_hooks.checkpoint.interval': 40,
                'load_from': latest_checkpoint(cascade),
            },
        )
    )
    cfg = load_small('dy_faster_rcnn_digits', digits, folder / 'work', val=True, **options)
    checkpoint = latest_checkpoint(folder / 'work')
    deploy(cfg, checkpoint, str(folder / 'float32'))
    # With weights of 7 bits, as processors without VNNI need: the same on all.
    deploy(cfg, checkpoint, str(folder / 'int8'), loader_of(cfg), images=IMAGES, reduced=True)
    for kind, options in (
        ('float32', None),
        ('float16', dict(half=True)),
        ('int8', dict(loader=loader_of(cfg), images=IMAGES, reduced=True)),
    ):
        graphed = options and graph_parts(cfg, checkpoint, **options)
        export_standalone(cfg, checkpoint, str(folder / f'alone_{kind}'), graphed=graphed)
    cfg.dump(folder / 'config.py')
    images = record(cfg, load_detector(cfg, checkpoint)[0])
    source = json.loads((digits / 'annotations/instances_train.json').read_text())
    truths = [as_annotations(images, exit, source, folder / f'exit{exit}.json') for exit in (0, 1)]
    return SimpleNamespace(cfg=cfg, folder=folder, images=images, truths=truths)


def ap_by_the_tool(exported, kind, exit, truth, monkeypatch, *options):
    """In percent, of tools/test_deployed.py: of all objects, and of small, medium and large ones,
    NaN where there are none."""
    options = ('--config', 'config.py', *options) if kind.startswith('alone') else options
    monkeypatch.chdir(exported.folder)
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'test_deployed.py',
            kind,
            f'--threshold={FORCED[exit]}',
            '--images',
            '0',
            *options,
            '--work-dir',
            'tested',
            '--out',
            'figures.json',
            '--cfg-options',
            f'test_dataloader.dataset.ann_file={truth}',
            f'test_evaluator.ann_file={truth}',
        ],
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / 'tools/test_deployed.py'), run_name='__main__')
    assert not ended.value.code
    metrics = json.loads((exported.folder / 'figures.json').read_text())['metrics']
    values = [metrics.get(f'coco/bbox_mAP{end}', 0.0) for end in ('', '_s', '_m', '_l')]
    return [100 * value if value >= 0 else math.nan for value in values]


@pytest.mark.parametrize('exit', [0, 1])
@pytest.mark.parametrize(
    'kind, least',
    [
        ('float32', 99),
        ('int8', 50),
        ('alone_float32', 99),
        ('alone_float16', 90),
        ('alone_int8', 50),
    ],
)
def test_the_ap_is_torchs(exported, kind, least, exit, monkeypatch, capsys):
    """100 is torch's own. In 8 bits it was 76 and 80 when this was written; what the other exit
    finds has 36 and 14."""
    ap, *by_size = ap_by_the_tool(exported, kind, exit, exported.truths[exit], monkeypatch)
    print(kind, exit, ap, by_size)
    assert ap >= least
    known = [value for value in by_size if not math.isnan(value)]
    # Of few objects one in 8 bits is much.
    assert len(known) > 1 and min(known) >= (least if least > 50 else 30)
    heads, values = capsys.readouterr().out.split('\nbbox')[1].splitlines()[:2]
    assert heads.split() == ['all', 'small', 'medium', 'large']
    assert values.split()[1] == f'{ap:.1f}'


def test_the_other_exit_would_be_noticed(exported, monkeypatch):
    for kind in ('float32', 'alone_float32'):
        assert ap_by_the_tool(exported, kind, 0, exported.truths[1], monkeypatch)[0] < 50


def test_8_bits_alone_are_those_of_the_folder(exported):
    """Layers that give predictions are float in both; decoding and NMS are, too."""
    about = json.loads((exported.folder / 'alone_int8' / 'detector.json').read_text())
    manifest = json.loads((exported.folder / 'int8' / 'manifest.json').read_text())
    assert about['precision'] == 'int8'
    assert {name: one['float_layers'] for name, one in about['quantization']['layers'].items()} == {
        name: one['float_layers'] for name, one in manifest['layers'].items()
    }
    for path in (exported.folder / 'alone_int8').glob('*.onnx'):
        graph = onnx.load(path).graph
        kinds = Counter(node.op_type for node in graph.node)
        assert kinds['QuantizeLinear'] > 10 and kinds['NonMaxSuppression'] == 2
        makers = {name: node.op_type for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type in ('TopK', 'NonMaxSuppression', 'RoiAlign'):
                assert makers[node.input[0]] != 'QuantizeLinear'
        whole = exported.folder / 'alone_float32' / path.name
        assert path.stat().st_size < 0.6 * whole.stat().st_size


def test_latencies_and_budgets_of_a_standalone_folder(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported.folder)
    for options, said in (
        ([], 'name a config by --config'),
        (['--config', 'config.py', '--runtime', 'openvino'], 'tested by onnxruntime'),
        (['--config', 'config.py', '--target-latency', '1', '--images', '1'], 'calibrated'),
    ):
        assert call_tool('test_deployed.py', 'alone_int8', *options, '--no-ap') == 2
        assert said in capsys.readouterr().err
    assert call_tool('test_deployed.py', 'int8', '--config', 'config.py') == 2
    assert 'other folders have theirs' in capsys.readouterr().err
    arguments = ('--config', 'config.py', '--images', 1, '--no-ap', '--out', 'timed.json')
    assert call_tool('test_deployed.py', 'alone_float32', *arguments) == 0
    first, second = json.loads((exported.folder / 'timed.json').read_text())['milliseconds']
    assert 0 < first < second


def test_float32_finds_the_same_detections(exported):
    images = record(exported.cfg, load_deployed(str(exported.folder / 'float32')))
    for exit in (0, 1):
        same = agreement(
            *([image['detections'][exit] for image in side] for side in (exported.images, images))
        )
        assert same.unmatched < 0.05 and same.box < 0.05 and same.score < 0.005
    assert [image['difficulty'] for image in images] == pytest.approx(
        [image['difficulty'] for image in exported.images], abs=1e-4
    )
