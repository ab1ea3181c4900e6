"""Frames from real files: whole, cut short, damaged, turned, of changing size."""

import struct
from fractions import Fraction

import cv2
import numpy as np
import pytest
from PIL import Image

from dynamicdet.errors import UsageError
from dynamicdet.video import sources
from dynamicdet.video.sources import open_source
from dynamicdet.video.writer import VideoWriter


def picture(number, height=48, width=64):
    """A gray level that tells the number, and detail that gives the encoder work."""
    noise = np.random.default_rng(number).integers(0, 30, (height, width, 3))
    return (noise + 4 * number).astype(np.uint8)


def write(path, count=30, fps=25, fragmented=False, **size):
    with VideoWriter(path, fps, fragmented) as writer:
        for number in range(count):
            writer.write(picture(number, **size))
    return path


def read(source):
    with source:
        frames = list(source)
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert all((frame.picture is None) == (frame.fault is not None) for frame in frames)
    return frames


def test_a_file_is_read_frame_by_frame(tmp_path):
    source = open_source(str(write(tmp_path / 'a.mp4', fps=12.5)))
    assert (source.length, source.fps, source.ended) == (30, 12.5, None)
    frames = read(source)
    assert len(frames) == 30 and source.ended is None
    for number, frame in enumerate(frames):
        assert frame.time == pytest.approx(number / 12.5)
        assert frame.picture.shape == (48, 64, 3) and frame.picture.dtype == np.uint8
        assert abs(frame.picture.mean() - picture(number).mean()) < 5


