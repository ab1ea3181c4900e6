"""Video in; boxes, exits and costs out. On small real detectors."""

import copy
import json
import os

import av
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict

from dynamicdet.errors import UsageError
from dynamicdet.testing import tiny_detector, tiny_dynamic
from dynamicdet.video.demo import FrameDetector, Lines, run_demo
from dynamicdet.video.sources import FrameSource, open_source
from mmdet.registry import MODELS

CLASSES = ('a', 'b', 'c')
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
#: Small enough that 1,000 frames take seconds.
SMALL = dict(
    type='SingleStageDetector',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, pad_size_divisor=32
    ),
    backbone=dict(type='YOLOV5Backbone', width=0.125, depth=0.1),
    neck=dict(type='YOLOV5PAFPN', width=0.125, depth=0.1),
    bbox_head=dict(type='YOLOV5Head', width=0.125, num_classes=3),
    test_cfg=dict(
        score_thr=0.001, nms_pre=100, nms=dict(type='nms', iou_threshold=0.6), max_per_img=5
    ),
)


def early(**options):
    return ConfigDict(
        {
            **dict(
                type='EarlyExitDetector',
                detector=SMALL,
                heads=dict(layers=[4, 9]),
                gate=dict(type='TemporalGate'),
            ),
            **options,
        }
    )


def config(model):
    return Config(
        dict(
            default_scope='mmdet',
            model=model,
            visualizer=dict(type='DetLocalVisualizer'),
            test_dataloader=dict(
                dataset=dict(
                    type='CocoDataset',
                    ann_file='',
                    data_prefix=dict(img=''),
                    metainfo=dict(classes=CLASSES),
                    pipeline=PIPELINE,
                )
            ),
        )
    )


def save(model, path, costs=None, points=None, **meta):
    """A checkpoint of a config's model, random, as ``FrameDetector`` wants it; with costs of
    exits."""
    torch.manual_seed(0)
    built = MODELS.build(model)
    if costs:
        built.gflops.copy_(torch.tensor(costs))
    if points:
        built.operating_points[: len(points)] = torch.tensor(points)
    meta = dict(dataset_meta=dict(classes=CLASSES), **meta)
    torch.save(dict(state_dict=built.state_dict(), meta=meta), path)
    return str(path)


@pytest.fixture
def detector(tmp_path):
    checkpoint = save(early(), tmp_path / 'early.pth', [0.1, 0.2, 0.3, 0.4])
    return FrameDetector(config(early()), checkpoint, 'cpu', budget=dict(threshold=0.05), score=0.0)


class Pictures(FrameSource):
    """A source of what it is given; None is a frame that cannot be read, an error is raised."""

    name = 'pictures'

    def __init__(self, *pictures):
        self.pictures, self.length = pictures, len(pictures)

    def _read(self):
        for picture in self.pictures:
            if isinstance(picture, BaseException):
                raise picture
            yield None, picture, 'is broken' if picture is None else None, None


def noise(seed, height=48, width=64):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def film_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format='bgr24') for frame in container.decode(video=0)]


def test_frames_lines_film_and_timeline(detector, tmp_path):
    # The same twice, then another twice.
    pictures, seen = [noise(1), noise(1), noise(2), noise(2)], []
    out = tmp_path / 'new' / 'out.mp4'
    summary = run_demo(detector, Pictures(*pictures), out, progress=seen.append)
    lines = lines_of(out.with_suffix('.jsonl'))
    # What has not changed is not looked at again, and has the same boxes.
    assert [line['exit'] for line in lines] == [2, -1, 2, -1]
    assert [line['gflops'] for line in lines] == pytest.approx([0.4, 0.1, 0.4, 0.1], abs=1e-6)
    found = [line['detections'] for line in lines]
    assert found[0] == found[1] != found[2] == found[3]
    assert len(lines[0]['detections']) == 5 and [line['time'] for line in lines] == [
        0,
        0.04,
        0.08,
        0.12,
    ]
    assert (
        lines[0]['difficulty'] == 1
        and lines[1]['difficulty'] == 0
        and lines[2]['difficulty'] > 0.05
    )
    for one in lines[0]['detections']:
        x1, y1, x2, y2 = one['bbox']
        assert -1 <= x1 <= x2 <= 65 and -1 <= y1 <= y2 <= 49 and one['label'] in (0, 1, 2)
    assert all(line['size'] == [64, 48] and line['seconds'] > 0 for line in lines)
    assert (summary.frames, summary.faults, summary.ended, summary.stopped) == (4, 0, None, False)
    assert dict(summary.exits) == {2: 2, -1: 2} and summary.gflops == pytest.approx(0.25)
    assert summary.seconds == pytest.approx(sum(line['seconds'] for line in lines), abs=1e-5)
    assert summary.files == [str(out.with_suffix(ending)) for ending in ('.mp4', '.jsonl', '.png')]
    film = film_of(out)
    assert len(film) == 4 and film[0].shape[1] >= 360 and film[0].shape[0] > 0.75 * film[0].shape[1]
    assert cv2.imread(str(out.with_suffix('.png'))) is not None
    assert seen == [1, 2, 3, 4]
    # A second run begins anew.
    run_demo(detector, Pictures(noise(2)), tmp_path / 'again.mp4')
    assert lines_of(tmp_path / 'again.jsonl')[0]['exit'] == 2


