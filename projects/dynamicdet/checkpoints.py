"""Read checkpoints without executing them, check them, write them whole."""
import contextlib
import hashlib
import io
import os
import pickle
import re
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from .errors import UsageError
from .stand_ins import StandIn, as_text, asked_classes, read_with_stand_ins, why_unread

#: What step 2 and calibration set in a dynamic detector, beside the router.
SETTINGS = ('delta', 'difficulties', 'gflops', 'latencies', 'threshold')
#: torch's own switch.
_WEIGHTS_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
#: Who uses it now, an entry each, and what it was before.
_inside: List[int] = []
_before: Dict[str, str] = {}
_lock = threading.Lock()


def allow_mmengine_classes() -> None:
    """Let ``torch.load(weights_only=True)`` read the checkpoints that mmengine writes.

    mmengine 0.10.7 stores its log (`HistoryBuffer`, numpy arrays and scalars) beside the weights.
    These classes hold data and run nothing. What numpy makes of a file is limited to plain numbers.
    """
    kinds = [type(np.dtype(kind)) for kind in (*'?bBhHiIlLqQefd', )]
    numpy_functions = dict(_reconstruct=_new_array, scalar=_scalar)
    torch.serialization.add_safe_globals([
        HistoryBuffer, (_history_method, 'builtins.getattr'), _NoNumbers, *kinds,
        (PlainArray, 'numpy.ndarray'), (_dtype, 'numpy.dtype'), (_no_bytes, 'builtins.bytes'),
        # As files name them that were written beside numpy 1, and 2.
        *[(function, f'numpy.{core}.multiarray.{name}')
          for core in ('core', '_core') for name, function in numpy_functions.items()]
    ])


class PlainArray(np.ndarray):
    """An array as a file gives it. It is written as what it is: `numpy.ndarray`."""

    def __setstate__(self, state: Sequence[Any]) -> None:
        # Of what is no number nothing is read: numpy would take pointers from a file.
        if isinstance(state[2], np.dtype):
            super().__setstate__(state)

    def __reduce__(self) -> tuple:
        return np.asarray(self).__reduce__()


class _NoNumbers:
    """Stands in for a type of objects, text or records."""

    def __setstate__(self, _: Any) -> None:
        pass


def _dtype(code: Any, *_: Any) -> Union[np.dtype, _NoNumbers]:
    """Stands in for ``numpy.dtype``."""
    plain = isinstance(code, str) and re.fullmatch('b1|[iu][1248]|f[248]', code)
    return np.dtype(code, copy=True) if plain else _NoNumbers()


def _new_array(*_: Any) -> PlainArray:
    """An array to be."""
    return PlainArray(0, np.int8)


def _scalar(dtype: Any, data: Any = None) -> Optional[np.generic]:
    return np.frombuffer(data, dtype)[0] if isinstance(dtype, np.dtype) else None


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, by which files name none: those of an empty array."""
    return b''


def _history_method(owner: type, name: str) -> Any:
    """Stands in for ``getattr``, by which a pickled `HistoryBuffer` names its four statistics: gives
    those and nothing else; of a class that is stood in for, such as an enumeration, a stand-in."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    if isinstance(owner, type) and issubclass(owner, StandIn):
        return owner()
    raise pickle.UnpicklingError(f'refused: getattr({owner!r}, {name!r})')


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse to execute anything, whatever its caller asked for.

    mmengine reads URLs through ``torch.hub``, which would execute them, and the maintained fork of
    mmengine falls back to executing where reading fails.
    """
    with _lock:
        # The first in remembers, the last out restores: threads may read at the same time.
        if not _inside:
            _before.update(
                {name: value for name, value in os.environ.items() if name == _WEIGHTS_ONLY})
        _inside.append(1)
        os.environ[_WEIGHTS_ONLY] = '1'
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                os.environ.pop(_WEIGHTS_ONLY, None)
                os.environ.update(_before)
                _before.clear()


# mmengine tries its patterns from the last to the first in the alphabet: ours for URLs comes before its own.
@CheckpointLoader.register_scheme(prefixes=[r'.*\.ddz$', r'https?://.*\.ddz$'], force=True)
def load_from_ddz(filename: str, map_location: Any = None) -> Dict[str, Any]:
    """Let mmengine read compressed checkpoints wherever it reads checkpoints: ``load_from``, ``init_cfg``,
    mmdet's ``init_detector``."""
    from .compression.checkpoint import read_compressed
    checkpoint = read_compressed(filename)
    if isinstance(map_location, (str, torch.device)):
        state = checkpoint['state_dict']
        for key, value in state.items():
            state[key] = value.to(map_location)
    return checkpoint


