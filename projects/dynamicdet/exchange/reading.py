"""Read files from elsewhere without executing what is in them."""

import collections
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..stand_ins import (
    StandIn,
    as_text,
    asked_classes,
    is_data,
    read_with_stand_ins,
    refusal_message,
    stand_in,
    why_unread,
)


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the weights of a torch file, or of a ``.pkl`` of numpy arrays such as Detectron2's.

    They are the file's ``ema``, where there is one, as YOLOv7's authors take it, else its ``model``
    or ``state_dict``, or all of it; a whole ``nn.Module`` gives its ``state_dict``. What lies
    beside them (optimizer, counters) is left.

    Raises:
        UsageError: If there is no file, it cannot be read safely, or it holds no weights.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no checkpoint at '{path}'")
    try:
        state = _find_state(_read_arrays(path) if path.endswith('.pkl') else _read_torch(path))
    except Exception as error:
        # Whatever the unpickler or the archive reader stumbles on.
        raise UsageError(
            f"'{path}' is no checkpoint that can be read safely: {why_unread(error)}"
        ) from None
    odd = [key for key, value in state.items() if isinstance(value, StandIn)]
    if odd:
        raise UsageError(
            f"'{path}' is no checkpoint that can be read safely: its entry {odd[0]!r} "
            f'{refusal_message(state[odd[0]].name)}'
        )
    if not state or not all(
        _is_array(value) and isinstance(key, str) for key, value in state.items()
    ):
        raise UsageError(
            f"'{path}' is no checkpoint: it holds no 'model' or 'state_dict' of arrays"
        )
    return state


def read_content(path: str) -> dict[str, Any]:
    """Read all of a file, not its weights alone: what a training that is resumed needs lies beside
    them. Arrays become tensors; what would have to be built becomes text.

    Raises:
        UsageError: If there is no file, it cannot be read safely, or it holds no mapping.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no checkpoint at '{path}'")
    try:
        content = as_text(
            _with_tensors(_read_arrays(path) if path.endswith('.pkl') else _read_torch(path))
        )
    except Exception as error:
        # Whatever the unpickler or the archive reader stumbles on.
        raise UsageError(
            f"'{path}' is no checkpoint that can be read safely: {why_unread(error)}"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' is no checkpoint: it holds a {type(content).__name__}")
    return content


def _with_tensors(content: Any) -> Any:
    """Mappings, and mappings in them, with tensors for arrays."""
    if isinstance(content, Mapping):
        return {key: _with_tensors(value) for key, value in content.items()}
    return _to_tensor(content) if isinstance(content, _Array) else content


def _find_state(content: Any) -> dict[str, Any]:
    for name in ('ema', 'model', 'state_dict'):
        held = content.get(name) if isinstance(content, Mapping) else None
        if isinstance(held, Mapping) or isinstance(held, StandIn) and held.is_module:
            content = held
    if isinstance(content, StandIn) and content.is_module:
        content = dict(_entries(content))
    if not isinstance(content, Mapping):
        return {}
    return {key: _to_tensor(value) for key, value in content.items()}


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor of plain numbers, all there."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and not value.is_quantized
        and not value.is_complex()
    )


def _to_tensor(value: Any) -> Any:
    if isinstance(value, _Array) and value.values is not None:
        native = value.values.dtype.newbyteorder('=')
        return torch.from_numpy(value.values.astype(native, order='C'))
    return value.detach() if isinstance(value, Tensor) else value


# torch's files.


def _read_torch(path: str) -> Any:
    return read_with_stand_ins(
        lambda: torch.load(path, map_location='cpu', weights_only=True), asked_classes(path)
    )


def _entries(module: StandIn, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """What ``state_dict`` of a whole module, as YOLOv7's files hold one, would give."""
    held = module.state
    for name, value in {**held['_parameters'], **held['_buffers']}.items():
        if value is not None and name not in held.get('_non_persistent_buffers_set', ()):
            yield prefix + name, value
    for name, below in held['_modules'].items():
        if below is not None:
            yield from _entries(below, f'{prefix}{name}.')


# Detectron2's files.


def _read_arrays(path: str) -> Any:
    with open(path, 'rb') as file:
        # The zoo was written by Python 2.
        return _ArrayUnpickler(file, encoding='latin1').load()


# numpy's own classes would take whatever state a file gives them, lengths and pointers among it, so
# stand-ins read the same records.


class _Dtype:
    """Stands in for ``numpy.dtype``: plain numbers; without a ``code`` it is one of anything
    else."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code = code if re.fullmatch('b1|[iu][1248]|f[248]', code) else None

    def __setstate__(self, state: Sequence[Any]) -> None:
        order = state[1]
        if self.code is not None:
            self.code = (order if order in ('<', '>') else '') + self.code[-2:]


class _Array:
    """Stands in for ``numpy.ndarray``; empty until its state comes."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, by_columns, data = state
        self.values = _decode(data, dtype, shape, 'F' if by_columns else 'C')


def _decode(
    data: bytes | str, dtype: _Dtype, shape: Sequence[int], order: str
) -> np.ndarray | None:
    if dtype.code is None:
        return None
    # Python 2's bytes come as text.
    data = data.encode('latin1') if isinstance(data, str) else data
    return np.frombuffer(data, np.dtype(dtype.code)).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    """An array to be; Python 2 and protocols up to 4."""
    return _Array()


def _frombuffer(data: bytes, dtype: _Dtype, shape: Sequence[int], order: str, *_: Any) -> _Array:
    """An array, protocol 5."""
    array = _Array()
    array.values = _decode(data, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic | None:
    value = _decode(data, dtype, (), 'C')
    return None if value is None else value[()]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them for Python 2."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'it holds bytes in {encoding!r}')
    return text.encode('latin1')


_ALLOWED = {
    'collections.OrderedDict': collections.OrderedDict,
    '_codecs.encode': _encode,
    # By which enumerations name their members.
    'builtins.getattr': lambda *_: StandIn(),
    'numpy.ndarray': _Array,
    'numpy.dtype': _Dtype,
    **{
        f'numpy.{core}.{name}': stand_in
        for core in ('core', '_core')
        for name, stand_in in (
            ('multiarray._reconstruct', _reconstruct),
            ('multiarray.scalar', _scalar),
            ('numeric._frombuffer', _frombuffer),
        )
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads text, numbers, their containers and arrays. All else is stood in for or refused, and
    never imported."""

    def find_class(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'
        if full in _ALLOWED:
            return _ALLOWED[full]
        if not is_data(full):
            raise pickle.UnpicklingError(refusal_message(full))
        return stand_in(full)
