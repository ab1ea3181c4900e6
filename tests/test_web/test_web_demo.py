"""The demo by Gradio: what it computes, and the whole of it in a browser."""

import contextlib
import os
import re
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Page, browser, same_rows
from mmengine.config import Config

from conftest import ROOT, call_tool, tool_server, write_random
from dynamicdet.apis import DynamicInferencer
from dynamicdet.datasets.digits import make_digits
from dynamicdet.errors import UsageError
from dynamicdet.web.both_exits import MOST_PICTURES, BothExits, read_film, read_pictures
from dynamicdet.web.gradio_demo import Uploads, open_socket
from mmdet.utils import register_all_modules

CONFIG = ROOT / 'configs' / 'dy_yolox_nano_digits.py'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    register_all_modules(init_default_scope=True)
    path = tmp_path_factory.mktemp('random') / 'random.pth'
    write_random(
        Config.fromfile(CONFIG), path, dataset_meta=dict(classes=(*'012345678', '<b>9</b>'))
    )
    state = torch.load(path, weights_only=True)
    state['state_dict']['gflops'] = torch.tensor([0.5, 2.0])
    torch.save(state, path)
    return path


@pytest.fixture(scope='module')
def exits(checkpoint):
    return BothExits(DynamicInferencer(str(CONFIG), str(checkpoint), show_progress=False))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits') / 'digits'
    make_digits(root, dict(train=0, val=0, test=3), 96)
    return sorted((root / 'test').iterdir())


def rows_of(found):
    """Boxes, scores and labels, (n, 6)."""
    return np.column_stack([found['boxes'], found['scores'], found['labels']]).reshape(-1, 6)


def by_inferencer(checkpoint, path, threshold):
    detector = DynamicInferencer(str(CONFIG), str(checkpoint), show_progress=False)
    found = detector(str(path), threshold=threshold)['predictions'][0]
    return found, np.column_stack([found['bboxes'], found['scores'], found['labels']])


def test_both_exits_are_those_of_the_inferencer(exits, checkpoint, pictures):
    shown = exits.detect_all(read_pictures(pictures), [])
    assert shown['threshold'] == 0.5 and shown['gflops'] == [0.5, 2.0] and not shown['faults']
    picture = shown['pictures'][1]
    for exit, threshold in enumerate((1, -1)):
        found, rows = by_inferencer(checkpoint, pictures[1], threshold)
        assert found['exit'] == exit and len(rows) > 3
        assert picture['difficulty'] == pytest.approx(found['difficulty'], abs=1e-5)
        assert same_rows(rows_of(picture['exits'][exit]), rows)
    easy, hard = picture['seconds']
    assert 0 < easy and 0 < hard and (picture['width'], picture['height']) == (96, 96)
    assert picture['src'].startswith('data:image/jpeg;base64,')


def test_a_budget_is_where_the_slider_begins(checkpoint):
    detector = DynamicInferencer(str(CONFIG), str(checkpoint), threshold=0.25, show_progress=False)
    assert BothExits(detector).shown([], [])['threshold'] == 0.25


def test_detectors_of_another_form_are_refused(exits, monkeypatch):
    monkeypatch.setattr(exits._model, 'num_exits', 3)
    with pytest.raises(UsageError, match='two exits'):
        BothExits(exits._detector)


def promise(path, side):
    """A PNG file of few bytes whose head promises many pixels."""

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    content = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + content)


def test_one_bad_picture_is_said_and_stops_no_other(exits, pictures, tmp_path):
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'cut.jpg').write_bytes(pictures[0].read_bytes()[:-200])
    (tmp_path / 'empty.png').write_bytes(b'')
    promise(tmp_path / 'large.png', 40_000)
    promise(tmp_path / 'larger.png', 9_000)
    bad = sorted(tmp_path.iterdir())
    shown = exits.detect_all(read_pictures([*bad, pictures[0]]), [])
    assert [picture['name'] for picture in shown['pictures']] == [pictures[0].name]
    faults = dict(fault.split(' ', 1) for fault in shown['faults'])
    assert set(faults) == {path.name for path in bad}
    assert 'million pixels' in faults['large.png'] and 'million pixels' in faults['larger.png']
    assert 'is no picture' in faults['text.png'] and 'truncated' in faults['cut.jpg']


def test_an_error_in_the_detector_is_that_pictures_alone(exits, pictures, monkeypatch, capsys):
    kept, calls = exits._model.finish, []

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError('out of memory')
        return kept(*arguments)

    monkeypatch.setattr(exits._model, 'finish', fails_once)
    shown = exits.detect_all(read_pictures(pictures[:2]), [])
    assert len(shown['pictures']) == 1 and 'RuntimeError' in shown['faults'][0]
    assert 'out of memory' in capsys.readouterr().err


