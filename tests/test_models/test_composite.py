"""Composite connections: against CBNetV2's numbers, and against a plain ResNet."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynamicdet.errors import UsageError
from dynamicdet.exchange.rules import apply_rules
from dynamicdet.interop.cbnetv2 import CBNETV2
from dynamicdet.models import build_composite
from dynamicdet.models.composite import Connection
from dynamicdet.models.composite.composite import biased_projection
from dynamicdet.models.fusing import _replace_convolutions
from dynamicdet.testing import randomize, tiny_backbone
from mmdet.registry import MODELS

DATA = Path(__file__).parents[1] / 'data'


def reference_weights():
    spec = importlib.util.spec_from_file_location(
        'reference_weights', DATA / 'reference_weights.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cbnetv2_parity():
    """Both backbones' maps within 1e-4 relative of CBNetV2's CBResNet-50, cb_del_stages=1."""
    weights = reference_weights()
    file = DATA / 'cbnetv2_resnet50_del1.json'
    reference = json.loads(file.read_text())
    composite = build_composite(dict(type='ResNet', depth=50), reuse_stages=1).eval()
    state = {
        f'backbone.{key}': torch.from_numpy(np.asarray(value))
        for key, value in weights.checkpoint(file, 'cbnetv2').items()
    }
    state, _ = apply_rules(CBNETV2.rules(SimpleNamespace(backbone=composite, branches=[])), state)
    composite.load_state_dict(
        {key.removeprefix('backbone.'): value for key, value in state.items()}, strict=True
    )
    images = torch.from_numpy(weights.inputs(reference['input']))
    with torch.no_grad():
        first = composite.first_maps(images)
        second = composite.deeper_maps(images, first)
    for maps, expected in ((first, reference['first']), (second, reference['second'])):
        assert len(maps) == len(expected) == 4
        for got, want in zip(maps, expected):
            assert list(got.shape) == want['shape']
            values = got.flatten()[want['index']].numpy()
            wanted = np.asarray(want['value'], np.float32)
            assert np.abs(values - wanted).max() <= 1e-4 * np.abs(wanted).max()
            np.testing.assert_allclose(got.mean().item(), want['mean'], rtol=1e-4)
            np.testing.assert_allclose(got.std(correction=0).item(), want['std'], rtol=1e-4)


CSP = [
    dict(type='CSPDarknet', deepen_factor=0.1, widen_factor=0.125),
    dict(
        type='CSPDarknet',
        deepen_factor=0.33,
        widen_factor=0.125,
        out_indices=(1, 4),
        use_depthwise=True,
    ),
    dict(
        type='CSPDarknet',
        arch='P6',
        deepen_factor=0.1,
        widen_factor=0.125,
        out_indices=(2, 3, 4, 5),
    ),
    dict(type='CSPNeXt', deepen_factor=0.1, widen_factor=0.125),
]


@pytest.mark.parametrize(
    'backbone',
    [
        *CSP,
        tiny_backbone(),
        tiny_backbone((1, 2, 3)),
        tiny_backbone(deep_stem=True, avg_down=True),
        dict(type='ResNet', depth=50, base_channels=4),
        dict(type='ResNeXt', depth=50, groups=4, base_width=4, base_channels=16),
        dict(type='Res2Net', depth=50, scales=4, base_width=4, base_channels=8),
        dict(type='ResNetV1d', depth=18, base_channels=8),
    ],
    ids=lambda cfg: f'{cfg["type"]}-{cfg.get("depth", cfg.get("arch", "P5"))}-{len(cfg)}',
)
@pytest.mark.parametrize('reuse_stages', [0, 1, 2])
def test_starts_as_plain_backbone(backbone, reuse_stages):
    """Zero-initialized norms: with equal weights, the second backbone's maps are a plain one's."""
    torch.manual_seed(0)
    composite = build_composite(backbone, reuse_stages).eval()
    plain = randomize(MODELS.build({**backbone, 'out_indices': composite.first.out_indices}))
    plain.eval()
    composite.first.load_state_dict(plain.state_dict())
    composite.second.load_state_dict(plain.state_dict(), strict=False)
    images = torch.rand(2, 3, 70, 90)
    with torch.no_grad():
        first = composite.first_maps(images)
        second = composite.deeper_maps(images, first)
        expected = plain(images)
    for one, two, want in zip(first, second, expected):
        assert torch.equal(one, want) and torch.equal(two, want)
    selected = composite.select(first)
    # The maps that a neck would be given by the backbone itself.
    own = MODELS.build(backbone)
    own.eval()
    own.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = own(images)
    assert len(selected) == len(expected)
    assert all(torch.equal(one, want) for one, want in zip(selected, expected))


@pytest.mark.parametrize('backbone', CSP)
def test_csp_refuses_the_stems_map(backbone):
    with pytest.raises(UsageError, match='leave 0 out of out_indices'):
        build_composite({**backbone, 'out_indices': (0, 2, 3)})


def tiny_swin(**settings):
    return dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        drop_path_rate=0.0,
        **settings,
    )


def build_swin(**settings):
    """A composite and a plain backbone, all three of the same weights; connections are fresh."""
    composite = build_composite(tiny_swin(**settings), reuse_stages=0).eval()
    plain = randomize(MODELS.build(tiny_swin(**settings)), seed=1)
    plain.eval()
    for net in (composite.first, composite.second):
        # Norms of maps that are given to nobody are for the connections alone.
        net.load_state_dict(plain.state_dict(), strict=False)
    return composite, plain


def tokens_to_map(tokens, size):
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


@pytest.mark.parametrize('size', [(64, 64), (70, 90)])
@pytest.mark.parametrize('settings', [{}, dict(out_indices=(1, 3))], ids=str)
def test_swin_starts_with_the_first_ones_maps_added(settings, size):
    """A stage's convolutions start at zero, its identity connection does not: what enters stage l
    is its own, from before, plus ``f1[l]``. Here by mmdet's own stages, one after the other."""
    composite, plain = build_swin(**settings)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        first = composite.first_maps(images)
        second = composite.deeper_maps(images, first)
        for one, want in zip(composite.select(first), plain(images)):
            assert torch.equal(one, want)
        net = composite.second
        tokens, hw = net.patch_embed(images)
        for index, stage in enumerate(net.stages):
            assert first[index].shape[-2:] == hw
            tokens = tokens + first[index].flatten(2).transpose(1, 2)
            tokens, hw, out, out_hw = stage(tokens, hw)
            want = tokens_to_map(getattr(net, f'norm{index}')(out), out_hw)
            torch.testing.assert_close(second[index], want)
    assert [f.shape for f in first] == [f.shape for f in second]


