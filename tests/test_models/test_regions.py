"""Regions of images, on real mmdet configs, shrunk."""

import copy

import numpy as np
import pytest
import torch

from conftest import same_detections, spread_scores
from dynamicdet.errors import UsageError
from dynamicdet.measuring.calibration import exit_states
from dynamicdet.models.budget_control import whole_images
from dynamicdet.models.regions import Crop, batches_of, cut_maps
from dynamicdet.testing import STOCK, randomize, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS

TWO_STAGE = ('faster_rcnn', 'mask_rcnn', 'cascade_rcnn')
ONE_BACKBONE = dict(backbones=1, reuse_stages=0, first_scale=0.5)
KINDS = {
    'composite': dict(),
    'own stems': dict(reuse_stages=0),
    'own stems, smaller first': dict(reuse_stages=0, first_scale=0.5),
    'one backbone': ONE_BACKBONE,
}
SIZE = (160, 224)


def build(name='faster_rcnn', seed=0, regions=dict(), **settings):
    settings.setdefault('shared', name in TWO_STAGE)
    model = MODELS.build(tiny_dynamic(name, regions=regions, **settings))
    return spread_scores(randomize(model, seed)).eval()


def fresh(model, objects=(2, 1, 0), size=SIZE):
    data = model.data_preprocessor(tiny_batch(objects, size=size))
    return data['inputs'], data['data_samples']


@torch.no_grad()
def predict(model, threshold, *data, **settings):
    model.set_budget(threshold=threshold)
    return model.predict(*data, **settings)


def rows_of(sample):
    found = sample.pred_instances
    rows = torch.cat([found.bboxes, found.scores[:, None], found.labels[:, None].float()], dim=1)
    return rows, found.get('masks', torch.zeros(0))


def equal(one, other):
    return all(torch.equal(*pair) for pair in zip(rows_of(one), rows_of(other)))


def without_regions(model):
    """The same detector, which sees whole images."""
    whole = copy.copy(model)
    whole.__dict__['_modules'] = {**model._modules, 'regions': None}
    return whole


def fixed_choice(model, rectangles):
    """Let a detector look at some rectangles of each image, whatever it finds there."""
    model.regions.choose = lambda gains, threshold: list(rectangles)


@pytest.mark.parametrize('settings', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('name', STOCK)
def test_no_price_is_the_full_second_exit_and_an_infinite_one_the_first(name, settings):
    model = build(name, **settings)
    whole = without_regions(model)
    for threshold, exit in ((-1, 1), (0, 1), (1, 0)):
        found = predict(model, threshold, *fresh(model))
        wanted = predict(whole, -1 if exit else 1, *fresh(model))
        assert sum(len(sample.pred_instances) for sample in wanted)
        for one, other in zip(found, wanted):
            assert equal(one, other) and one.exit == exit and 0 <= one.difficulty <= 1
            height, width = one.ori_shape
            assert one.regions == ([[0, 0, width, height]] if exit else [])


@pytest.mark.parametrize('merge', [None, 'nms', 'wbf'])
@pytest.mark.parametrize('settings', KINDS.values(), ids=KINDS)
def test_the_whole_as_a_crop_is_the_full_second_exit(settings, merge):
    model = build('mask_rcnn', merge=merge, **settings)
    wanted = predict(model, -1, *fresh(model))
    fixed_choice(model, [(0, 0, 5, 7)])
    for one, other in zip(predict(model, 0.5, *fresh(model)), wanted):
        assert equal(one, other) and one.regions == other.regions


@pytest.mark.parametrize('name', STOCK)
def test_a_crop_is_the_detector_on_the_crop(name):
    """Bit-equal: what one backbone finds in a crop is what it finds in an image of that crop."""
    model = build(name, **ONE_BACKBONE)
    plain = without_regions(model)
    fixed_choice(model, [(2, 3, 3, 5)])
    inputs, samples = fresh(model, (2,))
    with torch.no_grad():
        model.set_budget(threshold=0.5)
        state = model.start(inputs, samples)
        assert state.regions == [[(2, 3, 3, 5)]]
        found = model._detect_in_crops(state, [Crop(0, (2, 3, 3, 5), (32, 64, 128, 192))], True)[0]
        # The crop as an image of its own.
        part = dict(
            inputs=[tiny_batch((2,), size=SIZE)['inputs'][0][:, 32:128, 64:192]],
            data_samples=[samples[0].new()],
        )
        shape = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0))
        part['data_samples'][0].set_metainfo(shape)
        data = plain.data_preprocessor(part)
        wanted = predict(plain, -1, data['inputs'], data['data_samples'])[0]
    sample = samples[0].new()
    sample.pred_instances = found
    assert len(found) and equal(sample, wanted)


