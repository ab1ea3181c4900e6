"""AP and latency of a report: what COCO says of the same detections."""
import pytest
import torch
from conftest import load_small
from pycocotools.coco import COCO

from dynamicdet.apis.calibration import build_loader, coco_results
from dynamicdet.apis.worth import build, measure, metric
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.engine import latest_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.routing.evaluation import evaluate


def plain(steps, _):
    return steps


@pytest.fixture
def on_training_images(digits, tmp_path):
    """A dynamic detector's config whose test set is what it was trained on; all images are easy."""
    annotations = f'{digits}/annotations/instances_train.json'
    return load_small('dy_faster_rcnn_digits', digits, tmp_path, **{
        'model.budget': dict(threshold=1.0),
        'test_dataloader.dataset.ann_file': 'annotations/instances_train.json',
        'test_dataloader.dataset.data_prefix.img': 'train/',
        'test_evaluator.ann_file': annotations}), annotations


@torch.no_grad()
def test_ap_is_cocos(on_training_images, cascade):
    cfg, annotations = on_training_images
    state = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    blind = {key: torch.zeros_like(value) if 'fc_cls' in key else value for key, value in state.items()}
    worth = measure(cfg, dict(one=state, blind=blind), plain)
    model, loader = build(cfg, state, 'cpu'), build_loader(cfg.test_dataloader)
    results = [dict(one, image_id=sample.img_id) for batch in loader for sample in model.test_step(batch)
               for one in coco_results(sample, loader.dataset.cat_ids)]
    wanted = evaluate(COCO(annotations), results)
    # mmdet rounds to three digits.
    assert worth['one'].ap == pytest.approx(wanted['ap'], abs=0.051) and wanted['ap'] > 1
    assert worth['one'].ap50 == pytest.approx(wanted['ap50'], abs=0.051)
    assert not worth['blind'].ap or worth['blind'].ap < worth['one'].ap / 2
    assert all(one.latency > 0 for one in worth.values())


def test_a_checkpoint_of_another_detector(on_training_images):
    with pytest.raises(UsageError, match='does not fit this config'):
        measure(on_training_images[0], dict(one={'w': torch.ones(1)}), plain)


def test_other_evaluators():
    assert metric({'pascal_voc/mAP': 0.25, 'pascal_voc/AP50': 0.5}, 'mAP', 'AP') == 25
    assert metric({'pascal_voc/mAP': 0.25, 'pascal_voc/AP50': 0.5}, 'mAP_50', 'AP50') == 50
    assert metric({}, 'mAP') is None