# As mmengine's for files on this machine, so that what lies beside the weights stops no reading: `load_from` and
# `resume` neither.
@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_file(filename: str, map_location: Any = None) -> Any:
    """Let mmengine read checkpoints without executing them, and with stand-ins for harmless objects in them, which
    come out as text; see `stand_ins`."""
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    return as_text(read_with_stand_ins(
        lambda: torch.load(filename, map_location=map_location, weights_only=True), asked_classes(filename)))


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint from a path or URL, on the CPU, without executing what is in it.

    Returns:
        dict: With ``state_dict`` and, where there, ``meta``.

    Raises:
        UsageError: If there is none, or the file is no checkpoint.
    """
    try:
        with weights_only():
            checkpoint = as_text(read_with_stand_ins(
                lambda: CheckpointLoader.load_checkpoint(path, map_location='cpu')))
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint at '{path}'") from None
    except UsageError:
        raise
    except Exception as error:
        # Whatever the unpickler or the archive reader stumbles on.
        raise UsageError(f"'{path}' is no checkpoint that can be read safely: {why_unread(error)}") from None
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not state or not all(
            isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"'{path}' is no checkpoint: it holds no state_dict of tensors")
    return checkpoint if 'state_dict' in checkpoint else dict(state_dict=state)


def write_checkpoint(checkpoint: Mapping[str, Any], path: str) -> None:
    """Write a checkpoint, whole or not at all, and only what `read_checkpoint` reads back."""
    from .engine import write_atomically
    file = io.BytesIO()
    torch.save(dict(checkpoint), file)
    file.seek(0)
    torch.load(file, map_location='cpu', weights_only=True)
    write_atomically(file.getbuffer(), path)


def require_complete(model: nn.Module,
                     state: Mapping[str, torch.Tensor],
                     optional: Sequence[str] = ()) -> None:
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
    given = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in wanted if key not in given and not key.startswith(tuple(optional))
               and not key.endswith('num_batches_tracked')]
    unknown = [key for key in given if key not in wanted]
    # A calibration is as long as its validation set.
    shaped = [key for key in given if key in wanted and given[key] != wanted[key]
              and key != 'difficulties']
    said = [f'{len(keys)} {what} (such as {", ".join(keys[:3])})'
            for what, keys in (('missing', missing), ('unknown', unknown), ('of another shape', shaped))
            if keys]
    if _lost_channels(given, wanted):
        said.append(_LOST)
    if said:
        raise UsageError(f'the checkpoint does not fit this config; its keys: {"; ".join(said)}')


def fit_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], str]:
    """Make a state dict one that loads into a model without a complaint, unless it has entries that match nothing.

    Args:
        model (nn.Module): The model, initialized.
        state (Mapping[str, Tensor]): Weights to start from. A plain detector's fill all exits of a dynamic one.

    Returns:
        tuple[dict, str]: Entries of the same shape as the model's, and those that match nothing, which may be old
        names that a layer renames as it loads; if there are none of these, also the model's own entries for all that
        is missing. And a line that says what was filled and what starts afresh.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    plain = hasattr(model, 'spread_plain_weights') and is_plain(state)
    if hasattr(model, 'spread_plain_weights'):
        state = model.spread_plain_weights(state)
    initialized = model.state_dict()
    unknown = [key for key in state if key not in initialized]
    fitting = [key for key in state if key in initialized
               and (key == 'difficulties' or state[key].shape == initialized[key].shape)]
    reshaped = [key for key in state if key in initialized and key not in set(fitting)]
    missing = [key for key in initialized if key not in state and key.split('.')[-1] != 'num_batches_tracked'
               and key not in SETTINGS]
    fitted = {key: state[key] for key in (*fitting, *unknown)}
    if not unknown:
        fitted = {**initialized, **fitted}
    filled = 'the detector'
    if plain and hasattr(model, 'num_exits'):
        filled = 'both exits' if model.num_exits == 2 else f'all {model.num_exits} exits'
    line = f"{'a plain detector' if plain else 'a checkpoint'} fills {filled}, {len(fitting)} of {len(initialized)} entries"
    for keys, said in ((reshaped, 'afresh, since of another shape (other classes?)'), (missing, 'afresh, since missing'),
                       (unknown, 'not used')):
        if keys:
            line += f'; {said}: {", ".join(dict.fromkeys(map(_layer, keys)))}'
    return fitted, line