def test_a_crop_of_a_pair_is_the_second_detector_on_it():
    """With its own normalization."""
    pair = [tiny_detector('retinanet'), tiny_detector('faster_rcnn')]
    pair[1].data_preprocessor.update(mean=[10.0, 20.0, 30.0], std=[50.0, 60.0, 70.0])
    model = MODELS.build(dict(type='DynamicDetector', detector=pair, objective='ap', regions={}))
    model = spread_scores(randomize(model)).eval()
    alone = MODELS.build(copy.deepcopy(pair[1])).eval()
    state = model.state_dict()
    known = {
        f'backbone.second.{key[9:]}' if key[:9] == 'backbone.' else f'branches.1.{key}': key
        for key in alone.state_dict()
    }
    alone.load_state_dict({key: state[name] for name, key in known.items()})
    crop = Crop(0, (2, 3, 3, 5), (32, 64, 128, 192))
    with torch.no_grad():
        model.set_budget(threshold=1)
        found = model._detect_in_crops(model.start(*fresh(model, (2,))), [crop], True)[0]
        image = tiny_batch((2,), size=SIZE)['inputs'][0][:, 32:128, 64:192]
        sample = fresh(model, (2,))[1][0].new()
        sample.set_metainfo(dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0)))
        data = alone.data_preprocessor(dict(inputs=[image], data_samples=[sample]))
        (wanted,) = alone.predict(data['inputs'], data['data_samples'])
    assert len(found) and same_detections(found, wanted.pred_instances)


