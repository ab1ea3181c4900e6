"""Detectors: their layers in blocks, and a compressed file of one."""

import copy

import pytest
import torch
from mmengine.hub import get_config
from mmengine.runner import CheckpointLoader

from dynamicdet.cascade.weights import require_complete
from dynamicdet.compression.ddz import compress, write_compressed
from dynamicdet.compression.pruning import prune_weights, pruned_share
from dynamicdet.compression.pruning_blocks import PruningBlock, find_layers, selected_layers
from dynamicdet.testing import randomize, shrink, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS


def test_a_pruned_dynamic_detector(tmp_path):
    model = randomize(MODELS.build(tiny_dynamic('faster_rcnn')))
    prune_weights(model, [PruningBlock('all', ['*'], 0.7)])
    state = model.state_dict()
    write_compressed(compress(dict(state_dict=state)), str(tmp_path / 'a.ddz'))
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.ddz'), map_location='cpu')[
        'state_dict'
    ]
    for key, value in state.items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0, equal_nan=True)
    assert loaded._metadata['backbone.first.bn1'] == dict(version=2)
    require_complete(model, loaded)
    other = MODELS.build(tiny_dynamic('faster_rcnn'))
    other.load_state_dict(loaded)
    dense = sum(value.numel() * value.element_size() for value in state.values())
    assert (tmp_path / 'a.ddz').stat().st_size < 0.5 * dense


def test_rtmdets_shared_convolutions_count_once():
    model = MODELS.build(shrink(get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model))
    layers = find_layers(model)
    assert len({id(layer.weight) for layer in layers.values()}) == len(layers)
    names = [layer.names for layer in layers.values() if len(layer.names) > 1]
    assert names and all(name.startswith('bbox_head.') for group in names for name in group)
    # By its second name too.
    block = PruningBlock('all', [names[0][1]], 0.5)
    assert [layer.names for layer in selected_layers(model, block).values()] == [names[0]]
    masks = prune_weights(model, [block])
    assert pruned_share(masks) == pytest.approx(0.5, abs=0.01)
    modules = dict(model.named_modules(remove_duplicate=False))
    assert torch.equal(modules[names[0][1]].weight == 0, ~masks[names[0][0]])


def test_a_detector_by_blocks_of_their_own():
    model = MODELS.build(tiny_detector('faster_rcnn'))
    before = copy.deepcopy(model.state_dict())
    prune_weights(
        model,
        [
            PruningBlock('backbone', ['backbone', 'neck'], 0.3),
            PruningBlock('heads', ['roi_head'], 0.9),
        ],
    )
    shares = {}
    for name, layer in find_layers(model).items():
        count = shares.setdefault(name.split('.')[0], [0, 0])
        count[0] += int((layer.module.weight == 0).sum())
        count[1] += layer.weight.numel()
    both = [shares['backbone'][index] + shares['neck'][index] for index in (0, 1)]
    assert both[0] / both[1] == pytest.approx(0.3, abs=1e-3)
    assert shares['roi_head'][0] / shares['roi_head'][1] == pytest.approx(0.9, abs=1e-3)
    assert shares['rpn_head'][0] == 0
    after = model.state_dict()
    assert all(
        torch.equal(after[key][after[key] != 0], before[key][after[key] != 0]) for key in before
    )
