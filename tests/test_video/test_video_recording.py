"""A tiny detector on tiny real videos: what is simulated from its record is what it does."""

import json
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

import dynamicdet.datasets.samplers  # noqa: F401  (these register)
import dynamicdet.datasets.video  # noqa: F401
import dynamicdet.video.all_exits  # noqa: F401
import dynamicdet.video.exit_curve_hook  # noqa: F401
from conftest import ROOT, call_tool, no_progress, same_detections
from dynamicdet.errors import UsageError
from dynamicdet.measuring.calibration import coco_results
from dynamicdet.measuring.recording import build_record_loader
from dynamicdet.routing.budget import Budget
from dynamicdet.testing import randomize
from dynamicdet.video.curves import settings_of
from dynamicdet.video.digits_video import make_digits_video
from dynamicdet.video.gate_simulation import evidence_by_exit, gate_difficulties, simulate_gate
from dynamicdet.video.record import read_video_record, write_video_record
from dynamicdet.video.recording import (
    forced_exit,
    load_early_exit_detector,
    record_videos,
    temporary_gate,
)
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

SIZE, LENGTH = 64, 7


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'videos'
    return make_digits_video(
        root, dict(train=1, val=3, test=2), length=LENGTH, image_size=SIZE, mp4=False
    )


def options_of(videos):
    found = {
        'data_root': f'{videos}/',
        'model.heads.layers': [2, 6, 11],
        'model.heads.channels': 16,
        'model.backbone.width': 0.25,
        'model.detector.backbone.width': 0.25,
        'model.detector.neck.width': 0.25,
        'model.detector.bbox_head.width': 0.25,
    }
    for split in ('train', 'val', 'test'):
        found.update(
            {
                f'{split}_dataloader.dataset.data_root': f'{videos}/',
                f'{split}_dataloader.num_workers': 0,
                f'{split}_dataloader.persistent_workers': False,
                f'{split}_dataloader.batch_size': 4,
            }
        )
        if split != 'train':
            found[f'{split}_evaluator.ann_file'] = f'{videos}/annotations/instances_{split}.json'
    return found


@pytest.fixture
def cfg(videos):
    cfg = Config.fromfile(ROOT / 'configs/video/early_exit_yolov5_digits.py')
    cfg.merge_from_dict(options_of(videos))
    return cfg


@pytest.fixture
def model(cfg):
    return seeded(cfg)


def seeded(cfg):
    """Random weights that find something, and other things at other exits."""
    model = randomize(MODELS.build(cfg.model), seed=3)
    model.detector.bbox_head.test_cfg.score_thr = 0.3
    for head in model.heads:
        head.test_cfg.score_thr = 0.3
    return model.eval()


def record_of(model, cfg, split='test'):
    return record_videos(
        model, cfg, build_record_loader(cfg, split), no_progress, frames=2, rounds=1
    )


def test_record_has_every_frame_once_and_comes_back(model, cfg, tmp_path):
    record = record_of(model, cfg)
    assert sorted((image['video'], image['frame']) for image in record['images']) == [
        (video, frame) for video in (1, 2) for frame in range(LENGTH)
    ]
    assert [image['change'] == 1 for image in record['images']] == [
        image['frame'] == 0 for image in record['images']
    ]
    assert all(
        len(image['detections']) == 4 and len(image['pooled']) == 3 for image in record['images']
    )
    assert sum(len(own) for image in record['images'] for own in image['detections'][:3]) > 20
    write_video_record(record, tmp_path / 'a.npz')
    assert read_video_record(tmp_path / 'a.npz')['costs'] == record['costs']
    # A head more costs more, and a later exit.
    costs = record['costs']['gflops']
    assert costs['early'] < record['gflops'][0] < record['gflops'][1] < record['gflops'][3]
    assert costs['looked'][0] == record['gflops'][0] and costs['looked'][3] > record['gflops'][3]
    assert record['provenance']['ann_file'].endswith('instances_test.json')


def test_forced_exits_leave_the_detector_as_it_was(model, cfg):
    dataset = build_record_loader(cfg, 'test').dataset
    model.set_budget(threshold=0.25)
    for exit, looks in ((-1, False), (0, False), (2, True), (3, False), (3, True)):
        with forced_exit(model, exit, looks):
            found = model.test_step(pseudo_collate([dataset[0], dataset[1]]))
        assert [sample.exit for sample in found] == [exit] * 2
    assert model.gate is None and model.budget == Budget('threshold', 0.25)
    assert model.thresholds.tolist() == [0.25] * 4


@pytest.fixture(scope='module')
def world(videos):
    """A model, the record of its test videos, their data set, and places in the record in the set's
    order."""
    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(ROOT / 'configs/video/early_exit_yolov5_digits.py')
    cfg.merge_from_dict(options_of(videos))
    model = seeded(cfg)
    record = record_of(model, cfg)
    dataset = build_record_loader(cfg, 'test').dataset
    row_of = {dataset.get_data_info(row)['img_id']: row for row in range(len(dataset))}
    return (
        model,
        record,
        dataset,
        sorted(range(len(dataset)), key=lambda at: row_of[record['images'][at]['id']]),
    )


