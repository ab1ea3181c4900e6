"""Checkpoints from elsewhere, and the tool that converts them."""

import contextlib
import functools
import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config

from mmdet.registry import MODELS

#: The helpers run without pytest, too.
ROOT = Path(__file__).parents[2]
DATA = ROOT / 'tests/data'
_spec = importlib.util.spec_from_file_location('reference_weights', DATA / 'reference_weights.py')
weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weights)


def reference(name):
    return json.loads((DATA / f'{name}.json').read_text())


def convert(monkeypatch, source, family, config, out, *options):
    """Run the tool in this process: exit status, what it says on stdout and on stderr."""
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'convert_checkpoint.py',
            str(source),
            '--from',
            family,
            '--config',
            str(config),
            '--out',
            str(out),
            *options,
        ],
    )
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as complained,
    ):
        try:
            runpy.run_path(str(ROOT / 'tools/convert_checkpoint.py'), run_name='__main__')
        except SystemExit as ended:
            status = ended.code or 0
    return status, said.getvalue(), complained.getvalue()


def build(name, **options):
    """The model of a shipped config."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.merge_from_dict(options)
    return MODELS.build(cfg.model)


def build_shapes(name):
    """The full-size model of a shipped config, all shapes and no values but the images'
    statistics."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py').model
    # mmdet's Swin takes numbers out of one.
    linspace = mock.patch.object(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    with torch.device('meta'), linspace:
        model = MODELS.build(cfg)
    model.data_preprocessor = MODELS.build(cfg.detector.data_preprocessor)
    return model


def _conv(name, out, into, size=1, bias=True):
    return {f'{name}.weight': (out, into, size, size), **({f'{name}.bias': (out,)} if bias else {})}


def _linear(name, out, into, bias=True):
    return {f'{name}.weight': (out, into), **({f'{name}.bias': (out,)} if bias else {})}


def _norm(name, channels, statistics=True):
    leaves = ['weight', 'bias'] + ['running_mean', 'running_var'] * statistics
    return {f'{name}.{leaf}': (channels,) for leaf in leaves}


def detectron2_shapes(blocks, groups=1, width=64, masks=False):
    """Keys and shapes of a model of Detectron2's zoo.

    Args:
        blocks (Sequence[int]): Blocks of res2 to res5.
        groups (int): RESNETS.NUM_GROUPS.
        width (int): RESNETS.WIDTH_PER_GROUP.
        masks (bool): Whether it is Mask R-CNN.
    """
    shapes = {}
    for level in range(2, 6):
        shapes |= _conv(f'backbone.fpn_lateral{level}', 256, 64 * 2**level)
        shapes |= _conv(f'backbone.fpn_output{level}', 256, 256, 3)

    def normed(name, out, into, size):
        shapes.update(_conv(name, out, into, size, bias=False) | _norm(f'{name}.norm', out))

    normed('backbone.bottom_up.stem.conv1', 64, 3, 7)
    into, inner = 64, groups * width
    for level, count in enumerate(blocks, 2):
        out = 64 * 2**level
        for index in range(count):
            block = f'backbone.bottom_up.res{level}.{index}'
            if index == 0:
                normed(f'{block}.shortcut', out, into, 1)
            normed(f'{block}.conv1', inner, into, 1)
            normed(f'{block}.conv2', inner, inner // groups, 3)
            normed(f'{block}.conv3', out, inner, 1)
            into = out
        inner *= 2
    shapes |= _conv('proposal_generator.rpn_head.conv', 256, 256, 3)
    shapes |= _conv('proposal_generator.rpn_head.objectness_logits', 3, 256)
    shapes |= _conv('proposal_generator.rpn_head.anchor_deltas', 12, 256)
    shapes |= _linear('roi_heads.box_head.fc1', 1024, 256 * 7 * 7)
    shapes |= _linear('roi_heads.box_head.fc2', 1024, 1024)
    shapes |= _linear('roi_heads.box_predictor.cls_score', 81, 1024)
    shapes |= _linear('roi_heads.box_predictor.bbox_pred', 320, 1024)
    if masks:
        for index in range(1, 5):
            shapes |= _conv(f'roi_heads.mask_head.mask_fcn{index}', 256, 256, 3)
        shapes |= _conv('roi_heads.mask_head.deconv', 256, 256, 2)
        shapes |= _conv('roi_heads.mask_head.predictor', 80, 256)
    return shapes


def cbnetv2_swin_shapes(depths, width=96, heads=3, window=7):
    """Keys and shapes of CBNetV2's CBSwinTransformer, cb_del_stages=1: the second backbone lacks
    the patch embedding, and projections between equal channels have no weights."""
    shapes = _conv('cb_modules.0.patch_embed.proj', width, 3, 4)
    shapes |= _norm('cb_modules.0.patch_embed.norm', width, statistics=False)
    for part in ('cb_modules.0', 'cb_modules.1'):
        for level, count in enumerate(depths):
            channels = width * 2**level
            for index in range(count):
                block = f'{part}.layers.{level}.blocks.{index}'
                shapes |= _norm(f'{block}.norm1', channels, False)
                shapes |= _norm(f'{block}.norm2', channels, False)
                position = f'{block}.attn.relative_position_'
                shapes[f'{position}bias_table'] = ((2 * window - 1) ** 2, heads * 2**level)
                shapes[f'{position}index'] = (window**2, window**2)
                shapes |= _linear(f'{block}.attn.qkv', 3 * channels, channels)
                shapes |= _linear(f'{block}.attn.proj', channels, channels)
                shapes |= _linear(f'{block}.mlp.fc1', 4 * channels, channels)
                shapes |= _linear(f'{block}.mlp.fc2', channels, 4 * channels)
            if level < 3:
                merging = f'{part}.layers.{level}.downsample'
                shapes |= _linear(f'{merging}.reduction', 2 * channels, 4 * channels, bias=False)
                shapes |= _norm(f'{merging}.norm', 4 * channels, False)
            shapes |= _norm(f'{part}.norm{level}', channels, False)
    for level in range(4):
        for deeper in range(1, 4 - level):
            channels = width * 2**level
            shapes |= _conv(f'cb_linears.{level}.{deeper}', channels, channels * 2**deeper)
    return {f'backbone.{key}': shape for key, shape in shapes.items()}
