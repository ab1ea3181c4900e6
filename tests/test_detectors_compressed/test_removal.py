"""Channels that go for good: what is coupled, what is left computes what it did, and who
refuses."""

import copy
import json

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from torch import nn

from conftest import ROOT
from dynamicdet.cascade.weights import require_complete
from dynamicdet.compression.channel_removal import BlockRemoval, plan_removal, remove_channels
from dynamicdet.compression.coupling import OUTPUT_RULES, find_clusters, raw_outputs
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.compression.shrinking import channels_of, resize_channels
from dynamicdet.errors import UsageError
from dynamicdet.models import DynamicDetector, build_pruned
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_detector
from mmdet.registry import MODELS


def every(target=0.5, **settings):
    return PruningBlock(
        **{
            'name': 'all',
            'modules': ['*'],
            'target': target,
            'structured': True,
            'over': 'layer',
            **settings,
        }
    )


def config(name):
    """A shrunk model config: of mmdet's own kinds, mmdet's zoo, or this project's."""
    if name == 'rtmdet':
        return shrink(get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model)
    path = ROOT / 'configs' / f'{name}.py'
    return shrink(Config.fromfile(path).model) if path.exists() else tiny_detector(name)


def removed(name, *blocks, round_to=4):
    """(config, the model before, and after)."""
    cfg = config(name)
    whole = randomize(MODELS.build(copy.deepcopy(cfg)))
    small = copy.deepcopy(whole)
    plan = plan_removal(small, blocks or [every()], round_to)
    remove_channels(small, plan)
    return cfg, whole, small, plan


def batch_for(name):
    return tiny_batch((2, 1), size=(64, 96), masks='mask' in name)


LISTED = [
    'faster_rcnn',
    'mask_rcnn',
    'retinanet',
    'fcos',
    'rtmdet',
    'yolox',
    'yolov7',
    'dy_faster_rcnn',
    'dy_mask_rcnn',
    'dy_retinanet',
    'dy_fcos',
    'dy_rtmdet_tiny',
    'dy_yolox_s',
    'dy_yolov7',
]


@pytest.mark.parametrize('name', LISTED)
def test_every_listed_detector_shrinks_reloads_and_trains(name):
    cfg, whole, small, plan = removed(name)
    assert plan.rows[0].removed == pytest.approx(0.5, abs=0.03) and plan.rows[0].channels > 300
    counts = [sum(value.numel() for value in model.parameters()) for model in (whole, small)]
    assert counts[1] < 0.35 * counts[0]
    # As plain data, and through it.
    channels = json.loads(json.dumps(small.removed_channels))
    again = MODELS.build(ConfigDict(type='PrunedDetector', detector=cfg, channels=channels))
    assert type(again) is type(whole)
    require_complete(again, small.state_dict())
    again.load_state_dict(small.state_dict())
    small.eval(), again.eval()
    exits = (1.0, -1.0) if isinstance(again, DynamicDetector) else (None,)
    for exit, threshold in enumerate(exits):
        found = []
        for model in (small, again):
            if threshold is not None:
                model.set_budget(threshold=threshold)
            with torch.no_grad():
                found.append(model.test_step(copy.deepcopy(batch_for(name))))
        for one, other in zip(*found):
            assert len(one.pred_instances) and torch.equal(
                one.pred_instances.bboxes, other.pred_instances.bboxes
            )
            assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)
            assert threshold is None or other.exit == exit
    again.train()
    data = again.data_preprocessor(batch_for(name), True)
    optimizer = torch.optim.SGD([one for one in again.parameters() if one.requires_grad], lr=1e-6)
    loss, _ = again.parse_losses(again.loss(data['inputs'], data['data_samples']))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    trained = [value for value in again.parameters() if value.requires_grad]
    assert all(value.grad is None or value.grad.shape == value.shape for value in trained)
    assert sum(value.grad is not None and bool(value.grad.any()) for value in trained) > 0.5 * len(
        trained
    )


