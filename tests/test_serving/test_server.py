"""A server as a process: it is started, asked by many at once, and ended while it works."""

import base64
import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image

from conftest import ROOT, SEED, free_port, load_small, run_tool, same_detections, write_random
from dynamicdet.apis import DynamicInferencer
from dynamicdet.deploy.deployment import deploy
from dynamicdet.deploy.folder import MANIFEST, _digest, open_detector
from dynamicdet.errors import UsageError
from dynamicdet.serving.app import build_app
from dynamicdet.serving.batcher import Batcher, Busy, Stopping
from mmdet.utils import register_all_modules


@pytest.fixture(scope='module')
def small(digits, tmp_path_factory):
    """Paths of a config and of a checkpoint, and a threshold that parts the test's pictures."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('served')
    cfg = load_small('dy_faster_rcnn_digits', digits, folder)
    cfg.dump(folder / 'config.py')
    classes = tuple('0123456789')
    checkpoint = write_random(cfg, folder / 'random.pth', dataset_meta=dict(classes=classes))
    detector = DynamicInferencer(cfg, checkpoint, 'cpu', show_progress=False, threshold=-1.0)
    found = detector([str(path) for path in pictures_of(digits)])['predictions']
    scores = sorted(result['difficulty'] for result in found)
    gap = int(np.argmax(np.diff(scores)))
    return folder / 'config.py', checkpoint, sum(scores[gap : gap + 2]) / 2


def pictures_of(digits):
    return sorted((digits / 'train').glob('*.*'))


class Server:
    """A process of tools/serve.py."""

    def __init__(self, *arguments, folder):
        self.log = open(folder / f'log-{free_port()}.txt', 'w+')
        command = [sys.executable, str(ROOT / 'tools/serve.py'), *map(str, arguments)]
        self.process = subprocess.Popen(
            [*command, '--port', '0'],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=folder,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith('serving on '):
                break
        self.log.seek(0)
        assert self.lines and self.lines[-1].startswith('serving on '), self.log.read()
        self.url = self.lines[-1].split()[-1]

    def metrics(self):
        text = httpx.get(f'{self.url}/metrics').text
        return {name: float(value) for name, value in re.findall(r'^([^# ]\S*) (\S+)$', text, re.M)}

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.fixture(scope='module')
def server(small, tmp_path_factory):
    config, checkpoint, threshold = small
    served = Server(
        config, checkpoint, '--threshold', threshold, '--max-bytes', 300_000,
        folder=tmp_path_factory.mktemp('server'),
    )  # fmt: skip
    yield served
    assert served.end() == 0


def raw(url, data, kind='image/png', **query):
    return httpx.post(
        f'{url}/detect', content=data, headers={'content-type': kind}, params=query, timeout=60
    )


def form(url, data):
    return httpx.post(f'{url}/detect', files=dict(image=('a.png', data)), timeout=60)


def in_json(url, data):
    return httpx.post(f'{url}/detect', json=dict(image=base64.b64encode(data).decode()), timeout=60)


def as_instances(result, boxes='boxes'):
    return InstanceData(
        bboxes=torch.tensor(result[boxes]).reshape(-1, 4),
        scores=torch.tensor(result['scores']),
        labels=torch.tensor(result['labels'], dtype=torch.long),
    )


def require_same(found, wanted):
    assert found['exit'] == wanted['exit']
    assert found['difficulty'] == pytest.approx(wanted['difficulty'], abs=1e-5)
    assert same_detections(as_instances(found), as_instances(wanted, 'bboxes'))


def test_twenty_clients_get_what_the_inferencer_finds(server, small, digits):
    config, checkpoint, threshold = small
    paths = pictures_of(digits)
    detector = DynamicInferencer(str(config), checkpoint, 'cpu', show_progress=False)
    wanted = detector([str(path) for path in paths], threshold=threshold)['predictions']
    assert {result['exit'] for result in wanted} == {0, 1} and all(
        result['scores'] for result in wanted
    )

    def ask(number):
        path = paths[number % len(paths)]
        return (raw, form, in_json)[number % 3](server.url, path.read_bytes())

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(60)))
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found['names'] == [str(label) for label in found['labels']]
        require_same(found, wanted[number % len(paths)])
    known = server.metrics()
    assert known['dynamicdet_requests_total{status="200"}'] >= 60
    assert known['dynamicdet_latency_seconds_count{exit="1"}'] > 0
    assert known['dynamicdet_batch_size_count{pass="later"}'] > 0
    # Some passes took several pictures.
    assert (
        known['dynamicdet_batch_size_sum{pass="first"}']
        > known['dynamicdet_batch_size_count{pass="first"}']
    )
    assert 0 < known['dynamicdet_hard_share'] < 1 and known['dynamicdet_pictures'] == 0


def test_low_scores_can_be_left_out(server, digits):
    data = pictures_of(digits)[0].read_bytes()
    every = raw(server.url, data).json()['scores']
    middle = sorted(every)[len(every) // 2]
    assert raw(server.url, data, min_score=middle).json()['scores'] == [
        score for score in every if score >= middle
    ]


def huge(width=40_000, height=40_000):
    """The head of a PNG file of so many pixels, and some of its data."""

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', head)
        + chunk(b'IDAT', zlib.compress(bytes(100_000)))
        + chunk(b'IEND', b'')
    )


def jpeg(size=(80, 60), kind='JPEG'):
    content = io.BytesIO()
    noise = np.random.default_rng(SEED).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(content, kind)
    return content.getvalue()


BAD = {
    'a text': (b'Dear server,\n', 'image/jpeg', 400, 'is no JPEG or PNG file'),
    'nothing': (b'', 'image/jpeg', 400, 'empty'),
    'a truncated JPEG': (jpeg()[:-400], 'image/jpeg', 400, 'truncated'),
    'a truncated PNG': (jpeg(kind='PNG')[:-400], 'image/png', 400, 'damaged'),
    'another kind of picture': (jpeg(kind='BMP'), 'image/jpeg', 400, 'is no JPEG or PNG file'),
    'a bomb': (huge(), 'image/png', 413, 'pixels'),
    'a smaller bomb': (huge(9_000, 9_000), 'image/png', 413, '9,000 x 9,000 pixels'),
    'too many bytes': (bytes(300_001), 'image/png', 413, 'more than 300,000 bytes'),
    'a page': (b'<html>', 'text/html', 415, "'text/html' is not taken"),
    'no JSON': (b'{"image"', 'application/json', 400, 'no JSON'),
    'deep JSON': (b'[' * 100_000, 'application/json', 400, 'no JSON'),
    'a URL': (b'{"image": "http://127.0.0.1/a.png"}', 'application/json', 400, 'URLs'),
    'a number': (b'{"image": 3}', 'application/json', 400, 'base64'),
    'more than that': (b'{"image": "", "url": ""}', 'application/json', 400, 'base64'),
    'a form without an end': (b'--x', 'multipart/form-data', 400, 'form cannot be read'),
    'an empty form': (b'--x--\r\n', 'multipart/form-data; boundary=x', 400, "'image'"),
    'a thin one': (jpeg((1, 500)), 'image/jpeg', 400, 'as long as wide'),
}


@pytest.mark.parametrize('data, kind, status, words', BAD.values(), ids=BAD)
def test_what_is_no_picture_gets_one_line(server, data, kind, status, words):
    answer = raw(server.url, data, kind)
    assert answer.status_code == status, answer.text
    assert words in answer.json()['detail'] and '\n' not in answer.json()['detail']
    # And the next is served.
    assert raw(server.url, jpeg(), 'image/jpeg').status_code == 200


def test_other_pages(server):
    assert httpx.get(f'{server.url}/healthz').json() == dict(status='ok')
    assert httpx.get(f'{server.url}/readyz').json() == dict(status='ok')
    assert httpx.get(f'{server.url}/docs').status_code == 200
    assert raw(server.url, jpeg(), 'image/jpeg', min_score=2).status_code == 422
    assert httpx.get(f'{server.url}/detect').status_code == 405


@pytest.fixture(scope='module')
def api(server):
    pictures = st.sampled_from([jpeg(), jpeg(kind='PNG'), jpeg((1, 9))])
    for kind in ('image/jpeg', 'image/png', 'application/octet-stream'):
        schemathesis.openapi.media_type(kind, pictures)
    schemathesis.openapi.format('binary', pictures)
    schemathesis.openapi.format('byte', pictures.map(lambda data: base64.b64encode(data).decode()))
    return schemathesis.openapi.from_url(f'{server.url}/openapi.json')


@pytest.mark.parametrize('mode', list(schemathesis.GenerationMode))
def test_it_does_what_its_schema_says(api, mode):
    operations = [operation.ok() for operation in api.get_all_operations()]
    assert {operation.path for operation in operations} == {
        '/detect',
        '/healthz',
        '/readyz',
        '/metrics',
    }
    for operation in operations:

        @seed(SEED)
        @settings(
            max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(timeout=60)

        # Without parameters there is nothing to do wrong.
        if mode is schemathesis.GenerationMode.POSITIVE or operation.path == '/detect':
            check()


def test_what_was_accepted_is_answered_when_it_is_ended(small, digits, tmp_path):
    config, checkpoint, _ = small
    # So much time that every picture goes both ways, whatever waits.
    served = Server(config, checkpoint, '--target-latency', 1000, folder=tmp_path)
    data, count = pictures_of(digits)[0].read_bytes(), 40
    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(raw, served.url, data) for _ in range(count)]
        while True:
            known = served.metrics()
            here = known['dynamicdet_pictures']
            if here + known.get('dynamicdet_requests_total{status="200"}', 0) >= count:
                break
            time.sleep(0.01)
        assert here > 0
        assert served.end() == 0
        answers = [answer.result() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * count
    assert {answer.json()['exit'] for answer in answers} == {1}
    with pytest.raises(httpx.ConnectError):
        raw(served.url, data)


@pytest.fixture
def batcher(small):
    made = []

    def make(detector=None, **settings):
        config, checkpoint, _ = small
        detector = detector or DynamicInferencer(
            str(config), checkpoint, 'cpu', show_progress=False, threshold=-1.0
        )
        made.append(Batcher(detector, **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def answer_of(batcher, data):
    prepared, fault = batcher.detector.prepare(data, 10**6)
    assert fault is None
    with batcher.accepted():
        return batcher.detect(prepared, time.monotonic()).result(60)


def test_a_full_server_refuses_and_a_stopped_one_too(batcher):
    import asyncio

    full = batcher(queue=1)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app(full)), base_url='http://here'
    )

    async def ask(path, **content):
        return await client.request('POST' if content else 'GET', path, **content)

    with full.accepted():
        with pytest.raises(Busy), full.accepted():
            pass
        answer = asyncio.run(ask('/detect', content=jpeg(), headers={'content-type': 'image/jpeg'}))
        assert answer.status_code == 429 and int(answer.headers['retry-after']) > 0
    assert answer_of(full, jpeg())['exit'] == 1
    full.stop()
    with pytest.raises(Stopping), full.accepted():
        pass
    assert not full.alive and not full.ready


def test_a_failure_is_told_and_the_next_is_served(batcher):
    served = batcher()
    prepared, _ = served.detector.prepare(jpeg(), 10**6)
    broken = dict(prepared, inputs=prepared['inputs'][:2])
    with served.accepted(), pytest.raises(UsageError, match='tensor'):
        served.detect(broken, time.monotonic()).result(60)
    assert answer_of(served, jpeg())['exit'] == 1


def test_pictures_of_other_shapes_do_not_change_each_other(batcher):
    served = batcher(target=1000.0)
    data = [jpeg((64, 64)), jpeg((64, 200)), jpeg((100, 64))] * 4
    alone = [answer_of(served, one) for one in data[:3]]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: answer_of(served, one), data))
    for number, found in enumerate(together):
        assert found['difficulty'] == pytest.approx(alone[number % 3]['difficulty'], abs=1e-5)
        assert same_detections(as_instances(found), as_instances(alone[number % 3]))


def test_a_folder_is_served_as_its_checkpoint(small, digits, batcher, tmp_path):
    config, checkpoint, threshold = small
    detector = DynamicInferencer(str(config), checkpoint, 'cpu', show_progress=False)
    deploy(Config.fromfile(config), checkpoint, str(tmp_path / 'deployed'))
    served = batcher(open_detector(str(tmp_path / 'deployed')))
    served.detector.model.set_budget(threshold=threshold)
    for path in pictures_of(digits)[:4]:
        (wanted,) = detector(str(path), threshold=threshold)['predictions']
        require_same(answer_of(served, path.read_bytes()), wanted)

    old = shutil.copytree(tmp_path / 'deployed', tmp_path / 'old')
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest['sha256']
    manifest['version'] -= 1
    (old / MANIFEST).write_text(json.dumps(dict(manifest, sha256=_digest(manifest))))
    (tmp_path / 'alone').mkdir()
    (tmp_path / 'alone' / 'detector.json').write_text('{}')
    for arguments, words in (
        ([old], 'is of version'),
        ([tmp_path / 'alone'], 'stands alone'),
        ([tmp_path / 'deployed', checkpoint], 'takes no checkpoint'),
        ([config], 'a config needs its checkpoint'),
        ([config, checkpoint, '--target-latency', '1e-6'], 'is out of reach'),
        ([config, ROOT / 'README.md'], 'README.md'),
    ):
        require_one_line(run_tool('serve.py', *arguments, '--port', 0), words)


def require_one_line(done, words):
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert 'Traceback' not in done.stderr


def test_a_port_that_is_taken_and_a_library_that_is_missing(server, small, tmp_path):
    config, checkpoint, _ = small
    port = server.url.rpartition(':')[2]
    done = run_tool('serve.py', config, checkpoint, '--port', port)
    require_one_line(done, f'port {port} of 127.0.0.1 is in use')
    require_one_line(run_tool('serve.py', config, checkpoint, '--host', '192.0.2.1'), '192.0.2.1')
    # A module that cannot be imported, before the one that can.
    Path(tmp_path / 'uvicorn.py').write_text('raise ImportError')
    done = run_tool('serve.py', config, checkpoint, PYTHONPATH=str(tmp_path))
    require_one_line(done, 'pip install -r requirements/serve.txt')