def test_colors_are_blue_green_red(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        writer.write(np.full((32, 32, 3), (200, 30, 30), np.uint8))
    (frame,) = read(open_source(str(tmp_path / 'a.mp4')))
    assert np.abs(frame.picture.mean((0, 1)) - (200, 30, 30)).max() < 6


def test_a_file_that_ends_early_says_so(tmp_path):
    path = write(tmp_path / 'a.mp4', fragmented=True)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    source = open_source(str(path))
    frames = read(source)
    whole = [frame for frame in frames if frame.picture is not None]
    assert 5 < len(whole) < 30
    assert [frame.time for frame in whole] == pytest.approx(
        [number / 25 for number in range(len(whole))]
    )
    # In the order of the file, which is not quite that of time.
    (fault,) = {frame.fault for frame in frames} - {None}
    assert len(frames) == len(whole) + 1 and fault.startswith('cannot be decoded: Invalid data')


def overwrite(path, share, length):
    """Spoil ``length`` bytes of what lies in a file after a share of its pictures."""
    content = bytearray(path.read_bytes())
    start = content.index(b'mdat') + 4
    end = content.index(b'moov')
    at = start + int(share * (end - start))
    content[at : at + length] = b'\xff' * length
    path.write_bytes(content)


def test_damaged_frames_are_named_and_the_others_come(tmp_path):
    path = write(tmp_path / 'a.mp4')
    overwrite(path, 0.4, path.stat().st_size // 10)
    source = open_source(str(path))
    frames = read(source)
    broken = [frame.number for frame in frames if frame.fault]
    assert 1 <= len(broken) <= 8 and min(broken) > 5
    assert len(frames) == 30 and source.ended is None
    # What comes after is in its place.
    assert abs(frames[-1].picture.mean() - picture(29).mean()) < 8


def test_a_source_that_gives_nothing_any_more_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'MOST_FAULTS', 3)
    for number in range(9):
        (tmp_path / f'{number}.jpg').write_bytes(b'none')
    cv2.imwrite(str(tmp_path / '2.jpg'), picture(2))
    source = open_source(str(tmp_path))
    assert [frame.fault is None for frame in read(source)] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert source.ended == '3 frames in a row cannot be read'


def test_a_size_may_change_in_a_stream(tmp_path):
    import av

    # A transport stream, as cameras send it, may change its size at any key frame.
    content = b''
    for number, (height, width) in enumerate([(48, 64), (80, 96)]):
        with av.open(str(tmp_path / f'{number}.ts'), 'w', format='mpegts') as container:
            stream = container.add_stream('libx264', rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, 'yuv420p'
            for place in range(10):
                one = av.VideoFrame.from_ndarray(
                    picture(10 * number + place, height, width), format='bgr24'
                )
                one.pts = 10 * number + place
                container.mux(stream.encode(one))
            container.mux(stream.encode(None))
        content += (tmp_path / f'{number}.ts').read_bytes()
    (tmp_path / 'both.ts').write_bytes(content)
    source = open_source(str(tmp_path / 'both.ts'))
    frames = read(source)
    assert source.length is None
    assert [frame.picture.shape[:2] for frame in frames] == [(48, 64)] * 10 + [(80, 96)] * 10
    assert abs(frames[-1].picture.mean() - picture(19).mean()) < 3


@pytest.mark.parametrize('turns', [0, 1, 2, 3])
def test_films_that_lie_on_their_side_are_turned(tmp_path, turns):
    """By the matrix in the track's header (ISO 14496-12, 8.3.2): 16.16 a b, c d; the third column
    is 2.30."""
    one = np.zeros((32, 64, 3), np.uint8)
    one[:16, :32] = 255  # upper left
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        writer.write(one)
    content = bytearray((tmp_path / 'a.mp4').read_bytes())
    # Of a version 0 header: 4 of version and flags, 36 of other fields behind the name.
    at = content.index(b'tkhd') + 4 + 40
    assert struct.unpack('>9i', content[at : at + 36]) == (
        1 << 16,
        0,
        0,
        0,
        1 << 16,
        0,
        0,
        0,
        1 << 30,
    )
    a, b = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]  # turned clockwise so often, as y points down
    content[at : at + 36] = struct.pack(
        '>9i', a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30
    )
    (tmp_path / 'a.mp4').write_bytes(content)
    (frame,) = read(open_source(str(tmp_path / 'a.mp4')))
    expected = np.rot90(one, -turns)
    assert frame.picture.shape == expected.shape
    assert np.abs(frame.picture.astype(int) - expected).mean() < 5


def test_a_folder_is_read_in_the_order_of_numbers(tmp_path):
    for number in (2, 10, 1):
        cv2.imwrite(str(tmp_path / f'f{number}.png'), picture(number, width=60 + number))
    (tmp_path / 'notes.txt').write_text('none')
    content = (tmp_path / 'f2.png').read_bytes()
    (tmp_path / 'f3.png').write_bytes(content[: len(content) // 2])
    source = open_source(str(tmp_path), fps=2)
    assert source.length == 4
    frames = read(source)
    assert [frame.time for frame in frames] == [0, 0.5, 1, 1.5]
    assert [frame.picture is not None and frame.picture.shape[1] for frame in frames] == [
        61,
        62,
        False,
        70,
    ]
    assert frames[2].fault.startswith("'f3.png' is damaged")
    assert (frames[3].picture == picture(10, width=70)).all()


def sound(path):
    import av

    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=16000)
        one = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format='fltp', layout='mono'
        )
        one.sample_rate = 16000
        container.mux(stream.encode(one))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    'name, make, words',
    [
        ('none.mp4', lambda path: None, 'there is no video, folder, camera or stream'),
        (
            'junk.mp4',
            lambda path: path.write_bytes(b'junk' * 99),
            'cannot be opened as a video: Invalid data',
        ),
        ('empty.mp4', lambda path: path.touch(), 'cannot be opened as a video'),
        (
            'cut.mp4',
            lambda path: path.write_bytes(write(path).read_bytes()[:3000]),
            'cannot be opened',
        ),
        ('sound.mp4', sound, 'has no pictures'),
        ('folder', lambda path: path.mkdir(), 'there is no picture in'),
    ],
)
def test_what_is_no_source_is_said(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(UsageError, match=words):
        open_source(str(tmp_path / name))


def test_no_camera_and_no_server_are_said():
    with pytest.raises(UsageError, match='no camera 63'):
        open_source('63')
    # Port 9 discards, if anything is there at all.
    with pytest.raises(UsageError, match="'rtsp://127.0.0.1:9/x' cannot be opened"):
        open_source('rtsp://127.0.0.1:9/x')


@pytest.mark.parametrize('fps', [-1, float('nan'), float('inf')])
def test_rates_are_checked(tmp_path, fps):
    with pytest.raises(UsageError, match='above 0'):
        sources.Folder(tmp_path, fps)


def film(path, times=(0, 40, 80, 120), streams=((48, 64),)):
    """A film whose frames have times, in milliseconds."""
    import av

    with av.open(str(path), 'w') as container:
        outs = []
        for height, width in streams:
            out = container.add_stream('libx264', rate=25, options=dict(bf='0'))
            out.height, out.width, out.pix_fmt = height, width, 'yuv420p'
            out.time_base = out.codec_context.time_base = Fraction(1, 1000)
            outs.append((out, height, width))
        for out, height, width in outs:
            for number, time in enumerate(times):
                one = av.VideoFrame.from_ndarray(picture(number, height, width), format='bgr24')
                one.pts, one.time_base = time, Fraction(1, 1000)
                container.mux(out.encode(one))
            container.mux(out.encode(None))
    return path


def box(kind, content):
    return struct.pack('>I4s', 8 + len(content), kind) + content


def add_cover(path):
    """A preview picture in the film's metadata, as telephones and drones put it there; FFmpeg lists
    it first."""
    jpeg = cv2.imencode('.jpg', np.full((30, 40, 3), 200, np.uint8))[1].tobytes()
    handler = box(b'hdlr', struct.pack('>II4s4sII', 0, 0, b'mdir', b'appl', 0, 0) + b'\0')
    items = box(b'ilst', box(b'covr', box(b'data', struct.pack('>II', 13, 0) + jpeg)))
    cover = box(b'udta', box(b'meta', struct.pack('>I', 0) + handler + items))
    content = path.read_bytes()
    at = content.index(b'moov') - 4
    head, index = content[:at], content[at + 8 :]
    first = struct.unpack('>I', index[:4])[0]
    # Behind the first box, in front of all that FFmpeg wrote of its own.
    index = index.replace(b'udta', b'free')
    path.write_bytes(head + box(b'moov', index[:first] + cover + index[first:]))


def test_a_preview_picture_is_no_film(tmp_path):
    import av

    add_cover(film(tmp_path / 'a.mp4'))
    with av.open(str(tmp_path / 'a.mp4')) as container:
        assert [stream.width for stream in container.streams.video] == [40, 64]
    source = open_source(str(tmp_path / 'a.mp4'))
    frames = read(source)
    assert (
        len(frames) == 4
        and frames[0].picture.shape == (48, 64, 3)
        and source.ended is None
        and not source.notes
    )


def test_of_several_films_one_is_looked_at_and_it_is_said(tmp_path):
    source = open_source(str(film(tmp_path / 'a.mkv', streams=[(48, 64), (96, 128)])))
    frames = read(source)
    (note,) = source.notes
    height, width = frames[0].picture.shape[:2]
    assert 'has 2 films' in note and f'{width} x {height} pixels' in note and len(frames) == 4


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv'])
def test_times_are_the_films(tmp_path, name):
    frames = read(open_source(str(film(tmp_path / name, [200, 240, 5200, 5240, 10200]))))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.04, 5, 5.04, 10], abs=2e-3)


