"""The static page: made from an export, and in a browser what runtime.py finds."""

import base64
import contextlib
import functools
import http.server
import json
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import Page, browser, same_rows
from mmengine.config import Config
from PIL import Image

from conftest import ROOT, call_tool, write_random
from dynamicdet.deploy import standalone_runtime
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.errors import UsageError
from dynamicdet.web.demo_page import ONNXRUNTIME_WEB, make_demo_page
from mmdet.utils import register_all_modules

#: Files of a detector that are none of onnxruntime-web's, small ones in their place.
RUNTIME = {
    'package.json': '{}',
    'dist/ort.wasm.min.mjs': 'export {}',
    'dist/ort-wasm-simd-threaded.mjs': 'export {}',
    'dist/ort-wasm-simd-threaded.wasm': 'wasm',
}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """An export with random weights that find something, and a calibration."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('alone')
    cfg = Config.fromfile(ROOT / 'configs' / 'dy_yolox_nano_digits.py')
    classes = tuple('0123456789')
    path = write_random(cfg, folder / 'random.pth', dataset_meta=dict(classes=classes))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['state_dict']['difficulties'] = torch.rand(50)
    torch.save(checkpoint, path)
    export_standalone(cfg, path, str(folder / 'out'))
    return folder / 'out'


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / 'package'
    for name, content in RUNTIME.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_the_page_is_the_export_the_runtime_and_examples(alone, package, tmp_path):
    out = tmp_path / 'demo'
    size = make_demo_page(str(alone), str(out), str(package))
    assert size == sum(path.stat().st_size for path in out.iterdir())
    for name in ('first.onnx', 'second.onnx', 'detector.json'):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    assert (out / 'ort-wasm-simd-threaded.wasm').read_text() == 'wasm'
    examples = json.loads((out / 'examples.json').read_text())
    assert len(examples) == 8 and all(Image.open(out / name).size[0] for name in examples)
    # No address of another server stands in what is this project's.
    for name in ('index.html', 'page.js', 'page.css', 'viewer.js', 'viewer.css'):
        assert not re.search(r'https?:|[\'"(]//', (out / name).read_text())
    with pytest.raises(UsageError, match='there already'):
        make_demo_page(str(alone), str(out), str(package))


def test_own_pictures_are_examples_whatever_their_names(alone, package, tmp_path):
    (tmp_path / 'mine').mkdir()
    for name in ('index.html.png', 'a #?%20.png'):
        Image.new('RGB', (30, 20)).save(tmp_path / 'mine' / name)
    out = tmp_path / 'demo'
    make_demo_page(str(alone), str(out), str(package), str(tmp_path / 'mine'))
    assert json.loads((out / 'examples.json').read_text()) == ['example_1.png', 'example_2.png']


def test_what_is_missing_is_said(alone, package, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'demo'
    assert call_tool('make_demo_page.py', tmp_path / 'none', '--out', out) == 2
    assert 'export.py --standalone' in capsys.readouterr().err
    with pytest.raises(UsageError, match='no folder of pictures'):
        make_demo_page(str(alone), str(out), str(package), str(tmp_path / 'none'))
    (package / 'dist/ort-wasm-simd-threaded.wasm').unlink()
    with pytest.raises(UsageError, match=f'no package of onnxruntime-web {ONNXRUNTIME_WEB}'):
        make_demo_page(str(alone), str(out), str(package))
    (tmp_path / 'x.tgz').write_bytes(b'no archive')
    with pytest.raises(UsageError, match='cannot be read as an npm package'):
        make_demo_page(str(alone), str(out), str(tmp_path / 'x.tgz'))
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(UsageError, match='npm, .* is not installed'):
        make_demo_page(str(alone), str(out))
    assert not out.exists()


@contextlib.contextmanager
def served(folder):
    """The address of a plain file server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_address[1]}'
        finally:
            server.shutdown()
            thread.join()


