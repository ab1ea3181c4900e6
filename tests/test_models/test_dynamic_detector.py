"""Every promise of the detector, on real mmdet configs, shrunk."""

import copy
import hashlib

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict

from conftest import same_detections, spread_scores
from dynamicdet.errors import UsageError
from dynamicdet.testing import STOCK, randomize, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS

#: Detectors whose exits share neck and heads, as in the shipped configs.
TWO_STAGE = ('faster_rcnn', 'mask_rcnn', 'cascade_rcnn')


def build(name='faster_rcnn', seed=0, **settings):
    """A dynamic detector with random weights, none of them zero."""
    settings.setdefault('shared', name in TWO_STAGE)
    return spread_scores(randomize(MODELS.build(tiny_dynamic(name, **settings)), seed)).eval()


def fresh(model, batch):
    """Inputs and data samples, on which nothing was predicted yet."""
    data = model.data_preprocessor(copy.deepcopy(batch))
    return data['inputs'], data['data_samples']


def boxes(sample):
    found = sample.pred_instances
    return torch.cat([found.bboxes, found.scores[:, None], found.labels[:, None].float()], dim=1)


def digest(model, skip=()):
    """One hash of every weight and statistic."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(skip):
            whole.update(name.encode() + value.numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize('name', STOCK)
def test_plain_checkpoint_gives_bit_equal_boxes(name):
    """A stock detector's checkpoint fills both exits; exit 0 is then the stock detector."""
    stock = randomize(MODELS.build(tiny_detector(name)), seed=1).eval()
    model = MODELS.build(tiny_dynamic(name, shared=name in TWO_STAGE)).eval()
    load_state_dict(model, copy.deepcopy(stock.state_dict()))
    batch = tiny_batch((2, 1, 0))
    expected = stock.predict(*fresh(stock, batch))
    assert sum(len(sample.pred_instances) for sample in expected)
    for threshold, exit in ((1, 0), (-1, 1)):
        model.set_budget(threshold=threshold)
        # Connections start at zero, so exit 1 is the stock detector as well.
        for got, want in zip(model.predict(*fresh(model, batch)), expected):
            assert got.exit == exit and 0 <= got.difficulty <= 1
            assert torch.equal(boxes(got), boxes(want))


@pytest.mark.parametrize('name', STOCK)
def test_step_1_trains_both_exits(name):
    model = build(name).train()
    batch = tiny_batch((2, 0, 1))
    losses = model.loss(*fresh(model, batch))
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    assert {key.split('.')[0] for key in losses} == {'exit0', 'exit1'}
    total.backward()
    for key, parameter in model.named_parameters():
        trained = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert not (key.startswith('router.') and trained), key
    for part in ('backbone.first', 'backbone.second', 'backbone.connections', 'branches.0'):
        grads = [p.grad for key, p in model.named_parameters() if key.startswith(part)]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), part


@pytest.mark.parametrize('name', STOCK)
def test_step_2_trains_the_router_alone(name):
    model = build(name, train_router=True).train()
    before = digest(model, skip=('router.',))
    losses = model.loss(*fresh(model, tiny_batch((2, 0, 1))))
    total, log = model.parse_losses(losses)
    assert [key for key in losses if 'loss' in key] == ['loss_router']
    assert {'difficulty', 'difficulty_std', 'share_above_half', 'delta'} < set(log)
    total.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == key.startswith('router.'), key
    assert digest(model, skip=('router.',)) == before
    assert not any(
        module.training
        for key, module in model.named_modules()
        if key.startswith(('backbone', 'branches'))
    )


