"""One pass through every exit: what stands in the record is what the detector itself says."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from conftest import ROOT, no_progress, recordable_options, same_detections, write_random
from dynamicdet.building import load_dynamic_detector
from dynamicdet.errors import UsageError
from dynamicdet.measuring import latencies, recording
from dynamicdet.measuring.calibration import coco_results, measure_gflops, plain_exits, record_exits
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.measuring.recording import build_record_loader, gray_entropy, record_data_set
from dynamicdet.measuring.views import flip_boxes, flip_images, shift_boxes, shift_images
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.merging import merge_record
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules

NAMES = ['dy_faster_rcnn_digits_router', 'dy_yolox_nano_digits_router']


def load_config(digits, name, **options):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict({**recordable_options(name, digits), **options})
    return cfg


@pytest.fixture(scope='module', params=NAMES)
def run(request, digits, tmp_path_factory):
    """A two-stage and a one-stage detector: config, model, loader and record of the validation
    set."""
    register_all_modules(init_default_scope=True)
    cfg = load_config(digits, request.param)
    path = write_random(
        cfg, tmp_path_factory.mktemp('record') / 'random.pth', dataset_meta=dict(classes=['x'])
    )
    model, _ = load_dynamic_detector(cfg, path, 'cpu')
    model.set_budget(threshold=0.25)
    loader = build_record_loader(cfg, 'val')
    record = record_data_set(model, cfg, loader, no_progress, checkpoint=path)
    return SimpleNamespace(cfg=cfg, model=model, loader=loader, record=record, path=path)


# What is recorded.


def test_detections_are_both_exits_own(run):
    """Bit by bit, though the backbones run once for both."""
    expected = []
    for exit in range(2):
        force_dynamic_exit(run.model, exit)
        with torch.no_grad():
            expected.append(
                [sample for batch in run.loader for sample in run.model.test_step(batch)]
            )
    run.model.set_budget(threshold=0.25)
    assert sum(len(own) for one in run.record.detections for own in one) > 10
    exits = record_exits(run.model, run.loader, no_progress)
    for image, other, *samples in zip(run.record, exits, *expected):
        assert (image['id'], image['file']) == (other['id'], other['file'])
        assert image['difficulty'] == other['difficulty'] == samples[0].difficulty
        for exit, sample in enumerate(samples):
            found = coco_results(sample, run.loader.dataset.cat_ids)
            assert sample.exit == exit
            assert image['detections'][exit] == other['detections'][exit] == found


def test_the_model_stays_as_it_was(run):
    assert run.model.budget == Budget('threshold', 0.25) and run.model.threshold == 0.25
    assert not run.model.training and not run.model.router._forward_pre_hooks


def test_losses_are_those_of_training(run):
    """Of each image alone, under the training pipeline, averaged as the heads do."""
    source = copy.deepcopy(run.cfg.val_dataloader.dataset)
    source.pipeline = copy.deepcopy(run.cfg.train_dataloader.dataset.pipeline)
    dataset = DATASETS.build(source)
    for index, image in enumerate(list(run.record)[:3]):
        data = run.model.data_preprocessor(pseudo_collate([dataset[index]]), False)
        losses, features = run.model.exit_losses(data['inputs'], data['data_samples'])
        np.testing.assert_allclose(image['losses'], losses[:, 0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(image['features'], features[0], rtol=1e-3, atol=1e-5)
        assert image['features'].dtype == np.float32
        assert image['objects'] == len(data['data_samples'][0].gt_instances) > 0


def test_difficulty_follows_from_the_features(run):
    features = torch.tensor(np.stack([image['features'] for image in run.record]))
    with torch.no_grad():
        scores = run.model.router.score(features)
    expected = [image['difficulty'] for image in run.record]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.max() - scores.min() > 1e-3


def test_the_view_is_the_flipped_image(run):
    """As if the file were flipped: what is found there lies, mirrored, in the record."""
    dataset = run.loader.dataset
    sample = dataset[0]
    batch = pseudo_collate(
        [dict(inputs=sample['inputs'].flip(-1), data_samples=sample['data_samples'])]
    )
    wide = sample['data_samples'].ori_shape[1]
    assert wide == 64 and sample['data_samples'].img_shape[1] == 128
    for exit, threshold in enumerate((1.0, -1.0)):
        run.model.set_budget(threshold=threshold)
        with torch.no_grad():
            found = coco_results(run.model.test_step(batch)[0], dataset.cat_ids)
        assert len(found) > 0
        for one in found:
            left, top, width, height = one['bbox']
            one['bbox'] = [wide - left - width, top, width, height]
        assert same_detections(run.record[0]['view'][exit], found)
    run.model.set_budget(threshold=0.25)


def test_costs_and_provenance(run):
    gflops, latencies = run.record.gflops, run.record.latencies
    assert gflops == pytest.approx(measure_gflops(run.model, run.loader.dataset))
    assert 0 < gflops[0] < gflops[1] and len(latencies) == 2 and min(latencies) > 0
    facts = run.record.provenance
    # The neck and heads of the small exit 0 cost something, and not all of it.
    assert 0.02 * gflops[0] < facts['branch0_gflops'] < 0.98 * gflops[0]
    assert facts['checkpoint'] == run.path and facts['images'] == 6
    assert facts['view'] == 'flipped from left to right' and facts['router'] == 'NOT trained'
    assert facts['categories'] == run.loader.dataset.cat_ids
    assert all(isinstance(value, (str, int, float, list)) for value in facts.values())


def test_an_untrained_router_may_be_another(run):
    """Other pools are tried on a cascade of step 1, without a step 2."""
    cfg = copy.deepcopy(run.cfg)
    cfg.model.router = dict(type='Router', pools=('mean', 'max'))
    with pytest.raises(UsageError, match='of another shape'):
        load_dynamic_detector(cfg, run.path, 'cpu')
    model, _ = load_dynamic_detector(cfg, run.path, 'cpu', any_router=True)
    assert len(model.router.mean) == 2 * len(run.model.router.mean)
    kept = dict(model.branches.named_parameters())
    for name, value in run.model.branches.named_parameters():
        assert torch.equal(kept[name], value)


def test_all_classes_must_be_in_the_annotations(run, digits, tmp_path):
    content = json.loads((digits / 'annotations/instances_test.json').read_text())
    content['categories'] = content['categories'][1:]
    (tmp_path / 'nine.json').write_text(json.dumps(content))
    cfg = copy.deepcopy(run.cfg)
    cfg.test_dataloader.dataset.ann_file = str(tmp_path / 'nine.json')
    with pytest.raises(UsageError, match='has 9 of the 10 classes'):
        build_record_loader(cfg, 'test')


def test_images_cost_what_their_size_costs(run, monkeypatch):
    """Of each size, as the network sees it, some are measured."""
    for image in run.record:
        assert (
            image['gflops'] == pytest.approx(run.record.gflops)
            and image['latencies'] == run.record.latencies
        )
    asked = []

    def measured(model, dataset, *_, rows, rounds=None):
        asked.append(rows)
        return rows[0], 10 * rows[0]

    for name in ('measure_gflops', 'measure_latencies'):
        monkeypatch.setattr(recording, name, measured)
    monkeypatch.setattr(recording, '_measure_routing', lambda model, dataset, rows: (0.25, 2.0))
    divisor = run.model.data_preprocessor.pad_size_divisor
    sides = [2 * divisor, 3 * divisor - 1, 2 * divisor - 1, 3 * divisor]
    shapes = np.array([(side, divisor) for side in sides])
    costs = recording._costs_of(shapes, run.model, None, no_progress)
    # Heads cost 0.75 GFLOPs at one size, and nothing, not less, at the other.
    assert costs.branch == (0.375, 0.0)
    assert asked == [[0, 2]] * 2 + [[1, 3]] * 2
    assert costs.gflops.tolist() == [[0, 0], [1, 10], [0, 0], [1, 10]]
    assert costs.latencies.tolist() == [[0, 0], [1, 10], [0, 0], [1, 10]]


def test_many_sizes_are_timed_less_often_each():
    """In all as often as 20 images of one size, until each is timed twice."""
    assert [latencies.rounds_to_time(sizes) for sizes in (1, 10, 20, 26, 500)] == [5, 5, 2, 2, 2]
    assert latencies.rounds_to_time(14) == 3


def test_without_annotations_there_are_no_losses(run):
    """Also with annotations in the frame of the file, as mmdet's test pipelines load them."""
    dataset = copy.deepcopy(run.loader.dataset)
    dataset.get_subset_(1)
    dataset.pipeline.transforms = [
        step for step in dataset.pipeline.transforms if type(step).__name__ != 'LoadAnnotations'
    ]
    late = copy.deepcopy(run.loader.dataset)
    late.get_subset_(1)
    steps = late.pipeline.transforms
    steps.insert(2, steps.pop(1))
    for source in (dataset, late):
        loader = torch.utils.data.DataLoader(source, batch_size=3, collate_fn=pseudo_collate)
        with pytest.warns(
            UserWarning, match='no losses and no objects.*LoadAnnotations right'
        ) as said:
            record = record_data_set(run.model, run.cfg, loader, no_progress, view='none')
        assert len([one for one in said if 'no losses' in str(one.message)]) == 1
        assert set(record[0]) == {
            'id',
            'file',
            'difficulty',
            'detections',
            'features',
            'entropy',
            'gflops',
            'latencies',
            'frame',
        }
        assert record.provenance['view'] == 'none'


