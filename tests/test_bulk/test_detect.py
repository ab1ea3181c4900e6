"""Tables of many pictures: what is in them; each picture is there once, whatever happens."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as parquet
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.coco import COCO

from conftest import ROOT, SEED, load_small, run_tool, same_detections, write_random
from dynamicdet.apis import DynamicInferencer
from dynamicdet.bulk import pools
from dynamicdet.bulk.one_process import detect_all
from dynamicdet.bulk.passes import build_passes
from dynamicdet.bulk.sources import list_pictures
from dynamicdet.bulk.table import ResultTable, read_rows, write_coco
from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget
from mmdet.utils import register_all_modules

#: Pictures of the tests, twice over: enough to be killed among.
COPIES = 3


@pytest.fixture(scope='module')
def small(digits, tmp_path_factory):
    """A folder with a config, a checkpoint and pictures, some of which cannot be read; and a
    threshold that parts the others."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('bulk')
    cfg = load_small('dy_faster_rcnn_digits', digits, folder)
    cfg.dump(folder / 'config.py')
    write_random(cfg, folder / 'random.pth', dataset_meta=dict(classes=tuple('0123456789')))
    pictures = folder / 'pictures'
    pictures.mkdir()
    originals = sorted((digits / 'train').glob('*.*'))
    for copy in range(COPIES):
        for path in originals:
            shutil.copy(path, pictures / f'{copy}-{path.name}')
    data = originals[0].read_bytes()
    (pictures / '0-text.jpg').write_text('Dear detector,')
    (pictures / '1-truncated.jpg').write_bytes(data[: len(data) // 2])
    (pictures / '2-empty.jpg').write_bytes(b'')
    Image.new('RGB', (1001, 1000)).save(pictures / '2-large.png')
    detector = DynamicInferencer(
        cfg, str(folder / 'random.pth'), 'cpu', show_progress=False, threshold=-1.0
    )
    found = detector([str(path) for path in originals])['predictions']
    scores = sorted(result['difficulty'] for result in found)
    # About the middle, where the gap is widest: rounding moves nobody.
    third = len(scores) // 3
    gap = third + int(np.argmax(np.diff(scores[third:-third])))
    return folder, sum(scores[gap : gap + 2]) / 2


def builder(small, batch_size=1):
    folder, threshold = small
    return functools.partial(
        build_passes,
        Config.fromfile(folder / 'config.py'),
        str(folder / 'random.pth'),
        'cpu',
        Budget.parse(threshold=threshold),
        batch_size,
        10**6,
    )


def detect(small, out, part_size=5, batch_size=1):
    pictures = list_pictures([str(small[0] / 'pictures')])
    with ResultTable(out, pictures, {}, part_size) as table:
        detect_all(builder(small, batch_size)(), table, lambda _: None)
        table.finish()
    return parquet.read_table(out)


@pytest.fixture(scope='module')
def wanted(small, tmp_path_factory):
    return detect(small, tmp_path_factory.mktemp('wanted') / 'results.parquet')


def arguments(small, out, *more, sources=('pictures',)):
    folder, threshold = small
    return [
        *(folder / source for source in sources), folder / 'config.py', folder / 'random.pth',
        '--out', out, '--threshold', threshold, '--part-size', 5, '--device', 'cpu',
        '--max-pixels', 10**6, *more,
    ]  # fmt: skip


def as_instances(result, boxes):
    return InstanceData(
        bboxes=torch.tensor(result[boxes]).reshape(-1, 4),
        scores=torch.tensor(result['scores']),
        labels=torch.tensor(result['labels'], dtype=torch.long),
    )


@pytest.mark.parametrize('batch_size', [1, 4])
def test_rows_are_what_the_inferencer_finds(small, wanted, batch_size, tmp_path):
    table = wanted if batch_size == 1 else detect(small, tmp_path / 'a.parquet', 7, batch_size)
    rows = table.to_pylist()
    assert [row['picture'] for row in rows] == sorted(
        str(path) for path in (small[0] / 'pictures').iterdir()
    )
    faults = {Path(row['picture']).name: row['error'] for row in rows if row['error']}
    assert set(faults) == {'0-text.jpg', '1-truncated.jpg', '2-empty.jpg', '2-large.png'}
    assert 'truncated' in faults['1-truncated.jpg']
    assert '1,001 x 1,000 pixels' in faults['2-large.png']
    config, checkpoint = (str(small[0] / name) for name in ('config.py', 'random.pth'))
    detector = DynamicInferencer(config, checkpoint, 'cpu', show_progress=False)
    good = [row for row in rows if row['error'] is None]
    found = detector([row['picture'] for row in good], threshold=small[1])['predictions']
    assert {row['exit'] for row in good} == {0, 1}
    for row, result in zip(good, found):
        assert row['exit'] == result['exit'] and (row['width'], row['height']) == (64, 64)
        assert row['difficulty'] == pytest.approx(result['difficulty'], abs=1e-6)
        assert same_detections(as_instances(row, 'boxes'), as_instances(result, 'bboxes'))


def test_tools_table_coco_and_shards(small, wanted, tmp_path):
    folder = small[0]
    with tarfile.open(folder / 'shard.tar', 'w') as shard:
        for path in sorted((folder / 'pictures').iterdir()):
            shard.add(path, path.name)
    done = run_tool(
        'detect.py', *arguments(small, tmp_path / 'a.parquet', '--coco', tmp_path / 'a.json')
    )
    assert done.returncode == 0, done.stderr
    assert parquet.read_table(tmp_path / 'a.parquet').equals(wanted)
    assert f'{len(wanted)} pictures, 4 with an error' in done.stdout and 'pictures/s' in done.stderr
    coco = COCO(tmp_path / 'a.json')
    rows = wanted.to_pylist()
    assert [image['file_name'] for image in coco.imgs.values()] == [
        row['picture'] for row in rows if not row['error']
    ]
    assert sorted(one['score'] for one in coco.anns.values()) == sorted(
        score for row in rows for score in row['scores']
    )
    assert [one['name'] for one in coco.cats.values()] == list('0123456789')
    assert not list(tmp_path.glob('*.parts'))

    # Once more: nothing to do. Other settings: refused.
    done = run_tool('detect.py', *arguments(small, tmp_path / 'a.parquet'))
    assert done.returncode == 0 and 'complete already' in done.stdout
    done = run_tool('detect.py', *arguments(small, tmp_path / 'a.parquet', '--batch-size', 2))
    assert done.returncode == 2 and 'is there already' in done.stderr
    done = run_tool('detect.py', *arguments(small, tmp_path / 'b.parquet', sources=['shard.tar']))
    assert done.returncode == 0, done.stderr
    for row, other in zip(read_rows(tmp_path / 'b.parquet'), rows):
        assert row['picture'] == f'{folder}/shard.tar/{Path(other["picture"]).name}'
        assert dict(row, picture='') == dict(other, picture='')


def test_killed_at_any_moment_it_ends_with_each_picture_once(small, wanted, tmp_path):
    """Whatever it was doing: it is killed after some parts, twice."""
    out, parts = tmp_path / 'a.parquet', tmp_path / 'a.parquet.parts'
    command = [sys.executable, str(ROOT / 'tools/detect.py'), *map(str, arguments(small, out))]
    chance = random.Random(SEED)
    for kills in (1, 2):
        before = len(list(parts.glob('part-*')))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(parts.glob('part-*'))) <= before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
    assert parts.is_dir() and not out.exists()
    # What a kill in the middle of a part leaves is none.
    (parts / '.part-000007.parquet.x').write_bytes(b'half')
    done = run_tool('detect.py', *command[2:])
    assert done.returncode == 0, done.stderr
    assert parquet.read_table(out).equals(wanted)


def test_killed_behind_its_last_step_it_is_complete(small, wanted, tmp_path):
    """The table is there, and so are some of its parts."""
    out, parts = tmp_path / 'a.parquet', tmp_path / 'a.parquet.parts'
    detect(small, out)
    parts.mkdir()
    (parts / 'part-000001.parquet').write_bytes(b'')
    with ResultTable(out, list_pictures([str(small[0] / 'pictures')]), {}, 5) as table:
        assert table.complete
    assert not parts.exists() and parquet.read_table(out).equals(wanted)


def test_a_hard_picture_that_is_gone_has_its_error(small, tmp_path):
    for number in range(4):
        shutil.copy(small[0] / 'pictures' / '0-000001.jpg', tmp_path / f'{number}.jpg')
    passes = builder((small[0], -1.0), 4)()
    rows, hard = passes.first(list_pictures([str(tmp_path)]), hand_over=False)
    (group,) = hard
    (tmp_path / '2.jpg').unlink()
    found = passes.later(group)
    assert [bool(row['error']) for row in found] == [False, False, True, False]
    assert [row['exit'] for row in found] == [1, 1, None, 1]


def test_parts_of_others_are_not_taken(small, tmp_path):
    pictures = list_pictures([str(small[0] / 'pictures')])
    out = tmp_path / 'a.parquet'
    with ResultTable(out, pictures, {}, 4) as table:
        with (
            pytest.raises(UsageError, match='another run is writing'),
            ResultTable(out, pictures, {}, 4),
        ):
            pass
        with pytest.raises(ValueError, match='other pictures'):
            table.write(0, [dict(picture='x')])
        assert table.missing() == list(range(-(-len(pictures) // 4)))
    for other in (ResultTable(out, pictures[1:], {}, 4), ResultTable(out, pictures, dict(a=1), 4)):
        with pytest.raises(UsageError, match='other pictures, detector or settings'), other:
            pass
    out.write_text('no table')
    shutil.rmtree(f'{out}.parts')
    with pytest.raises(UsageError, match='is there already'), ResultTable(out, pictures, {}, 4):
        pass


def test_no_pictures_found_and_no_boxes(tmp_path):
    """A table of errors alone is one."""
    (tmp_path / 'a.jpg').write_bytes(b'')
    with ResultTable(tmp_path / 'a.parquet', list_pictures([str(tmp_path / 'a.jpg')]), {}) as table:
        from dynamicdet.bulk.passes import empty_row

        table.write(0, [empty_row(table.pictures[0], 'is empty')])
        assert table.finish() == dict(pictures=1, errors=1)
    write_coco(tmp_path / 'a.json', tmp_path / 'a.parquet', ['x'])
    content = json.loads((tmp_path / 'a.json').read_text())
    assert content['images'] == content['annotations'] == [] and len(content['categories']) == 1


@pytest.mark.parametrize(
    'share, first, later, sizes',
    [
        (0.5, 1.0, 2.0, (4, 4)),
        (0.5, 1.0, 6.0, (2, 6)),
        (0.0, 1.0, 9.0, (7, 1)),
        (1.0, 1.0, 99.0, (1, 7)),
    ],
)
def test_pools_have_sizes_by_hard_share_and_cost(share, first, later, sizes):
    assert pools.share_out(8, share, first, later) == sizes


@pytest.fixture(scope='module')
def ray():
    ray = pools.start(workers=2)
    yield ray
    ray.shutdown()


def workers():
    """Processes of pools that this process has started, by way of Ray's."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if 'MapWorker' in ' '.join(process.cmdline())
    ]


@pytest.mark.ray
@pytest.mark.parametrize('handover, kill', [('maps', True), ('picture', False)])
def test_two_pools_find_the_same_and_a_killed_worker_loses_nothing(
    small, wanted, ray, tmp_path, handover, kill
):
    build, out, killed = builder(small), tmp_path / 'a.parquet', []
    pictures = list_pictures([str(small[0] / 'pictures')])

    def tell(_):
        if kill and not killed:
            killed.append(random.Random(SEED).choice(workers()).pid)
            os.kill(killed[0], signal.SIGKILL)

    with ResultTable(out, pictures, {}, 5) as table:
        plan = pools.make_plan(ray, build(), table, 2, 0.5, handover=handover)
        assert (plan.first, plan.later, plan.hand_over) == (1, 1, handover == 'maps')
        pools.detect_in_pools(ray, build, table, plan, tell)
        assert len(killed) == kill and table.missing() == []
        table.finish()
    assert parquet.read_table(out).equals(wanted)