@pytest.mark.parametrize('settings', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('merge', [None, 'nms'])
def test_results_keep_their_order_and_do_not_depend_on_the_batch(settings, merge):
    model = build('mask_rcnn', merge=merge, **settings)
    # A router with random weights: by the rule many images have nothing to gain.
    model.regions.router.trained.fill_(True)
    data = fresh(model, (2, 1, 0, 3))
    middle = float(np.median([one.difficulty for one in predict(model, 1, *data)]))
    together = predict(model, middle, *fresh(model, (2, 1, 0, 3)))
    # Some go on and some do not, or this says little.
    assert {sample.exit for sample in together} == {0, 1}
    for row, sample in enumerate(together):
        inputs, samples = fresh(model, (2, 1, 0, 3))
        (alone,) = predict(model, middle, inputs[row : row + 1], samples[row : row + 1])
        assert alone.img_id == sample.img_id == row
        assert alone.exit == sample.exit and alone.regions == sample.regions
        assert alone.difficulty == pytest.approx(sample.difficulty, abs=1e-4)
        assert same_detections(alone.pred_instances, sample.pred_instances)


def test_what_a_region_holds_takes_the_place_of_what_was_found_there():
    model = build('faster_rcnn', **ONE_BACKBONE)
    first = predict(model, 1, *fresh(model, (2,)))[0].pred_instances
    fixed_choice(model, [(1, 1, 3, 4)])
    found = predict(model, 0.5, *fresh(model, (2,)))[0].pred_instances
    crop = torch.tensor([0.0, 0, 160, 128])
    known = {tuple(row) for row in first.bboxes.tolist()}

    def replaced(boxes):
        """Whose center is in the region, and that lie inside the crop."""
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        inside = (boxes[:, 2] <= crop[2] - 1) & (boxes[:, 3] <= crop[3] - 1)
        return inside & (x >= 32) & (x < 128) & (y >= 32) & (y < 96)

    new = torch.tensor([tuple(row) not in known for row in found.bboxes.tolist()])
    assert new.any() and (~new).any()
    assert replaced(found.bboxes[new]).all()
    assert not replaced(found.bboxes[~new]).any()
    # And all that is not replaced is there.
    assert int((~new).sum()) == int((~replaced(first.bboxes)).sum())


def test_with_a_step_crops_have_few_sizes():
    model = build('faster_rcnn', regions=dict(step=2), **ONE_BACKBONE)
    fixed_choice(model, [(1, 1, 2, 2), (3, 4, 4, 6)])
    seen = []
    hook = model.backbone.first.register_forward_pre_hook(
        lambda _, arguments: seen.append(tuple(arguments[0].shape[-2:]))
    )
    (sample,) = predict(model, 0.5, *fresh(model, (2,)))
    hook.remove()
    # Exit 0 sees half of the sides. With halo the first has 3 x 3 cells, the second 3 x 4, of 5 x
    # 7; the last row is the image's.
    assert seen == [(64, 128), (128, 128)]
    assert sample.regions == [[0, 0, 128, 128], [96, 32, 224, 160]]


def test_masks_of_crops_lie_in_the_image():
    model = build('mask_rcnn', seed=1, **ONE_BACKBONE)
    inputs, samples = fresh(model, (2,))
    # The file is twice as large as the delivered image.
    samples[0].set_metainfo(dict(ori_shape=(320, 448), scale_factor=(0.5, 0.5)))
    first = predict(model, 1, inputs, [copy.deepcopy(samples[0])])[0].pred_instances
    fixed_choice(model, [(1, 1, 4, 6)])
    found = predict(model, 0.5, inputs, samples)[0].pred_instances
    assert found.masks.shape[1:] == (320, 448) == first.masks.shape[1:]
    known = {tuple(row) for row in first.bboxes.tolist()}
    new = [row for row, box in enumerate(found.bboxes.tolist()) if tuple(box) not in known]
    assert new
    for row in new:
        ys, xs = found.masks[row].nonzero(as_tuple=True)
        if len(ys):
            left, top, right, bottom = found.bboxes[row].tolist()
            assert left - 2 <= xs.min() and xs.max() <= right + 2
            assert top - 2 <= ys.min() and ys.max() <= bottom + 2
    model = build('mask_rcnn')
    fixed_choice(model, [(1, 1, 4, 6)])
    frame = predict(model, 0.5, *fresh(model, (2,)), rescale=False)[0]
    assert frame.pred_instances.masks.shape[1:] == SIZE


def test_no_more_pixels_at_a_time_than_a_batch_has():
    crops = [Crop(row, (), (0, 0, 96, 64 * (1 + row % 2))) for row in range(9)]
    batches = list(batches_of(crops, 96 * 64 * 3))
    assert sorted(crop.row for some in batches for crop in some) == list(range(9))
    for some in batches:
        assert len({crop.size for crop in some}) == 1
        assert len(some) * np.prod(some[0].size) <= 96 * 64 * 3
    # One that is larger runs alone.
    assert [len(some) for some in batches_of(crops, 1)] == [1] * 9


def test_second_exit_sees_no_more_than_the_regions():
    model = build('faster_rcnn', **ONE_BACKBONE)
    fixed_choice(model, [(0, 0, 1, 1), (4, 6, 5, 7)])
    inputs, samples = fresh(model, (2, 1))
    model.set_budget(threshold=0.5)
    with torch.no_grad():
        state = model.start(inputs, samples)
        seen = []
        hook = model.backbone.first.register_forward_pre_hook(
            lambda _, arguments: seen.append(tuple(arguments[0].shape))
        )
        model.finish(model.deepen(state))
    hook.remove()
    # All four corners have one size: one batch.
    assert seen == [(4, 3, 64, 64)]


def test_maps_are_cut_where_the_image_is():
    values = torch.arange(4 * 6.0).reshape(1, 1, 4, 6)
    (part,) = cut_maps([values], (64, 96), [Crop(0, (), (16, 32, 48, 96))])
    assert torch.equal(part, values[..., 1:3, 2:6])
    # A stride that does not divide the crop's place: the cells that it touches.
    (part,) = cut_maps([values], (64, 96), [Crop(0, (), (24, 32, 48, 96))])
    assert torch.equal(part, values[..., 1:3, 2:6])


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(backbones=3, regions={}), 'two exits'),
        (dict(regions=dict(halo=-1)), 'halo of regions'),
        (dict(regions=dict(limit=0)), 'limit of regions'),
        (dict(regions=dict(overhead=-1.0)), 'overhead of regions'),
        (dict(regions=dict(step=0)), 'step of regions'),
    ],
)
def test_what_regions_take(settings, said):
    with pytest.raises(UsageError, match=said):
        MODELS.build(tiny_dynamic('faster_rcnn', **settings))


def test_budgets_are_prices():
    model = build('faster_rcnn', **ONE_BACKBONE)
    with pytest.raises(UsageError, match='calibrated for regions'):
        model.set_budget(hard_share=0.5)
    model.regions.curve = torch.tensor(
        [[0, 1, 1, 3, 0.3], [0.5, 0.4, 2, 2, 0.2], [1, 0, 0, 1, 0.1]], dtype=torch.float64
    )
    assert model.set_budget(hard_share=0.4) == 0.5 == float(model.threshold)
    assert model.set_budget(hard_share=0.2) == pytest.approx(0.75)
    assert model.set_budget(target_gflops=2) == 0.5
    assert model.set_budget(target_latency=0.25) == pytest.approx(0.25)
    with pytest.raises(UsageError, match='cannot be met'):
        model.set_budget(target_gflops=0.5)
    with pytest.raises(UsageError, match='one number'):
        model.set_budget(hard_share=[0.5])
    # A calibration comes with the checkpoint, and an older checkpoint loads.
    other = build('faster_rcnn', seed=1, budget=dict(hard_share=0.4), **ONE_BACKBONE)
    other.load_state_dict(model.state_dict())
    assert predict_with_budget(other) == 0.5
    state = {key: value for key, value in model.state_dict().items() if 'regions' not in key}
    build('faster_rcnn', **ONE_BACKBONE).load_state_dict(state)
    # And one without regions takes a checkpoint with them.
    build('faster_rcnn', regions=None, **ONE_BACKBONE).load_state_dict(model.state_dict())


