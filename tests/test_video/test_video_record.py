"""Records of video runs come back as they were; what is foreign, cut or mixed up is refused in one
line."""

import copy
import json

import numpy as np
import pytest
from video_cases import detection, make_video_record

from dynamicdet.errors import UsageError
from dynamicdet.routing.record import RoutingRecord, read_record, write_record
from dynamicdet.video.record import read_video_record, write_video_record


@pytest.fixture
def record():
    # Scores that float32 holds.
    one, two = [[detection(score=0.875)], [], [detection(score=0.5)] * 2], [[], [], []]
    return make_video_record([[(1.0, one), (2.0, two)], [(0.5, two)]])


def same(one, other):
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and np.array_equal(one, other)
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_comes_back_as_it_was(record, tmp_path):
    before = copy.deepcopy(record)
    write_video_record(record, tmp_path / 'new' / 'videos.npz')
    assert same(record, before)
    assert same(read_video_record(tmp_path / 'new' / 'videos.npz'), record)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['videos.npz']


def test_losses_of_exits_come_along(record, tmp_path):
    for image in record['images']:
        image['losses'] = [0.5, 0.25, 1e-7]
    write_video_record(record, tmp_path / 'videos.npz')
    assert same(read_video_record(tmp_path / 'videos.npz'), record)


def test_is_a_record_for_tools_of_routing(record, tmp_path):
    write_video_record(record, tmp_path / 'videos.npz')
    plain = read_record(tmp_path / 'videos.npz')
    assert [image['difficulty'] for image in plain] == [1.0, pytest.approx(1 / 3), 1.0]
    assert plain[0]['detections'] == record['images'][0]['detections']
    assert plain.gflops == record['gflops']


def test_a_record_of_images_is_refused(record, tmp_path):
    images = [
        dict(id=image['id'], file='a', difficulty=0.5, detections=image['detections'])
        for image in record['images']
    ]
    own = RoutingRecord.from_images(images, record['gflops'], record['latencies'])
    write_record(own, tmp_path / 'images.npz')
    with pytest.raises(UsageError, match='not of a video run'):
        read_video_record(tmp_path / 'images.npz')


def test_cut_short_at_any_byte(record, tmp_path):
    write_video_record(record, tmp_path / 'videos.npz')
    content = (tmp_path / 'videos.npz').read_bytes()
    for length in range(0, len(content), 211):
        (tmp_path / 'cut.npz').write_bytes(content[:length])
        with pytest.raises(UsageError, match='cut short') as error:
            read_video_record(tmp_path / 'cut.npz')
        assert '\n' not in str(error.value)


def test_absent_or_no_record(tmp_path):
    with pytest.raises(UsageError, match='record_video.py'):
        read_video_record(tmp_path / 'absent.npz')
    (tmp_path / 'text.npz').write_text('hello')
    with pytest.raises(UsageError):
        read_video_record(tmp_path / 'text.npz')


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(version=9), 'version 9'),
        (dict(videos=[0, 0]), 'do not fit'),
        (dict(frames=[0, 1.5, 0]), 'do not fit'),
        (dict(widths=[4]), 'do not fit'),
        (dict(widths=[4, 999]), 'fewer features'),
        (dict(videos=None), 'lacks parts'),
        (dict(costs=dict(gflops=dict(early=1.0, looked=[1.0, 2.0, 3.0]))), 'lacks parts'),
        (dict(frames=[0, 0, 0]), 'twice'),
    ],
)
def test_damaged_inside(record, tmp_path, change, message):
    path = tmp_path / 'videos.npz'
    write_video_record(record, path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    provenance = json.loads(str(arrays['provenance']))
    provenance['video_run'].update(change)
    arrays['provenance'] = np.array(json.dumps(provenance))
    np.savez_compressed(path, **arrays)
    with pytest.raises(UsageError, match=message) as error:
        read_video_record(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda record: record.update(images=[]), 'no frames'),
        (lambda record: record['images'][1].pop('early'), 'lack early'),
        (lambda record: record['images'][1].update(frame=0), 'twice'),
        (
            lambda record: record['images'][1].update(pooled=record['images'][1]['pooled'][::-1]),
            'differ in their heads',
        ),
        (lambda record: record['costs']['latencies'].update(early=float('nan')), 'do not fit'),
        (lambda record: record['images'][2].update(change=float('nan')), 'not finite'),
        (lambda record: record['images'][2].update(early=np.zeros(3, np.float32)), 'features'),
    ],
)
def test_bad_records_are_not_written(record, tmp_path, spoil, message):
    spoil(record)
    with pytest.raises(UsageError, match=message):
        write_video_record(record, tmp_path / 'videos.npz')
    assert not list(tmp_path.iterdir())