def picture(size, seed):
    """Noise of large patches, as a PNG file keeps it."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope='module')
def page_folder(alone, tmp_path_factory):
    """The page as the command makes it, with the onnxruntime-web that npm gives."""
    out = tmp_path_factory.mktemp('page') / 'demo'
    assert call_tool('make_demo_page.py', alone, '--out', out) == 0
    return out


DROP = """([name, text]) => {
  const data = new DataTransfer();
  const content = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  data.items.add(new File([content], name, {type: name.endsWith('png') ? 'image/png' : ''}));
  document.getElementById('drop').dispatchEvent(
    new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.mark.browser
def test_in_a_browser_it_finds_what_runtime_py_finds(page_folder, alone, tmp_path):
    detector = standalone_runtime.Detector(alone, threads=1)
    with served(page_folder) as url, browser() as opened:
        shown = Page(opened, url)
        shown.wait_for(8)
        assert len(shown.exits()) == 8
        assert not shown.foreign() and not shown.errors

        # A picture is dropped.
        path = tmp_path / 'dropped.png'
        picture((150, 101), 1).save(path)
        image = standalone_runtime.read_image(path)
        shown.page.evaluate(DROP, ['dropped.png', base64.b64encode(path.read_bytes()).decode()])
        shown.wait_for(1, 'dropped.png')
        shown.slide('score', 0)
        difficulty = detector(image, -1).difficulty
        for threshold in (difficulty - 1e-3, difficulty + 1e-3):
            shown.slide('budget', threshold)
            found = detector(image, shown.threshold())
            assert shown.threshold() == pytest.approx(threshold)
            assert shown.page.get_attribute('.dd-chosen', 'data-exit') == str(found.exit)
            rows = np.column_stack([found.boxes, found.scores, found.labels])
            assert len(rows) > 3 and same_rows(shown.boxes(), rows)
            assert same_rows(shown.boxes(f'.dd-both [data-exit="{found.exit}"]'), rows)
        caption = shown.page.inner_text('.dd-both [data-exit="1"] figcaption')
        assert re.search(r'\d+\.\d ms', caption)

        # What is no picture is said, and the next one is shown.
        shown.page.evaluate(DROP, ['notes.txt', base64.b64encode(b'text').decode()])
        shown.wait_for(0)
        assert 'notes.txt is no picture' in shown.page.inner_text('.dd-faults')
        shown.page.set_input_files('#files', [path])
        shown.wait_for(1, 'dropped.png')
        assert not shown.page.is_visible('.dd-faults')

        require_same_delivery(shown.page)
        require_same_thresholds(shown.page, detector)
        shown.page.set_viewport_size(dict(width=390, height=800))
        assert shown.width() <= 390
        assert not shown.foreign() and not shown.errors


def require_same_delivery(page):
    """Pixels that the page's detector is given are runtime.py's, whatever an export says of
    resizing and padding."""
    resize = dict(scale=[61, 47], keep_ratio=True)
    pad = dict(size=None, square=False, divisor=1, value=[114, 3, 255])
    abouts = (
        dict(resize=None, pad=None),
        dict(resize=resize, pad=None),
        dict(resize=dict(resize, keep_ratio=False), pad=dict(pad, divisor=32)),
        dict(resize=resize, pad=dict(pad, size=[64, 70])),
        dict(resize=None, pad=dict(pad, square=True, divisor=8)),
    )
    for size in ((40, 30), (33, 90), (128, 7), (61, 47), (1, 5)):
        image = np.asarray(picture(size, 2))
        every = page.evaluate(
            '([abouts, pixels, size]) => abouts.map((about) => {'
            ' const {image, size: [w, h], scale} = deliver(about, Uint8Array.from(pixels), size);'
            ' return [[...image], w, h, scale]; })',
            [abouts, image.ravel().tolist(), list(size)],
        )
        for about, found in zip(abouts, every):
            wanted, scale = standalone_runtime.Detector.deliver(SimpleNamespace(about=about), image)
            assert (found[2], found[1]) == wanted.shape[:2] and found[3] == list(scale)
            assert found[0] == wanted.ravel().tolist()


def require_same_thresholds(page, detector):
    for difficulties in (detector.about['difficulties'], [0.5], [0.2, 0.2, 0.7], [0.3] * 4):
        detector.about['difficulties'] = difficulties
        shares = np.linspace(0, 1, 21).tolist()
        found = page.evaluate(
            '([known, shares]) => shares.map((share) =>'
            ' DynamicViewer.thresholdForShare(known, share))',
            [difficulties, shares],
        )
        assert found == [detector.threshold_for(hard_share=share) for share in shares]


@pytest.mark.browser
def test_a_page_with_a_changed_graph_says_so(page_folder):
    path = page_folder / 'second.onnx'
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b'x')
    try:
        with served(page_folder) as url, browser() as opened:
            shown = Page(opened, url)
            shown.page.wait_for_selector('#status.fault')
            assert 'second.onnx was changed' in shown.page.inner_text('#status')
    finally:
        path.write_bytes(content)
