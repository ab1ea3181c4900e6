"""From a checkpoint to a page, by the two command lines of docs/routing.md; on a two-stage and a
one-stage detector."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, call_tool, recordable_options, write_random
from dynamicdet.routing.record import RoutingRecord, read_record, write_record
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

CONFIGS = ['dy_faster_rcnn_digits_router', 'dy_yolox_nano_digits_router']


@pytest.fixture(scope='module', params=CONFIGS)
def recorded(request, digits, tmp_path_factory):
    """Path of a record of the test data, by the tool."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('routing with spaces')
    options = recordable_options(request.param, digits)
    cfg = Config.fromfile(ROOT / f'configs/{request.param}.py')
    cfg.merge_from_dict(options)
    write_random(cfg, folder / 'random.pth')
    assert (
        call_tool(
            'record.py',
            ROOT / f'configs/{request.param}.py',
            folder / 'random.pth',
            '--out',
            folder / 'test.npz',
            '--device',
            'cpu',
            '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
        )
        == 0
    )
    return folder / 'test.npz'


def test_from_a_checkpoint_to_a_page(recorded, capsys):
    record = read_record(recorded)
    assert len(record) == 6 and record.provenance['checkpoint'].endswith('random.pth')
    assert set(record[0]) == {
        'id',
        'file',
        'difficulty',
        'detections',
        'features',
        'entropy',
        'gflops',
        'latencies',
        'frame',
        'view',
        'losses',
        'objects',
    }
    capsys.readouterr()
    val = dataclasses.replace(
        record,
        files=[f'val/{file}' for file in record.files],
        provenance=dict(record.provenance, checkpoint='other.pth', exits_digest='other'),
    )
    write_record(val, recorded.with_name('val.npz'))
    assert (
        call_tool(
            'analyze_routing.py',
            recorded,
            '--val-record',
            recorded.with_name('val.npz'),
            '--bootstrap',
            5,
        )
        == 0
    )
    said = capsys.readouterr()
    assert re.search(
        r"^warning: a record is of 'other\.pth', whose exits have other weights than those of "
        r"'.*random\.pth'$",
        said.err,
        re.MULTILINE,
    )
    page = recorded.with_suffix('') / 'routing.html'
    assert f'The same with pictures: {page}' in said.out and 'Diagnosis' in said.out
    assert 'the curve and random routing ...' in said.err
    analysis = json.loads((page.parent / 'routing.json').read_text())
    assert analysis['images'] == 6 and len(analysis['calibrated']) == 11
    assert page.stat().st_size < 3e6


def test_plain_detectors_beside_a_router(recorded, tmp_path, capsys):
    """At two sizes; the second time their records are there."""
    name = 'yolox_nano_digits' if 'yolox' in str(read_record(recorded).provenance) else None
    config = ROOT / f'configs/{name or "faster_rcnn_digits"}.py'
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'plain.pth')
    arguments = [recorded, '--bootstrap', 5, '--by-class', '--out-dir', tmp_path]
    arguments += ['--baseline', config, tmp_path / 'plain.pth', 64, 96]
    for _ in range(2):
        assert call_tool('analyze_routing.py', *arguments) == 0
        said = capsys.readouterr()
        assert 'Plain detectors on the same images' in said.out
    assert 'plain detector:' not in said.err
    kept = list((recorded.parent / 'test_baselines').glob(f'{config.stem}-*.npz'))
    assert len(kept) == 2
    found = json.loads((tmp_path / 'routing.json').read_text())['baselines']
    assert [point['name'] for point in found['points']] == [f'{config.stem} {n}' for n in (64, 96)]
    assert found['points'][0]['gflops'] < found['points'][1]['gflops']
    assert len(found['leads']) == 11
    assert call_tool('analyze_routing.py', recorded, '--baseline', config) == 2
    assert '--baseline takes CONFIG CHECKPOINT' in capsys.readouterr().err


