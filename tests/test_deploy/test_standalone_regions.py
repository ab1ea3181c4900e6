"""Regions in folders that run without this project: what they find is what torch finds."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from standalone_cases import PIPELINE, build, by_torch, delivered, require_same

from conftest import ROOT
from dynamicdet.deploy import standalone_regions, standalone_runtime
from dynamicdet.deploy.deployment import graph_parts
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.deploy.standalone_model import StandaloneDetector, open_standalone
from dynamicdet.errors import UsageError
from dynamicdet.routing import regions as region_choice
from dynamicdet.testing import tiny_dynamic

ONE_BACKBONE = dict(backbones=1, reuse_stages=0)
KINDS = {
    'one backbone': lambda: tiny_dynamic('yolox', regions={}, first_scale=0.5, **ONE_BACKBONE),
    'one backbone, merged': lambda: tiny_dynamic(
        'retinanet', merge='wbf', regions=dict(limit=1), first_scale=0.5, **ONE_BACKBONE
    ),
    'composite, two stages': lambda: tiny_dynamic('faster_rcnn', regions={}, merge='nms'),
    'large images': lambda: tiny_dynamic(
        'yolox', regions=dict(first_size=64, tile=96, limit=4), **ONE_BACKBONE
    ),
}
#: In cells: an inner one, and one at the image's edge.
RECTANGLES = [(0, 0, 1, 2), (3, 4, 4, 5)]
SIZE = (160, 192)
CURVE = ((0.0, 1.0, 1.0, 4.0), (0.2, 0.6, 1.5, 3.0), (0.6, 0.2, 0.8, 2.0), (1.0, 0.0, 0.0, 1.0))


def configured(model):
    loader = dict(dataset=dict(type='x', pipeline=PIPELINE))
    return Config(dict(model=model, test_dataloader=loader))


def write(model, out):
    """Torch's detector with random weights and a calibration, and the folder's."""
    cfg = configured(model)
    built = build(model)
    if built.regions is not None:
        built.regions.class_weights.copy_(torch.tensor([0.5, 2.0, 1.5]))
        built.regions.curve = torch.tensor([[*row, np.nan] for row in CURVE], dtype=torch.float64)
    torch.save(dict(state_dict=built.state_dict(), meta={}), out.with_suffix('.pth'))
    export_standalone(cfg, str(out.with_suffix('.pth')), str(out))
    return built, open_standalone(str(out), threads=1)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    kept, place = {}, tmp_path_factory.mktemp('regions')

    def get(kind):
        if kind not in kept:
            kept[kind] = write(KINDS[kind](), place / kind.replace(' ', '_').replace(',', ''))
        return kept[kind]

    return get


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_found_in_regions_is_torchs(kind, written, monkeypatch):
    """At no price, at an infinite one, and with two crops."""
    model, detector = written(kind)
    monkeypatch.setattr(
        region_choice,
        'choose_rectangles',
        lambda gains, price, *rest: (
            RECTANGLES if 0 < price < np.inf else [] if price else [(0, 0, *gains.shape)]
        ),
    )
    monkeypatch.setattr(
        'dynamicdet.models.regions.choose_rectangles', region_choice.choose_rectangles
    )
    batch, given = delivered(model, SIZE)
    for threshold, exit, count in ((-1.0, 1, 1), (0.5, 1, 2), (1.0, 0, 0)):
        model.set_budget(threshold=threshold)
        found, sample = detector.run(*given, threshold), by_torch(model, batch)
        assert len(found.scores) and found.exit == sample.exit == exit
        assert len(found.regions) == count
        np.testing.assert_allclose(found.regions, sample.regions, atol=1e-6)
        require_same(found, sample, given[1])


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_worth_its_price_is_torchs(kind, written):
    model, detector = written(kind)
    counts = []
    for seed in range(4):
        batch, given = delivered(model, SIZE, seed)
        model.set_budget(threshold=1.0)
        highest = by_torch(model, batch).difficulty
        assert 0 < highest < 1
        for share in (0.5, 0.9):
            model.set_budget(threshold=share * highest)
            found, sample = detector.run(*given, share * highest), by_torch(model, batch)
            assert found.difficulty == pytest.approx(sample.difficulty, abs=1e-5)
            assert found.exit == sample.exit == 1
            np.testing.assert_allclose(found.regions, sample.regions, atol=1e-6)
            counts.append(len(found.regions))
    assert max(counts)


def test_a_fitted_router_of_regions_is_torchs(tmp_path):
    model = KINDS['one backbone']()
    built = build(model)
    router = built.regions.router
    router.start_training()
    with torch.no_grad():
        router.layers[0].weight.uniform_(0.1, 0.4, generator=torch.Generator().manual_seed(1))
        router.layers[0].bias.fill_(0.02)
        router.mean.fill_(0.3)
        router.std.fill_(1.7)
    cfg = configured(model)
    torch.save(dict(state_dict=built.state_dict(), meta={}), tmp_path / 'fitted.pth')
    export_standalone(cfg, str(tmp_path / 'fitted.pth'), str(tmp_path / 'fitted'))
    detector = open_standalone(str(tmp_path / 'fitted'), threads=1)
    batch, given = delivered(built, SIZE)
    built.set_budget(threshold=1.0)
    sample, found = by_torch(built, batch), detector.run(*given, 1.0)
    assert 0 < found.difficulty == pytest.approx(sample.difficulty, abs=1e-5)


def test_shares_of_pixels_are_prices(written):
    model, detector = written('one backbone')
    for share in (0.0, 0.1, 0.4, 1.0):
        model.set_budget(hard_share=share)
        assert detector.threshold_for(hard_share=share) == pytest.approx(float(model.threshold))
    for budget in (dict(hard_share=1.5), dict(threshold=2.0), dict(threshold=0.5, hard_share=0.5)):
        with pytest.raises(ValueError):
            detector.threshold_for(**budget)


#: Runs a folder's runtime.py where neither torch nor this project can be imported.
ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'mmdet', 'mmcv', 'mmengine', 'dynamicdet', 'cv2'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
sys.argv[:2] = ['runtime.py']
import runtime
runtime.whole.main(runtime.Detector)
"""