def test_uploads_are_removed_whatever_happens(exits, pictures, tmp_path, monkeypatch):
    folder, outside = tmp_path / 'uploads', tmp_path / 'outside.jpg'
    uploads = Uploads(exits, folder)

    def upload(name, content):
        path = folder / name / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return str(path)

    good = pictures[0].read_bytes()
    outside.write_bytes(good)
    sent = [upload('a.jpg', good), upload('b.txt', b'text'), str(outside)]
    shown = uploads.pictures(sent)
    assert len(shown['pictures']) == 2 and 'b.txt is no picture' in shown['faults'][0]
    assert list(folder.iterdir()) == [] and outside.exists()
    texts = uploads.pictures([upload(f'{at}.txt', b'') for at in range(9)])
    assert (
        len(texts['faults']) == 1 and '9 files are no pictures, such as 0.txt' in texts['faults'][0]
    )
    many = [upload(f'{at}.jpg', b'') for at in range(MOST_PICTURES + 2)]
    assert f'the first {MOST_PICTURES}' in uploads.pictures(many)['faults'][0]
    film = uploads.film([upload('film.mp4', b'no film')])
    assert film['faults'] and str(tmp_path) not in film['faults'][0]
    old, new = Path(upload('old.jpg', good)), Path(upload('new.jpg', good))
    (folder / 'part').write_bytes(good)
    for path in (old, folder / 'part'):
        os.utime(path, (0, 0))
    uploads.remove_left_over(600)
    assert [path for path in folder.rglob('*') if path.is_file()] == [new]
    assert not old.parent.exists()
    uploads.pictures([str(new)])
    monkeypatch.setattr(exits, 'detect_all', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        uploads.pictures([upload('c.jpg', good)])
    assert list(folder.iterdir()) == []


def write_film(path, frames):
    import av

    with av.open(str(path), 'w') as film:
        stream = film.add_stream('mpeg4', rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for number in range(frames):
            picture = np.full((48, 64, 3), number % 250, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, 'bgr24')))
        film.mux(stream.encode())
    return path


def test_of_a_film_frames_equally_far_apart_are_taken(tmp_path):
    for frames, step in ((3, 1), (MOST_PICTURES, 1), (MOST_PICTURES + 1, 2), (100, 8)):
        found = read_film(write_film(tmp_path / f'{frames}.mp4', frames))
        assert [name for name, _, _ in found] == [f'frame {at}' for at in range(0, frames, step)]
        assert all(picture.shape == (48, 64, 3) and not fault for _, picture, fault in found)


def test_what_cannot_be_served_is_one_line(checkpoint, tmp_path, capsys):
    report = tmp_path / 'report.html'
    arguments = 'web_demo.py', CONFIG, checkpoint
    assert call_tool(*arguments, '--report', report) == 2
    assert 'cannot be read' in capsys.readouterr().err
    report.write_bytes(b'\xff\x00')
    assert call_tool(*arguments, '--report', report) == 2
    report.write_text('{}')
    assert call_tool(*arguments, '--report', report) == 2
    assert 'tools/report.py' in capsys.readouterr().err
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert call_tool(*arguments, '--port', port) == 2
        assert 'choose another with --port' in capsys.readouterr().err
    with pytest.raises(UsageError, match='cannot be listened at'):
        open_socket('127.0.0.1', 70_000)


@pytest.fixture(scope='module')
def server(checkpoint, tmp_path_factory):
    """The address of a running demo, and its folder of temporary files."""
    folder = tmp_path_factory.mktemp('server')
    report, out, err = folder / 'report.html', folder / 'out', folder / 'err'
    report.write_text(
        '<!doctype html><html><h1>What routing is worth</h1>'
        '<script>document.title = 1; document.body.dataset.ran = 1</script></html>'
    )
    (folder / 'tmp').mkdir()
    process = tool_server().start(
        ROOT / 'tools' / 'web_demo.py',
        [CONFIG, checkpoint, '--port', 0, '--max-upload', 1, '--report', report],
        folder,
        {**os.environ, 'TMPDIR': str(folder / 'tmp')},
        (out, err),
        900,
    )
    try:
        end = time.monotonic() + 300
        while not (said := out.exists() and re.search(r'open (http://\S+)', out.read_text())):
            assert time.monotonic() < end and not tool_server().ended(), err.read_text()
            time.sleep(0.1)
        yield said[1], folder / 'tmp'
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGINT)
        tool_server().wait()
    assert list((folder / 'tmp').glob('web_demo_*')) == []
    # Of starlette's, where a page is closed while it waits for an answer.
    _, *faults = err.read_text().split('Traceback')
    assert not [fault for fault in faults if 'No response returned.' not in fault]