# The data.


def test_training_images_come_in_order_under_the_tests_pipeline(digits):
    cfg = load_config(digits, NAMES[0], **{'train_dataloader.dataset.indices': -3})
    loader = build_record_loader(cfg, 'train')
    samples = [sample for batch in loader for sample in batch['data_samples']]
    assert [sample.img_id for sample in samples] == [10, 11, 12]
    assert all('train' in sample.img_path for sample in samples)
    names = [type(step).__name__ for step in loader.dataset.pipeline.transforms]
    assert names == ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackDetInputs']


def test_data_sets_inside_others(digits):
    cfg = load_config(digits, NAMES[0])
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=inner)
    assert len(build_record_loader(cfg, 'train').dataset) == 12
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, inner])
    with pytest.raises(
        UsageError, match='made on one data set in COCO format, and train_dataloader has 2'
    ):
        build_record_loader(cfg, 'train')
    cfg.pop('train_dataloader')
    with pytest.raises(UsageError, match='no train_dataloader'):
        build_record_loader(cfg, 'train')


def test_detectors_that_learn_masks_get_them(digits):
    cfg = load_config(digits, NAMES[0])
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    assert 'masks' in next(iter(build_record_loader(cfg, 'val')))['data_samples'][0].gt_instances
    cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    assert (
        'masks' not in next(iter(build_record_loader(cfg, 'val')))['data_samples'][0].gt_instances
    )