@pytest.mark.parametrize('name', STOCK)
def test_image_losses_do_not_depend_on_the_batch(name):
    """loss(batch) gives each image what a batch of it alone gives."""
    model = build(name, train_router=True)
    batch = tiny_batch((2, 0, 4))
    together, _ = model.exit_losses(*fresh(model, batch))
    assert together.shape == (2, 3) and not together.requires_grad
    again, _ = model.exit_losses(*fresh(model, batch))
    assert torch.equal(together, again)
    for index in range(3):
        single = {key: value[index : index + 1] for key, value in batch.items()}
        alone, _ = model.exit_losses(*fresh(model, single))
        torch.testing.assert_close(alone[:, 0], together[:, index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', TWO_STAGE)
def test_both_exits_see_the_same_sampling(name):
    """Exits that are equal have equal losses, though their proposals are sampled at random."""
    stock = randomize(MODELS.build(tiny_detector(name)), seed=1)
    model = MODELS.build(tiny_dynamic(name, train_router=True)).eval()
    load_state_dict(model, stock.state_dict())
    inputs, samples = fresh(model, tiny_batch((4, 3)))
    (first, second), _ = model.exit_losses(inputs, samples)
    assert torch.equal(first, second)
    # The sampling is random: under other seeds the same exit gives other losses.
    maps = model.backbone.select(model.backbone.first_maps(inputs))
    drawn = set()
    for seed in range(5):
        torch.manual_seed(seed)
        drawn.add(model.parse_losses(model.branch(0).loss(maps, samples))[0].item())
    assert len(drawn) > 1


@pytest.mark.parametrize('name', TWO_STAGE)
@pytest.mark.parametrize('settings', [dict(), dict(first_scale=0.5, reuse_stages=0)])
def test_both_exits_are_asked_about_the_same_regions(name, settings):
    """Heads of both exits see the same number of samples, whatever each exit proposes."""
    model = build(name, train_router=True, **settings)
    seen = []
    extractor = model.branches[0].roi_head.bbox_roi_extractor
    extractor = extractor[0] if isinstance(extractor, torch.nn.ModuleList) else extractor
    extractor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model.exit_losses(*fresh(model, tiny_batch((2,), size=(128, 192))))
    first, second = seen
    assert len(first) == len(second) > 0
    scale = torch.tensor([1.0] + 4 * [settings.get('first_scale', 1.0)])
    torch.testing.assert_close(first, second * scale, rtol=1e-3, atol=1e-2)
    # The heads' method is back.
    assert 'loss' not in vars(model.branches[0].roi_head)


def test_measuring_losses_leaves_the_generator_alone():
    model = build(train_router=True)
    state = torch.get_rng_state()
    model.exit_losses(*fresh(model, tiny_batch()))
    assert torch.equal(torch.get_rng_state(), state)


def test_objects_multiply_the_gains():
    inputs = tiny_batch((2, 0, 3))
    mean = build(train_router=True)
    summed = build(train_router=True, objective='loss_sum')
    plain, _ = mean.exit_gains(*fresh(mean, inputs))
    weighted, _ = summed.exit_gains(*fresh(summed, inputs))
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 0.0, 3.0]))
    with pytest.raises(UsageError, match='objective'):
        build(objective='none')


@pytest.mark.parametrize('name', STOCK)
def test_mixed_batches_keep_order(name):
    """Each image of a mixed batch gets what its own exit gives it, in its own place."""
    model = build(name)
    batch = tiny_batch((1, 2, 0, 1, 3))
    forced = []
    for threshold in (1, -1):
        model.set_budget(threshold=threshold)
        forced.append(model.predict(*fresh(model, batch)))
    scores = [sample.difficulty for sample in forced[0]]
    # Between two difficulties: none of them hangs on its last bit.
    middle = sum(sorted(scores)[2:4]) / 2
    model.set_budget(threshold=middle)
    results = model.predict(*fresh(model, batch))
    assert [sample.img_id for sample in results] == list(range(5))
    assert sorted(sample.exit for sample in results) == [0, 0, 0, 1, 1]
    for index, sample in enumerate(results):
        assert sample.exit == int(scores[index] > middle)
        assert same_detections(sample.pred_instances, forced[sample.exit][index].pred_instances)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize('threshold, runs', [(1, (1, 0, 0)), (-1, (0, 1, 1))])
def test_only_what_is_needed_runs(threshold, runs):
    """An all-easy batch never runs the second backbone, an all-hard one never the first branch."""
    model = build('retinanet')
    counters = [
        count_calls(part)
        for part in (model.branches[0].neck, model.branches[1].neck, model.backbone.second.layer2)
    ]
    model.set_budget(threshold=threshold)
    model.predict(*fresh(model, tiny_batch((1, 2, 0))))
    assert tuple(len(calls) for calls in counters) == runs


