"""A run that is killed while it records goes on behind the last part, and records the same."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, no_progress, recordable_options, run_tool, write_random
from dynamicdet.building import load_dynamic_detector
from dynamicdet.errors import UsageError
from dynamicdet.measuring import record_parts
from dynamicdet.measuring.record_parts import RecordParts, batches_from
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from dynamicdet.routing.record import join_records
from mmdet.utils import register_all_modules

NAME = 'dy_yolox_nano_digits_router'
#: Records in parts of two images, and is killed before the last batch.
KILLED = """
import os, signal, sys, torch
from mmengine.config import Config
from mmdet.utils import register_all_modules
torch.set_num_threads(1)
register_all_modules(init_default_scope=True)
from dynamicdet.building import load_dynamic_detector
from dynamicdet.measuring import record_parts
from dynamicdet.measuring.recording import build_record_loader, record_data_set
record_parts._PART = 2
cfg = Config.fromfile(sys.argv[1])
model, _ = load_dynamic_detector(cfg, sys.argv[2], 'cpu')
loader = build_record_loader(cfg, 'val')
def until_the_last(batches, what):
    for number, batch in enumerate(batches, 1):
        if number == len(batches):
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
record_data_set(model, cfg, loader, until_the_last, parts=record_parts.RecordParts(sys.argv[3]))
"""


@pytest.fixture(scope='module')
def detector(digits, tmp_path_factory):
    """Config and checkpoint of a small detector, and its data in batches of two."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('detector')
    cfg = Config.fromfile(ROOT / 'configs' / f'{NAME}.py')
    cfg.merge_from_dict({**recordable_options(NAME, digits), 'val_dataloader.batch_size': 2})
    cfg.dump(folder / 'config.py')
    return folder / 'config.py', write_random(cfg, folder / 'random.pth')


def without_clock(record):
    """What does not depend on how fast the machine is."""
    facts = {
        name: fact
        for name, fact in record.provenance.items()
        if 'latency' not in name and name != 'date'
    }
    seconds = dict(latencies=[0.0] * 2, image_latencies=0 * record.image_latencies)
    return dataclasses.replace(record, provenance=facts, **seconds)


def test_a_killed_run_goes_on_and_records_the_same(detector, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    config, checkpoint = detector
    (tmp_path / 'killed.py').write_text(KILLED)
    done = run_tool(tmp_path / 'killed.py', config, checkpoint, tmp_path / 'parts')
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    monkeypatch.setattr(record_parts, '_PART', 2)
    cfg = Config.fromfile(config)
    model, _ = load_dynamic_detector(cfg, checkpoint, 'cpu')
    loader = build_record_loader(cfg, 'val')
    images = len(loader.dataset)
    parts, seen = RecordParts(tmp_path / 'parts'), []
    kept = images - len(list(loader.batch_sampler)[-1])
    assert parts.images == kept > 0

    def watched(batches, what):
        seen.append((what, len(batches)))
        return batches

    record = record_data_set(model, cfg, loader, watched, parts=parts)
    assert ('every exit', 1) in seen
    whole = record_data_set(model, cfg, loader, no_progress)
    assert len(whole) == images and whole.view is not None and whole.losses is not None
    assert without_clock(record) == without_clock(whole)
    parts.remove()
    assert not (tmp_path / 'parts').exists()


def test_parts_end_at_the_first_that_is_damaged(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(record_parts, '_PART', 2)
    config, checkpoint = detector
    cfg = Config.fromfile(config)
    model, _ = load_dynamic_detector(cfg, checkpoint, 'cpu')
    loader = build_record_loader(cfg, 'val')
    record_data_set(model, cfg, loader, no_progress, 'none', parts=RecordParts(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files[:2]] == ['000000.npz', '000001.npz']
    files[1].write_bytes(files[1].read_bytes()[:100])
    parts = RecordParts(tmp_path)
    assert parts.images == 2
    behind = batches_from(loader, 2)
    ids = [sample.img_id for batch in behind for sample in batch['data_samples']]
    assert ids == [
        entry['img_id']
        for entry in map(loader.dataset.get_data_info, range(2, len(loader.dataset)))
    ]
    with pytest.raises(UsageError, match='end inside a batch'):
        batches_from(loader, 1)


def test_joined_records_are_as_the_whole(detector):
    config, checkpoint = detector
    cfg = Config.fromfile(config)
    model, _ = load_dynamic_detector(cfg, checkpoint, 'cpu')
    record = record_data_set(model, cfg, build_record_loader(cfg, 'val'), no_progress)
    halves = [record.take(range(1)), record.take(range(1, len(record)))]
    assert join_records(halves) == record
    halves[1] = dataclasses.replace(halves[1], entropy=None)
    with pytest.raises(UsageError, match='same columns'):
        join_records(halves)
    assert np.diff(record.detections[0].offsets).any()
