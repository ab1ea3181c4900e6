"""What is measured on a trained detector: difficulties, latencies, compute, both exits' results."""

import json
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, SEED, THREADS, no_progress, shrink_options
from dynamicdet import timing
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.errors import UsageError
from dynamicdet.measuring import calibration
from dynamicdet.measuring.calibration import (
    calibrate,
    inference_settings,
    mean_costs,
    measure_difficulties,
    measure_gflops,
    plain_exits,
    provenance,
    record_exits,
    score_facts,
)
from dynamicdet.measuring.latencies import measure_latencies
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.evaluation import read_truth
from dynamicdet.routing.merging import platt_scaling_of
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules


def load_config(digits, name='dy_faster_rcnn_digits_router', **options):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict({**shrink_options(digits), **options})
    return cfg


@pytest.fixture(scope='module')
def cfg(digits):
    return load_config(digits)


@pytest.fixture(scope='module')
def path(cfg, tmp_path_factory):
    """A checkpoint of random weights that detects something and tells images apart."""
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    # Zero after initialization; without it both exits would see the same maps.
    for name, parameter in model.backbone.named_parameters():
        if name.startswith('connections.'):
            torch.nn.init.normal_(parameter, std=0.3)
    model.branches[0].roi_head.bbox_head.fc_cls.weight.data *= 30
    model.router.fc2.weight.data *= 30
    model.delta.fill_(0.1)
    file = tmp_path_factory.mktemp('checkpoint') / 'random.pth'
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=['x']))), file
    )
    return str(file)


@pytest.fixture
def model(cfg, path):
    return load_dynamic_detector(cfg, path, 'cpu')[0]


@pytest.fixture(scope='module')
def loader(cfg):
    return build_loader(cfg.val_dataloader)


def run(model, loader, threshold):
    """Results of every image at a threshold, in the order of the data."""
    model.set_budget(threshold=threshold)
    with torch.no_grad():
        return [sample for batch in loader for sample in model.test_step(batch)]


# Difficulties.


def test_difficulties_are_those_of_predict(model, loader):
    expected = [sample.difficulty for sample in run(model, loader, 0.5)]
    found = measure_difficulties(model, loader, no_progress)
    assert found.dtype == np.float32 and found.shape == (6,)
    assert found.tolist() == sorted(expected)
    assert found[-1] - found[0] > 1e-3


@pytest.mark.parametrize('batch_size', [1, 4])
def test_difficulties_do_not_depend_on_the_batch(model, digits, loader, batch_size):
    other = build_loader(
        load_config(digits, **{'val_dataloader.batch_size': batch_size}).val_dataloader
    )
    assert len(other) != len(loader)
    np.testing.assert_allclose(
        measure_difficulties(model, other, no_progress),
        measure_difficulties(model, loader, no_progress),
        atol=1e-5,
    )


def test_difficulties_run_no_second_backbone(model, loader, monkeypatch):
    monkeypatch.setattr(model.backbone, 'deeper_maps', None)
    monkeypatch.setattr(model, 'branches', None)
    assert len(measure_difficulties(model, loader, no_progress)) == 6


# Latencies and compute.


def test_latencies_are_told_apart_and_leave_the_budget(model, loader, monkeypatch):
    """By a clock that the second backbone alone moves on, but for a second at each look."""
    second, seconds = model.backbone.deeper_maps, [0]

    def look(_):
        seconds[0] += 1
        return seconds[0]

    def slow(*args):
        seconds[0] += 20
        return second(*args)

    monkeypatch.setattr(timing, 'now', look)
    monkeypatch.setattr(model.backbone, 'deeper_maps', slow)
    model.set_budget(threshold=0.25)
    assert measure_latencies(model, loader.dataset, no_progress, images=2, rounds=2) == (1, 21)
    assert model.budget == Budget('threshold', 0.25) and model.threshold == 0.25


@pytest.mark.parametrize(
    'measure',
    [
        lambda model, loader: measure_latencies(
            model, loader.dataset, no_progress, images=1, rounds=1
        ),
        lambda model, loader: measure_gflops(model, loader.dataset, images=1),
        lambda model, loader: record_exits(model, loader, no_progress),
    ],
)
def test_a_failure_leaves_the_budget_too(model, loader, measure, monkeypatch):
    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, 'branch', fail)
    model.set_budget(threshold=0.25)
    with pytest.raises(KeyboardInterrupt):
        measure(model, loader)
    assert model.budget == Budget('threshold', 0.25) and model.threshold == 0.25


def test_the_second_exit_costs_more(model, loader):
    model.set_budget(threshold=0.25)
    easy, hard = measure_gflops(model, loader.dataset, images=3)
    assert 0 < easy < hard < 4 * easy
    assert model.budget == Budget('threshold', 0.25) and model.threshold == 0.25