def test_threshold_1_is_easy_even_for_saturated_difficulties():
    model = build()
    torch.nn.init.constant_(model.router.fc2.bias, 1e4)
    results = model.predict(*fresh(model, tiny_batch((1,))))
    assert results[0].difficulty == 1 and results[0].exit == 1
    model.set_budget(threshold=1)
    assert model.predict(*fresh(model, tiny_batch((1,))))[0].exit == 0


@pytest.mark.parametrize('name', STOCK)
@pytest.mark.parametrize('shared', [True, False])
def test_tensor_mode_runs_both_exits(name, shared):
    model = build(name, shared=shared)
    inputs, samples = fresh(model, tiny_batch((1, 2)))
    out = model(inputs, samples, mode='tensor')
    assert set(out) == {'difficulty', 'exits'}
    assert out['difficulty'].shape == (2,) and len(out['exits']) == 2
    first, second = (list(flatten(raw)) for raw in out['exits'])
    assert first and [t.shape[1:] for t in first] == [t.shape[1:] for t in second]
    # Two-stage heads see as many regions as their exit proposes.
    assert any(a.shape != b.shape or not torch.allclose(a, b) for a, b in zip(first, second))


def flatten(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from flatten(item)


def test_sharing_is_a_flag():
    assert len(build(shared=True).branches) == 1
    assert len(build(shared=False).branches) == 2
    keys = build(shared=True).state_dict()
    assert not any(key.startswith('branches.1') for key in keys)


def test_reuse_stages_0_gives_the_second_backbone_a_stem():
    model = build(reuse_stages=0)
    model.set_budget(threshold=-1)
    assert hasattr(model.backbone.second.conv1, 'weight')
    batch = tiny_batch((1, 2))
    scores = [sample.difficulty for sample in model.predict(*fresh(model, batch))]
    model.set_budget(threshold=sum(scores) / 2)
    assert {s.exit for s in model.predict(*fresh(model, batch))} == {0, 1}


@pytest.mark.parametrize('size', [(97, 131), (33, 200), (64, 64)])
def test_odd_sizes(size):
    model = build()
    batch = tiny_batch((1, 2), size=size)
    for threshold in (1, -1):
        model.set_budget(threshold=threshold)
        assert len(model.predict(*fresh(model, batch))) == 2


def test_configs_are_left_alone():
    cfg = tiny_dynamic('faster_rcnn')
    before = str(cfg)
    MODELS.build(dict(cfg))
    assert str(cfg) == before


def test_keys_that_match_nothing_are_named(capsys):
    stock = MODELS.build(tiny_detector('mask_rcnn'))
    model = MODELS.build(tiny_dynamic('faster_rcnn'))
    load_state_dict(model, stock.state_dict())
    said = capsys.readouterr().out
    assert 'unexpected key' in said and 'roi_head.mask_head.conv_logits.weight' in said
    assert 'roi_head.bbox_head' not in said.split('missing keys')[0]


def test_budget_from_the_config():
    model = build(budget=dict(threshold=0.25))
    state = build(seed=3).state_dict()
    load_state_dict(model, state)
    assert model.threshold.item() == 0.25  # the config's counts, not the checkpoint's
    with pytest.raises(UsageError):
        build(budget=dict(threshold=7))
    waiting = build(budget=dict(hard_share=0.5))
    load_state_dict(waiting, state)
    with pytest.raises(UsageError, match='calibrate.py'):
        waiting.predict(*fresh(waiting, tiny_batch()))
    state.update(
        difficulties=torch.tensor([0.1, 0.2, 0.6, 0.8]), latencies=torch.tensor([0.01, 0.03])
    )
    load_state_dict(waiting, state)
    assert waiting.threshold.item() == pytest.approx(0.4)
    assert waiting.set_budget(target_latency=0.025) == pytest.approx(0.15)
    again = build()
    load_state_dict(again, waiting.state_dict())
    assert again.threshold.item() == pytest.approx(0.15) and len(again.difficulties) == 4


def test_frozen_norms_and_statistics_under_training_loops():
    """Loops call train() as they like; statistics in step 2 stay."""
    cfg = tiny_dynamic('faster_rcnn', train_router=True)
    cfg.backbone.norm_eval = False
    model = MODELS.build(cfg)
    model.train()
    model.backbone.train()  # what a careless hook might do
    model.train()
    before = digest(model, skip=('router.',))
    for _ in range(2):
        model.loss(*fresh(model, tiny_batch((1, 2))))
    assert digest(model, skip=('router.',)) == before


def test_difficulty_does_not_depend_on_what_an_image_is_batched_with():
    """Up to the edge effects of padding, which all mmdet detectors have."""
    model = build()
    torch.nn.init.zeros_(model.router.fc2.bias)
    narrow, wide = tiny_batch((1,), size=(64, 192)), tiny_batch((1,), size=(192, 192))
    both = {key: narrow[key] + wide[key] for key in narrow}
    alone = model.predict(*fresh(model, narrow))[0].difficulty
    together = model.predict(*fresh(model, both))[0].difficulty
    assert together == pytest.approx(alone, abs=0.01)


REDUCED = dict(first_scale=0.5, reuse_stages=0)


def test_exit_0_of_a_reduced_image_is_the_stock_detector_on_that_image():
    """Same boxes as the stock detector finds in the image at half size, in the original frame."""
    stock = randomize(MODELS.build(tiny_detector('faster_rcnn')), seed=1).eval()
    model = MODELS.build(tiny_dynamic('faster_rcnn', **REDUCED)).eval()
    load_state_dict(model, stock.state_dict())
    inputs, samples = fresh(model, tiny_batch((1, 2), size=(128, 192)))
    half = torch.nn.functional.interpolate(inputs, size=(64, 96), mode='bilinear', antialias=True)
    halved = copy.deepcopy(samples)
    for sample in halved:
        sample.set_metainfo(dict(img_shape=(64, 96), scale_factor=(0.5, 0.5)))
    model.set_budget(threshold=1)
    expected = stock.predict(half, halved)
    got = model.predict(inputs, samples)
    assert all(len(sample.pred_instances) for sample in expected)
    for one, two in zip(got, expected):
        assert torch.equal(boxes(one), boxes(two)) and one.exit == 0
        assert one.img_shape == (128, 192) and one.scale_factor == (1.0, 1.0)


@pytest.mark.parametrize('name', STOCK)
def test_reduced_first_exit_trains_and_detects(name):
    model = build(name, **REDUCED).train()
    inputs, samples = fresh(model, tiny_batch((2, 0), size=(128, 192)))
    before = [sample.gt_instances.bboxes.clone() for sample in samples]
    total, _ = model.parse_losses(model.loss(inputs, samples))
    assert torch.isfinite(total)
    assert all(torch.equal(s.gt_instances.bboxes, b) for s, b in zip(samples, before))
    model.eval()
    losses, _ = model.exit_losses(inputs, samples)
    assert torch.isfinite(losses).all()
    for threshold in (1, -1):
        model.set_budget(threshold=threshold)
        assert len(model.predict(*fresh(model, tiny_batch((2, 0), size=(128, 192))))) == 2
    out = model(*fresh(model, tiny_batch((1,), size=(128, 192))), mode='tensor')
    assert len(out['exits']) == 2


def test_boxes_that_are_not_rescaled_are_in_the_delivered_frame():
    model = build(**REDUCED)
    model.set_budget(threshold=1)
    batch = tiny_batch((1,), size=(128, 192))
    rescaled = model.predict(*fresh(model, batch))[0]
    as_is = model.predict(*fresh(model, batch), rescale=False)[0]
    torch.testing.assert_close(boxes(as_is), boxes(rescaled))


def test_first_scale_is_checked():
    for settings in (
        dict(first_scale=0.5),
        dict(first_scale=0, reuse_stages=0),
        dict(first_scale=1.5, reuse_stages=0),
    ):
        with pytest.raises(UsageError, match='first_scale'):
            build(**settings)
