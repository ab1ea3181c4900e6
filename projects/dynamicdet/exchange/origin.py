"""Which framework a checkpoint is of, by the names of its entries."""

import re
from collections.abc import Iterable

from ..errors import UsageError

#: What only one framework's detectors have, plain or dynamic, below what a dynamic one puts in
#: front.
_PATTERNS = dict(
    detectron2=re.compile(
        r'proposal_generator\.|roi_heads\.|sem_seg_head\.|head\.(cls|bbox)_subnet\.'
        r'|backbone\.(\w+\.)?(stem\.conv\d|res\d\.|s\d\.b\d|fpn_(lateral|output)\d|top_block\.)'
    ),
    mmdet=re.compile(
        r'neck\.|rpn_head\.|roi_head\.|bbox_head\.|mask_head\.'
        r'|backbone\.(\w+\.)?(layer\d\.|conv1\.|bn1\.|stages\.|stage\d\.)'
    ),
)


def framework_of(keys: Iterable[str]) -> str | None:
    """'detectron2' or 'mmdet'; None where names do not tell.

    Args:
        keys (Iterable[str]): Names of a state dict's entries; ``module.`` in front is ignored.
    """
    votes = dict.fromkeys(_PATTERNS, 0)
    for key in keys:
        key = re.sub(r'^(module\.)?(branches\.\d+\.)?', '', key)
        for name, pattern in _PATTERNS.items():
            votes[name] += pattern.match(key) is not None
    best = max(votes, key=votes.get)
    return best if votes[best] else None


def require_detectron2(keys: Iterable[str]) -> None:
    """Raise a `UsageError` if a checkpoint is of MMDetection, where one of Detectron2 is wanted."""
    if framework_of(keys) == 'mmdet':
        raise UsageError(
            "this checkpoint is MMDetection's, and one of Detectron2 is wanted: convert it by "
            'tools/detectron2/convert_checkpoint.py CHECKPOINT --to detectron2 --out FILE'
        )


def require_mmdet(keys: Iterable[str]) -> None:
    """Raise a `UsageError` if a checkpoint is of Detectron2, where one of MMDetection is wanted."""
    if framework_of(keys) == 'detectron2':
        raise UsageError(
            "this checkpoint is Detectron2's, and one of MMDetection is wanted: convert one that "
            'is dynamic by tools/detectron2/convert_checkpoint.py CHECKPOINT --to mmdet --out '
            'FILE, one of the model zoo by tools/convert_checkpoint.py --from detectron2'
        )
