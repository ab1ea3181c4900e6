"""Read checkpoints without executing them, check them, write them whole."""

import contextlib
import os
import pickle
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from .errors import UsageError
from .exchange.origin import require_mmdet
from .exchange.writing import write_checkpoint  # noqa: F401  (one room reads and writes)
from .stand_ins import StandIn, as_text, asked_classes, read_with_stand_ins, why_unread

#: torch's own switch.
_WEIGHTS_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
#: Who uses it now, an entry each, and what it was before.
_inside: list[int] = []
_before: dict[str, str] = {}
_lock = threading.Lock()


def allow_mmengine_classes() -> None:
    """Let ``torch.load(weights_only=True)`` read the checkpoints that mmengine writes.

    mmengine 0.10.7 stores its log (`HistoryBuffer`, numpy arrays and scalars) beside the weights.
    These classes hold data and run nothing. What numpy makes of a file is limited to plain numbers.
    """
    kinds = [type(np.dtype(kind)) for kind in (*'?bBhHiIlLqQefd',)]
    numpy_functions = dict(_reconstruct=_new_array, scalar=_scalar)
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_method, 'builtins.getattr'),
            _NoNumbers,
            *kinds,
            (PlainArray, 'numpy.ndarray'),
            (_dtype, 'numpy.dtype'),
            (_no_bytes, 'builtins.bytes'),
            # As files name them that were written beside numpy 1, and 2.
            *[
                (function, f'numpy.{core}.multiarray.{name}')
                for core in ('core', '_core')
                for name, function in numpy_functions.items()
            ],
        ]
    )


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


def _dtype(code: Any, *_: Any) -> np.dtype | _NoNumbers:
    """Stands in for ``numpy.dtype``."""
    plain = isinstance(code, str) and re.fullmatch('b1|[iu][1248]|f[248]', code)
    return np.dtype(code, copy=True) if plain else _NoNumbers()


def _new_array(*_: Any) -> PlainArray:
    """An array to be."""
    return PlainArray(0, np.int8)


def _scalar(dtype: Any, data: Any = None) -> np.generic | None:
    return np.frombuffer(data, dtype)[0] if isinstance(dtype, np.dtype) else None


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, by which files name none: those of an empty array."""
    return b''


def _history_method(owner: type, name: str) -> Any:
    """Stands in for ``getattr``, by which a pickled `HistoryBuffer` names its four statistics:
    gives those and nothing else; of a class that is stood in for, such as an enumeration, a
    stand-in."""
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
                {name: value for name, value in os.environ.items() if name == _WEIGHTS_ONLY}
            )
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


# As mmengine's for files on this machine, so that what lies beside the weights stops no reading:
# `load_from` and `resume` neither.
@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_file(filename: str, map_location: Any = None) -> Any:
    """Let mmengine read checkpoints without executing them, and with stand-ins for harmless objects
    in them, which come out as text; see `stand_ins`."""
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    return as_text(
        read_with_stand_ins(
            lambda: torch.load(filename, map_location=map_location, weights_only=True),
            asked_classes(filename),
        )
    )


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint from a path or URL, on the CPU, without executing what is in it.

    Returns:
        dict: With ``state_dict`` and, where there, ``meta``.

    Raises:
        UsageError: If there is none, it cannot be downloaded, or the file is no checkpoint.
    """
    try:
        with weights_only():
            checkpoint = as_text(
                read_with_stand_ins(
                    lambda: CheckpointLoader.load_checkpoint(path, map_location='cpu')
                )
            )
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint at '{path}'") from None
    except UsageError:
        raise
    except Exception as error:
        if '://' in path and isinstance(error, OSError):
            raise UsageError(
                f"'{path}' cannot be downloaded: {why_unread(error)}; where there is no network, "
                'give the path of a file that was downloaded elsewhere'
            ) from None
        # Whatever the unpickler or the archive reader stumbles on.
        raise UsageError(
            f"'{path}' is no checkpoint that can be read safely: {why_unread(error)}"
        ) from None
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('model'), dict):
        # Where others have a `state_dict`, Detectron2 has this.
        try:
            require_mmdet(checkpoint['model'])
        except UsageError as error:
            raise UsageError(f"'{path}': {error}") from None
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise UsageError(f"'{path}' is no checkpoint: it holds no state_dict of tensors")
    return checkpoint if 'state_dict' in checkpoint else dict(state_dict=state)
