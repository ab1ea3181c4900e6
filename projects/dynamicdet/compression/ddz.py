"""One file for sparse, quantized and shared weights: ``.ddz``.

The container is a safetensors file whose entries are byte strings, the frames of `encoding`. Its
metadata hold, as JSON, an index (a row for each entry of the state dict: key, type, shape,
encoding, SHA-256 of what it decodes to), the checkpoint's ``meta``, and one SHA-256 over index,
meta and all frames. Nothing in it is executed on reading.
"""

import hashlib
import json
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..files import write_atomically
from .encoding import (
    Entry,
    Frames,
    Lossy,
    decode_tensor,
    encode_state,
    need_for_compression,
    tensor_digest,
)

FORMAT, VERSION = 'dynamicdet.ddz', '1'
SUFFIX = '.ddz'
#: Where a `QuantizationHook` keeps what it trained; among the meta in the file.
RANGES = 'quantization'


@dataclass(frozen=True)
class Compressed:
    """A checkpoint, encoded.

    Attributes:
        entries (List[Entry]): Of its state dict, in order.
        content (bytes): The file.
        dropped (List[str]): What of the checkpoint it does not hold, such as the optimizer's state.
    """

    entries: list[Entry]
    content: bytes
    dropped: list[str]


def compress(checkpoint: Mapping[str, Any], lossy: Lossy = Lossy()) -> Compressed:
    """Encode a checkpoint's ``state_dict`` and ``meta``, and the ranges of a `QuantizationHook`.

    Raises:
        UsageError: If a pattern matches nothing, a weight cannot be stored, or a library is
            missing.
    """
    need_for_compression('zstandard')
    need_for_compression('safetensors')
    from safetensors.numpy import save

    state = checkpoint['state_dict']
    entries = encode_state(state, lossy)
    dropped = [key for key in checkpoint if key not in ('state_dict', 'meta', RANGES)]
    meta = _plain(checkpoint.get('meta') or {}, 'meta', dropped)
    if RANGES in checkpoint:
        trained = checkpoint[RANGES]
        # A double holds a float32 exactly.
        meta[RANGES] = dict(
            trained, ranges={key: value.tolist() for key, value in trained['ranges'].items()}
        )
    versions = {
        module: local['version']
        for module, local in getattr(state, '_metadata', {}).items()
        if isinstance(local, dict) and isinstance(local.get('version'), int)
    }
    index = _json(dict(entries=[entry.row for entry in entries], versions=versions))
    frames = {
        f'{number}.{name}': frame
        for number, entry in enumerate(entries)
        for name, frame in entry.frames.items()
    }
    header = dict(format=FORMAT, version=VERSION, index=index, meta=_json(meta))
    header['sha256'] = _digest_of_file(header, frames)
    arrays = {name: np.frombuffer(frame, np.uint8) for name, frame in frames.items()}
    return Compressed(entries, save(arrays, metadata=header), dropped)


def write_compressed(compressed: Compressed, path: str) -> None:
    """Write a file, whole or not at all; its name must end in ``.ddz``, by which it is known.

    Raises:
        UsageError: If it does not.
    """
    require_suffix(path)
    write_atomically(compressed.content, path)


def require_suffix(path: str) -> None:
    """Raise a `UsageError` unless a name ends in ``.ddz``."""
    if not str(path).endswith(SUFFIX):
        raise UsageError(
            f"'{path}' must end in {SUFFIX}: that is how a compressed checkpoint is recognized"
        )