def test_a_film_of_a_fast_camera_is_shown_slower(detector, tmp_path):
    with av.open(str(tmp_path / 'fast.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=2000)
        stream.width, stream.height = 64, 48
        for seed in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(seed), format='bgr24')))
        container.mux(stream.encode(None))
    said = []
    summary = run_demo(
        detector, open_source(tmp_path / 'fast.mp4'), tmp_path / 'out.mp4', say=said.append
    )
    assert summary.frames == len(film_of(tmp_path / 'out.mp4')) == 3
    assert said == ['the source has 2000 frames per second: they are shown at 1000']
    assert [line['time'] for line in lines_of(tmp_path / 'out.jsonl')] == [0, 0.0005, 0.001]


def test_a_target_is_held_on_the_frames_that_come(tmp_path):
    """Of two settings, one gives boxes again at 0.1, the other looks at each frame, at 0.4: 0.25 by
    turns."""
    points = [[1.0, -1.0, -1.0, 0.1, 0.001], [-1.0, -1.0, -1.0, 0.4, 0.004]]
    checkpoint = save(early(), tmp_path / 'a.pth', [0.1, 0.2, 0.3, 0.4], points)
    budget = dict(target_gflops=0.25)
    pictures = [noise(seed) for seed in range(200)]
    summary = run_demo(
        FrameDetector(config(early()), checkpoint, 'cpu', budget=budget, online=True),
        Pictures(*pictures),
        tmp_path / 'out.mp4',
    )
    assert summary.gflops == pytest.approx(0.25, abs=0.02) and set(summary.exits) == {-1, 2}
    # Without, the dearest setting that the target pays for.
    summary = run_demo(
        FrameDetector(config(early()), checkpoint, 'cpu', budget=budget),
        Pictures(*pictures[:5]),
        tmp_path / 'out.mp4',
    )
    assert summary.gflops == pytest.approx(0.1)
    for wrong in (dict(threshold=0.5), None):
        with pytest.raises(UsageError, match='online holds target_latency or target_gflops'):
            FrameDetector(config(early()), checkpoint, 'cpu', budget=wrong, online=True)


def test_broken_frames_keep_the_state_and_their_place(detector, tmp_path):
    said = []
    pictures = [None, noise(1), None, noise(1), None]
    summary = run_demo(detector, Pictures(*pictures), tmp_path / 'out.mp4', say=said.append)
    lines = lines_of(tmp_path / 'out.jsonl')
    assert [line.get('exit') for line in lines] == [None, 2, None, -1, None]
    assert [line.get('fault') for line in lines] == [
        'is broken',
        None,
        'is broken',
        None,
        'is broken',
    ]
    assert [line['frame'] for line in lines] == [0, 1, 2, 3, 4]
    assert (summary.frames, summary.faults) == (2, 3)
    assert said == ['frame 0: is broken', 'frame 2: is broken', 'frame 4: is broken']
    film = film_of(tmp_path / 'out.mp4')
    # Nothing could be drawn for the first; the others stand in for those that are missing.
    assert len(film) == 4 and np.abs(film[0].astype(int) - film[1]).mean() < 3


def test_many_faults_are_said_once(detector, tmp_path):
    said = []
    run_demo(detector, Pictures(*[None] * 50), tmp_path / 'out.mp4', say=said.append)
    assert len(said) == 21 and 'only in the file' in said[-1]
    assert len(lines_of(tmp_path / 'out.jsonl')) == 50 and not (tmp_path / 'out.mp4').exists()


def test_a_change_of_size_is_said_and_all_goes_on(detector, tmp_path):
    said = []
    pictures = [noise(1), noise(2, 96, 64), noise(2, 96, 64), noise(3, 31, 201)]
    summary = run_demo(detector, Pictures(*pictures), tmp_path / 'out.mp4', say=said.append)
    lines = lines_of(tmp_path / 'out.jsonl')
    assert [line['size'] for line in lines] == [[64, 48], [64, 96], [64, 96], [201, 31]]
    assert [line.get('size_before') for line in lines] == [None, [64, 48], None, [64, 96]]
    # Another size is another frame: it is looked at.
    assert [line['exit'] for line in lines] == [2, 2, -1, 2]
    assert summary.frames == 4 and len(said) == 2
    assert said[0] == 'frame 1: the size changes from (64, 48) to (64, 96)'
    assert len({frame.shape for frame in film_of(tmp_path / 'out.mp4')}) == 1


