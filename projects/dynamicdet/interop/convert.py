"""A checkpoint from elsewhere -> one of ours."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..cascade.weights import require_complete
from ..errors import UsageError
from ..exchange.reading import read_weights
from ..exchange.rules import apply_rules
from ..version import __version__
from .cbnetv2 import CBNETV2
from .detectron2 import DETECTRON2
from .yolov5 import YOLOV5
from .yolov7 import DYNAMICDET, YOLOV7

#: What ``--from`` takes. A new source is a file with its table, and an entry here.
SOURCES = dict(
    dynamicdet=DYNAMICDET, yolov7=YOLOV7, yolov5=YOLOV5, cbnetv2=CBNETV2, detectron2=DETECTRON2
)


def convert_checkpoint(path: str, family: str, model: nn.Module) -> tuple[dict, list[str]]:
    """Convert a file's weights into those of a model.

    Args:
        path (str): A torch file, or a ``.pkl`` of numpy arrays. Nothing in it is executed.
        family (str): Where it comes from, a key of `SOURCES`.
        model (nn.Module): Freshly built. What the source never has, such as the router, is taken
            from it. A plain detector's weights fill both exits of a dynamic one.

    Returns:
        tuple[dict, list[str]]: The checkpoint, ``state_dict`` complete and ``meta`` with where it
            comes from; and what was done, in lines for the user.

    Raises:
        UsageError: If the file cannot be read, one of its entries is unknown, or the model is not
            filled by them exactly.
    """
    source, state = SOURCES[family], read_weights(path)
    try:
        filled, skipped = apply_rules(source.rules(model), state)
        filled = {**source.defaults(model), **filled}
        if hasattr(model, 'spread_plain_weights'):
            filled = model.spread_plain_weights(filled)
        require_complete(model, filled, source.kept)
    except UsageError as error:
        raise UsageError(f"'{path}' from {family} is not converted: {error}") from None
    built = model.state_dict()
    # Released weights are often in half precision; what fills two places is two tensors from here
    # on.
    complete = {
        **built,
        **{key: value.to(built[key].dtype, copy=True) for key, value in filled.items()},
    }
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    meta = dict(
        source=dict(family=family, file=Path(path).name, sha256=digest), dynamicdet=__version__
    )
    lines = [f'{len(state) - skipped.total()} of {len(state)} entries taken']
    lines += [f'{count} known and unneeded: {reason}' for reason, count in skipped.items()]
    lines += [f'{len(filled)} of {len(built)} entries of the model filled']
    lines.append(f'{len(built) - len(filled)} left as built: {_parts(set(built) - set(filled))}')
    return dict(meta=meta, state_dict=complete), lines


def _parts(keys: Iterable[str]) -> str:
    """Entries of a model by part: counters of norms, the backbone's parts, and what is at the
    top."""
    parts: Counter[str] = Counter()
    for key in keys:
        first, *rest = key.split('.')
        if rest and rest[-1] == 'num_batches_tracked':
            parts[rest[-1]] += 1
        else:
            parts[f'{first}.{rest[0]}' if first == 'backbone' else first] += 1
    return ', '.join(f'{name} ({count})' for name, count in sorted(parts.items()))
