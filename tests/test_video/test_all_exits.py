"""AP of each exit in the usual validation, and its picture."""

import contextlib
import io
import json
import uuid

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from pycocotools.coco import COCO

import dynamicdet.datasets.samplers  # noqa: F401  (these register)
import dynamicdet.datasets.video  # noqa: F401
import dynamicdet.video.exit_curve_hook  # noqa: F401
from conftest import ROOT
from dynamicdet.errors import UsageError
from dynamicdet.routing.evaluation import evaluate
from dynamicdet.video.all_exits import ExitsMetric, exit_of
from dynamicdet.video.digits_video import make_digits_video
from dynamicdet.video.exit_curve_hook import draw_history, read_history, updated_history


def test_number_of_an_exit():
    assert [
        exit_of(name)
        for name in ('exit03/bbox_mAP', 'exit12/x', 'coco/bbox_mAP', 'exit/x', 'exitAA/y')
    ] == [3, 12, None, None, None]


def test_history_grows_and_begins_anew():
    history = updated_history(updated_history([], 1, [0.1, 0.2]), 2, [0.2, 0.3])
    assert [one['epoch'] for one in history] == [1, 2]
    assert updated_history(history, 1, [0.5, 0.6]) == [dict(epoch=1, ap=[0.5, 0.6])]


def test_history_of_a_broken_file_is_none(tmp_path):
    path = tmp_path / 'exit_curve.json'
    assert read_history(path) == []
    for content in ('', '{"a": 1}', '[{"epoch": 1}]', '[{"epoch": 1, "ap": [0.1'):
        path.write_text(content)
        assert read_history(path) == []
    path.write_text('[{"epoch": 1, "ap": [0.1, 0.5]}]')
    assert read_history(path) == [dict(epoch=1, ap=[0.1, 0.5])]


def test_picture():
    png = draw_history([dict(epoch=1, ap=[0.1]), dict(epoch=2, ap=[0.2, 0.3])])
    assert png.startswith(b'\x89PNG') and len(png) > 5000


def test_metric_needs_all_exits():
    with pytest.raises(UsageError, match='AllExitsValLoop'):
        ExitsMetric('absent.json').process({}, [dict(pred_instances=None)])


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'videos'
    return make_digits_video(root, dict(train=2, val=2, test=1), length=5, image_size=64, mp4=False)


@pytest.fixture
def cfg(videos, tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/video/early_exit_yolov5_digits.py')
    options = {
        'load_from': None,
        'data_root': f'{videos}/',
        'model.heads.layers': [2, 9],
        'model.heads.channels': 16,
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 1,
    }
    for part in ('backbone', 'detector.backbone', 'detector.neck', 'detector.bbox_head'):
        options[f'model.{part}.width'] = 0.25
    for split in ('train', 'val', 'test'):
        options.update(
            {
                f'{split}_dataloader.dataset.data_root': f'{videos}/',
                f'{split}_dataloader.num_workers': 0,
                f'{split}_dataloader.persistent_workers': False,
                f'{split}_dataloader.batch_size': 2,
            }
        )
        if split != 'train':
            options[f'{split}_evaluator.ann_file'] = f'{videos}/annotations/instances_{split}.json'
    cfg.merge_from_dict(options)
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = f'exits-{uuid.uuid4().hex[:8]}'
    return cfg


def test_training_logs_and_draws_ap_of_each_exit(cfg, tmp_path):
    runner = Runner.from_cfg(cfg)
    found = {}
    runner.val_loop.evaluator.metrics[0].evaluate, plain = (
        (lambda size: found.update(plain(size)) or found),
        runner.val_loop.evaluator.metrics[0].evaluate,
    )
    runner.train()
    assert {
        f'exit{exit:02d}/bbox_{item}' for exit in range(3) for item in ('mAP', 'mAP_50')
    } <= found.keys()
    assert found['coco/bbox_mAP'] == found['exit02/bbox_mAP']
    history = json.loads((tmp_path / 'exit_curve.json').read_text())
    assert [(one['epoch'], len(one['ap'])) for one in history] == [(1, 3)]
    assert (tmp_path / 'exit_curve.png').read_bytes().startswith(b'\x89PNG')


def test_other_detectors_are_told(cfg):
    cfg.model = cfg.model.detector
    with pytest.raises(UsageError, match='EarlyExitDetector'):
        Runner.from_cfg(cfg).val()


def test_ap_of_each_exit_is_coco_s(cfg, videos):
    path = f'{videos}/annotations/instances_val.json'
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
        metric = ExitsMetric(path)
    categories = sorted(coco.cats)
    metric.dataset_meta = dict(classes=[coco.cats[one]['name'] for one in categories])
    results = []
    for number, (identity, image) in enumerate(coco.imgs.items()):
        own = [one for one in coco.imgToAnns[identity] if not one['iscrowd']]
        boxes = torch.tensor([one['bbox'] for one in own], dtype=torch.float32).reshape(-1, 4)
        # Every third frame a bit off.
        boxes[:, :2] += 3 * (number % 3 == 0)
        results += [
            dict(image_id=identity, bbox=box, score=0.5, category_id=one['category_id'])
            for box, one in zip(boxes.tolist(), own)
        ]
        boxes[:, 2:] += boxes[:, :2]
        found = InstanceData(
            bboxes=boxes,
            scores=torch.full((len(own),), 0.5),
            labels=torch.tensor([categories.index(one['category_id']) for one in own]).long(),
        )
        nothing = InstanceData(
            bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long()
        )
        metric.process({}, [dict(img_id=identity, ori_shape=(64, 64), exits=[nothing, found])])
    scores = metric.evaluate(len(coco.imgs))
    expected = evaluate(coco, results)
    assert scores['exit00/bbox_mAP'] == 0 and 0 < expected['ap'] < 100
    # CocoMetric rounds to three digits.
    assert scores['exit01/bbox_mAP'] == pytest.approx(expected['ap'] / 100, abs=6e-4)
    assert scores['coco/bbox_mAP_50'] == pytest.approx(expected['ap50'] / 100, abs=6e-4)