@pytest.mark.parametrize('name', ['dy_faster_rcnn', 'fcos'])
def test_what_is_left_computes_what_it_did_without_the_rest(name):
    """Independent of the check inside: channels at zero where they enter, all else as it was."""
    _, whole, small, plan = removed(name)
    with torch.no_grad():
        for layer, kept in plan.kept.items():
            module = whole.get_submodule(layer) if layer != 'router' else None
            if kept.entering is not None and isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                gone = sorted(set(range(module.weight.shape[1])) - set(kept.entering.tolist()))
                module.weight[:, gone] = 0
        images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
        wanted, found = (raw_outputs(model.eval(), images) for model in (whole, small))
    assert len(wanted) == len(found) > 3
    for one, other in zip(wanted, found):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_prediction_layers_keep_their_outputs_and_both_backbones_match():
    _, whole, small, _ = removed('dy_faster_rcnn')
    for layer in (
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
    ):
        given = [channels_of(model.branches[0].get_submodule(layer)) for model in (whole, small)]
        assert given[0][1] == given[1][1] and given[0][0] > given[1][0]
    first, second = small.backbone.first.layer3, small.backbone.second.layer3
    joined = small.backbone.connections[1].projections[0][0]
    assert first[-1].conv2.out_channels == joined.in_channels == 16
    assert small.backbone.second.layer2[-1].conv2.out_channels == joined.out_channels == 8
    assert second[0].conv1.in_channels == 8
    assert small.branches[0].roi_head.bbox_roi_extractor.out_channels == 32
    assert (
        len(small.router.mean) == small.router.fc1.in_features == sum(small.backbone.channels) // 2
    )


def test_units_of_groups():
    """Of group norms and convolutions with groups whole groups go."""
    clusters = find_clusters(randomize(MODELS.build(config('fcos'))))
    normed = [one for one in clusters if any(name.endswith('.gn') for name in one.layers)]
    assert normed and all((one.units, one.width) == (32, 2) for one in normed)
    grouped = find_clusters(randomize(MODELS.build(config('dy_faster_rcnn_x101'))))
    own = [one for one in grouped if 'backbone.first.layer2.1.conv2' in one.layers]
    assert [(one.units, one.width) for one in own] == [
        (4, 8)
    ] and 'backbone.first.layer2.1.conv1' in own[0].layers


def test_each_layer_of_a_joined_map_is_rounded():
    """Channel attention couples what two branches give: each of them keeps a multiple."""
    _, _, small, _ = removed('rtmdet', every(0.4), round_to=8)
    for name, (entering, leaving, _) in small.removed_channels.items():
        if name.endswith('_conv.conv') and 'depthwise' not in name:
            assert leaving % 8 == 0 and leaving > 0, name


def hand_made(score):
    """A detector in which channel i of a layer has norm ``score[i]``."""
    model = randomize(MODELS.build(config('retinanet')))
    layer = model.bbox_head.cls_convs[0].conv
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(score)[:, None, None, None].expand_as(layer.weight))
    return model


def test_the_weakest_go_and_masked_ones_first():
    score = [float((7 * index) % 64 + 1) for index in range(64)]
    score[5] = 0.0
    model = hand_made(score)
    plan = plan_removal(model, [every(0.25, modules=['bbox_head.cls_convs.0'])], 16)
    kept = plan.kept['bbox_head.cls_convs.0.conv'].leaving.tolist()
    assert kept == sorted(sorted(range(64), key=lambda index: -score[index])[:48])
    assert plan.rows == [BlockRemoval('all', 64, 48)]
    # Who takes them in, and nothing else.
    assert set(plan.kept) == {'bbox_head.cls_convs.0.conv', 'bbox_head.cls_convs.1.conv'}


def test_over_a_block_the_weakest_layer_loses_most():
    model = hand_made([1e-3] * 32 + [1.0] * 32)
    with torch.no_grad():
        model.bbox_head.cls_convs[1].conv.weight.fill_(1.0)
    modules = ['bbox_head.cls_convs.0', 'bbox_head.cls_convs.1']
    plan = plan_removal(model, [every(0.25, modules=modules, over='block')], 16)
    left = {name: len(kept.leaving) for name, kept in plan.kept.items() if kept.leaving is not None}
    assert left == {'bbox_head.cls_convs.0.conv': 32}


@pytest.mark.parametrize(
    'block, reason',
    [
        (dict(target=1.0), 'at least 0 and below 1'),
        (dict(target=-0.1), 'at least 0 and below 1'),
        (dict(modules=['bakbone']), "'bakbone' matches no module"),
        (dict(modules=['backbone.layer1'], target=0.99), 'pruned to nothing'),
        (dict(modules=['bbox_head.retina_cls']), 'nothing in it can be removed'),
        (dict(norm=float('nan')), 'above 0'),
        (dict(norm=0), 'above 0'),
        (dict(score='gradient'), 'not by score'),
        (dict(over='kind'), "over is 'layer' or 'block'"),
    ],
)
def test_blocks_that_cannot_be(block, reason):
    model = MODELS.build(config('retinanet'))
    with pytest.raises(UsageError, match=reason) as caught:
        plan_removal(model, [every(**block)], 4)
    assert '\n' not in str(caught.value)


