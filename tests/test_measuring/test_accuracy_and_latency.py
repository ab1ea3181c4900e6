"""AP and latency of a report: what COCO says of the same detections."""

import pytest
import torch
from pycocotools.coco import COCO

from conftest import load_small, no_progress, on_findable
from dynamicdet.building import build_loader, load_detector
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.compression.size_report import BlockSize, compression_table
from dynamicdet.errors import UsageError
from dynamicdet.files import latest_checkpoint
from dynamicdet.measuring import accuracy_and_latency
from dynamicdet.measuring.accuracy_and_latency import box_ap, measure_detectors
from dynamicdet.measuring.calibration import coco_results
from dynamicdet.routing.evaluation import evaluate


@pytest.fixture
def cfg(digits, findable, tmp_path):
    """A dynamic detector's config whose test set has objects that it finds; all images are easy."""
    return load_small(
        'dy_faster_rcnn_digits',
        digits,
        tmp_path,
        **{**on_findable(findable), 'model.budget': dict(threshold=1.0)},
    )


@torch.no_grad()
def test_ap_is_cocos(cfg, findable, cascade):
    state = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    blind = {
        key: torch.zeros_like(value) if 'fc_cls' in key else value for key, value in state.items()
    }
    found = measure_detectors(cfg, dict(one=state, blind=blind), no_progress)
    model, loader = load_detector(cfg, dict(state_dict=state))[0], build_loader(cfg.test_dataloader)
    results = [
        dict(one, image_id=sample.img_id)
        for batch in loader
        for sample in model.test_step(batch)
        for one in coco_results(sample, loader.dataset.cat_ids)
    ]
    wanted = evaluate(COCO(str(findable)), results)
    # mmdet rounds to three digits.
    assert found['one'].ap == pytest.approx(wanted['ap'], abs=0.051)
    assert found['one'].ap50 == pytest.approx(wanted['ap50'], abs=0.051)
    # Of each figure its own, and of each detector.
    assert 5 < wanted['ap'] < wanted['ap50'] - 1
    assert found['blind'].ap < found['one'].ap / 2
    assert all(one.latency > 0 for one in found.values())


@pytest.mark.parametrize('threshold, shares, seconds', [(1.0, [1, 0], 0.25), (-1.0, [0, 1], 0.75)])
def test_the_latency_is_that_of_the_exits_taken(
    cfg, cascade, monkeypatch, threshold, shares, seconds
):
    cfg.model.budget = dict(threshold=threshold)
    state = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    monkeypatch.setattr(accuracy_and_latency, 'exit_latencies', lambda *_: dict(one=[0.25, 0.75]))
    found = measure_detectors(cfg, dict(one=state), no_progress)['one']
    assert (found.shares, found.latency) == (shares, seconds)
    sizes = [BlockSize('backbone', 4, 0, 16)]
    assert compression_table(sizes, 20, found)[-1].endswith(
        f'ms ({shares[0]:.0%} at exit 0, {shares[1]:.0%} at exit 1)'
    )


@torch.no_grad()
def test_each_exit_is_timed(cfg, cascade):
    model = load_detector(cfg, latest_checkpoint(cascade))[0]
    exits = []
    model.data_preprocessor.register_forward_pre_hook(
        lambda *_: exits.append(float(model.threshold))
    )
    loader = build_loader(cfg.test_dataloader)
    seconds = accuracy_and_latency.exit_latencies(dict(one=model), loader.dataset, no_progress)[
        'one'
    ]
    assert len(seconds) == 2 and min(seconds) > 0
    assert exits == [1.0, -1.0] * (len(exits) // 2) and model.threshold == 1.0


def test_a_checkpoint_of_another_detector(cfg):
    with pytest.raises(UsageError, match='does not fit this config'):
        measure_detectors(cfg, dict(one={'w': torch.ones(1)}), no_progress)


def test_other_evaluators():
    assert box_ap({'pascal_voc/mAP': 0.25, 'pascal_voc/AP50': 0.5}, 'mAP', 'AP') == 25
    assert box_ap({'pascal_voc/mAP': 0.25, 'pascal_voc/AP50': 0.5}, 'mAP_50', 'AP50') == 50
    assert box_ap({}, 'mAP') is None
