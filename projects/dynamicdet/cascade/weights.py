"""Which weights fill a detector, and what they say of it: by the names of its entries."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..errors import UsageError
from .composite import ORDINALS

#: In front of the names of plain detectors' checkpoints, one for each exit, with commas between.
JOINED = 'exits://'
#: Of a dynamic detector, what a plain one's checkpoint has not.
NOT_PLAIN = ('backbone.connections.', 'router.')
#: What step 2 and calibration set in a dynamic detector, beside the router.
SETTINGS = (
    'delta',
    'difficulties',
    'gflops',
    'latencies',
    'platt_scale',
    'platt_shift',
    'threshold',
    'regions.',
)


def require_complete(
    model: nn.Module, state: Mapping[str, torch.Tensor], optional: Sequence[str] = ()
) -> None:
    """Refuse a state dict that does not fill a model, or holds what the model lacks.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor]): The state dict; a ``module.`` in front is ignored. A plain
            detector's is taken for both exits of a dynamic one.
        optional (Sequence[str]): Prefixes of keys that may be missing.

    Raises:
        UsageError: Says how many keys are missing, unknown or of another shape, and names some.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    if hasattr(model, 'spread_plain_weights'):
        state = model.spread_plain_weights(state)
        optional = (*optional, *SETTINGS)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [
        key
        for key in wanted
        if key not in shapes
        and not key.startswith(tuple(optional))
        and not key.endswith('num_batches_tracked')
    ]
    unknown = [key for key in shapes if key not in wanted]
    # A calibration is as long as its validation set.
    shaped = [
        key
        for key in shapes
        if key in wanted
        and shapes[key] != wanted[key]
        and key not in ('difficulties', 'regions.curve')
    ]
    complaints = [
        f'{len(keys)} {what} (such as {", ".join(keys[:3])})'
        for what, keys in (('missing', missing), ('unknown', unknown), ('of another shape', shaped))
        if keys
    ]
    if _lost_channels(shapes, wanted):
        complaints.append(_LOST)
    if complaints:
        raise UsageError(
            f'the checkpoint does not fit this config; its keys: {"; ".join(complaints)}'
        )