def read_compressed(path: str, fetch: Callable[[str], bytes] | None = None) -> dict[str, Any]:
    """Read a ``.ddz`` file; every entry is checked.

    Args:
        path (str): Of the file, or a URL that ``fetch`` takes.
        fetch (Callable, optional): Gives the bytes behind a URL. Defaults to None: files alone.

    Returns:
        dict: ``state_dict`` and ``meta``; ``quantization`` if it was there.

    Raises:
        FileNotFoundError: If there is none.
        UsageError: If it is something else, truncated or altered, or a library is missing.
    """
    need_for_compression('zstandard')
    need_for_compression('safetensors')
    path = str(path) if fetch and '://' in str(path) else str(Path(path).expanduser())
    if not (fetch and '://' in path) and not Path(path).is_file():
        raise FileNotFoundError(path)
    content = fetch(path) if fetch and '://' in path else Path(path).read_bytes()
    try:
        return decompress(content)
    except UsageError as error:
        raise UsageError(f"'{path}' {error}") from None
    except Exception as error:
        # Whatever the parsers of a damaged file stumble on.
        raise UsageError(
            f"'{path}' is truncated, altered or no compressed checkpoint "
            f'({type(error).__name__}): copy it or make it anew'
        ) from None


def decompress(content: bytes) -> dict[str, Any]:
    """The checkpoint of a file's content, every entry checked; see `read_compressed`."""
    from safetensors.numpy import load

    arrays = load(content)
    (size,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + size])['__metadata__']
    if header.get('format') != FORMAT:
        raise UsageError('is a safetensors file, but no compressed checkpoint')
    if header['version'] != VERSION:
        raise UsageError(
            f'is of version {header["version"]} of the format, of which this release knows '
            f'{VERSION}: use a newer release'
        )
    frames = {name: array.tobytes() for name, array in arrays.items()}
    if _digest_of_file(header, frames) != header['sha256']:
        raise UsageError('is altered: its checksum is another; copy it or make it anew')
    index = json.loads(header['index'])
    state: OrderedDict[str, Tensor] = OrderedDict()
    values: list[Tensor] = []
    for number, row in enumerate(index['entries']):
        if row['encoding'] == 'same':
            value = values[row['as']].clone()
        else:
            value = decode_tensor(row, {name: frames[f'{number}.{name}'] for name in row['frames']})
        if tensor_digest(value) != row['sha256']:
            raise UsageError(
                f"is altered: the checksum of '{row['key']}' is another; copy it or make it anew"
            )
        values.append(value)
        state[row['key']] = value
    # What torch puts beside a state dict, by which modules recognize older releases' keys.
    state._metadata = OrderedDict(
        (module, dict(version=version)) for module, version in index['versions'].items()
    )
    meta = _revive(json.loads(header['meta']))
    trained = meta.pop(RANGES, None)
    if trained is None:
        return dict(state_dict=state, meta=meta)
    trained['ranges'] = {key: torch.tensor(value) for key, value in trained['ranges'].items()}
    return {'state_dict': state, 'meta': meta, RANGES: trained}


def _digest_of_file(header: Mapping[str, str], frames: Frames) -> str:
    digest = hashlib.sha256()
    for text in (header['format'], header['version'], header['index'], header['meta']):
        digest.update(struct.pack('<Q', len(text)) + text.encode())
    for name in sorted(frames):
        digest.update(f'{name} {len(frames[name])} '.encode() + frames[name])
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(',', ':'))


def _plain(value: Any, name: str, dropped: list[str]) -> Any:
    """What JSON holds of a meta dict. Tuples are marked; what is neither data nor number is named
    in ``dropped``."""
    if isinstance(value, dict):
        entries = {
            key: _plain(entry, f'{name}.{key}', dropped)
            for key, entry in value.items()
            if isinstance(key, str)
        }
        return {key: entry for key, entry in entries.items() if f'{name}.{key}' not in dropped}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, name, dropped) for item in value]
        return dict(__tuple__=items) if isinstance(value, tuple) else items
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in 'biufU':
        return _plain(value.tolist(), name, dropped)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    dropped.append(name)
    return None


def _revive(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {'__tuple__'}:
            return tuple(map(_revive, value['__tuple__']))
        return {key: _revive(entry) for key, entry in value.items()}
    return [_revive(item) for item in value] if isinstance(value, list) else value
