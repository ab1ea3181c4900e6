"""Regions of a digits detector: prices, a fitted map, and the tools that set them."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config

from conftest import ROOT, no_progress, run_tool, same_detections, shrink_options, write_random
from dynamicdet.apis import DynamicInferencer
from dynamicdet.apis.stream import Stream
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from dynamicdet.measuring.region_calibration import calibrate_regions, fit_regions
from dynamicdet.routing.record import write_record
from dynamicdet.routing.regions import PriceCurve
from mmdet.utils import register_all_modules

NAME = 'dy_faster_rcnn_digits_router'


def load_config(digits, **options):
    cfg = Config.fromfile(ROOT / 'configs' / f'{NAME}.py')
    cfg.merge_from_dict({**shrink_options(digits), 'model.regions': {}, **options})
    return cfg


@pytest.fixture(scope='module')
def cfg(digits):
    return load_config(digits)


@pytest.fixture(scope='module')
def path(cfg, tmp_path_factory):
    """Random weights that detect something, of a cascade without a router."""
    register_all_modules(init_default_scope=True)
    file = tmp_path_factory.mktemp('checkpoint') / 'random.pth'
    return write_random(cfg, file, dataset_meta=dict(classes=['x']))


@pytest.fixture
def model(cfg, path):
    return load_dynamic_detector(cfg, path, 'cpu')[0]


@pytest.fixture(scope='module')
def calibrated(cfg, path):
    """The model and what its calibration says."""
    register_all_modules(init_default_scope=True)
    model = load_dynamic_detector(cfg, path, 'cpu')[0]
    return model, calibrate_regions(model, build_loader(cfg.val_dataloader), no_progress, 0.5)


def test_calibration(calibrated):
    model, said = calibrated
    curve = PriceCurve(*model.regions.curve[:, :3].T.numpy())
    assert (curve.thresholds[0], curve.thresholds[-1]) == (0, 1)
    assert (curve.shares[0], curve.shares[-1]) == (1, 0)
    costs = model.regions.curve[:, 3:].numpy()
    # Two small regions may have fewer pixels and cost more than a larger one: between, it may rise.
    assert (costs > 0).all() and (costs[0] > costs[-1]).all()
    # What really ran: all of exit 0, and at no price all of exit 1.
    assert said['g1'] > said['g0'] > 0
    assert costs[-1, 0] == pytest.approx(said['g0'], rel=0.2)
    assert costs[0, 0] == pytest.approx(said['g1'], rel=0.2)
    assert float(model.threshold) == pytest.approx(said['threshold'])
    assert len(model.difficulties) == 6
    assert not torch.equal(
        model.regions.class_weights, torch.ones_like(model.regions.class_weights)
    )


def test_budgets_in_gflops_are_met(calibrated, cfg):
    model, said = calibrated
    assert model.set_budget(target_gflops=said['g1'] * 10) == 0
    middle = float(model.regions.curve[:, 3].mean())
    assert 0 < model.set_budget(target_gflops=middle) < 1
    with pytest.raises(UsageError, match='cannot be met'):
        model.set_budget(target_gflops=said['g0'] / 10)


def test_stream_gives_what_batches_give(calibrated, cfg):
    model, _ = calibrated
    model.set_budget(threshold=float(model.difficulties.median()))
    loader = build_loader(cfg.val_dataloader)
    with torch.no_grad():
        wanted = [sample for batch in loader for sample in model.test_step(batch)]
    with Stream(model, batch_size=2, hard_batch=3) as stream:
        got = list(stream.run(build_loader(cfg.val_dataloader)))
    assert [one.img_id for one in got] == [one.img_id for one in wanted]
    for one, other in zip(got, wanted):
        assert (one.exit, one.regions) == (other.exit, other.regions)
        assert same_detections(one.pred_instances, other.pred_instances)


def write_findable(record, path):
    """An annotation file of the surest boxes that exit 1 finds in a record's images."""
    known = record.provenance['categories']
    annotations = [
        dict(one, id=0, image_id=identity, area=one['bbox'][2] * one['bbox'][3], iscrowd=0)
        for identity, found in zip(record.ids.tolist(), record.detections[1])
        for one in found[:3]
    ]
    content = dict(
        images=[
            dict(id=one, file_name=f'{one}.jpg', width=128, height=128)
            for one in record.ids.tolist()
        ],
        categories=[dict(id=one, name=f'thing {one}') for one in known],
        annotations=[dict(one, id=number) for number, one in enumerate(annotations, 1)],
    )
    path.write_text(json.dumps(content))
    return str(path)


