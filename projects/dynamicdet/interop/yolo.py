"""What the files of YOLOv5 and YOLOv7 have in common.

Letters: A anchors per level, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..exchange.rules import Rule, rename, skip
from ..models.yolo import AnchorHead

#: Entries beside the layers.
UNNEEDED = [
    skip(r'(.*\.)?num_batches_tracked', 'counters of training'),
    skip(r'ema\..*', 'moving averages of training'),
]


def anchor_head_rows(theirs: str, ours: str, head: AnchorHead) -> list[Rule]:
    """Rows of the head's convolutions and anchors.

    Args:
        theirs (str): Pattern of what its keys begin with.
        ours (str): Its name in the detector.
        head (AnchorHead): Of the model to fill.
    """
    return [
        rename(
            theirs + r'm\.(\d)\.(.*)',
            f'{ours}.convs.<1>.<2>',
            change=lambda values: kinds_apart(values, head.num_anchors),
        ),
        skip(theirs + r'anchors', lambda value: _compare_anchors(value, head, head.strides)),
        skip(
            theirs + r'anchor_grid',
            lambda value: _compare_anchors(value, head, [1] * len(head.strides)),
        ),
    ]


def kinds_apart(values: Tensor, anchors: int) -> Tensor:
    """The head's outputs: theirs are 4 box values, objectness and C classes of each anchor in turn;
    ours the boxes of all anchors, then objectness, then classes."""
    by_anchor = values.unflatten(0, (anchors, -1))
    kinds = by_anchor[:, :4], by_anchor[:, 4:5], by_anchor[:, 5:]
    return torch.cat([kind.flatten(0, 1) for kind in kinds])


def _compare_anchors(anchors: Tensor, head: AnchorHead, units: Sequence[int]) -> str:
    """What to say of a file's anchors, which are in ``units`` of pixels, one per level."""
    head_anchors, same = head.anchors.flatten(1), False
    if anchors.numel() == head_anchors.numel():
        pixels = (
            anchors.float().reshape(head_anchors.shape) * head_anchors.new_tensor(units)[:, None]
        )
        same = torch.allclose(pixels, head_anchors, rtol=1e-2)
    if same:
        return 'anchors, which the config has'
    return (
        "anchors THAT DIFFER from the config's: set bbox_head.anchors to theirs, or boxes will be "
        'wrong'
    )
