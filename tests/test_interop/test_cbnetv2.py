"""CBNetV2: its maps, every key of its models, and the order of Swin's patch merging."""

import numpy as np
import pytest
import torch
from foreign import DATA, build, build_shapes, cbnetv2_swin_shapes, convert, reference, weights
from mmengine.config import Config

from conftest import ROOT
from dynamicdet.cascade.weights import require_complete
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.exchange.rules import apply_rules
from dynamicdet.interop.cbnetv2 import CBNETV2, unfold_order
from mmdet.models.backbones.swin import swin_converter
from mmdet.models.layers import PatchMerging
from mmdet.registry import MODELS

REFERENCE = 'cbnetv2_resnet50_del1'


def test_r50_parity_through_the_tool(tmp_path, monkeypatch):
    """Maps of both backbones within 1e-4 relative of the recorded ones; neck and heads as they
    were."""
    name = 'dy_faster_rcnn'
    state = {
        f'backbone.{key}': torch.from_numpy(np.asarray(value))
        for key, value in weights.checkpoint(DATA / f'{REFERENCE}.json', 'cbnetv2').items()
    }
    model = build(name).eval()
    heads = {key: torch.rand(value.shape) for key, value in model.branches[0].state_dict().items()}
    state |= heads
    state['ema_backbone_cb_modules_0_conv1_weight'] = torch.zeros(64, 3, 7, 7)
    torch.save(dict(state_dict=state, meta=dict(epoch=12), optimizer={}), tmp_path / 'theirs.pth')
    config, out = ROOT / f'configs/{name}.py', tmp_path / 'ours.pth'
    status, said, complained = convert(monkeypatch, tmp_path / 'theirs.pth', 'cbnetv2', config, out)
    assert status == 0, complained
    assert 'router (6)' in said and 'connections' not in said
    model.load_state_dict(read_checkpoint(str(out))['state_dict'], strict=True)
    for key, value in model.branches[0].state_dict().items():
        assert torch.equal(value, heads[key])
    recorded = reference(REFERENCE)
    images = torch.from_numpy(weights.inputs(recorded['input']))
    with torch.no_grad():
        first = model.backbone.first_maps(images)
        second = model.backbone.deeper_maps(images, first)
    for maps, expected in ((first, recorded['first']), (second, recorded['second'])):
        for got, want in zip(maps, expected, strict=True):
            wanted = np.asarray(want['value'], np.float32)
            values = got.flatten()[want['index']].numpy()
            assert np.abs(values - wanted).max() <= 1e-4 * np.abs(wanted).max()
            np.testing.assert_allclose(got.mean().item(), want['mean'], rtol=1e-4)
            np.testing.assert_allclose(got.std(correction=0).item(), want['std'], rtol=1e-4)


def swin_heads(cascade):
    """Keys and shapes of neck and heads in mmdet 2.x, on Swin-T or -S."""
    shapes = {}

    def weighted(name, *shape):
        shapes.update({f'{name}.weight': shape, f'{name}.bias': shape[:1]})

    for index in range(4):
        weighted(f'neck.lateral_convs.{index}.conv', 256, 96 * 2**index, 1, 1)
        weighted(f'neck.fpn_convs.{index}.conv', 256, 256, 3, 3)
    weighted('rpn_head.rpn_conv', 256, 256, 3, 3)
    weighted('rpn_head.rpn_cls', 3, 256, 1, 1)
    weighted('rpn_head.rpn_reg', 12, 256, 1, 1)
    for part in ('.0', '.1', '.2') if cascade else ('',):
        box, mask = f'roi_head.bbox_head{part}', f'roi_head.mask_head{part}'
        weighted(f'{box}.fc_cls', 81, 1024)
        weighted(f'{box}.fc_reg', 320, 1024)
        weighted(f'{box}.shared_fcs.0', 1024, 256 * 7 * 7)
        if not cascade:
            weighted(f'{box}.shared_fcs.1', 1024, 1024)
        for index in range(4):
            weighted(f'{mask}.convs.{index}.conv', 256, 256, 3, 3)
            if cascade:
                shapes[f'{box}.shared_convs.{index}.conv.weight'] = (256, 256, 3, 3)
                weighted(f'{box}.shared_convs.{index}.bn', 256)
                shapes[f'{box}.shared_convs.{index}.bn.running_mean'] = (256,)
                shapes[f'{box}.shared_convs.{index}.bn.running_var'] = (256,)
                shapes[f'{box}.shared_convs.{index}.bn.num_batches_tracked'] = ()
        weighted(f'{mask}.upsample', 256, 256, 2, 2)
        weighted(f'{mask}.conv_logits', 80, 256, 1, 1)
    return shapes