def test_fit_and_tools(cfg, path, digits, tmp_path):
    """Record, fit, calibrate, test and the inferencer, one after the other."""
    model = load_dynamic_detector(cfg, path, 'cpu')[0]
    loader = build_record_loader(cfg, 'val')
    record = record_data_set(model, cfg, loader, no_progress, 'none', path)
    assert record.frame.shape == (6, 4) and (record.frame[:, :2] == 128).all()
    # Random weights find none of the digits: what exit 1 finds becomes what there is.
    record.provenance['ann_file'] = write_findable(record, tmp_path / 'findable.json')
    write_record(record, tmp_path / 'val.npz')
    config = tmp_path / 'regions.py'
    cfg.dump(config)
    done = run_tool(
        'fit_router.py',
        config,
        path,
        '--records',
        tmp_path / 'val.npz',
        '--out',
        tmp_path / 'fitted.pth',
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'regions fitted to 6 images' in done.stdout
    done = run_tool(
        'calibrate.py', config, tmp_path / 'fitted.pth', '--device', 'cpu', '--no-data-check'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'share of pixels 0.5' in done.stdout
    state = read_checkpoint(str(tmp_path / 'fitted.pth'))['state_dict']
    assert state['regions.router.trained'] and len(state['regions.curve'])
    done = run_tool(
        'test.py',
        config,
        tmp_path / 'fitted.pth',
        '--hard-share',
        0.4,
        '--no-data-check',
        '--cfg-options',
        f'work_dir={tmp_path}',
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'hard: ' in done.stdout
    inferencer = DynamicInferencer(
        str(config), str(tmp_path / 'fitted.pth'), device='cpu', show_progress=False
    )
    image = np.zeros((64, 64, 3), np.uint8)
    (result,) = inferencer(image, threshold=0)['predictions']
    assert result['exit'] == 1 and result['regions'] == [[0, 0, 64, 64]]
    with pytest.raises(UsageError, match='first_size'):
        DynamicInferencer(str(config), str(tmp_path / 'fitted.pth'), device='cpu', full_size=True)
    cfg = copy.deepcopy(cfg)
    cfg.model.regions = dict(first_size=64)
    large = DynamicInferencer(
        cfg, str(tmp_path / 'fitted.pth'), device='cpu', full_size=True, show_progress=False
    )
    (result,) = large(np.zeros((200, 300, 3), np.uint8), threshold=0)['predictions']
    assert result['regions'] == [[0, 0, 300, 200]]
    done = run_tool(
        'export.py', config, tmp_path / 'fitted.pth', '--out', tmp_path / 'out', '--dry-run'
    )
    assert done.returncode and 'regions are not exported yet' in done.stderr
    with pytest.raises(UsageError, match='online'):
        DynamicInferencer(
            str(config), str(tmp_path / 'fitted.pth'), device='cpu', online=True, hard_share=0.5
        )


def test_what_cannot_be_fitted(model, cfg, path):
    record = record_data_set(model, cfg, build_record_loader(cfg, 'val'), no_progress, 'none', path)
    model.regions.router.in_channels = (8,)
    with pytest.raises(UsageError, match='no maps'):
        fit_regions(model, [record])


def rank_results(rank, folder, dumped, checkpoint):
    register_all_modules(init_default_scope=True)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    cfg = Config.fromfile(dumped)
    model = load_dynamic_detector(cfg, checkpoint, 'cpu')[0]
    model.set_budget(threshold=0.2)
    dataset = build_loader(cfg.val_dataloader).dataset
    results = {}
    with torch.no_grad():
        for row in range(rank, len(dataset), 2):
            one = dataset[row]
            batch = dict(inputs=[one['inputs']], data_samples=[one['data_samples']])
            (sample,) = model.test_step(batch)
            results[row] = (sample.difficulty, sample.exit, sample.regions)
    torch.save(results, f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_look_at_the_same_regions_as_one(cfg, path, tmp_path):
    dumped = str(tmp_path / 'regions.py')
    cfg.dump(dumped)
    torch.multiprocessing.spawn(rank_results, (str(tmp_path), dumped, path), nprocs=2)
    found = {}
    for rank in range(2):
        found.update(torch.load(tmp_path / f'{rank}.pth', weights_only=True))
    model = load_dynamic_detector(cfg, path, 'cpu')[0]
    model.set_budget(threshold=0.2)
    with torch.no_grad():
        samples = [
            sample
            for batch in build_loader(cfg.val_dataloader)
            for sample in model.test_step(batch)
        ]
    assert len(found) == len(samples) == 6
    for row, sample in enumerate(samples):
        difficulty, exit, regions = found[row]
        assert difficulty == pytest.approx(sample.difficulty, abs=1e-4)
        assert (exit, regions) == (sample.exit, sample.regions)