@pytest.fixture(scope='module')
def record(digits, tmp_path_factory):
    """Path of a small record made by hand: exit 1 finds what is there."""
    annotations = digits / 'annotations' / 'instances_test.json'
    content = json.loads(annotations.read_text())
    generator = np.random.default_rng(0)
    images = []
    for index, entry in enumerate(content['images']):
        found = [
            dict(bbox=one['bbox'], score=0.8, category_id=one['category_id'])
            for one in content['annotations']
            if one['image_id'] == entry['id']
        ]
        images.append(
            dict(
                id=entry['id'],
                file=entry['file_name'],
                difficulty=float(generator.uniform()),
                detections=[found[:1], found, found[1:]],
            )
        )
    path = tmp_path_factory.mktemp('record') / 'three.npz'
    write_record(
        RoutingRecord.from_images(
            images,
            gflops=[1, 2, 3],
            latencies=[0.1, 0.2, 0.3],
            provenance=dict(ann_file=str(annotations)),
        ),
        path,
    )
    return path


def test_two_of_three_exits(record, tmp_path):
    assert (
        call_tool(
            'analyze_routing.py',
            record,
            '--exits',
            0,
            1,
            '--bootstrap',
            0,
            '--out-dir',
            tmp_path / 'a',
        )
        == 0
    )
    found = json.loads((tmp_path / 'a/routing.json').read_text())
    assert [end['exit'] for end in found['ends']] == [0, 1] and found['ends'][1][
        'ap'
    ] == pytest.approx(100)
    assert [end['gflops'] for end in found['ends']] == [1, 2]


def test_annotations_that_were_moved(record, digits, tmp_path, capsys):
    moved = read_record(record)
    moved.provenance['ann_file'] = '/nowhere/test.json'
    write_record(moved, tmp_path / 'moved.npz')
    assert call_tool('analyze_routing.py', tmp_path / 'moved.npz') == 2
    assert "error: there is no annotation file '/nowhere/test.json': name it by --ann-file" in (
        capsys.readouterr().err
    )
    shutil.copy(digits / 'annotations/instances_test.json', tmp_path / 'here.json')
    assert (
        call_tool(
            'analyze_routing.py',
            tmp_path / 'moved.npz',
            '--ann-file',
            tmp_path / 'here.json',
            '--bootstrap',
            0,
        )
        == 0
    )


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['{folder}/none.npz'], "there is no record '{folder}/none.npz'"),
        (['{folder}/broken.npz'], "'{folder}/broken.npz' is no record, or was cut short"),
        (['{record}', '--exits', '0', '3'], 'two different exits are wanted, 0 to 2; got 0 and 3'),
        (
            ['{record}', '--ann-file', '{folder}/broken.npz'],
            'download or make it again; or name another by --ann-file',
        ),
        (
            ['{record}', '--val-record', '{record}', '--val-ann-file', '{folder}/none'],
            'name it by --val-ann-file',
        ),
        (['{record}', '--bootstrap', '-1'], '--bootstrap must be 0 or more'),
        (
            ['{record}', '--out-dir', '{folder}/broken.npz/out'],
            "the folder '{folder}/broken.npz/out' cannot be made",
        ),
    ],
)
def test_mistakes_are_one_line(record, tmp_path, capsys, arguments, said):
    (tmp_path / 'broken.npz').write_bytes(record.read_bytes()[:300])
    names = dict(folder=tmp_path, record=record)
    assert call_tool('analyze_routing.py', *(one.format(**names) for one in arguments)) == 2
    error = capsys.readouterr().err
    assert said.format(**names) in error and 'Traceback' not in error
    assert len([line for line in error.split('\n') if line.startswith('error: ')]) == 1


def test_what_record_refuses(tmp_path, capsys):
    arguments = [
        ROOT / f'configs/{CONFIGS[0]}.py',
        tmp_path / 'none.pth',
        '--device',
        'cpu',
        '--out',
    ]
    assert call_tool('record.py', *arguments, tmp_path) == 2
    assert 'is a folder, not a file to write' in capsys.readouterr().err
    assert call_tool('record.py', *arguments, tmp_path / 'a.npz') == 2
    assert 'none.pth' in capsys.readouterr().err
