"""H.264 files: sizes, names, what a kill leaves."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest

from dynamicdet import errors
from dynamicdet.errors import UsageError
from dynamicdet.video.writer import VideoWriter


def levels(path):
    """The mean gray level of each frame, and the size of the first."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format='bgr24') for frame in container.decode(stream)]
        assert stream.codec_context.name == 'h264' and stream.codec_context.pix_fmt == 'yuv420p'
    return [round(float(frame.mean())) for frame in frames], frames[0].shape[:2]


def flat(level, height=32, width=48):
    return np.full((height, width, 3), level, np.uint8)


@pytest.mark.parametrize('size', [(32, 48), (33, 47), (1, 1), (2, 31)])
def test_frames_come_back(tmp_path, size):
    with VideoWriter(tmp_path / 'new' / 'a.mp4', 30) as writer:
        for level in (0, 60, 120, 250):
            writer.write(flat(level, *size))
    found, shape = levels(tmp_path / 'new' / 'a.mp4')
    assert np.abs(np.array(found) - [0, 60, 120, 250]).max() <= 3
    assert shape == tuple(side + side % 2 for side in size)  # H.264 needs even sizes
    assert os.listdir(tmp_path / 'new') == ['a.mp4']


def test_the_rate_is_kept(tmp_path):
    for fps in (25, 29.97, 0.5):
        with VideoWriter(tmp_path / 'a.mp4', fps) as writer:
            for level in range(4):
                writer.write(flat(level))
        with av.open(str(tmp_path / 'a.mp4')) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_other_sizes_are_fitted_into_the_first(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        writer.write(flat(200, 32, 64))
        writer.write(flat(200, 64, 64))  # as high as the video, half as wide: black left and right
        writer.write(flat(200, 5, 1000))
    with av.open(str(tmp_path / 'a.mp4')) as container:
        first, second, third = (f.to_ndarray(format='bgr24') for f in container.decode(video=0))
    assert first.shape == second.shape == third.shape == (32, 64, 3)
    assert (
        second[:, :14].mean() < 10 and second[:, 50:].mean() < 10 and second[:, 20:44].mean() > 190
    )
    assert third[15].mean() > 60  # one line remains


def test_nothing_is_lost_by_an_error(tmp_path):
    (tmp_path / 'a.mp4').write_text('an older file')
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / 'a.mp4') as writer:
            for level in (10, 100):
                writer.write(flat(level))
            assert (tmp_path / 'a.mp4').read_text() == 'an older file'
            raise KeyboardInterrupt
    assert levels(tmp_path / 'a.mp4')[0] == pytest.approx([10, 100], abs=5)
    assert os.listdir(tmp_path) == ['a.mp4']


def test_without_frames_there_is_no_file(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        pass
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_what_was_written(tmp_path):
    """A fragmented file is readable up to its last key frame."""
    # Without the package's __init__, which brings in mmdet and takes seconds.
    projects = str(Path(errors.__file__).parents[1])
    code = textwrap.dedent(f"""
        import sys, time, types
        import numpy as np
        for name in ('dynamicdet', 'dynamicdet.video'):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [{projects!r} + '/' + name.replace('.', '/')]
        from dynamicdet.video.writer import VideoWriter
        writer = VideoWriter({str(tmp_path / 'a.mp4')!r}, fragmented=True)
        rng = np.random.default_rng(0)
        for number in range(600):
            writer.write(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
        print('written', flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'written\n'
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ['.a.mp4.part']
    with av.open(str(tmp_path / '.a.mp4.part')) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) >= 250


def test_same_frames_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (32, 32, 3)).astype(np.uint8) for _ in range(9)]
    for name in ('a', 'b'):
        with VideoWriter(tmp_path / f'{name}.mp4') as writer:
            for frame in frames:
                writer.write(frame)
    assert (tmp_path / 'a.mp4').read_bytes() == (tmp_path / 'b.mp4').read_bytes()


@pytest.mark.parametrize(
    'frame',
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_frame_is_refused(tmp_path, frame):
    with VideoWriter(tmp_path / 'a.mp4') as writer, pytest.raises(UsageError, match='a frame is'):
        writer.write(frame)


def test_mistakes_are_said(tmp_path):
    for fps in (0, -1, float('nan'), float('inf')):
        with pytest.raises(UsageError, match='frames per second'):
            VideoWriter(tmp_path / 'a.mp4', fps)
    (tmp_path / 'file').touch()
    with VideoWriter(tmp_path / 'file' / 'a.mp4') as writer:
        with pytest.raises(UsageError, match='cannot be written'):
            writer.write(flat(1))


@pytest.mark.parametrize('fragmented', [False, True])
def test_frames_are_shown_at_their_times(tmp_path, fragmented):
    """Pauses, also in front of a key frame (every 250), times between frames, and how long the last
    one stays."""
    times = [
        0.5,
        0.54,
        0.5401,
        3.0,
        *(3.04 + 0.04 * number for number in range(246)),
        100.0,
        100.04,
        3700.0,
    ]
    with VideoWriter(tmp_path / 'a.mp4', 25, fragmented) as writer:
        for time in times:
            writer.write(flat(90), time, 2.5)
    with av.open(str(tmp_path / 'a.mp4')) as container:
        frames = list(container.decode(video=0))
        assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-4)
        assert frames[250].key_frame
    with av.open(str(tmp_path / 'a.mp4')) as container:
        *_, last = (packet for packet in container.demux(video=0) if packet.size)
        assert float((last.pts + last.duration) * last.time_base) == pytest.approx(3702.5, abs=1e-3)


@pytest.mark.parametrize('fragmented', [False, True])
def test_times_by_the_rate_and_given_ones_agree(tmp_path, fragmented):
    for fps in (25, 30000 / 1001, 0.5, 1000):
        for name, step in (('rate', None), ('time', 1 / fps)):
            with VideoWriter(tmp_path / f'{name}.mp4', fps, fragmented) as writer:
                for number in range(5):
                    writer.write(flat(50 * number), None if step is None else number * step, step)
        assert (tmp_path / 'rate.mp4').read_bytes() == (tmp_path / 'time.mp4').read_bytes()
        with av.open(str(tmp_path / 'rate.mp4')) as container:
            assert [frame.time for frame in container.decode(video=0)] == pytest.approx(
                [number / fps for number in range(5)], rel=1e-3, abs=1e-4
            )


def test_times_that_do_not_go_on_are_the_next_moment(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        for time in (1.0, 1.0, 0.2, 1.04):
            writer.write(flat(9), time)
    with av.open(str(tmp_path / 'a.mp4')) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([1, 1, 1, 1.04], abs=1e-3) and len(set(times)) == 4