@torch.no_grad()
def run_lazily(model, dataset, rows):
    found = []
    for row in rows:
        found.extend(model.test_step(pseudo_collate([dataset[row]])))
    return found


@pytest.mark.parametrize(
    'config',
    [
        dict(type='ScoreGate', kind='confidence'),
        dict(type='AgreementGate', iou=0.0),
        dict(type='TemporalGate'),
        dict(type='HaltingGate'),
        dict(type='TemporalGate', gate=dict(type='ScoreGate', over='sum')),
        dict(type='TemporalGate', nothing=dict(type='Presence')),
    ],
    ids=lambda config: (
        config['type'] + ' wrapping' * ('gate' in config) + ' nothing' * ('nothing' in config)
    ),
)
def test_simulation_is_what_the_detector_does(world, config):
    model, record, dataset, in_order = world
    config = dict(config)
    if config['type'] == 'HaltingGate':
        config['in_channels'] = [model.table[layer].channels for layer in model.exit_layers]
    if 'nothing' in config:
        config['nothing'] = dict(config['nothing'], in_channels=model.table[0].channels)
    torch.manual_seed(0)
    gate = MODELS.build(config).eval()
    if 'nothing' in config:
        # Half of the frames, by weights that were drawn.
        early = torch.from_numpy(np.stack([image['early'] for image in record['images']]))
        gate.nothing.standardize(early)
        chances = gate.nothing(early).sort().values
        gate.nothing.level.fill_(chances[len(chances) // 2 - 1 :][:2].mean())
    for layer in getattr(gate, 'go', ()):
        torch.nn.init.normal_(layer.weight, std=3.0)
    difficulties = gate_difficulties(gate, evidence_by_exit(record))
    seen = set()
    settings = settings_of(record, gate, difficulties, count=3, change_count=2)
    for setting in [*settings[::2], settings[-1]]:
        run = simulate_gate(record, gate, difficulties, setting)
        with temporary_gate(model, gate, setting):
            found = run_lazily(model, dataset, range(len(dataset)))
        assert [sample.exit for sample in found] == run.exits[in_order].tolist()
        seen.update(run.exits.tolist())
        for sample, at in zip(found, in_order):
            source = run.source[at]
            shown = record['images'][source]['detections'][run.exits[source]] if source >= 0 else []
            assert same_detections(coco_results(sample, dataset.cat_ids), shown)
    assert len(seen) > 1


def test_frames_must_say_where_they_belong(model, cfg):
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = (
        'img_id',
        'img_path',
        'ori_shape',
        'img_shape',
        'scale_factor',
    )
    with pytest.raises(UsageError, match='video_id, frame_id'):
        record_of(model, cfg)


def test_from_a_checkpoint_to_a_calibrated_one(cfg, tmp_path, capsys):
    register_all_modules(init_default_scope=True)
    model = seeded(cfg)
    # It is told the heads' channels by the detector.
    cfg.model.gate = dict(type='HaltingGate')
    cfg.dump(tmp_path / 'config.py')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    for split in ('val', 'test'):
        assert (
            call_tool(
                'record_video.py',
                tmp_path / 'config.py',
                tmp_path / 'model.pth',
                '--split',
                split,
                '--out',
                tmp_path / f'{split}.npz',
                '--frames',
                1,
                '--rounds',
                1,
                '--device',
                'cpu',
            )
            == 0
        )
    assert (
        call_tool(
            'calibrate_video.py',
            tmp_path / 'config.py',
            tmp_path / 'model.pth',
            '--record',
            tmp_path / 'val.npz',
            '--fit-record',
            tmp_path / 'val.npz',
            '--max-drop',
            0.5,
            '--out',
            tmp_path / 'done.pth',
        )
        == 0
    )
    assert 'HaltingGate on 21 frames: AP' in capsys.readouterr().out
    done, checkpoint = load_early_exit_detector(cfg, str(tmp_path / 'done.pth'), fused=False)
    assert done.gflops.isfinite().all() and done.latencies.isfinite().all()
    assert done.operating_points[0].isfinite().all() and done.gate.go[0].weight.abs().sum() > 0
    assert checkpoint['meta']['calibration']['fit']['gate']['record'].endswith('val.npz')
    dearest = done.operating_points[done.operating_points[:, -1].nan_to_num(nan=-1).argmax()]
    assert done.set_budget(target_latency=dearest[-1].item()) == pytest.approx(dearest[:4].tolist())
    assert (
        call_tool(
            'analyze_gates.py',
            tmp_path / 'test.npz',
            '--val-record',
            tmp_path / 'val.npz',
            '--fit-record',
            tmp_path / 'val.npz',
            '--gate-of',
            tmp_path / 'config.py',
            tmp_path / 'done.pth',
            '--out-dir',
            tmp_path / 'page',
        )
        == 0
    )
    table = capsys.readouterr().out
    assert all(
        name in table
        for name in ('exit 3', 'agreement', 'temporal + halting', 'oracle, reusing', "config's")
    )
    analysis = json.loads((tmp_path / 'page' / 'gates.json').read_text())
    assert len(analysis['fixed']) == 4 and analysis['gates']['entropy']['rows']
    assert (tmp_path / 'page' / 'gates.png').read_bytes().startswith(b'\x89PNG')


def test_tools_say_what_is_wrong(cfg, tmp_path, capsys):
    torch.save(dict(state_dict=seeded(cfg).state_dict()), tmp_path / 'model.pth')
    cfg.dump(tmp_path / 'config.py')
    both = (tmp_path / 'config.py', tmp_path / 'model.pth')
    assert call_tool('analyze_gates.py', tmp_path / 'absent.npz') == 2
    assert (
        call_tool(
            'record_video.py', *both, '--frames', 0, '--out', tmp_path / 'a.npz', '--device', 'cpu'
        )
        == 2
    )
    assert (
        call_tool(
            'record_video.py',
            *both,
            '--frames',
            1,
            '--rounds',
            1,
            '--out',
            tmp_path / 'a.npz',
            '--device',
            'cpu',
        )
        == 0
    )
    assert call_tool('calibrate_video.py', *both, '--record', tmp_path / 'a.npz') == 2
    cfg.model.gate = dict(type='HaltingGate', in_channels=[8, 32, 32])
    cfg.dump(tmp_path / 'config.py')
    assert call_tool('calibrate_video.py', *both, '--record', tmp_path / 'a.npz') == 2
    assert (
        call_tool(
            'calibrate_video.py',
            *both,
            '--record',
            tmp_path / 'a.npz',
            '--cfg-options',
            'model.gate.type=HalingGate',
        )
        == 2
    )
    cfg.model.gate = dict(type='TemporalGate', nothing=dict(type='Presence'))
    cfg.dump(tmp_path / 'config.py')
    assert call_tool('calibrate_video.py', *both, '--record', tmp_path / 'a.npz') == 2
    # Its few frames are all with digits, or too few.
    assert (
        call_tool(
            'calibrate_video.py',
            *both,
            '--record',
            tmp_path / 'a.npz',
            '--fit-record',
            tmp_path / 'a.npz',
        )
        == 2
    )
    errors = capsys.readouterr().err.splitlines()
    said = [line for line in errors if line.startswith('error: ')]
    assert [
        part in line
        for part, line in zip(
            (
                'record_video.py',
                '1 or more',
                'has no gate',
                'no trained HaltingGate',
                'cannot be built',
                'no trained TemporalGate(Presence)',
                'frames',
            ),
            said,
        )
    ] == [True] * 7


def test_what_the_experiment_measures_of_a_run(tmp_path, monkeypatch):
    """Exits, gates and both by the clock, from a config and a checkpoint, as experiments/video.py
    asks for."""
    sys.path.insert(0, str(ROOT / 'experiments'))
    import video_results

    monkeypatch.setattr(video_results, 'RESAMPLES', 3)
    # Gates are fitted to three folds of every second video.
    videos = make_digits_video(
        tmp_path / 'videos', dict(train=1, val=6, test=2), length=LENGTH, image_size=SIZE, mp4=False
    )
    cfg = Config.fromfile(ROOT / 'configs/video/early_exit_yolov5_digits.py')
    cfg.merge_from_dict(options_of(videos))
    model = seeded(cfg)
    config, checkpoint = str(tmp_path / 'config.py'), str(tmp_path / 'a.pth')
    cfg.model.detector.test_cfg.score_thr = 0.3
    cfg.dump(config)
    meta = dict(dataset_meta=dict(classes=tuple('0123456789')))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    test, val = (record_of(model, cfg, split) for split in ('test', 'val'))
    exits = video_results.head_results(test)['exits']
    assert len(exits) == 4 and all(
        len(one['resampled']) == 3 and one['latency'] > 0 for one in exits
    )
    found = video_results.gate_results(test, val, config, checkpoint)
    assert {'temporal', 'entropy', 'agreement', 'halting', 'temporal + halting'} <= set(
        found['gates']
    )
    assert [row['exit'] for row in found['fixed']] == [0, 1, 2, 3] and len(found['oracles']) == 2
    before = torch.get_num_threads()
    clock = video_results.clock_results(config, checkpoint, found, val, threads=before + 1)
    assert torch.get_num_threads() == before and clock['threads'] == before + 1
    known = [name for name, own in found['gates'].items() if own['within']]
    assert list(clock['ways']) == [*(f'exit {exit}' for exit in range(4)), *known] and known
    assert clock['frames'] == 2 * LENGTH and clock['provenance']['device']
    for name, way in clock['ways'].items():
        assert sum(way['exits']) == 2 * LENGTH and 0 < way['median'] and way['seconds'] > 0
        if name.startswith('exit '):
            assert way['exits'][-1] == 2 * LENGTH and len(way['exits']) == int(name[-1]) + 2
    assert clock['ways']['exit 3']['ap'] == pytest.approx(found['fixed'][-1]['ap'], abs=0.5)
