"""Regions of a digits detector: prices, a fitted map, and the tools that set them."""

import copy
import json
import re

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
from dynamicdet.models.budget_control import build_budget_controller, calibrated_otherwise
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.evaluation import read_truth
from dynamicdet.routing.merging import platt_scaling_of
from dynamicdet.routing.record import write_record
from dynamicdet.routing.regions import PriceCurve
from mmdet.registry import MODELS
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
    # What was fitted to scores as they are says nothing of others.
    done = run_tool('calibrate.py', config, tmp_path / 'fitted.pth', '--scores', '--no-data-check')
    assert done.returncode == 2 and 'calibrate --scores first' in done.stderr
    online = DynamicInferencer(
        str(config),
        str(tmp_path / 'fitted.pth'),
        device='cpu',
        online=True,
        hard_share=0.4,
        show_progress=False,
    )
    before = float(online.model.threshold)
    looked_at = [
        (right - left) * (bottom - top)
        for result in online([image] * 5)['predictions']
        for left, top, right, bottom in result['regions']
    ]
    served = sum(looked_at) / (5 * image.shape[0] * image.shape[1])
    # Less is looked at in images to come where it was too much, and more where it was too little.
    assert served != 0.4 and (online.controller.share - 0.4) * (served - 0.4) < 0
    assert float(online.model.threshold) == before


def test_online_the_price_moves(calibrated, cfg):
    """On images unlike those of the calibration, whose prices are off, the share is held."""
    model, _ = calibrated
    curve = model.regions.curve.clone()
    images = list(build_loader(dict(cfg.val_dataloader, batch_size=1))) * 20
    try:
        # As if half as much had been found worth its price.
        model.regions.curve[:, 1] /= 2
        model.regions.curve[0, 1] = 1
        controller = build_budget_controller(model, dict(hard_share=0.3))
        controller.gain = 0.1
        start = controller.threshold
        before = float(model.threshold)
        with Stream(model, batch_size=2, controller=controller) as stream:
            results = list(stream.run(images))
        shares = [area_of(sample) for sample in results]
        assert float(model.threshold) == before and not model.regions._forward_hooks
        assert len(results) == 120 and controller.threshold != start
        assert np.mean(shares[60:]) == pytest.approx(0.3, abs=0.08)
        assert abs(np.mean(shares[60:]) - 0.3) < abs(np.mean(shares[:6]) - 0.3)
    finally:
        model.regions.curve = curve


def area_of(sample):
    """Share of an image's pixels in its regions."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in sample.regions]
    return sum(areas) / np.prod(sample.ori_shape)


def test_online_budgets_need_a_calibration(model):
    with pytest.raises(UsageError, match='calibrated for regions'):
        build_budget_controller(model, dict(target_latency=1.0))


def test_scores_are_scaled_before_prices_are_set(calibrated, model, cfg, path, tmp_path):
    """By whole images, whose exits are not merged then."""
    plain, _ = calibrated
    loader = build_loader(cfg.val_dataloader)
    record = record_data_set(model, cfg, build_record_loader(cfg, 'val'), no_progress, 'none', path)
    loader.dataset.ann_file = write_findable(record, tmp_path / 'findable.json')
    model.merge = Merge.parse('nms')
    calibrate_regions(model, loader, no_progress, 0.5, fit_scores=True)
    wanted = platt_scaling_of(record, read_truth(loader.dataset.ann_file, loader.dataset.cat_ids))
    got = list(zip(model.platt_scale.tolist(), model.platt_shift.tolist()))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    assert wanted[0] != (1.0, 0.0) and str(model.merge).startswith('nms')
    # Prices follow from scores.
    assert not torch.equal(model.difficulties, plain.difficulties)


@pytest.mark.parametrize(
    'then, settings, said',
    [
        (dict(date='x'), dict(merge='nms'), 'without merge, and runs with merge: .*more'),
        (dict(merge='nms'), dict(), 'with merge, and runs without merge: .*less'),
        (dict(regions=True), dict(), 'with regions, and runs without regions: thresholds'),
        (dict(date='x'), dict(regions={}), 'without regions, and runs with regions: thresholds'),
        (dict(merge='nms'), dict(merge='wbf'), None),
        (dict(regions=True), dict(regions={}, merge='nms'), None),
        (dict(), dict(merge='nms'), None),
    ],
)
def test_other_settings_than_the_calibrations_are_said(cfg, then, settings, said):
    cfg = copy.deepcopy(cfg)
    cfg.model.regions = None
    cfg.model.update(settings)
    model = MODELS.build(cfg.model)
    doubt = calibrated_otherwise(model, then)
    assert doubt is None if said is None else re.search(said, doubt) and '\n' not in doubt


def test_the_tool_says_that_it_was_calibrated_otherwise(cfg, path, tmp_path):
    checkpoint = read_checkpoint(path)
    checkpoint['meta'].update(calibration=dict(merge='nms'))
    torch.save(checkpoint, tmp_path / 'other.pth')
    cfg = copy.deepcopy(cfg)
    cfg.dump(tmp_path / 'regions.py')
    arguments = (tmp_path / 'regions.py', tmp_path / 'other.pth', '--threshold', 1)
    done = run_tool('test.py', *arguments, '--no-data-check', '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'calibrated without regions, and runs with regions' in done.stderr
    with pytest.warns(UserWarning, match='without regions, and runs with regions'):
        DynamicInferencer(str(arguments[0]), str(arguments[1]), device='cpu', show_progress=False)


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
