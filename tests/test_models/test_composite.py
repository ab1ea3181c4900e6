"""Composite connections: against CBNetV2's numbers, and against a plain ResNet."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynamicdet.errors import UsageError
from dynamicdet.models import build_composite
from dynamicdet.models.composite import Connection, upsample_sum
from dynamicdet.testing import randomise, tiny_backbone
from mmdet.registry import MODELS

DATA = Path(__file__).parents[1] / 'data'


def reference_weights():
    spec = importlib.util.spec_from_file_location('reference_weights', DATA / 'reference_weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rename_cbnetv2(key: str) -> str:
    """CBNetV2's name of an entry -> ours."""
    parts = key.split('.')
    if parts[0] == 'cb_modules':
        return '.'.join([('first', 'second')[int(parts[1])], *parts[2:]])
    # cb_linears.STAGE.MAP.(0 conv, 1 norm): the first stage is taken over and has none.
    stage, index, *rest = parts[1:]
    return '.'.join(['connections', str(int(stage) - 1), 'projections', index, *rest])


def test_cbnetv2_parity():
    """Both backbones' maps within 1e-4 relative of CBNetV2's CBResNet-50, cb_del_stages=1."""
    weights = reference_weights()
    file = DATA / 'cbnetv2_resnet50_del1.json'
    reference = json.loads(file.read_text())
    state = {
        rename_cbnetv2(key): torch.from_numpy(np.asarray(value))
        for key, value in weights.checkpoint(file, 'cbnetv2').items()
    }
    composite = build_composite(dict(type='ResNet', depth=50), reuse_stages=1).eval()
    # The second backbone's unused stem norm is in their checkpoint.
    spare = [key for key in state if key.startswith('second.bn1.')]
    for key in spare:
        state.pop(key)
    composite.load_state_dict(state, strict=True)
    images = torch.from_numpy(weights.inputs(reference['input']))
    with torch.no_grad():
        first = composite.first_maps(images)
        second = composite.second_maps(images, first)
    for maps, expected in ((first, reference['first']), (second, reference['second'])):
        assert len(maps) == len(expected) == 4
        for got, want in zip(maps, expected):
            assert list(got.shape) == want['shape']
            values = got.flatten()[want['index']].numpy()
            wanted = np.asarray(want['value'], np.float32)
            assert np.abs(values - wanted).max() <= 1e-4 * np.abs(wanted).max()
            np.testing.assert_allclose(got.mean().item(), want['mean'], rtol=1e-4)
            np.testing.assert_allclose(got.std(correction=0).item(), want['std'], rtol=1e-4)


@pytest.mark.parametrize('backbone', [
    tiny_backbone(),
    tiny_backbone((1, 2, 3)),
    tiny_backbone(deep_stem=True, avg_down=True),
    dict(type='ResNet', depth=50, base_channels=4),
    dict(type='ResNeXt', depth=50, groups=4, base_width=4, base_channels=16),
    dict(type='Res2Net', depth=50, scales=4, base_width=4, base_channels=8),
    dict(type='ResNetV1d', depth=18, base_channels=8),
], ids=lambda cfg: f"{cfg['type']}-{cfg['depth']}-{len(cfg)}")
@pytest.mark.parametrize('reuse_stages', [0, 1, 2])
def test_starts_as_plain_backbone(backbone, reuse_stages):
    """Zero-initialised norms: with equal weights, the second backbone's maps are a plain one's."""
    torch.manual_seed(0)
    plain = randomise(MODELS.build({**backbone, 'out_indices': (0, 1, 2, 3)}))
    plain.eval()
    composite = build_composite(backbone, reuse_stages).eval()
    composite.first.load_state_dict(plain.state_dict())
    composite.second.load_state_dict(plain.state_dict(), strict=False)
    images = torch.rand(2, 3, 70, 90)
    with torch.no_grad():
        first = composite.first_maps(images)
        second = composite.second_maps(images, first)
        expected = plain(images)
    for one, two, want in zip(first, second, expected):
        assert torch.equal(one, want) and torch.equal(two, want)
    selected = composite.select(first)
    assert len(selected) == len(backbone.get('out_indices', range(4)))
    assert selected[-1] is first[-1]


def test_connections_change_the_second_backbone():
    composite = randomise(build_composite(tiny_backbone())).eval()
    images = torch.rand(1, 3, 64, 64)
    first = composite.first_maps(images)
    with_connections = composite.second_maps(images, first)
    for connection in composite.connections:
        for _, norm in connection.projections:
            norm.weight.data.zero_()
            norm.bias.data.zero_()
    without = composite.second_maps(images, first)
    assert torch.equal(with_connections[0], without[0])  # taken over from the first
    assert all(not torch.allclose(a, b) for a, b in zip(with_connections[1:], without[1:]))


def test_connection_by_hand():
    """Two 1x1 maps of value 3 and 5 with weights 2 and -1: 2 * 3 - 5 = 1 everywhere."""
    connection = Connection([1, 1], 1).eval()
    for (conv, norm), weight in zip(connection.projections, (2.0, -1.0)):
        nn.init.constant_(conv.weight, weight)
        nn.init.ones_(norm.weight)
        norm.eps = 0
    out = connection([torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 1), 5.0)], (4, 4))
    assert out.shape == (1, 1, 4, 4)
    torch.testing.assert_close(out, torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize('size, sizes', [
    ((32, 48), [(16, 24), (8, 12), (4, 6)]),
    ((32, 48), [(32, 48), (8, 12), (2, 3)]),
    ((25, 33), [(13, 17), (7, 9), (4, 5)]),
    ((25, 33), [(5, 11), (3, 6)]),
    ((8, 8), [(4, 4)]),
])
def test_upsample_sum_is_the_direct_sum(size, sizes):
    """Both ways of summing, on sizes that divide and sizes that do not."""
    maps = [torch.rand(2, 3, *own) for own in sizes]
    direct = sum(F.interpolate(m, size=size, mode='nearest') for m in maps)
    torch.testing.assert_close(upsample_sum(maps, size), direct)


def test_norms_of_connections_stay_in_eval_mode():
    composite = build_composite(tiny_backbone(norm_eval=False)).train()
    norms = [m for m in composite.connections.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert composite.first.bn1.training
    assert all(norm.weight.requires_grad for norm in norms)


def test_frozen_stages_survive_what_was_dropped():
    composite = build_composite(tiny_backbone(frozen_stages=2), reuse_stages=1).train()
    assert not any(p.requires_grad for p in composite.second.layer2.parameters())
    assert all(p.requires_grad for p in composite.second.layer3.parameters())
    assert not list(composite.second.layer1.parameters())


def test_the_config_is_left_alone():
    backbone = tiny_backbone((1, 2, 3))
    before = str(backbone)
    build_composite(backbone)
    assert str(backbone) == before


def test_unknown_families_are_refused():
    with pytest.raises(TypeError, match='RegNet.*docs/composite.md'):
        build_composite(dict(type='RegNet', arch='regnetx_400mf'))
    with pytest.raises(TypeError, match='NoSuchNet'):
        build_composite(dict(type='NoSuchNet'))
    with pytest.raises(UsageError, match='reuse_stages'):
        build_composite(tiny_backbone(), reuse_stages=4)