def uploaded(folder):
    """Files that are still there."""
    return [path for path in folder.glob('web_demo_*/**/*') if path.is_file()]


@pytest.mark.browser
def test_in_a_browser(server, exits, pictures, tmp_path):
    url, folder = server
    with browser('--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream') as opened:
        shown = Page(opened, url, permissions=['camera'])
        # Of nested tabs, the inner one comes last.
        inner = '[role=tabpanel]:visible >> nth=-1 >> input[type=file]'

        def send(tab, files):
            shown.page.get_by_role('tab', name=tab, exact=True).click()
            shown.page.locator(inner).set_input_files(files)

        # Built-in pictures, without any other server.
        shown.page.get_by_role('tab', name='Examples').click()
        shown.page.get_by_role('button', name='Built-in').click()
        shown.wait_for(8)

        # A picture; the slider moves boxes and cost without a request.
        send('Pictures', [pictures[1]])
        shown.wait_for(1, pictures[1].name)
        shown.slide('score', 0)
        (wanted,) = exits.detect_all(read_pictures([pictures[1]]), [])['pictures']
        asked = len(shown.asked)
        summaries = set()
        for exit, change in enumerate((1e-3, -1e-3)):
            shown.slide('budget', wanted['difficulty'] + change)
            assert same_rows(shown.boxes(), rows_of(wanted['exits'][exit]))
            assert shown.page.get_attribute('.dd-chosen', 'data-exit') == str(exit)
            assert shown.page.locator(f'.dd-both .dd-is-chosen[data-exit="{exit}"]').count() == 1
            summary = shown.page.inner_text('.dd-summary')
            assert f'{exit} of 1 hard' in summary and ('0.500', '2.00')[exit] in summary
            summaries.add(summary)
        assert len(summaries) == 2 and len(shown.asked) == asked
        # Names of classes are text.
        assert shown.page.locator('.dd-box b').count() == 0

        # Several pictures, by share and by time.
        send('Folder', [pictures[0].parent])
        shown.wait_for(3)
        shown.page.click('[data-kind=share]')
        for share in (0, 1):
            shown.slide('budget', share)
            assert shown.exits() == [share] * 3
        shown.page.click('[data-kind=milliseconds]')
        for end in ('min', 'max'):
            shown.slide('budget', shown.page.get_attribute('.dd-budget', end))
            assert shown.exits() == [int(end == 'max')] * 3

        send('Film', [write_film(tmp_path / 'film.mp4', 5)])
        shown.wait_for(5, 'frame 0')

        # What one user does wrong, another does not see.
        other = Page(opened, url)
        (tmp_path / 'text.png').write_text('no picture')
        send('Pictures', [tmp_path / 'text.png'])
        shown.wait_for(0)
        assert 'text.png is no picture' in shown.page.inner_text('.dd-faults')
        (tmp_path / 'large.png').write_bytes(os.urandom(1_100_000))
        send('Pictures', [tmp_path / 'large.png'])
        shown.page.get_by_text('maximum allowed size').first.wait_for()
        other.page.locator(inner).set_input_files([pictures[2]])
        other.wait_for(1, pictures[2].name)

        # The camera, one picture.
        other.page.get_by_role('tab', name='Camera').click()
        other.page.get_by_text('Click to Access Webcam').click()
        other.page.wait_for_function('document.querySelector("video").readyState >= 2')
        other.page.get_by_role('button', name='capture photo').click()
        other.wait_for(1, 'image.png')
        assert uploaded(folder) == []

        other.page.get_by_role('tab', name='Report').click()
        frame = other.page.frame_locator('iframe.report')
        assert frame.locator('h1').inner_text() == 'What routing is worth'
        frame.locator('body[data-ran]').wait_for()

        other.page.set_viewport_size(dict(width=390, height=800))
        assert other.width() <= 390
        for page in (shown, other):
            assert not page.foreign() and not page.errors


@pytest.mark.browser
def test_the_browser_is_told_to_ask_no_other_server(server):
    url, _ = server
    with browser() as opened:
        shown = Page(opened, url)
        refused = shown.page.evaluate(
            "fetch('http://127.0.0.2:9/').then(() => 'asked', (error) => error.message)"
        )
        policy = shown.page.request.get(url).headers['content-security-policy']
        assert refused != 'asked' and "default-src 'self'" in policy