def _layer(key: str) -> str:
    """The layer of an entry, whichever exit it is of: such as 'bbox_head.fc_cls'; of a whole part, the part."""
    names = re.sub(r'^branches\.\d+\.', '', key).split('.')
    return names[0] if names[0] in ('router', 'gate') else '.'.join(names[:2] if names[0] == 'backbone' else names[:-1])


def forget_other_router(model: nn.Module, state: Dict[str, torch.Tensor]) -> bool:
    """Remove a state dict's router where it is another than the model's: of other shapes, as other pools have, or
    with entries that the model's lacks.

    Returns:
        bool: Whether it was.
    """
    own = {f'router.{name}': value.shape for name, value in model.router.state_dict().items()}
    theirs = {key: key.removeprefix('module.') for key in state if key.removeprefix('module.').startswith('router.')}
    other = any(own.get(name) != state[key].shape for key, name in theirs.items())
    for key in theirs if other else ():
        del state[key]
    return other


_LOST = 'it looks like a detector that has lost channels: use the config that tools/prune.py wrote beside it'


def _lost_channels(given: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> List[str]:
    """Keys with fewer channels, if so many have that it is more than a head for other classes."""
    shaped = [key for key in given if key in wanted and given[key] != wanted[key] and key != 'difficulties']
    fewer = 4 * len(shaped) > len(wanted) and all(
        len(given[key]) == len(wanted[key]) and all(a <= b for a, b in zip(given[key], wanted[key]))
        for key in shaped)
    return shaped if fewer else []


def require_all_channels(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of a detector that has lost channels where the model has not: mmengine would say what does
    not fit, and leave it random. What else does not fit is fine-tuning's own business.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor]): The state dict, as of `require_complete`.

    Raises:
        UsageError: Says which config to use.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    if hasattr(model, 'spread_plain_weights'):
        state = model.spread_plain_weights(state)
    given, wanted = ({key: tuple(value.shape) for key, value in one.items()} for one in (state, model.state_dict()))
    shaped = _lost_channels(given, wanted)
    if shaped:
        raise UsageError(f'the checkpoint does not fit this config; its keys: {len(shaped)} of another shape (such as '
                         f'{", ".join(shaped[:3])}); {_LOST}')


def exits_digest(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of the weights that detect, 16 hexadecimal digits: the same before and after step 2 and calibration,
    which change the router or the gate and settings alone.

    Args:
        state (Mapping[str, Tensor]): The state dict of a dynamic detector; a ``module.`` in front is ignored.
    """
    digest = hashlib.sha256()
    for key, value in sorted((key.removeprefix('module.'), value) for key, value in state.items()):
        if not key.startswith(('router.', 'gate.')) and key not in (*SETTINGS, 'thresholds', 'operating_points'):
            digest.update(f'{key} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def is_plain(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict is a stock detector's, not a dynamic one's."""
    return not any(key.removeprefix('module.').startswith(('backbone.first.', 'branches.'))
                   for key in state)