def test_the_folder_stands_alone(written, tmp_path):
    _, detector = written('one backbone')
    folder = tmp_path / 'alone'
    write(KINDS['one backbone'](), folder)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    for share, exit in (('0', 0), ('1', 1)):
        done = subprocess.run(
            [
                *(sys.executable, '-c', ALONE, str(folder), str(tmp_path / 'image.png')),
                *('--folder', str(folder), '--hard-share', share, '--min-score', '0'),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        found = detector(np.ascontiguousarray(pixels[..., ::-1]), hard_share=float(share))
        assert found.exit == exit and len(found.scores)
        assert done.stdout.splitlines()[0] == (
            f'exit {exit}, difficulty {found.difficulty:.3f}, {len(found.scores)} objects'
        )


def test_runtimes_do_not_take_each_others_folders(written, tmp_path):
    folder = tmp_path / 'regions'
    write(KINDS['one backbone'](), folder)
    with pytest.raises(ValueError, match='standalone.regions'):
        standalone_runtime.Detector(folder)
    about = json.loads((folder / 'detector.json').read_text())
    (folder / 'detector.json').write_text(json.dumps(dict(about, format='dynamicdet.standalone')))
    with pytest.raises(ValueError, match='standalone.regions'):
        standalone_regions.Detector(folder)


def test_a_runner_tests_it(written, tmp_path):
    folder = tmp_path / 'regions'
    model, _ = write(KINDS['one backbone, merged'](), folder)
    deployed = StandaloneDetector(str(folder), budget=dict(hard_share=0.4))
    model.set_budget(hard_share=0.4)
    assert deployed.threshold == pytest.approx(float(model.threshold))
    batch, given = delivered(model, SIZE)
    sample = deployed.test_step(copy.deepcopy(batch))[0]
    assert sample.regions == deployed.detector.run(*given, deployed.threshold).regions
    with pytest.raises(UsageError, match='hard_share'):
        StandaloneDetector(str(folder), budget=dict(target_gflops=2.0))


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (dict(regions=dict(router=dict(hidden=4))), 'hidden channels'),
        (dict(regions=None, merge='nms'), 'merged exits'),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(change, said, tmp_path):
    model = dict(KINDS['one backbone'](), **change)
    with pytest.raises(UsageError, match=said) as caught:
        write(model, tmp_path / 'out')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()


def test_the_copy_needs_numpy_alone(tmp_path):
    write(KINDS['one backbone'](), tmp_path / 'folder')
    shutil.copytree(tmp_path / 'folder' / 'numerics', tmp_path / 'numerics')
    script = ALONE.split('sys.path')[0] + (
        "sys.path.insert(0, '.')\n"
        'from numerics.routing import box_merging, region_cells, region_tree, regions\n'
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'onnxruntime'}))"
    )
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.stdout == '[]\n', done.stderr
    source = (ROOT / 'projects/dynamicdet/deploy/standalone_regions.py').read_text()
    assert source.count('\n') <= 160


def test_layers_in_float16_serve_regions(tmp_path):
    """As the same detector's in float32, but for rounding."""
    _, whole = write(KINDS['one backbone'](), tmp_path / 'whole')
    path = str(tmp_path / 'whole.pth')
    graphed = graph_parts(configured(KINDS['one backbone']()), path, half=True)
    out = str(tmp_path / 'half')
    export_standalone(configured(KINDS['one backbone']()), path, out, graphed=graphed)
    half = open_standalone(out, threads=1)
    assert half.about['precision'] == 'float16'
    _, given = delivered(build(KINDS['one backbone']()), SIZE)
    for threshold in (-1.0, 1.0):
        found, wanted = half.run(*given, threshold), whole.run(*given, threshold)
        assert found.exit == wanted.exit and found.regions == wanted.regions
        assert found.difficulty == pytest.approx(wanted.difficulty, abs=0.05)
        assert found.scores[:3] == pytest.approx(wanted.scores[:3], abs=0.02)
