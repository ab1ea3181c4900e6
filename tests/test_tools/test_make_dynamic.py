"""From a plain detector, its weights and a folder of pictures to a dynamic detector."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from conftest import ROOT, run_tool
from dynamicdet.building import load_dynamic_detector
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.datasets.digits import make_digits
from dynamicdet.measuring.record_parts import RecordParts
from dynamicdet.routing.record import read_record, write_record
from dynamicdet.testing import randomize, tiny_detector
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

CLASSES = tuple('0123456789')


def write_plain(folder, name, seed):
    """A shrunk detector for the built-in digits, its config and checkpoint."""
    detector = tiny_detector(name)
    detector.bbox_head.num_classes = 10
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
        ),
    ]
    dataset = dict(type='CocoDataset', metainfo=dict(classes=CLASSES), pipeline=pipeline)
    Config(dict(model=detector, test_dataloader=dict(dataset=dataset), default_scope='mmdet')).dump(
        folder / f'{name}.py'
    )
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = randomize(MODELS.build(detector), seed)
    write_checkpoint(dict(state_dict=model.state_dict()), str(folder / f'{name}.pth'))
    return [folder / f'{name}.py', folder / f'{name}.pth']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The built-in data, with as many pictures for validation as routers need."""
    root = tmp_path_factory.mktemp('data') / 'digits'
    return make_digits(root, dict(train=9, val=9, test=3), image_size=64)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('plain')
    return write_plain(folder, 'fcos', 0), write_plain(folder, 'retinanet', 1)


def make(names, digits, out, *options):
    done = run_tool(
        'make_dynamic.py',
        *names,
        '--data',
        digits,
        '--out',
        out,
        '--view',
        'none',
        '--workers',
        '0',
        '--device',
        'cpu',
        *options,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope='module')
def made(plain, digits, tmp_path_factory):
    """One detector at two sizes, and what the run said."""
    out = tmp_path_factory.mktemp('made') / 'dynamic.pth'
    status, said = make(plain[0], digits, out, '--exits', 32, 64)
    assert status == 0, said[-3000:]
    return out, said