def predict_with_budget(model):
    with torch.no_grad():
        model.predict(*fresh(model))
    return float(model.threshold)


def test_regions_are_trained_in_step_2_and_then_nothing_else_is():
    model = build('faster_rcnn')
    assert not any(one.requires_grad for one in model.regions.parameters())
    model = build('faster_rcnn', train_router=True)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {f'regions.{name}' for name, _ in model.regions.named_parameters()}


def test_maps_are_seen_by_a_trained_router():
    model = build('faster_rcnn', regions=dict(router=dict(in_channels=(8, 16, 32, 64))))
    model.regions.router.trained.fill_(True)
    together = predict(model, 1, *fresh(model))
    for row, sample in enumerate(together):
        inputs, samples = fresh(model)
        (alone,) = predict(model, 1, inputs[row : row + 1], samples[row : row + 1])
        assert alone.difficulty == pytest.approx(sample.difficulty, abs=1e-4)


def test_images_that_end_before_the_batch():
    """Cells are the image's own: what it is batched with says nothing of where to look."""
    model = build('faster_rcnn', **ONE_BACKBONE)
    small, large = tiny_batch((2,), size=(100, 130)), tiny_batch((2,), size=SIZE)
    both = {key: small[key] + large[key] for key in small}
    data = model.data_preprocessor(both)
    found = predict(model, 1e-6, data['inputs'], data['data_samples'])
    for sample in found:
        height, width = sample.ori_shape
        for left, top, right, bottom in sample.regions:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (sample.pred_instances.bboxes[:, 2] <= width + 1e-3).all()


def test_large_images_are_seen_small_first():
    """Exit 0 sees the longer side at no more than its size, and crops have all their pixels."""
    model = build('faster_rcnn', regions=dict(first_size=64), **ONE_BACKBONE)
    fixed_choice(model, [(2, 3, 3, 5)])
    seen = []
    hook = model.backbone.first.register_forward_pre_hook(
        lambda _, arguments: seen.append(tuple(arguments[0].shape))
    )
    predict(model, 0.5, *fresh(model, (2,), size=(192, 256)))
    # A crop of one row of two cells and a halo around it.
    assert seen == [(1, 3, 64, 64), (1, 3, 96, 128)]
    # Also where both exits are recorded, on wholes.
    seen.clear()
    with torch.no_grad(), whole_images(model):
        model.set_budget(threshold=1)
        list(exit_states(model, *fresh(model, (2,), size=(192, 256))))
    hook.remove()
    assert seen == [(1, 3, 64, 64), (1, 3, 192, 256)]
    with pytest.raises(UsageError, match='first_size of regions'):
        build('faster_rcnn', regions=dict(first_size=1), **ONE_BACKBONE)


@pytest.mark.parametrize('merge', [None, 'nms'])
def test_large_regions_are_seen_in_tiles(merge):
    """At no price all of a large image is looked at, and never more than a tile at once."""
    settings = dict(ONE_BACKBONE, merge=merge)
    model = build('faster_rcnn', regions=dict(first_size=64, tile=160), **settings)
    seen = []
    hook = model.backbone.first.register_forward_pre_hook(
        lambda _, arguments: seen.append(tuple(arguments[0].shape))
    )
    (found,) = predict(model, 0, *fresh(model, (2,), size=(192, 256)))
    hook.remove()
    # 6 x 8 cells in 2 x 3 tiles of 3 x 2 or 3 cells, with halos inside the image.
    assert seen[0] == (1, 3, 64, 64)
    shapes = sorted(shape[2:] for shape in seen[1:] for _ in range(shape[0]))
    assert shapes == [(128, 96), (128, 96), (128, 128), (128, 128), (128, 160), (128, 160)]
    assert max(shape[0] * shape[2] * shape[3] for shape in seen[1:]) <= 160**2
    assert found.exit == 1 and found.regions == [[0, 0, 256, 192]]
    # The same as its tiles, chosen one by one.
    tiles = [
        (top, left, top + 3, right) for top in (0, 3) for left, right in ((0, 2), (2, 5), (5, 8))
    ]
    fixed_choice(model, tiles)
    (wanted,) = predict(model, 0.5, *fresh(model, (2,), size=(192, 256)))
    assert len(found.pred_instances) and same_detections(
        found.pred_instances, wanted.pred_instances
    )
    with pytest.raises(UsageError, match='tile of regions must hold'):
        build('faster_rcnn', regions=dict(tile=64), **settings)
