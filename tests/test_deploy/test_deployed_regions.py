"""Regions through graphs: crops pass through them, and prices follow from what runs them."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch.utils.data import Subset

from conftest import (
    ROOT,
    RUNTIMES_TO_TRY,
    no_progress,
    run_tool,
    same_detections,
    shrink_options,
    spread_scores,
    write_random,
)
from dynamicdet.apis.stream import Stream
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.deploy.deployment import deploy
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.graphs import Graph, export_parts
from dynamicdet.deploy.latencies import measure_region_seconds, put_latencies
from dynamicdet.errors import UsageError
from dynamicdet.measuring.region_calibration import measure_gain_maps
from dynamicdet.models.detector_parts import find_parts
from dynamicdet.routing.regions import price_curve
from dynamicdet.testing import randomize, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

ONE_BACKBONE = dict(backbones=1, reuse_stages=0, first_scale=0.5)


def pair():
    return dict(
        type='DynamicDetector',
        detector=[tiny_detector('retinanet'), tiny_detector('faster_rcnn')],
        objective='ap',
        regions={},
    )


def dynamic(name, shared=True, **settings):
    return lambda: tiny_dynamic(name, shared=shared, regions={}, **settings)


KINDS = {
    'composite, two stages, masks': dynamic('mask_rcnn'),
    'composite, one stage': dynamic('yolox', shared=False),
    'own stems': dynamic('retinanet', shared=False, reuse_stages=0),
    'one backbone, two stages': dynamic('faster_rcnn', **ONE_BACKBONE),
    'one backbone, merged': dynamic('yolox', merge='nms', **ONE_BACKBONE),
    'pair': pair,
}
#: In cells: an inner one, and one at the image's edge.
RECTANGLES = [(0, 0, 1, 2), (3, 4, 4, 5)]


def build(kind):
    return spread_scores(randomize(MODELS.build(KINDS[kind]()), seed=1)).eval()


@pytest.fixture(scope='module')
def exported():
    kept = {}

    def get(kind):
        if kind not in kept:
            kept[kind] = export_parts(build(kind), (64, 96))
        return kept[kind]

    return get


@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
@pytest.mark.parametrize('kind', KINDS)
def test_crops_pass_through_graphs(kind, runtime, exported):
    """At no price, at an infinite one and with two crops an image has what torch finds."""
    model, deployed = build(kind), build(kind)
    for part in find_parts(deployed):
        graph = exported(kind)[part.name]
        part.place(Graph(graph.content, graph.form, runtime=runtime))
    batch = tiny_batch((1, 2), (160, 192))
    for one in (model, deployed):
        one.regions.choose = lambda gains, threshold: RECTANGLES if threshold == 0.5 else []
    for threshold, exit, count in ((-1, 1, 1), (0.5, 1, 2), (1, 0, 0)):
        results = []
        for one in (model, deployed):
            one.set_budget(threshold=threshold)
            with torch.no_grad():
                results.append(one.test_step(copy.deepcopy(batch)))
        for expected, got in zip(*results):
            assert len(expected.pred_instances)
            assert same_detections(got.pred_instances, expected.pred_instances)
            assert got.exit == exit and len(got.regions) == count
            assert got.regions == expected.regions
            assert got.difficulty == pytest.approx(expected.difficulty, abs=1e-4)


@pytest.fixture(scope='module')
def calibrated(digits, tmp_path_factory):
    """Config and checkpoint of a small detector whose regions are calibrated, and its images."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('regions')
    cfg = Config.fromfile(ROOT / 'configs/dy_faster_rcnn_digits_router.py')
    cfg.merge_from_dict({**shrink_options(digits), 'model.regions': {}})
    cfg.val_dataloader.batch_size = 1
    path = write_random(cfg, folder / 'random.pth')
    model = load_dynamic_detector(cfg, path, 'cpu')[0]
    loader = build_loader(cfg.val_dataloader)
    # As tools/calibrate.py, but for costs, which would take long to measure.
    maps = measure_gain_maps(model, loader, no_progress)
    curve = price_curve(maps)
    costs = [1 + 2 * curve.shares, np.full(len(curve.shares), 60.0)]
    model.regions.curve = torch.from_numpy(np.column_stack([*curve, *costs]))
    difficulties = sorted(model.regions.difficulty(gain_map) for gain_map in maps)
    model.difficulties = torch.tensor(difficulties)
    model.set_budget(hard_share=0.4)
    torch.save(dict(state_dict=model.state_dict()), folder / 'calibrated.pth')
    return cfg, str(folder / 'calibrated.pth'), model, loader