# Views and entropy.


def test_padding_stays_where_it_is():
    batch = torch.arange(24.0).reshape(1, 1, 2, 12).expand(2, 3, 2, 12).clone()
    batch[0, :, :, 8:] = -1
    samples = [
        SimpleNamespace(img_shape=(2, 8), ori_shape=(1, 4), get=dict(scale_factor=(2.0, 2.0)).get),
        # Padded by the pipeline too, so that the shape of the image includes it.
        SimpleNamespace(
            img_shape=(2, 12), ori_shape=(4, 20), get=dict(scale_factor=(0.5, 0.5)).get
        ),
    ]
    flipped = flip_images(batch, samples)
    assert flipped[0, 0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, -1, -1, -1, -1]
    assert flipped[1, 0, 0].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 11]
    assert torch.equal(flip_images(flipped, samples), batch)


def test_a_box_and_its_mirror_image():
    boxes = np.array([[10, 5, 20, 8], [0, 1, 100, 2]], np.float32)
    mirrored = flip_boxes(boxes, 100)
    assert mirrored.tolist() == [[70, 5, 20, 8], [0, 1, 100, 2]] and mirrored.dtype == np.float32
    assert (flip_boxes(mirrored, 100) == boxes).all()


def test_entropy_counts_bits():
    def gray(levels):
        return torch.as_tensor(levels, dtype=torch.uint8).reshape(1, 1, -1).expand(3, 1, -1)

    assert gray_entropy(gray([7] * 10)) == 0
    assert gray_entropy(gray([0, 255, 0, 255])) == pytest.approx(1)
    assert gray_entropy(gray([0, 0, 0, 9])) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    assert gray_entropy(gray(list(range(256)))) == pytest.approx(8)


def test_gray_is_as_bright_as_colors_look():
    """Blue, green, red of the same value have gray levels of 0.114, 0.587 and 0.299 of it: a
    picture of two colors has one gray level where these agree."""
    one = torch.tensor([[[0, 100]], [[100, 0]], [[0, 0]]], dtype=torch.uint8)
    assert gray_entropy(one) == pytest.approx(1)
    same = torch.tensor([[[255, 0]], [[0, 0]], [[0, 97]]], dtype=torch.uint8)
    assert gray_entropy(same) == 0


def test_a_shifted_view_lies_where_the_image_lies():
    sample = DetDataSample(
        metainfo=dict(img_shape=(20, 24), ori_shape=(40, 48), scale_factor=(0.5, 0.5))
    )
    batch = torch.arange(3 * 24 * 32, dtype=torch.float32).reshape(1, 3, 24, 32)
    shifted = shift_images(batch, [sample])
    assert torch.equal(shifted[..., 5:20, 5:24], batch[..., :15, :19])
    assert torch.equal(shifted[..., :5, 5], batch[..., :1, 0].expand(1, 3, 5))
    # Padding stays as it is.
    assert torch.equal(shifted[..., 20:, :], batch[..., 20:, :])
    assert torch.equal(shifted[..., 24:], batch[..., 24:])
    # Five pixels of the delivered image are ten of the original.
    boxes = np.array([[30, 25, 20, 8]], np.float32)
    assert shift_boxes(boxes, sample).tolist() == [[20, 15, 20, 8]]


def test_a_record_of_merged_exits_is_that_of_the_exits_merged(run):
    """Recorded with and without, it is the same; only what ran is paid."""
    merge = Merge('nms', 0.5)
    with plain_exits(run.model):
        run.model.merge = merge
        merged = record_data_set(run.model, run.cfg, run.loader, no_progress, checkpoint=run.path)
    assert run.model.merge is None
    wanted = merge_record(run.record, merge)
    for name in ('detections', 'view'):
        for own, other in zip(getattr(merged, name), getattr(wanted, name)):
            assert all(map(same_detections, own, other))
    assert any(
        len(one) > len(other) for one, other in zip(merged.detections[1], run.record.detections[1])
    )
    np.testing.assert_array_equal(merged.losses, run.record.losses)
    np.testing.assert_array_equal(merged.features, run.record.features)
    assert merged.provenance['merge'] == wanted.provenance['merge'] == 'nms (IoU 0.5)'
    # The proposals of an image are those of its exit, and so is what they cost.
    assert merged.gflops == pytest.approx(wanted.gflops, rel=0.02)
    assert merged.gflops[1] > run.record.gflops[1]
    assert merged.gflops[0] == run.record.gflops[0]