def test_compute_is_a_mean_over_images(model, loader):
    one, two = (
        measure_gflops(model, [loader.dataset[0]] * count, images=count) for count in (1, 2)
    )
    assert one == pytest.approx(two, rel=1e-6)


# Both exits.


@pytest.fixture
def renumbered(digits, tmp_path):
    """The validation set; its categories have ids that are not 1, 2, 3, ..."""
    data = json.loads((digits / 'annotations/instances_val.json').read_text())
    for category in data['categories']:
        category['id'] = 10 * category['id'] + 3
    for annotation in data['annotations']:
        annotation['category_id'] = 10 * annotation['category_id'] + 3
    file = tmp_path / 'renumbered.json'
    file.write_text(json.dumps(data))
    cfg = load_config(digits, **{'val_dataloader.dataset.ann_file': str(file)})
    return build_loader(cfg.val_dataloader)


def test_both_exits_are_recorded(model, renumbered):
    images = record_exits(model, renumbered, no_progress)
    forced = [run(model, renumbered, threshold) for threshold in (1, -1)]
    assert [image['id'] for image in images] == [1, 2, 3, 4, 5, 6]
    for index, image in enumerate(images):
        assert image['file'] == forced[0][index].img_path
        for exit in (0, 1):
            sample = forced[exit][index]
            assert sample.exit == exit and sample.difficulty == image['difficulty']
            expected = sample.pred_instances
            found = image['detections'][exit]
            assert len(found) == len(expected) > 0
            boxes = np.array([entry['bbox'] for entry in found])
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_allclose(boxes, expected.bboxes.numpy(), atol=1e-4)
            assert [entry['score'] for entry in found] == expected.scores.tolist()
            assert [entry['category_id'] for entry in found] == [
                10 * (label + 1) + 3 for label in expected.labels.tolist()
            ]
    assert any(image['detections'][0] != image['detections'][1] for image in images)


def test_boxes_are_in_the_images_own_frame(model, renumbered):
    """The pipeline doubles these images of 64 pixels."""
    boxes = np.array(
        [
            entry['bbox']
            for image in record_exits(model, renumbered, no_progress)
            for entry in image['detections'][1]
        ]
    )
    assert (boxes >= 0).all()
    assert 40 < (boxes[:, :2] + boxes[:, 2:]).max() <= 64.01


def test_recording_leaves_the_budget(model, loader):
    model.set_budget(threshold=0.25)
    record_exits(model, loader, no_progress)
    assert model.budget == Budget('threshold', 0.25) and model.threshold == 0.25


# All of it.


def test_calibration_fills_the_model(model, loader):
    found = calibrate(model, loader, no_progress, hard_share=1 / 3)
    np.testing.assert_array_equal(
        model.difficulties, measure_difficulties(model, loader, no_progress)
    )
    assert model.latencies.tolist() == pytest.approx([found['lat1'], found['lat2']])
    assert model.threshold.item() == pytest.approx(found['threshold'])
    assert sum(sample.exit for batch in loader for sample in model.test_step(batch)) == 2


@pytest.fixture
def found_loader(model, digits, loader, tmp_path):
    """The validation images with some of what the exits find as their objects."""
    data = json.loads((digits / 'annotations/instances_val.json').read_text())
    data['annotations'] = [
        dict(one, id=number, image_id=image['id'], iscrowd=0, area=one['bbox'][2] * one['bbox'][3])
        for number, (image, one) in enumerate(
            (
                (image, one)
                for image in record_exits(model, loader, no_progress)
                for exit, step in ((0, 2), (1, 3))
                for one in image['detections'][exit][::step]
            ),
            1,
        )
    ]
    (tmp_path / 'found.json').write_text(json.dumps(data))
    options = {'val_dataloader.dataset.ann_file': str(tmp_path / 'found.json')}
    return build_loader(load_config(digits, **options).val_dataloader)


def test_scores_are_calibrated_to_the_annotations(model, found_loader):
    """By what each exit finds by itself, whatever was set before."""
    loader = found_loader
    with plain_exits(model):
        record = record_exits(model, loader, no_progress)
    truth = read_truth(loader.dataset.ann_file, loader.dataset.cat_ids)
    wanted = platt_scaling_of(record, truth)
    model.merge = Merge.parse('nms')
    model.set_platt_scaling([(3.0, 1.0)] * 2)
    calibrate(model, loader, no_progress, fit_scores=True)
    scaling = zip(model.platt_scale.tolist(), model.platt_shift.tolist())
    assert [list(one) for one in scaling] == [pytest.approx(one) for one in wanted]
    assert wanted[0] != wanted[1] and model.merge == Merge.parse('nms')
    np.testing.assert_array_equal(
        model.difficulties, measure_difficulties(model, loader, no_progress)
    )
    assert score_facts(model) == dict(
        merge='nms (IoU 0.65)', platt_scaling=[pytest.approx(one) for one in wanted]
    )
    # Exit 1's neck and heads, and exit 0's.
    merged = model.gflops[1].item()
    model.merge = None
    calibrate(model, loader, no_progress)
    assert merged > model.gflops[1].item() and model.platt_scale[0] == pytest.approx(wanted[0][0])


