"""Plain detectors on a record's pictures: what they find is what the same detector finds as an
exit."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, shrink_options
from dynamicdet.building import load_detector
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.measuring import baselines
from dynamicdet.measuring.baselines import Baseline, at_size, parse_baselines, record_baseline
from dynamicdet.measuring.flops import build_detector, measure_costs
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules


def quiet(steps, _):
    """No progress bar."""
    return steps


def load(digits, name, **options):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    small = shrink_options(digits)
    cfg.merge_from_dict({key: one for key, one in small.items() if not key.startswith('model.')})
    cfg.merge_from_dict(options)
    return cfg


@pytest.fixture(scope='module')
def run(digits, tmp_path_factory):
    """One YOLOX at two sizes, both of its exits the plain detector, and its record."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('baseline')
    plain = load(digits, 'yolox_nano_digits')
    torch.manual_seed(0)
    model = MODELS.build(plain.model)
    model.init_weights()
    # It finds something.
    for conv in [*model.bbox_head.multi_level_conv_obj, *model.bbox_head.multi_level_conv_cls]:
        torch.nn.init.normal_(conv.weight, std=0.1)
        torch.nn.init.zeros_(conv.bias)
    write_checkpoint(dict(state_dict=model.state_dict(), meta={}), folder / 'plain.pth')
    # A batch of several computes convolutions otherwise.
    options = {'val_dataloader.batch_size': 1, 'test_dataloader.batch_size': 1}
    options.update({'model.backbones': 1, 'model.shared': True})
    cfg = load(digits, 'dy_yolox_nano_digits', **options)
    dynamic, _ = load_detector(cfg, str(folder / 'plain.pth'), plain=True)
    loader = build_record_loader(cfg, 'test')
    record = record_data_set(dynamic, cfg, loader, quiet, view='none')
    return SimpleNamespace(
        plain=plain, dynamic=dynamic, loader=loader, record=record, path=str(folder / 'plain.pth')
    )


def baseline_of(run, size=None):
    return Baseline(run.plain, run.path, size, 'plain')


@pytest.mark.parametrize('beside', [False, True])
def test_it_finds_what_the_same_detector_finds_as_the_last_exit(run, beside, monkeypatch):
    with_exits = (run.dynamic, run.loader.dataset) if beside else None
    found = record_baseline(baseline_of(run), run.record, quiet, beside=with_exits)
    assert found.ids.tolist() == run.record.ids.tolist() and found.files == run.record.files
    assert len(found.detections[0].scores) > 20
    for name in ('boxes', 'scores', 'categories', 'offsets'):
        own, its = (getattr(one, name) for one in (found.detections[0], run.record.detections[1]))
        assert np.array_equal(own, its)
    costs = measure_costs(build_detector(run.plain), (128, 128))
    assert found.gflops[0] == pytest.approx(costs.exits[0].flops / 1e9, rel=1e-6)
    assert found.gflops[0] < run.record.gflops[1] and found.latencies[0] > 0
    assert run.dynamic.budget is None or not beside or run.dynamic.threshold == 0.5


def test_sizes_are_other_points(run):
    """At half the size it is the first exit, but for how the picture is made smaller."""
    small = record_baseline(baseline_of(run, 64), run.record, quiet)
    whole = record_baseline(baseline_of(run), run.record, quiet)
    assert small.gflops[0] == pytest.approx(whole.gflops[0] / 4, rel=0.01)
    assert small.provenance['pipeline'] != whole.provenance['pipeline']


def test_seconds_are_those_of_the_record_s_clock(run, monkeypatch):
    """Half as slow here as where it was recorded: times two."""
    medians = {'plain': 0.5, 0: 0.25, 1: 1.0}
    monkeypatch.setattr(
        baselines, 'time_in_turns', lambda runs, *rest, **more: {one: medians[one] for one in runs}
    )
    record = dataclasses.replace(
        run.record, image_latencies=np.tile([0.5, 2.0], (len(run.record), 1))
    )
    both = run.dynamic, run.loader.dataset
    found = record_baseline(baseline_of(run), record, quiet, beside=both)
    assert found.latencies == [1.0, 1.0]
    assert record_baseline(baseline_of(run), record, quiet).latencies == [0.5, 0.5]