@pytest.fixture(scope='module')
def folders(calibrated, tmp_path_factory):
    """A folder in float32 and one in 8 bits, each with what was done."""
    cfg, path, _, loader = calibrated
    root, few = tmp_path_factory.mktemp('deployed'), Subset(loader.dataset, [0, 1])
    float32, int8 = str(root / 'float32'), str(root / 'int8')
    return dict(
        float32=(float32, deploy(cfg, path, float32, timed=few)),
        int8=(int8, deploy(cfg, path, int8, loader, images=4, timed=few)),
    )


def share_of(model, loader):
    with torch.no_grad():
        samples = [sample for batch in loader for sample in model.test_step(batch)]
    return np.mean([sample.exit for sample in samples])


@pytest.mark.parametrize('kind', ['float32', 'int8'])
def test_a_folder_has_prices_and_their_costs_in_its_runtime(kind, folders, calibrated):
    _, _, model, loader = calibrated
    out, about = folders[kind]
    deployed = load_deployed(out)
    curve, known = deployed.regions.curve, model.regions.curve
    # What is found at a price is the folder's; how much is looked at, and its GFLOPs, stay.
    assert torch.equal(curve[:, 1:4], known[:, 1:4])
    assert torch.equal(curve[:, 0], known[:, 0]) == (kind == 'float32')
    assert (curve[1:, 0] >= curve[:-1, 0]).all() and (curve[0, 0], curve[-1, 0]) == (0, 1)
    whole, region, pixels = about['latencies']['region_seconds']
    wanted = whole + region * known[:, 2] + pixels * known[:, 1]
    torch.testing.assert_close(curve[:, 4], wanted)
    assert not torch.equal(curve[:, 4], known[:, 4])
    # As many have regions as of the detector in torch.
    for one in (model, deployed):
        one.set_budget(hard_share=0.4)
    assert share_of(deployed, loader) == pytest.approx(share_of(model, loader), abs=0.2)
    seconds = curve[:, 4].numpy()
    middle = float(seconds.min() + seconds.max()) / 2
    assert 0 <= deployed.set_budget(target_latency=middle) <= 1
    with pytest.raises(UsageError, match='cannot be met'):
        deployed.set_budget(target_latency=float(seconds.min()) / 2)


def test_seconds_are_measured_anew(folders, calibrated):
    out, _ = folders['float32']
    deployed, dataset = load_deployed(out), calibrated[3].dataset
    seconds = measure_region_seconds(deployed, dataset, no_progress, 1, 1)
    assert len(seconds) == 3 and min(seconds) >= 0 < max(seconds)
    put_latencies(deployed, [0.01, 0.03], [0.01, 0.0, 0.02])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        threshold = deployed.set_budget(target_latency=0.02)
    curve = deployed.regions.price_curve()
    assert np.interp(threshold, curve.thresholds, curve.shares) == pytest.approx(0.5, abs=1e-6)


def test_a_stream_of_a_folder_gives_what_batches_give(folders, calibrated):
    deployed, loader = load_deployed(folders['float32'][0]), calibrated[3]
    deployed.set_budget(threshold=float(deployed.difficulties.median()))
    with torch.no_grad():
        wanted = [sample for batch in loader for sample in deployed.test_step(batch)]
    assert {sample.exit for sample in wanted} == {0, 1}
    with Stream(deployed, batch_size=2, hard_batch=3) as stream:
        got = list(stream.run(loader))
    for one, other in zip(got, wanted, strict=True):
        assert (one.img_id, one.exit, one.regions) == (other.img_id, other.exit, other.regions)
        assert same_detections(one.pred_instances, other.pred_instances)


def test_the_tool_serves_a_budget_in_time(folders, tmp_path):
    out, about = folders['int8']
    done = run_tool(
        'test_deployed.py',
        out,
        '--images',
        1,
        '--target-latency',
        20,
        '--work-dir',
        tmp_path,
        '--out',
        tmp_path / 'f.json',
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'each region' in done.stdout
    assert len(json.loads((tmp_path / 'f.json').read_text())['region_milliseconds']) == 3


def test_without_images_there_is_no_budget_in_time(calibrated, tmp_path):
    cfg, path, *_ = calibrated
    deploy(cfg, path, str(tmp_path / 'out'))
    deployed = load_deployed(str(tmp_path / 'out'))
    assert deployed.set_budget(hard_share=0.4) < 1
    with pytest.raises(UsageError, match='calibrated for it'):
        deployed.set_budget(target_latency=1.0)