def test_images_of_other_sizes_count_as_in_a_record(model, monkeypatch):
    """Two of three are small: by the first images alone, all would be."""
    divisor = model.data_preprocessor.pad_size_divisor
    asked = []

    def measured(model, dataset, *_, rows):
        asked.append(rows)
        return 1 + rows[0], 10 + 10 * rows[0]

    for name in ('measure_gflops', 'measure_latencies'):
        monkeypatch.setattr(calibration, name, measured)
    shapes = [(divisor, divisor)] * 2 + [(divisor, 2 * divisor)]
    gflops, latencies = mean_costs(model, None, shapes, no_progress)
    assert asked == [[0, 1]] * 2 + [[2]] * 2
    assert gflops == latencies == pytest.approx([(1 + 1 + 3) / 3, (10 + 10 + 30) / 3])


def test_a_router_that_was_not_trained(model, loader):
    model.delta.fill_(float('nan'))
    with pytest.raises(UsageError, match='router of this checkpoint is not trained.*step 2'):
        calibrate(model, loader, no_progress)
    assert not len(model.difficulties)


def test_where_figures_come_from(cfg, loader, path):
    found = provenance(cfg, path, loader.dataset, 'cpu')
    assert found['checkpoint'] == path and found['config'].endswith('_digits_router.py')
    assert found['ann_file'].endswith('instances_val.json') and found['images'] == 6
    assert found['threads'] == THREADS and found['seed'] == SEED and 'cores' in found['device']
    # What passes through which model is another matter.
    assert {'torch', 'date'} <= set(found) and not {'dtype', 'batch_size'} & set(found)


@pytest.mark.parametrize('batch_size, dtype', [(1, 'float32'), (4, 'float64')])
def test_how_images_passed(model, digits, batch_size, dtype):
    loader = build_loader(
        load_config(digits, **{'val_dataloader.batch_size': batch_size}).val_dataloader
    )
    assert inference_settings(model.to(getattr(torch, dtype)), loader) == dict(
        dtype=dtype, batch_size=batch_size, latency_batch_size=1
    )


# Loading.


def refusal(*args):
    with pytest.raises(UsageError) as caught:
        load_dynamic_detector(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_what_is_loaded(cfg, path):
    model, checkpoint = load_dynamic_detector(cfg, path, 'cpu')
    assert not model.training and model.dataset_meta == dict(classes=['x'])
    state = model.state_dict()
    for key, value in checkpoint['state_dict'].items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, equal_nan=True)


def test_a_stock_config_is_refused(cfg, path):
    stock = Config(dict(model=cfg.model.detector))
    assert 'must be a DynamicDetector, not FasterRCNN' in refusal(stock, path, 'cpu')


def test_a_plain_checkpoint_is_refused(cfg, path, tmp_path):
    stock = MODELS.build(cfg.model.detector)
    torch.save(dict(state_dict=stock.state_dict()), tmp_path / 'plain.pth')
    assert 'plain detector' in refusal(cfg, str(tmp_path / 'plain.pth'), 'cpu')


def test_another_architecture_is_refused(digits, path):
    wider = load_config(
        digits,
        **{
            'model.backbone.base_channels': 16,
            'model.detector.neck.in_channels': [16, 32, 64, 128],
        },
    )
    assert 'of another shape (such as backbone.first' in refusal(wider, path, 'cpu')


def test_a_missing_part_is_refused(cfg, path, tmp_path):
    checkpoint = torch.load(path)
    del checkpoint['state_dict']['router.fc2.weight']
    torch.save(checkpoint, tmp_path / 'part.pth')
    assert 'router.fc2.weight' in refusal(cfg, str(tmp_path / 'part.pth'), 'cpu')


@pytest.mark.parametrize(
    'write, said',
    [
        (lambda file: None, 'there is no checkpoint at'),
        (lambda file: file.write_text('not weights'), 'is no checkpoint'),
        (lambda file: file.write_bytes(pickle.dumps([1, 2])), 'is no checkpoint'),
    ],
)
def test_files_that_are_no_checkpoint(cfg, tmp_path, write, said):
    write(tmp_path / 'file.pth')
    assert said in refusal(cfg, str(tmp_path / 'file.pth'), 'cpu')


def test_an_empty_validation_set(digits, tmp_path):
    data = json.loads((digits / 'annotations/instances_val.json').read_text())
    (tmp_path / 'empty.json').write_text(json.dumps({**data, 'images': [], 'annotations': []}))
    cfg = load_config(digits, **{'val_dataloader.dataset.ann_file': str(tmp_path / 'empty.json')})
    with pytest.raises(UsageError, match='validation set is empty'):
        build_loader(cfg.val_dataloader)