def test_boxes_that_are_given_again_follow_the_resolution(detector, tmp_path):
    """The same picture, twice as large: the network sees the same, boxes are in the new picture's
    pixels."""
    small, said = noise(1), []
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    run_demo(detector, Pictures(small, large, large, small), tmp_path / 'out.mp4', say=said.append)
    lines = lines_of(tmp_path / 'out.jsonl')
    assert [line['exit'] for line in lines] == [2, -1, -1, -1] and len(said) == 2
    boxes = [np.array([one['bbox'] for one in line['detections']]) for line in lines]
    assert len(boxes[0]) == 5
    np.testing.assert_allclose(boxes[1], 2 * boxes[0], atol=0.02)
    np.testing.assert_allclose(boxes[2], 2 * boxes[0], atol=0.02)
    np.testing.assert_allclose(boxes[3], boxes[0], atol=0.02)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('of the source')])
def test_what_was_done_is_kept_when_it_breaks_off(detector, tmp_path, error):
    source = Pictures(noise(1), noise(2), error, noise(3))
    if isinstance(error, KeyboardInterrupt):
        summary = run_demo(detector, source, tmp_path / 'out.mp4')
        assert summary.stopped and summary.frames == 2
    else:
        with pytest.raises(RuntimeError, match='of the source'):
            run_demo(detector, source, tmp_path / 'out.mp4')
    assert len(lines_of(tmp_path / 'out.jsonl')) == 2 and len(film_of(tmp_path / 'out.mp4')) == 2
    assert sorted(p.name for p in tmp_path.glob('*out*')) == ['out.jsonl', 'out.mp4', 'out.png']


def test_frames_may_be_limited(detector, tmp_path):
    summary = run_demo(detector, Pictures(*[noise(1)] * 9), tmp_path / 'out.mp4', most=3)
    assert summary.frames == 3 and summary.ended is None


def test_two_runs_do_not_write_one_file(tmp_path):
    (tmp_path / '.o.jsonl.part').write_text('of a run that was killed')
    with Lines(tmp_path / 'o.jsonl') as lines:
        lines.write(dict(frame=0))
        with pytest.raises(UsageError, match='being written by another run'):
            Lines(tmp_path / 'o.jsonl')
        lines.write(dict(frame=1))
    assert (tmp_path / 'o.jsonl').read_text() == '{"frame": 0}\n{"frame": 1}\n'
    with Lines(tmp_path / 'o.jsonl'):
        pass
    assert not (tmp_path / 'o.jsonl').read_text()


@pytest.mark.parametrize('out', ['out', 'out.avi', 'out.jsonl'])
def test_the_name_must_be_a_films(detector, tmp_path, out):
    with pytest.raises(UsageError, match='must end in .mp4'):
        run_demo(detector, Pictures(noise(1)), tmp_path / out)
    assert not [path for path in tmp_path.iterdir() if path.name != 'early.pth']