@pytest.mark.parametrize(
    'name, depths, cascade',
    [
        ('dy_mask_rcnn_swin-t', (2, 2, 6, 2), False),
        ('dy_cascade_mask_rcnn_swin-s', (2, 2, 18, 2), True),
    ],
)
def test_every_key_of_swin_at_full_size(name, depths, cascade):
    model = build_shapes(name)
    shapes = cbnetv2_swin_shapes(depths) | swin_heads(cascade)
    state = {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}
    found, skipped = apply_rules(CBNETV2.rules(model), state)
    require_complete(model, found, CBNETV2.kept)
    # The second patch embedding is the first's: four entries more.
    assert len(found) == len(state) + 4 and not skipped


def test_swin_values():
    """As mmdet's own converter has them; patch embedding for both, positions as mmdet builds
    them."""
    cfg = Config.fromfile(ROOT / 'configs/dy_mask_rcnn_swin-t.py').model
    small = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    cfg.backbone.update(small)
    cfg.detector.neck.in_channels = [8, 16, 32, 64]
    model = MODELS.build(cfg)
    ours = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(shape, generator=generator)
        for key, shape in cbnetv2_swin_shapes(small['depths'], 8, 1).items()
    }
    position = (torch.arange(49) // 7, torch.arange(49) % 7)
    row, column = (axis[:, None] - axis[None] + 6 for axis in position)
    state |= {key: row * 13 + column for key in state if key.endswith('position_index')}
    found, _ = apply_rules(CBNETV2.rules(model), state)
    for index, part in enumerate(('first', 'second')):
        prefix = f'backbone.cb_modules.{index}.'
        plain = {
            key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)
        }
        for key, value in swin_converter(plain).items():
            name = key.replace('backbone.', f'backbone.{part}.')
            assert torch.equal(found.pop(name), value), name
            if name.endswith('position_index'):
                assert torch.equal(ours[name], value)
    for leaf in ('projection.weight', 'projection.bias', 'norm.weight', 'norm.bias'):
        theirs = state[f'backbone.cb_modules.0.patch_embed.{leaf.replace("projection", "proj")}']
        assert torch.equal(found.pop(f'backbone.second.patch_embed.{leaf}'), theirs)
    assert found.keys() == {key for key in ours if key.startswith('backbone.connections.')}


def test_patch_merging_by_the_original_definition():
    """Concatenate x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]; norm; reduce."""
    torch.manual_seed(0)
    x, weight, scale, shift = (
        torch.rand(2, 4, 6, 3),
        torch.rand(6, 12),
        torch.rand(12),
        torch.rand(12),
    )
    pixels = torch.cat(
        [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1
    )
    pixels = pixels - pixels.mean(-1, keepdim=True)
    pixels = pixels / (pixels.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted = (pixels * scale + shift) @ weight.T
    merging = MODELS.build(dict(type=PatchMerging, in_channels=3, out_channels=6))
    merging.load_state_dict(
        {
            'norm.weight': unfold_order(scale),
            'norm.bias': unfold_order(shift),
            'reduction.weight': unfold_order(weight),
        }
    )
    got, size = merging(x.flatten(1, 2), (4, 6))
    assert tuple(size) == (2, 3)
    torch.testing.assert_close(got, wanted.flatten(1, 2))


def test_a_plain_detector_is_refused():
    cfg = Config.fromfile(ROOT / 'configs/dy_faster_rcnn.py').model.detector
    cfg.backbone.base_channels = 4
    cfg.neck.in_channels = [16, 32, 64, 128]
    with pytest.raises(UsageError, match='a dynamic detector'):
        CBNETV2.rules(MODELS.build(cfg))