def test_times_go_on_where_a_film_is_joined_from_two(tmp_path):
    joined = (
        film(tmp_path / 'a.ts').read_bytes() + film(tmp_path / 'b.ts', [0, 40, 1080]).read_bytes()
    )
    (tmp_path / 'c.ts').write_bytes(joined)
    times = [frame.time for frame in read(open_source(str(tmp_path / 'c.ts')))]
    assert (
        len(times) == 7 and all(one < two for one, two in zip(times, times[1:])) and times[-1] < 1.5
    )
    assert np.diff(times)[-1] == pytest.approx(1.04, abs=1e-3)


@pytest.mark.parametrize(
    'said, wanted',
    [
        ([None, None, 7.0, 7.5, None], [0, 0.1, 0.2, 0.7, 0.8]),
        ([-3, -2, -2, -2.5, -1], [0, 1, 1.1, 1.2, 2.7]),
        ([4, 5, 6], [0, 1, 2]),
    ],
)
def test_clocks_go_forward(said, wanted):
    clock = sources._Clock(10)
    assert [clock.time(one) for one in said] == pytest.approx(wanted)


def test_frames_that_cannot_be_read_take_their_time():
    clock = sources._Clock(10)
    times = [
        clock.time_of_fault(),
        clock.time_of_fault(),
        clock.time(9.0),
        clock.time_of_fault(),
        clock.time(9.2),
    ]
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    'matrix, expected',
    [
        ((-1, 0, 0, 1), lambda one: one[:, ::-1]),
        ((1, 0, 0, -1), lambda one: one[::-1]),
        ((0, 1, 1, 0), lambda one: one.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda one: one.transpose(1, 0, 2)[::-1, ::-1]),
    ],
)
def test_films_that_are_mirrored_are_mirrored_back(tmp_path, matrix, expected):
    one = np.zeros((32, 64, 3), np.uint8)
    one[:16, :32] = 255
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        writer.write(one)
    content = bytearray((tmp_path / 'a.mp4').read_bytes())
    at = content.index(b'tkhd') + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / 'a.mp4').write_bytes(content)
    (frame,) = read(open_source(str(tmp_path / 'a.mp4')))
    wanted = expected(one)
    assert (
        frame.picture.shape == wanted.shape
        and np.abs(frame.picture.astype(int) - wanted).mean() < 5
    )


def test_an_animated_picture_has_its_own_times(tmp_path):
    pages = [Image.fromarray(picture(number)) for number in (1, 9, 20)]
    pages[0].save(
        tmp_path / 'a.gif', save_all=True, append_images=pages[1:], duration=[100, 700, 300]
    )
    frames = read(open_source(str(tmp_path / 'a.gif')))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.8]) and frames[
        0
    ].picture.shape == (48, 64, 3)


def test_a_camera_has_the_walls_clock(tmp_path, monkeypatch):
    """Of a slow reader frames come late, whatever rate the driver says."""
    path = str(film(tmp_path / 'a.mp4'))
    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, 'VideoCapture', lambda number: opened(path))
    now = iter([50.0, 50.5, 50.6, 53.0])
    monkeypatch.setattr(sources, 'monotonic', lambda: next(now))
    assert [frame.time for frame in read(sources.Camera(0))] == pytest.approx([0, 0.5, 0.6, 3.0])


def test_folders_of_all_that_opencv_reads(tmp_path):
    for number, ending in enumerate(('avif', 'gif', 'jp2', 'JPG')):
        assert cv2.imwrite(
            str(tmp_path / f'{number}.{ending}'), np.full((64, 64, 3), 50 * number, np.uint8)
        )
    frames = read(open_source(str(tmp_path)))
    assert [round(frame.picture.mean() / 50) for frame in frames] == [0, 1, 2, 3]