def test_what_is_written_is_for_every_tool(made, digits):
    out, said = made
    assert '9 pictures in' in said and 'report.html' in said
    assert sorted(path.name for path in out.parent.iterdir()) == [
        'dynamic',
        'dynamic.pth',
        'dynamic.py',
    ]
    checkpoint = read_checkpoint(str(out))
    assert checkpoint['meta']['dataset_meta']['classes'] == CLASSES
    facts = checkpoint['meta']['router']
    assert facts['truth'] == 'annotations' and facts['method'] == 'linear'
    assert facts['objective']['gain'] == 'ap' and facts['objective']['by_class'] is True
    record = read_record(out.parent / 'dynamic' / 'record.npz')
    assert len(record) == 9 and record.losses is None and (record.objects > 0).any()
    state = checkpoint['state_dict']
    assert len(state['difficulties']) == 9 and state['latencies'].isfinite().all()
    assert state['gflops'].tolist() == pytest.approx(record.gflops)
    assert 0 < state['gflops'][0] < state['gflops'][1]
    config = out.with_suffix('.py')
    cfg = Config.fromfile(config)
    assert cfg.model.backbones == 1 and tuple(cfg.model.scales) == (0.5, 1)
    assert cfg.model.router.sees == 'detections' and 'regions' not in cfg.model
    # The kept router is linear: two hidden channels, which are each other's negative.
    layer = state['router.fc1.weight']
    assert (layer[0] == -layer[1]).all() and not layer[2:].any()
    # The test split of the folder is for the final figures.
    assert cfg.test_dataloader.dataset.ann_file.endswith('dynamic/test.json')
    assert cfg.test_dataloader.dataset.data_prefix.img == str((digits / 'test').absolute())
    done = run_tool(
        'test.py', config, out, '--hard-share', '0.5', '--work-dir', out.parent / 'dynamic' / 'test'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'coco/bbox_mAP' in done.stdout + done.stderr and 'hard: 50.0% wanted' in done.stdout


def test_a_second_run_takes_the_record_that_is_there(made, plain, digits):
    out, _ = made
    record = out.parent / 'dynamic' / 'record.npz'
    before = record.read_bytes()
    out.unlink()
    status, said = make(plain[0], digits, out, '--exits', 32, 64)
    assert status == 0 and 'not recorded again' in said and out.is_file()
    assert record.read_bytes() == before
    # A damaged one, or one of other weights, is not taken; the parts of a run that was stopped are.
    whole = read_record(record)
    parts = RecordParts(record.with_suffix(f'.{whole.provenance["fingerprint"]}.parts'))
    first = dataclasses.replace(whole.take(range(4)), image_gflops=None, image_latencies=None)
    write_record(first, parts.folder / '000000.npz')
    stale = record.with_suffix('.0123.parts')
    stale.mkdir()
    record.write_bytes(before[: len(before) // 2])
    status, said = make(plain[0], digits, out, '--exits', 32, 64)
    assert status == 0 and 'not recorded again' not in said
    assert '4 pictures are recorded: going on with the others' in said
    assert not stale.exists() and not parts.folder.exists()
    again = read_record(record)
    assert again.features.tolist() == whole.features.tolist()
    assert again.detections[1].scores.tolist() == whole.detections[1].scores.tolist()
    assert read_record(record).gflops == pytest.approx(
        read_checkpoint(str(out))['state_dict']['gflops'].tolist()
    )


def test_a_pair_and_pictures_without_annotations(plain, digits, tmp_path):
    shutil.copytree(digits / 'train', tmp_path / 'pictures')
    status, said = make(
        [*plain[0], *plain[1]],
        tmp_path / 'pictures',
        tmp_path / 'pair.pth',
        '--exits',
        32,
        64,
        '--score',
        0.2,
    )
    assert status == 0, said[-3000:]
    assert 'without annotations: what the last exit detects with a score of 0.2' in said
    truth = json.loads((tmp_path / 'pair' / 'val.json').read_text())
    record = read_record(tmp_path / 'pair' / 'record.npz')
    assert len(truth['annotations']) == np.count_nonzero(record.detections[1].scores >= 0.2) > 0
    cfg = Config.fromfile(tmp_path / 'pair.py')
    assert [one.type for one in cfg.model.detector] == ['FCOS', 'RetinaNet']
    checkpoint = read_checkpoint(str(tmp_path / 'pair.pth'))
    assert checkpoint['meta']['router']['truth'] == 'detections of score 0.2 or more'
    # The plain checkpoints by one name are as good for a record.
    names = f'exits://{plain[0][1]},{plain[1][1]}'
    done = run_tool(
        'record.py', tmp_path / 'pair.py', names, '--view', 'none', '--out', tmp_path / 'again.npz'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again = read_record(tmp_path / 'again.npz')
    assert again.detections[1].scores.tolist() == record.detections[1].scores.tolist()
    assert again.losses is None and 'cannot be compared' in done.stderr


@pytest.mark.parametrize('annotated', [True, False])
def test_regions_are_calibrated_and_no_router_is_fitted(plain, digits, tmp_path, annotated):
    data = digits if annotated else digits / 'val'
    status, said = make(
        plain[0],
        data,
        tmp_path / 'regions.pth',
        *('--exits', 32, 64, '--regions', '--merge', 'nms', '--score', 0.2),
    )
    assert status == 0 and 'router fitted' not in said, said[-3000:]
    checkpoint = read_checkpoint(str(tmp_path / 'regions.pth'))
    truth = 'annotations' if annotated else 'detections of score 0.2 or more'
    assert checkpoint['meta']['regions']['truth'] == truth
    assert checkpoint['meta']['calibration']['hard_share'] == 0.5
    cfg = Config.fromfile(tmp_path / 'regions.py')
    model, _ = load_dynamic_detector(cfg, str(tmp_path / 'regions.pth'), 'cpu')
    assert model.merge.type == 'nms' and len(model.regions.curve)
    assert (model.regions.class_weights != 1).any()
    assert model.set_budget(hard_share=0.1) >= model.set_budget(hard_share=0.9)


@pytest.mark.parametrize(
    'options, said',
    [
        (['--exits', 32, 48, 64, '--regions'], '--regions takes two exits; got 3'),
        (['--exits', 32, 64, '--regions', '--gain', 'reward'], '--regions fits no router'),
        (['--exits', 32, 64, '--method', 'rule', '--sees', 'maps'], "of exit 0's detections"),
        (['--exits', 32, 64, '--gain', 'reward', '--by-class'], 'leave by_class away'),
        (['--exits', 64], 'two or more, rising'),
        (['--exits', 64, 32], 'two or more, rising'),
        (['--exits', 32, 64, '--ann', 'gone.json'], 'gone.json'),
        (['--exits', 32, 64, '--img', 'few'], 'needs at least 9 pictures'),
        (['--exits', 32, 64, '--hard-share', 2], 'hard_share'),
    ],
)
def test_what_cannot_be_is_one_line(plain, digits, tmp_path, options, said):
    (tmp_path / 'few').mkdir()
    for number in range(4):
        (tmp_path / f'few/{number}.png').write_bytes(
            (ROOT / 'docs/images/trade_off.png').read_bytes()
        )
    options = [tmp_path / 'few' if option == 'few' else option for option in options]
    status, line = make(plain[0], digits, tmp_path / 'x.pth', *options)
    assert status == 2 and said in line and 'Traceback' not in line
    assert not (tmp_path / 'x.pth').exists()


def test_other_classes_and_dynamic_configs_are_refused(made, plain, digits, tmp_path):
    content = json.loads((digits / 'annotations' / 'instances_val.json').read_text())
    for number, category in enumerate(content['categories']):
        category['name'] = f'thing {number}'
    (tmp_path / 'other.json').write_text(json.dumps(content))
    status, line = make(
        plain[0], digits, tmp_path / 'x.pth', '--exits', 32, 64, '--ann', tmp_path / 'other.json'
    )
    assert status == 2 and 'the detector knows none of them' in line
    config = made[0].with_suffix('.py')
    status, line = make([config, made[0]], digits, tmp_path / 'x.pth', '--exits', 32, 64)
    assert status == 2 and 'give the config of a plain detector' in line


@pytest.mark.parametrize(
    'tool, options',
    [
        ('record.py', ['--view', 'none', '--out', 'record.npz']),
        ('test.py', ['--threshold', '-1']),
        ('image_demo.py', ['--threshold', '1', '--no-save-vis']),
        ('export.py', ['--dry-run', '--out', 'exported']),
        ('benchmark.py', ['--size', '64', '64', '--rounds', '1', '--batch-rounds', '1']),
        ('report.py', ['--view', 'none']),
    ],
)
def test_tools_take_the_plain_checkpoint_of_one_backbone(
    made, plain, digits, tmp_path, tool, options
):
    config, weights = made[0].with_suffix('.py'), plain[0][1]
    names = [config, '--checkpoint', weights] if tool == 'benchmark.py' else [config, weights]
    pictures = [digits / 'val'] if tool == 'image_demo.py' else []
    done = run_tool(tool, *pictures, *names, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_calibrating_plain_weights_asks_for_a_router(made, plain, tmp_path):
    done = run_tool(
        'calibrate.py', made[0].with_suffix('.py'), plain[0][1], '--out', tmp_path / 'x.pth'
    )
    assert done.returncode == 2 and 'fit it by tools/record.py' in done.stderr