def test_swin_identity_by_hand():
    """Maps of 1, 2, 3 and 4 everywhere; with zero convolutions what enters stage l is map l
    itself."""
    composite, _ = build_swin()
    maps = [torch.full((1, 8 * 2**i, 8 // 2**i, 8 // 2**i), i + 1.0) for i in range(4)]
    for index, connection in enumerate(composite.connections):
        assert isinstance(connection.projections[0], nn.Identity)
        assert all(
            isinstance(w, nn.Conv2d) and w.bias is not None for w in connection.projections[1:]
        )
        nothing = torch.zeros_like(maps[index])
        assert torch.equal(connection(maps[index:], nothing), maps[index])
    # A bias of 5 in the convolution from map 3 to stage 2: 3 + 5.
    composite.connections[2].projections[1].bias.data.fill_(5.0)
    assert torch.equal(
        composite.connections[2](maps[2:], torch.zeros_like(maps[2])),
        torch.full((1, 32, 2, 2), 8.0),
    )


def test_swin_is_what_mmdet_computes_without_connections():
    """Same stem and stages in training mode too, with the settings that change them."""
    composite, plain = build_swin(with_cp=True, use_abs_pos_embed=True, pretrain_img_size=64)
    images = torch.rand(1, 3, 64, 64)
    composite.train(), plain.train()
    zeros = [torch.zeros_like(f) for f in plain(images)]
    for one, want in zip(composite.deeper_maps(images, zeros), plain(images)):
        torch.testing.assert_close(one, want)


def test_swin_takes_over_nothing():
    with pytest.raises(UsageError, match='reuse_stages=0'):
        build_composite(tiny_swin(), reuse_stages=1)


def test_connections_change_the_second_backbone():
    composite = randomize(build_composite(tiny_backbone())).eval()
    images = torch.rand(1, 3, 64, 64)
    first = composite.first_maps(images)
    with_connections = composite.deeper_maps(images, first)
    for connection in composite.connections:
        for _, norm in connection.projections:
            norm.weight.data.zero_()
            norm.bias.data.zero_()
    without = composite.deeper_maps(images, first)
    assert torch.equal(with_connections[0], without[0])  # taken over from the first
    assert all(not torch.allclose(a, b) for a, b in zip(with_connections[1:], without[1:]))


def test_connection_by_hand():
    """Two maps of value 3 and 5 with weights 2 and -1, added to 7: 7 + 2 * 3 - 5 = 8 everywhere."""
    connection = Connection([1, 1], 1).eval()
    for (conv, norm), weight in zip(connection.projections, (2.0, -1.0)):
        nn.init.constant_(conv.weight, weight)
        nn.init.ones_(norm.weight)
        norm.eps = 0
    entering = torch.full((1, 1, 4, 4), 7.0)
    out = connection([torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 1), 5.0)], entering)
    torch.testing.assert_close(out, torch.full((1, 1, 4, 4), 8.0))


@pytest.mark.parametrize(
    'size, sizes',
    [
        ((32, 48), [(16, 24), (8, 12), (4, 6)]),
        ((32, 48), [(32, 48), (8, 12), (2, 3)]),
        ((25, 33), [(13, 17), (7, 9), (4, 5)]),
        ((25, 33), [(5, 11), (3, 6)]),
        ((8, 8), [(4, 4)]),
    ],
)
@pytest.mark.parametrize('fused', [False, True])
def test_the_sum_is_the_direct_sum(size, sizes, fused):
    """Both ways of summing, on sizes that divide and sizes that do not; and as fused for
    inference."""
    maps, x = [torch.rand(2, 3, *own) for own in sizes], torch.rand(2, 4, *size)
    connection = randomize(Connection([3] * len(maps), 4, biased_projection))
    with torch.no_grad():
        direct = x + sum(
            F.interpolate(w(m), size=size, mode='nearest')
            for w, m in zip(connection.projections, maps)
        )
        kept = x.clone()
        if fused:
            _replace_convolutions(connection)
        got = connection(maps, x)
    torch.testing.assert_close(got, direct)
    assert torch.equal(x, kept)


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