def rename_entries(
    state: dict[str, torch.Tensor],
    prefix: str,
    rename: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Rename, in place, the entries of a state dict that belong to the module with a prefix; these
    entries, without the prefix."""
    keys = [key for key in state if key.startswith(prefix)]
    renamed = rename({key[len(prefix) :]: state.pop(key) for key in keys})
    state.update({prefix + key: value for key, value in renamed.items()})
    return renamed


def fit_weights(
    model: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Make a state dict one that loads into a model without a complaint, unless it has entries that
    match nothing.

    Args:
        model (nn.Module): The model, initialized.
        state (Mapping[str, Tensor]): Weights to start from. A plain detector's fill all exits of a
            dynamic one.

    Returns:
        tuple[dict, str]: Entries of the same shape as the model's, and those that match nothing,
            which may be old names that a layer renames as it loads; if there are none of these,
            also the model's own entries for all that is missing. And a line that says what was
            filled and what starts afresh.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    plain = hasattr(model, 'spread_plain_weights') and is_plain(state)
    if hasattr(model, 'spread_plain_weights'):
        state = model.spread_plain_weights(state)
    initialized = model.state_dict()
    unknown = [key for key in state if key not in initialized]
    fitting = [
        key
        for key in state
        if key in initialized
        and (key == 'difficulties' or state[key].shape == initialized[key].shape)
    ]
    reshaped = [key for key in state if key in initialized and key not in set(fitting)]
    missing = [
        key
        for key in initialized
        if key not in state
        and key.split('.')[-1] != 'num_batches_tracked'
        and not key.startswith('regions.')
        and key not in SETTINGS
    ]
    fitted = {key: state[key] for key in (*fitting, *unknown)}
    if not unknown:
        fitted = {**initialized, **fitted}
    filled = 'the detector'
    if plain and hasattr(model, 'num_exits'):
        filled = 'both exits' if model.num_exits == 2 else f'all {model.num_exits} exits'
    line = (
        f'{"a plain detector" if plain else "a checkpoint"} fills {filled}, {len(fitting)} of '
        f'{len(initialized)} entries'
    )
    for keys, fate in (
        (reshaped, 'afresh, since of another shape (other classes?)'),
        (missing, 'afresh, since missing'),
        (unknown, 'not used'),
    ):
        if keys:
            line += f'; {fate}: {", ".join(dict.fromkeys(map(_layer, keys)))}'
    return fitted, line


def _layer(key: str) -> str:
    """The layer of an entry, whichever exit it is of: such as 'bbox_head.fc_cls'; of a whole part,
    the part."""
    names = re.sub(r'^branches\.\d+\.', '', key).split('.')
    return (
        names[0]
        if names[0] in ('router', 'gate')
        else '.'.join(names[:2] if names[0] == 'backbone' else names[:-1])
    )


def forget_other_router(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Remove a state dict's router where it is another than the model's: of other shapes, as other
    pools have, or with entries that the model's lacks.

    Returns:
        bool: Whether it was.
    """
    shapes = {f'router.{name}': value.shape for name, value in model.router.state_dict().items()}
    theirs = {
        key: key.removeprefix('module.')
        for key in state
        if key.removeprefix('module.').startswith('router.')
    }
    other = any(shapes.get(name) != state[key].shape for key, name in theirs.items())
    for key in theirs if other else ():
        del state[key]
    return other


_LOST = (
    'it looks like a detector that has lost channels: use the config that tools/prune.py wrote '
    'beside it'
)


def _lost_channels(shapes: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> list[str]:
    """Keys with fewer channels, if so many have that it is more than a head for other classes."""
    shaped = [
        key
        for key in shapes
        if key in wanted
        and shapes[key] != wanted[key]
        and key not in ('difficulties', 'regions.curve')
    ]
    fewer = 4 * len(shaped) > len(wanted) and all(
        len(shapes[key]) == len(wanted[key])
        and all(a <= b for a, b in zip(shapes[key], wanted[key]))
        for key in shaped
    )
    return shaped if fewer else []


def require_all_channels(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of a detector that has lost channels where the model has not: mmengine would
    say what does not fit, and leave it random. What else does not fit is fine-tuning's own
    business.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor]): The state dict, as of `require_complete`.

    Raises:
        UsageError: Says which config to use.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    if hasattr(model, 'spread_plain_weights'):
        state = model.spread_plain_weights(state)
    shapes, wanted = (
        {key: tuple(value.shape) for key, value in entries.items()}
        for entries in (state, model.state_dict())
    )
    shaped = _lost_channels(shapes, wanted)
    if shaped:
        raise UsageError(
            f'the checkpoint does not fit this config; its keys: {len(shaped)} of another shape '
            f'(such as {", ".join(shaped[:3])}); {_LOST}'
        )


def exits_digest(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of the weights that detect, 16 hexadecimal digits: the same before and after step 2
    and calibration, which change the router or the gate and settings alone.

    Args:
        state (Mapping[str, Tensor]): The state dict of a dynamic detector; a ``module.`` in front
            is ignored.
    """
    digest = hashlib.sha256()
    for key, value in sorted((key.removeprefix('module.'), value) for key, value in state.items()):
        if not key.startswith(('router.', 'gate.', 'regions.')) and key not in (
            *SETTINGS,
            'thresholds',
            'operating_points',
        ):
            digest.update(f'{key} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def is_plain(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict is a stock detector's, not a dynamic one's."""
    return not any(
        key.removeprefix('module.').startswith(('backbone.first.', 'branches.')) for key in state
    )


def missing_of(state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Prefixes of what a state dict may lack of a dynamic detector: connections and router, if it
    is made of plain detectors' weights."""
    keys = [key.removeprefix('module.') for key in state]
    trained = any(key.startswith(NOT_PLAIN) or key == 'delta' for key in keys)
    return () if trained and not is_plain(state) else NOT_PLAIN


def join_checkpoints(checkpoints: Sequence[Mapping]) -> dict:
    """The checkpoint of a pair from those of its detectors, one for each exit.

    Args:
        checkpoints (Sequence[Mapping]): Of plain detectors, in the order of their exits.

    Returns:
        dict: ``state_dict``, without a router, and ``meta`` with the ``dataset_meta`` of the first
            that has one.

    Raises:
        UsageError: If one is not plain, or they know other classes.
    """
    joined: dict[str, torch.Tensor] = {}
    for exit, (name, checkpoint) in enumerate(zip(ORDINALS, checkpoints, strict=False)):
        state = checkpoint.get('state_dict', checkpoint)
        if not is_plain(state):
            raise UsageError(
                f"the checkpoint of exit {exit} is not a plain detector's: a pair is made of those"
            )
        for key, value in state.items():
            key = key.removeprefix('module.')
            inside = key.startswith('backbone.')
            key = key.removeprefix('backbone.')
            joined[f'backbone.{name}.{key}' if inside else f'branches.{exit}.{key}'] = value
    metas = [meta for meta in map(_dataset_meta, checkpoints) if meta.get('classes')]
    classes = {tuple(meta['classes']) for meta in metas}
    if len(classes) > 1:
        raise UsageError(
            'the detectors of a pair must know the same classes in the same order; these '
            f'checkpoints know {" and ".join(str(list(names)[:3]) for names in classes)} ...'
        )
    return dict(state_dict=joined, meta=dict(dataset_meta=metas[0]) if metas else {})


def _dataset_meta(checkpoint: Mapping) -> dict:
    meta = checkpoint.get('meta') or {}
    dataset_meta = meta.get('dataset_meta') or {'classes': meta.get('CLASSES')}
    return {key.lower(): value for key, value in dataset_meta.items()}
