"""The tools on videos, in processes of their own; and the configs of the built-in videos."""

import json

import av
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from conftest import ROOT, run_tool
from dynamicdet.datasets import samplers  # noqa: F401  (registers)
from dynamicdet.video.digits_video import make_digits_video
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

CONFIG = f"""
_base_ = ['{ROOT}/configs/_base_/digits_video.py', '{ROOT}/configs/_base_/digits_yolov7.py']
custom_imports = dict(imports=['dynamicdet', 'dynamicdet.datasets.samplers'])
model = dict(_delete_=True, type='EarlyExitDetector', detector=_base_.model,
             heads=dict(layers=[4, 10]), gate=dict(type='FixedExit', exit=0))
"""


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    return make_digits_video(
        tmp_path_factory.mktemp('data') / 'v', dict(train=2, val=3, test=0), 6, 64
    )


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
    """A config of an early-exit detector and a checkpoint of it, random."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('setting')
    (folder / 'c.py').write_text(CONFIG)
    model = MODELS.build(Config.fromfile(folder / 'c.py').model)
    model.gflops.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.save(
        dict(
            state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=tuple('0123456789')))
        ),
        folder / 'c.pth',
    )
    return folder / 'c.py', folder / 'c.pth'


def test_the_set_is_made(tmp_path):
    done = run_tool(
        'make_digits_video.py',
        '--root',
        tmp_path / 'd',
        '--train',
        1,
        '--val',
        0,
        '--test',
        1,
        '--length',
        2,
        '--size',
        64,
        '--seed',
        3,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / 'd') and '2 of 2 videos' in done.stdout
    assert len(list((tmp_path / 'd').glob('t*/0001/*.jpg'))) == 4


def test_a_film_goes_through(setting, videos, tmp_path):
    film = videos / 'val' / '0001.mp4'
    out = tmp_path / 'o.mp4'
    done = run_tool(
        'video_demo.py',
        film,
        *setting,
        '--out',
        out,
        '--device',
        'cpu',
        '--gate',
        'FixedExit',
        'exit=1',
        '--budget',
        'threshold=0.5',
        '--pred-score-thr',
        0,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / 'o.jsonl').read_text().splitlines()]
    assert [line['frame'] for line in lines] == list(range(6)) and {
        line['exit'] for line in lines
    } == {1}
    assert {round(line['gflops'], 4) for line in lines} == {0.3} and lines[0]['detections']
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    assert (
        '6 frames' in done.stdout
        and '0.3 GFLOPs each' in done.stdout
        and 'exit 1: 100%' in done.stdout
    )
    assert str(tmp_path / 'o.png') in done.stdout


def test_a_folder_with_a_broken_frame_is_said(setting, videos, tmp_path):
    folder = tmp_path / 'frames'
    folder.mkdir()
    for path in sorted((videos / 'val' / '0002').iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    broken = folder / '000003.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    done = run_tool(
        'video_demo.py',
        folder,
        *setting,
        '--out',
        tmp_path / 'o.mp4',
        '--frames',
        4,
        '--device',
        'cpu',
        '--budget',
        'threshold=0',
    )
    assert done.returncode == 1
    assert (
        "frame 2: '000003.jpg' is no picture, or damaged" in done.stderr
        and 'Traceback' not in done.stderr
    )
    assert len((tmp_path / 'o.jsonl').read_text().splitlines()) == 4 and '3 frames' in done.stdout


def test_a_mistake_is_one_line(setting, videos, tmp_path):
    done = run_tool(
        'video_demo.py',
        videos / 'val' / '0001.mp4',
        *setting,
        '--out',
        tmp_path / 'o.mp4',
        '--gate',
        'TemporalGate',
        'gate.type=NoGate',
    )
    assert done.returncode == 2 and 'no gate' in done.stderr and 'Traceback' not in done.stderr
    # What is inside is known as such.
    assert 'NoGate is not in' in done.stderr
    assert not list(tmp_path.glob('*o.*'))


def load(loader, root):
    loader = loader.copy()
    loader.update(num_workers=0, persistent_workers=False)
    loader.dataset.data_root = f'{root}/'
    return Runner.build_dataloader(loader, seed=0)


def test_the_configs_give_frames_clips_and_streams(videos, tmp_path):
    base = f"_base_ = '{ROOT}/configs/_base_/digits_video.py'\n"
    (tmp_path / 'frames.py').write_text(base)
    (tmp_path / 'clips.py').write_text(base + 'train_dataloader = _base_.clips\n')
    cfg = Config.fromfile(tmp_path / 'frames.py')
    frames = load(cfg.train_dataloader, videos)
    assert len(frames.dataset) == 12 and sum(len(batch['inputs']) for batch in frames) == 12
    streams = [
        [(s.video_id, s.frame_id, s.video_length) for s in batch['data_samples']]
        for batch in load(cfg.val_dataloader, videos)
    ]
    assert streams == [[(video, frame, 6) for video in (1, 2, 3)] for frame in range(6)]
    clips = load(Config.fromfile(tmp_path / 'clips.py').train_dataloader, videos)
    (batch,) = clips
    samples = batch['data_samples']
    assert [sample.clip_step for sample in samples] == [0, 1, 2, 3] * (len(samples) // 4)
    assert len(clips.dataset) == 12
    for one, two in zip(samples, samples[1:]):
        assert two.clip_step == 0 or (
            one.video_id == two.video_id and 1 <= two.frame_id - one.frame_id <= 3
        )
