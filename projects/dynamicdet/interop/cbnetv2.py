"""CBNetV2 (arXiv 2107.00420): its ResNet and Swin detectors, mmdet 2.x.

Names of theirs: ``cb_modules.0`` and ``.1`` are the two backbones, ``cb_linears.l.j`` the
projection of stage ``l + j`` into stage l. Necks and heads are named as in mmdet 3.
"""

from torch import Tensor, nn

from ..errors import UsageError
from ..exchange.rules import Rule, WeightSource, rename, skip
from ..models import CompositeBackbone


def unfold_order(values: Tensor) -> Tensor:
    """Patch merging's weights, (..., 4 C), in the order of mmdet 3.

    Swin's own code concatenates the pixels (row, column) 0,0 1,0 0,1 1,1 of each 2x2 patch, C
    channels each. mmdet 3 takes ``nn.Unfold``: channel by channel, the pixels row by row.
    """
    pixels = values.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return pixels.transpose(-1, -2).flatten(-2)


def cbnetv2_rules(model: nn.Module) -> list[Rule]:
    """The table, for a dynamic detector."""
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, CompositeBackbone):
        raise UsageError(
            'a CBNetV2 checkpoint holds two backbones: name the --config of a dynamic detector'
        )
    # Their second backbone always takes over the first one's stem, ours only with its first stage.
    stems = ['first'] if backbone.reuse_stages else ['first', 'second']
    heads = [f'branches.{index}.<0>' for index in range(len(model.branches))]
    rows = [
        skip(r'ema_.*', 'moving averages of training'),
        skip(
            r'backbone\.cb_modules\.1\.bn1\..*',
            'a norm of the second backbone that it does not use',
        ),
        rename(r'(neck|rpn_head|roi_head)\..*', *heads),
        rename(
            r'backbone\.cb_linears\.(\d)\.(\d)\.(.*)',
            f'backbone.connections.<1-{backbone.connected}>.projections.<2>.<3>',
        ),
        rename(
            r'backbone\.cb_modules\.0\.((?:conv1|bn1|stem)\..*)',
            *[f'backbone.{part}.<1>' for part in stems],
        ),
        rename(
            r'backbone\.cb_modules\.0\.patch_embed\.proj\.(.*)',
            *[f'backbone.{part}.patch_embed.projection.<1>' for part in stems],
        ),
        rename(
            r'backbone\.cb_modules\.0\.(patch_embed\.norm\..*)',
            *[f'backbone.{part}.<1>' for part in stems],
        ),
    ]
    for index, part in enumerate(('first', 'second')):
        theirs, ours = rf'backbone\.cb_modules\.{index}\.', f'backbone.{part}.'
        block, stage = theirs + r'layers\.(\d)\.blocks\.(\d+)\.', ours + 'stages.<1>.'
        rows += [
            rename(theirs + r'(layer\d\..*)', ours + '<1>'),
            rename(block + r'attn\.(.*)', stage + 'blocks.<2>.attn.w_msa.<3>'),
            rename(block + r'mlp\.fc1\.(.*)', stage + 'blocks.<2>.ffn.layers.0.0.<3>'),
            rename(block + r'mlp\.fc2\.(.*)', stage + 'blocks.<2>.ffn.layers.1.<3>'),
            rename(block + r'(norm\d\..*)', stage + 'blocks.<2>.<3>'),
            rename(theirs + r'layers\.(\d)\.(downsample\..*)', stage + '<2>', change=unfold_order),
            rename(theirs + r'(norm\d\..*)', ours + '<1>'),
        ]
    return rows


CBNETV2 = WeightSource(cbnetv2_rules)