def test_weights_that_are_not_finite():
    model = MODELS.build(config('retinanet'))
    model.neck.fpn_convs[0].conv.weight.data[0, 0] = float('nan')
    with pytest.raises(UsageError, match="'neck.fpn_convs.0.conv' are not finite"):
        plan_removal(model, [every(modules=['backbone'])], 4)


def test_what_stays_is_named():
    model = MODELS.build(config('faster_rcnn'))
    # The stem adds to what stage 1 gives, which is in no block.
    plan = plan_removal(model, [every(modules=['backbone.conv1', 'backbone.layer2'])], 4)
    assert 'backbone.conv1' in plan.alone and 'not in its block' in plan.alone['backbone.conv1']
    assert [plan.rows[0].channels, plan.rows[0].left] == [48, 24]


def test_checkpoints_of_other_channels_are_refused_in_one_line():
    cfg, whole, small, _ = removed('retinanet')
    again = build_pruned(cfg, small.removed_channels)
    with pytest.raises(UsageError, match='some of whose channels were removed') as caught:
        again.load_state_dict(whole.state_dict(), strict=False)
    assert '\n' not in str(caught.value)
    with pytest.raises(UsageError, match='lost channels: use the config') as caught:
        require_complete(whole, small.state_dict())
    assert '\n' not in str(caught.value)
    # A head for other classes is fine-tuning, and one's own to decide.
    state = dict(small.state_dict())
    state['bbox_head.retina_cls.weight'] = torch.zeros(90, 32, 3, 3)
    state['bbox_head.retina_cls.bias'] = torch.zeros(90)
    with pytest.raises(RuntimeError, match='size mismatch'):
        again.load_state_dict(state)


@pytest.mark.parametrize(
    'channels, reason',
    [
        ({'bakbone.conv1': [3, 4, 1]}, "no layer 'bakbone.conv1'"),
        ({'backbone.conv1': [3, 999, 1]}, 'cannot have'),
        ({'backbone.conv1': [3, 4]}, 'cannot have'),
        ({'backbone': [3, 4, 1]}, 'none there'),
        ({'backbone.conv1': [3, 0, 1]}, 'cannot have'),
    ],
)
def test_descriptions_of_something_else(channels, reason):
    with pytest.raises(UsageError, match=reason):
        resize_channels(MODELS.build(config('retinanet')), channels)


def test_removing_twice():
    cfg, _, small, _ = removed('retinanet', every(0.25))
    remove_channels(small, plan_removal(small, [every(0.5, modules=['bbox_head'])], 4))
    again = build_pruned(cfg, small.removed_channels)
    again.load_state_dict(small.state_dict())
    assert (
        again.bbox_head.cls_convs[0].conv.out_channels == 24
        and again.neck.fpn_convs[0].conv.out_channels == 48
    )


def test_a_detector_of_another_kind():
    with pytest.raises(UsageError, match='cannot be removed: only those of'):
        plan_removal(
            MODELS.build(shrink(Config.fromfile(ROOT / 'configs/dy_dino_r50.py').model).detector),
            [every(modules=['backbone'])],
            4,
        )


def test_early_exits_are_neither_removed_nor_exported():
    from dynamicdet.models.detector_parts import find_parts

    model = MODELS.build(
        shrink(Config.fromfile(ROOT / 'configs/video/early_exit_yolov5_digits.py').model)
    )
    with pytest.raises(UsageError, match='EarlyExitDetector cannot be removed: only those of'):
        plan_removal(model, [every(modules=['detector.backbone'])], 4)
    with pytest.raises(UsageError, match='EarlyExitDetector cannot be cut'):
        find_parts(model)


class Folded(nn.Module):
    """Adds the second half of its channels to the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 32, 1)
        self.third, self.last = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images):
        maps = self.first(images)
        return self.last(self.third(self.second(maps[:, :16] + maps[:, 16:]).relu()).relu())


def test_channels_that_are_added_to_each_other_stay_or_go_together(monkeypatch):
    monkeypatch.setitem(OUTPUT_RULES, Folded, lambda model, images, _: model(images))
    torch.manual_seed(0)
    model = Folded()
    plan = plan_removal(model, [every()], 4)
    assert 'third' in plan.kept
    remove_channels(model, plan)
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 4, 8, 8)