def test_it_runs_once(run, tmp_path, monkeypatch):
    first = record_baseline(baseline_of(run), run.record, quiet, folder=tmp_path)

    def never(*_):
        raise AssertionError('it ran again')

    monkeypatch.setattr(baselines, '_detect', never)
    again = record_baseline(baseline_of(run), run.record, quiet, folder=tmp_path)
    assert first == again
    # Other pictures, and another size, are another record.
    for other, size in ((run.record.take([1, 0]), None), (run.record, 96)):
        with pytest.raises(AssertionError, match='ran again'):
            record_baseline(baseline_of(run, size), other, quiet, folder=tmp_path)


def test_classes_go_by_name(run):
    """A detector of more classes, in another order, is judged by those that the record has."""
    provenance = copy.deepcopy(run.record.provenance)
    classes, categories = provenance['classes'], provenance['categories']
    kept = [classes[7], classes[2]], [categories[7], categories[2]]
    fewer = dataclasses.replace(
        run.record, provenance=dict(provenance, classes=kept[0], categories=kept[1])
    )
    found = record_baseline(baseline_of(run), fewer, quiet).detections[0]
    every = run.record.detections[1]
    inside = np.isin(every.categories, kept[1])
    assert 0 < inside.sum() < len(inside)
    assert np.array_equal(found.categories, every.categories[inside])
    assert np.array_equal(found.boxes, every.boxes[inside])
    other = dataclasses.replace(run.record, provenance=dict(provenance, classes=['unicorn'] * 10))
    with pytest.raises(
        UsageError, match="does not know all classes of the record, such as 'unicorn'"
    ):
        record_baseline(baseline_of(run), other, quiet)
    with pytest.raises(UsageError, match='does not say its classes'):
        record_baseline(baseline_of(run), dataclasses.replace(run.record, provenance={}), quiet)


def test_what_is_refused(run, tmp_path):
    moved = dataclasses.replace(run.record, files=['/nowhere/a.png'] * len(run.record))
    with pytest.raises(UsageError, match="there is no picture '/nowhere/a.png'"):
        record_baseline(baseline_of(run), moved, quiet)
    write_checkpoint(dict(state_dict=run.dynamic.state_dict()), tmp_path / 'dynamic.pth')
    dynamic = baseline_of(run)._replace(checkpoint=str(tmp_path / 'dynamic.pth'))
    with pytest.raises(UsageError, match='is no plain detector'):
        record_baseline(dynamic, run.record, quiet)


def test_command_lines(run):
    def read(name):
        assert name == 'configs/a.py'
        return run.plain

    found = parse_baselines(
        [['configs/a.py', 'a.pth', '64', '96'], ['configs/a.py', 'b.pth']], read
    )
    assert [(one.checkpoint, one.size, one.name) for one in found] == [
        ('a.pth', 64, 'a 64'),
        ('a.pth', 96, 'a 96'),
        ('b.pth', None, 'a'),
    ]
    assert parse_baselines(None, read) == []
    with pytest.raises(UsageError, match='takes CONFIG CHECKPOINT'):
        parse_baselines([['configs/a.py']], read)
    with pytest.raises(UsageError, match='whole numbers of pixels'):
        parse_baselines([['configs/a.py', 'a.pth', 'b.pth']], read)
    with pytest.raises(UsageError, match='no test_dataloader with a pipeline'):
        parse_baselines([['configs/a.py', 'a.pth']], lambda name: Config(dict(model={})))


def test_sizes_keep_proportions():
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(1333, 800), keep_ratio=True),
        dict(type='Pad', size=(1344, 800)),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ]
    before = copy.deepcopy(steps)
    found = at_size(steps, 667)
    assert [step['type'] for step in found] == [
        'LoadImageFromFile',
        'Resize',
        'Pad',
        'PackDetInputs',
    ]
    assert found[1]['scale'] == (667, 400) and found[2]['size'] == (673, 400)
    assert at_size(steps, None)[1]['scale'] == (1333, 800) and steps == before
    with pytest.raises(UsageError, match='no Resize with a scale'):
        at_size(steps[:1], 320)
