"""The experiment on real pictures, on made-up ones."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, spread_scores
from dynamicdet.deploy.standalone import export_standalone
from dynamicdet.deploy.standalone_model import open_standalone
from dynamicdet.routing.record import RoutingRecord
from dynamicdet.testing import randomize, tiny_detector
from mmdet.registry import MODELS

sys.path.insert(0, str(ROOT / 'experiments'))
from real_coco import BUDGETS, Judge, last_exit_alone  # noqa: E402
from real_front import System, above, gflops_of, looked_at, systems_of  # noqa: E402
from real_records import dynamic_config, join_annotations, stock_config  # noqa: E402
from real_region_sizes import TwoSizes  # noqa: E402

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 120), keep_ratio=True),
    dict(type='PackDetInputs'),
]


def test_annotations_of_two_folders_are_joined(tmp_path):
    """Pictures that are not at hand are left out, with their objects; ids start anew."""
    data, more = tmp_path / 'data', tmp_path / 'more'
    for folder in (data / 'coco/val2017', data / 'coco/annotations', more):
        folder.mkdir(parents=True)
    for name, first in (('test', 1), ('test_more', 3)):
        content = dict(
            images=[dict(id=one, file_name=f'{one}.jpg') for one in (first, first + 1)],
            annotations=[dict(id=index, image_id=first + index) for index in range(2)],
            categories=[dict(id=1, name='it')],
        )
        (data / f'coco/annotations/{name}.json').write_text(json.dumps(content))
    for path in (data / 'coco/val2017/1.jpg', data / 'coco/val2017/2.jpg', more / '4.jpg'):
        path.touch()
    joined = join_annotations(data, 'test', more)
    assert [image['id'] for image in joined['images']] == [1, 2, 4]
    assert joined['images'][2]['file_name'] == str(more / '4.jpg')
    assert joined['annotations'] == [
        dict(id=index, image_id=image) for index, image in enumerate((1, 2, 4), 1)
    ]
    assert len(join_annotations(data, 'test', None)['images']) == 2


def test_configs_are_of_these_pictures(tmp_path):
    cfg = stock_config(tmp_path / 'test.json', 416)
    assert cfg.test_dataloader.dataset.ann_file == str(tmp_path / 'test.json')
    assert [step.scale for step in cfg.test_dataloader.dataset.pipeline if 'scale' in step] == [
        (416, 416)
    ]
    model = dynamic_config(tmp_path / 'test.json').model
    assert model.first_scale == 0.5 and model.backbones == 1


def test_budgets_are_kept():
    """Exit 0 costs 0.62, exit 1 2.79 GFLOPs; who looks at detections pays 0.3 for each of the
    hard."""
    record = SimpleNamespace(gflops=[0.62, 2.79], provenance=dict(branch0_gflops=0.3))
    judge = Judge.__new__(Judge)
    judge.record = record
    scores = np.arange(1000.0)
    for gflops in BUDGETS:
        for charged in (False, True):
            choice = judge.choice(scores, charged, gflops)
            paid = 0.62 + choice.mean() * (2.17 + 0.3 * charged)
            assert paid == pytest.approx(gflops, abs=2e-3) and choice[-1] == 1 and not choice[0]


def test_the_last_exit_alone_has_no_first_backbone():
    images = [dict(id=1, file='a', difficulty=0.5, detections=[[], []])]
    record = RoutingRecord.from_images(images, [0.62, 2.79], [0.1, 0.2], dict(branch0_gflops=0.3))
    assert last_exit_alone(record).gflops == pytest.approx([2.47, 2.47])


def test_systems_are_compared_at_equal_cost():
    """Of two plain sizes and a third system between them; a size that is dearer and worse than another is none of
    the front."""
    aps = np.array([[10.0, 20.0, 19.0, 18.0]] * 3)
    costs = np.array([[1.0, 2.0, 1.5, 3.0]] * 3)
    assert above(aps, costs, [0, 1], 2) == [4.0, 4.0, 4.0]
    assert above(aps, costs, [3, 1, 0], 2) == [4.0, 4.0, 4.0]
    # Beyond the largest size it is compared with that.
    assert above(aps, costs + [0, 0, 9, 0], [0, 1], 2) == [-1.0, -1.0, -1.0]


def test_gflops_are_of_what_was_looked_at():
    """Exit 0 sees half of the sides, in multiples of 32; regions count what the second exit saw."""
    pictures = np.array([[448, 640, 0], [416, 640, 416 * 640], [640, 640, 128 * 96]])
    plain = gflops_of(System('nano', 'plain', 640), pictures, [1e-6, 1e-6])
    assert plain.tolist() == pytest.approx([0.28672, 0.26624, 0.4096])
    regions = gflops_of(System('nano', 'regions', 640, 0.1), pictures, [1e-6, 1e-6])
    assert regions.tolist() == pytest.approx(
        [1e-6 * 224 * 320, 1e-6 * (192 * 320 + 416 * 640), 1e-6 * (320 * 320 + 128 * 96)]
    )
    pair = gflops_of(System('pair', 'image', 640, 0.3), pictures, [1e-6, 3e-6])
    assert pair.tolist() == pytest.approx(
        [1e-6 * 224 * 320, 1e-6 * 192 * 320 + 3e-6 * 416 * 640, 1e-6 * 320 * 320 + 3e-6 * 128 * 96]
    )
    found = SimpleNamespace(exit=1, regions=[[0, 0, 48, 64.3]])
    given = np.zeros((3, 440, 640), np.uint8), (2.0, 2.0), (220, 320)
    # 96 x 128.6 pixels: the last cell ends beyond the picture.
    assert looked_at(found, given) == (448, 640, 96 * 160)
    assert looked_at(SimpleNamespace(exit=1), given) == (448, 640, 448 * 640)
    assert looked_at(SimpleNamespace(exit=0, regions=[]), given) == (448, 640, 0)


def test_a_plain_detector_is_both_exits_of_regions(tmp_path):
    """At each price: dear ones look at nothing, cheap ones at more; exit 0 runs once."""
    cfg = Config(
        dict(
            model=tiny_detector('yolox'),
            test_dataloader=dict(dataset=dict(type='x', pipeline=PIPELINE)),
        )
    )
    built = spread_scores(randomize(MODELS.build(cfg.model.to_dict()), seed=1)).eval()
    torch.save(dict(state_dict=built.state_dict(), meta={}), tmp_path / 'plain.pth')
    export_standalone(cfg, str(tmp_path / 'plain.pth'), str(tmp_path / 'plain'))
    detector = TwoSizes(open_standalone(str(tmp_path / 'plain'), 1), [1.0, 2.0, 0.5], (64, 128), 1)
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    found, pixels = zip(*(detector.detect(picture, 'a', price) for price in (np.inf, 1e-3, 0.0)))
    assert [one.exit for one in found] == [0, 1, 1] and len(detector.seen) == 1
    assert pixels[0] == 64 * 64 < pixels[1] <= pixels[2] == 64 * 64 + 96 * 128


def test_names_of_systems_and_their_folders():
    assert [system.detector for system in systems_of(['yolov5_n', 'yolox_nano'])][-3:] == [
        'pair'
    ] * 3
    systems = systems_of(['yolox_nano'])
    assert len({system.name for system in systems}) == len(systems) == 16
    assert {system.folder for system in systems} == {
        'yolox_nano_plain', 'yolox_nano_image', 'yolox_nano_regions', 'yolox_nano_large_regions'
    }  # fmt: skip