def resident():
    """Megabytes of this process that are in memory now."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def test_memory_stays_flat(detector, tmp_path):
    """1,000 frames; from the 400th on, when the encoder's buffers are full, nothing is added to the
    process. To keep 600 small pictures would take 6 MB, those that are drawn 200."""
    picture, sizes = noise(1, 64, 64), {}

    class Endless(FrameSource):
        name = 'endless'

        def _read(self):
            while True:
                picture[:8] += 1  # one frame after the other changes
                yield None, picture.copy(), None, None

    def measure(done):
        if done % 100 == 0:
            sizes[done] = resident()

    summary = run_demo(detector, Endless(), tmp_path / 'out.mp4', most=1000, progress=measure)
    assert summary.frames == 1000 and len(lines_of(tmp_path / 'out.jsonl')) == 1000
    assert max(sizes[done] for done in range(500, 1001, 100)) < sizes[400] + 4, sizes
    assert len(detector.model._streams) == 1


@pytest.mark.parametrize(
    'model, exits', [(tiny_detector('retinanet'), 0), (tiny_dynamic('retinanet'), 2)]
)
def test_other_detectors(tmp_path, model, exits):
    checkpoint = save(model, tmp_path / 'c.pth', [1.0, 2.0][:exits])
    budget = dict(threshold=-1) if exits else None
    found = FrameDetector(config(model), checkpoint, 'cpu', budget=budget, score=0.0)
    summary = run_demo(found, Pictures(noise(1), noise(2)), tmp_path / 'out.mp4')
    lines = lines_of(tmp_path / 'out.jsonl')
    if exits:
        assert [(line['exit'], line['gflops']) for line in lines] == [(1, 2.0)] * 2
    else:
        assert all(line['exit'] is line['gflops'] is line['difficulty'] is None for line in lines)
        assert not summary.exits and summary.gflops is None
    assert len(film_of(tmp_path / 'out.mp4')) == 2


def test_a_gate_may_be_replaced(tmp_path):
    checkpoint = save(early(), tmp_path / 'c.pth', calibration=dict(gate='TemporalGate'))
    made = FrameDetector(
        config(early()),
        checkpoint,
        'cpu',
        gate=dict(type='FixedExit', exit=1),
        budget=dict(threshold=0.5),
    )
    assert made.detect(noise(1), 's', 0).exit == 1
    # The thresholds of one gate are nothing to another.
    with pytest.raises(UsageError, match='are of TemporalGate, and the detector has FixedExit'):
        FrameDetector(config(early()), checkpoint, 'cpu', gate=dict(type='FixedExit', exit=1))
    # Nor where the config says another, none, or one that wraps another.
    wrapping = dict(type='TemporalGate', gate=dict(type='AgreementGate'))
    for own, name in (
        (None, 'no gate'),
        (dict(type='ScoreGate'), 'ScoreGate'),
        (wrapping, r'TemporalGate\(AgreementGate\)'),
    ):
        with pytest.raises(UsageError, match=f'has {name}: '):
            FrameDetector(config(early(gate=own)), checkpoint, 'cpu')
    same = FrameDetector(config(early()), checkpoint, 'cpu', gate=dict(type='TemporalGate'))
    assert same.model.thresholds.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    'model, options, words',
    [
        (
            tiny_detector('retinanet'),
            dict(gate=dict(type='FixedExit', exit=0)),
            'only an EarlyExitDetector',
        ),
        (early(), dict(gate=dict(type='NoGate')), 'is no gate'),
        (early(), dict(gate=dict(type='FixedExit', exit='a')), 'is no gate: a fixed exit is'),
        (tiny_detector('retinanet'), dict(budget=dict(threshold=0.5)), 'has one speed only'),
        (early(), dict(budget=dict(hard_share=0.5)), 'a budget of early exits is one of'),
        (early(), dict(budget=dict(target_gflops=1)), 'needs a calibrated checkpoint'),
        (early(), dict(score=float('nan')), 'in [[]0, 1[]]; got nan'),
    ],
)
def test_mistakes_are_said(tmp_path, model, options, words):
    checkpoint = save(model, tmp_path / 'c.pth')
    with pytest.raises(UsageError, match=words):
        FrameDetector(config(model), checkpoint, 'cpu', **options)


def test_a_model_that_cannot_be_built_is_one_line(tmp_path):
    checkpoint, model = save(early(), tmp_path / 'c.pth'), copy.deepcopy(early())
    model.detector.bbox_head.type = 'YOLOV5Headd'
    with pytest.raises(UsageError, match='cannot be built: .*YOLOV5Headd') as error:
        FrameDetector(config(model), checkpoint, 'cpu')
    assert '\n' not in str(error.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint = save(tiny_detector('retinanet'), tmp_path / 'c.pth')
    with pytest.raises(UsageError, match='does not fit this config'):
        FrameDetector(config(early()), checkpoint, 'cpu')


def test_a_real_file_goes_through(detector, tmp_path):
    from dynamicdet.video.writer import VideoWriter

    with VideoWriter(tmp_path / 'in.mp4', 10) as writer:
        for number in range(6):
            writer.write(noise(number))
    summary = run_demo(detector, open_source(str(tmp_path / 'in.mp4')), tmp_path / 'out.mp4')
    assert summary.frames == 6 and summary.ended is None
    assert [line['time'] for line in lines_of(tmp_path / 'out.jsonl')] == [
        0,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
    ]


def test_the_film_shows_frames_at_the_times_of_their_lines(detector, tmp_path):
    """Also behind frames that cannot be read, at the beginning too."""

    class Uneven(FrameSource):
        name = 'uneven'

        def _read(self):
            yield None, None, 'is broken', None
            for number, time in enumerate((1.0, 1.04, 6.0, 6.5)):
                yield time, noise(number), None, 2.0
                if number == 1:
                    yield None, None, 'is broken', None

    out = tmp_path / 'out.mp4'
    run_demo(detector, Uneven(), out)
    times = [line['time'] for line in lines_of(out.with_suffix('.jsonl'))]
    assert times == pytest.approx([0, 0.04, 0.08, 0.12, 5.04, 5.54])
    with av.open(str(out)) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(
            times[1:], abs=2e-4
        )
    with av.open(str(out)) as container:
        *_, last = (packet for packet in container.demux(video=0) if packet.size)
        assert float((last.pts + last.duration) * last.time_base) == pytest.approx(7.54, abs=1e-3)
