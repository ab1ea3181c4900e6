"""One file for sparse, quantised and shared weights: ``.ddz``.

The container is a safetensors file whose entries are byte strings, each a zstd frame. Its metadata hold, as
JSON, an index (a row for each entry of the state dict: key, type, shape, encoding, SHA-256 of what it decodes
to), the checkpoint's ``meta``, and one SHA-256 over index, meta and all frames. Nothing in it is executed on
reading.

    raw        the bytes as they are
    sparse     bits of what is not zero, then only that
    codebook   a table of at most 256 values, and an index into it for each weight
    int8       w = scale of its output channel x integer in -127 ... 127

With ``bits`` among its frames, an encoding holds only what is not zero. Floats are stored byte plane by
byte plane: signs and exponents repeat, mantissas do not. Numbers are little-endian.
"""
import hashlib
import json
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

FORMAT, VERSION = 'dynamicdet.ddz', '1'
SUFFIX = '.ddz'
#: zstd's level for weights, whose bytes do not repeat in sequences: higher ones gain nothing.
_LEVEL = 3
#: For the bits of what is not zero: at 90 % sparsity 0.659 MB for 10.86 M weights, where level 9 takes
#: 0.732 and the entropy is 0.637.
_BITS_LEVEL = 19
_DTYPES = {str(dtype).split('.')[1]: dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool)}
Frames = Dict[str, bytes]


@dataclass(frozen=True)
class Lossy:
    """Encodings that change weights.

    Args:
        int8 (Sequence[str], optional): Patterns (`fnmatch`) of keys to store as integers of 8 bits.
        codebook (int, optional): Bits of an index into a table of shared values, 2 to 8.
        codebook_keys (Sequence[str], optional): Patterns of keys that share values.

    Patterns apply to weights alone: floats of two or more dimensions. None: none; empty: all of them, and for
    ``int8`` all that has no codebook.
    """
    int8: Optional[Sequence[str]] = None
    codebook: Optional[int] = None
    codebook_keys: Optional[Sequence[str]] = None

    def __post_init__(self) -> None:
        if self.codebook is not None and not 2 <= self.codebook <= 8:
            raise UsageError(f'a codebook has indices of 2 to 8 bits, not of {self.codebook}')

    def of(self, key: str, value: Tensor) -> Optional[str]:
        """How an entry is encoded: ``int8``, ``codebook`` or not by these."""
        if not _is_weight(value):
            return None
        if self.codebook is not None and _named(key, self.codebook_keys or ()):
            return 'codebook'
        return 'int8' if self.int8 is not None and _named(key, self.int8) else None


def _named(key: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(key, pattern) for pattern in patterns)


def _is_weight(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() >= 2


@dataclass(frozen=True)
class Entry:
    """An encoded entry: its row of the index, and its frames (none if it repeats an earlier entry)."""
    row: Dict[str, Any]
    frames: Frames

    @property
    def size(self) -> int:
        """Bytes of its frames."""
        return _total(self.frames)


# Encoding.


def encode_state(state: Mapping[str, Tensor], lossy: Lossy = Lossy()) -> List[Entry]:
    """Encode a state dict, each entry by what is smallest for it.

    Raises:
        UsageError: If a pattern matches no weight, or a weight cannot be stored.
    """
    _require_matches(state, lossy)
    entries: List[Entry] = []
    first: Dict[Tuple, int] = {}
    for index, (key, value) in enumerate(state.items()):
        value = value.detach().cpu().contiguous()
        dtype = str(value.dtype).split('.')[1]
        if dtype not in _DTYPES:
            raise UsageError(f"'{key}' is of type {dtype}, which the format does not hold")
        kind = lossy.of(key, value)
        # What a model holds twice, or what is equal, is stored once.
        identity = (dtype, tuple(value.shape), kind, _digest(value))
        row: Dict[str, Any] = dict(key=key, dtype=dtype, shape=list(value.shape))
        if identity in first:
            original = entries[first[identity]].row
            row.update(encoding='same', sha256=original['sha256'])
            entries.append(Entry({**row, 'as': first[identity]}, {}))
            continue
        first[identity] = index
        encoding, frames, sizes = _encode(key, value, kind, lossy.codebook or 8)
        row.update(encoding=encoding, frames=sizes)
        row['sha256'] = _digest(_decode(row, frames))
        if kind is None and row['sha256'] != identity[-1]:
            raise AssertionError(f'{key} does not come back as it was')
        entries.append(Entry(row, frames))
    return entries


def _require_matches(state: Mapping[str, Tensor], lossy: Lossy) -> None:
    for patterns in (lossy.int8, lossy.codebook_keys):
        for pattern in patterns or ():
            if not any(_is_weight(value) and fnmatchcase(key, pattern) for key, value in state.items()):
                raise UsageError(
                    f"the pattern '{pattern}' matches no weight; a key is such as "
                    f"'{next((key for key, value in state.items() if _is_weight(value)), 'none')}'")


def _encode(key: str, value: Tensor, kind: Optional[str], bits: int) -> Tuple[str, Frames, Dict[str, int]]:
    """(encoding, frames, decoded size of each); the smallest of what is possible."""
    if kind is not None and not torch.isfinite(value).all():
        raise UsageError(f"'{key}' holds values that are not finite: it cannot be stored as {kind}")
    if kind == 'int8':
        scale, numbers = quantise(value.float())
        return ('int8', *_smaller(dict(scale=_planes(_bytes(torch.from_numpy(scale)))), numbers.reshape(-1)))
    if kind == 'codebook':
        table, indices = share(value.float(), bits)
        return _with_table(torch.from_numpy(table).to(value.dtype), indices)
    few = _few_values(value)
    if few is not None:
        return _with_table(*few)
    raw = _bytes(value)
    # By bits, not by value: a negative zero is kept.
    kept = raw.any(1)
    plain = _frames(dict(values=_planes(raw)))
    if kept.all():
        return ('raw', *plain)
    sparse = _frames(dict(bits=np.packbits(kept), values=_planes(raw[kept])))
    return ('sparse', *sparse) if _total(sparse[0]) < _total(plain[0]) else ('raw', *plain)


def _with_table(table: Tensor, indices: np.ndarray) -> Tuple[str, Frames, Dict[str, int]]:
    """Entry 0 of the table is zero if any weight is."""
    return ('codebook', *_smaller(dict(table=_planes(_bytes(table))), indices))


def _smaller(common: Dict[str, np.ndarray], numbers: np.ndarray) -> Tuple[Frames, Dict[str, int]]:
    """One byte per number, or bits and only the numbers that are not zero."""
    kept = numbers != 0
    dense = _frames({**common, 'values': numbers})
    if kept.all():
        return dense
    sparse = _frames({**common, 'bits': np.packbits(kept), 'values': numbers[kept]})
    return sparse if _total(sparse[0]) < _total(dense[0]) else dense


def _frames(parts: Mapping[str, np.ndarray]) -> Tuple[Frames, Dict[str, int]]:
    """Each part as a zstd frame, and its size before."""
    zstandard = _need('zstandard')
    contents = {name: np.ascontiguousarray(part).view(np.uint8).tobytes() for name, part in parts.items()}
    frames = {
        name: zstandard.ZstdCompressor(level=_BITS_LEVEL if name == 'bits' else _LEVEL).compress(content)
        for name, content in contents.items()}
    return frames, {name: len(content) for name, content in contents.items()}


def _total(frames: Frames) -> int:
    return sum(map(len, frames.values()))


def _few_values(value: Tensor) -> Optional[Tuple[Tensor, np.ndarray]]:
    """A table without loss and indices into it, where there are at most 256 values: weights that are shared
    already."""
    whole = {2: torch.int16, 4: torch.int32}.get(value.element_size())
    if not value.is_floating_point() or whole is None or value.numel() < 1024:
        return None
    numbers = value.reshape(-1).view(whole).numpy()
    if len(np.unique(numbers[:4096])) > 256:
        return None
    table, indices = np.unique(numbers, return_inverse=True)
    if len(table) > 256:
        return None
    # Zero first.
    order = np.argsort(table != 0, kind='stable')
    place = np.empty(len(table), np.uint8)
    place[order] = np.arange(len(table))
    indices = place[indices.reshape(-1)]
    return torch.from_numpy(table[order].copy()).view(value.dtype), indices


def quantise(weight: Tensor) -> Tuple[np.ndarray, np.ndarray]:
    """Symmetric integers of 8 bits, one scale for each output channel: w ~ scale x integer.

    Args:
        weight (Tensor): float32 (C, ...), finite.

    Returns:
        tuple: scale, float32 (C, ), largest |w| / 127; integers, int8 (C, n), -127 to 127.
    """
    rows = weight.flatten(1)
    scale = rows.abs().amax(1) / 127
    # A scale that underflows would divide by zero.
    whole = torch.where(scale[:, None] > 0, rows / scale[:, None], 0).round().clamp(-127, 127)
    return scale.numpy(), whole.to(torch.int8).numpy()


def share(weight: Tensor, bits: int, iterations: int = 30) -> Tuple[np.ndarray, np.ndarray]:
    """Shared values by k-means in one dimension, begun with equal distances (Deep Compression, Han et al.
    2016).

    Args:
        weight (Tensor): float32, finite. Zeros stay zeros: they have an entry of their own.
        bits (int): 2 to 8; the table has at most 2^bits entries.
        iterations (int): Of Lloyd's algorithm, at most.

    Returns:
        tuple: table, float32 (k, ); indices, uint8 (n, ). Entry 0 is zero if any weight is.
    """
    flat = weight.flatten().numpy()
    zeros = flat == 0
    alive = np.sort(flat[~zeros]).astype(np.float64)
    count = 2**bits - bool(zeros.any())
    distinct = np.unique(alive)
    centroids = distinct if len(distinct) <= count else _lloyd(alive, count, iterations)
    table = np.unique(centroids.astype(np.float32))
    # Not zero itself: that would be pruned.
    table = table[table != 0] if zeros.any() else table
    middles = (table[1:] + table[:-1]) / 2
    indices = np.searchsorted(middles, flat).astype(np.uint8) if len(table) else np.zeros(flat.size, np.uint8)
    if zeros.any():
        table = np.concatenate([np.zeros(1, np.float32), table])
        indices = np.where(zeros, 0, indices + 1).astype(np.uint8)
    return table, indices


def _lloyd(values: np.ndarray, count: int, iterations: int) -> np.ndarray:
    """k-means of sorted values: clusters are runs, whose means are differences of running sums."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centroids = np.linspace(values[0], values[-1], count)
    for _ in range(iterations):
        cuts = np.concatenate([[0],
                               np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2),
                               [len(values)]])
        sizes = np.diff(cuts)
        # A cluster without members stays where it is.
        means = np.where(sizes > 0, np.diff(sums[cuts]) / np.maximum(sizes, 1), centroids)
        if np.array_equal(means, centroids):
            break
        centroids = means
    return centroids


# Decoding.


def _decode(row: Mapping[str, Any], frames: Frames) -> Tensor:
    """The tensor of a row."""
    dtype, shape = _DTYPES[row['dtype']], tuple(row['shape'])
    parts = {name: _unframe(frame, row['frames'][name]) for name, frame in frames.items()}
    if row['encoding'] in ('raw', 'sparse'):
        return _tensor(_spread(_unplanes(parts['values'], dtype.itemsize), parts, shape),
                       dtype).reshape(shape)
    numbers = _spread(parts['values'][:, None], parts, shape)
    if row['encoding'] == 'codebook':
        table = _tensor(_unplanes(parts['table'], dtype.itemsize), dtype)
        return table[torch.from_numpy(numbers[:, 0].astype(np.int64))].reshape(shape)
    if row['encoding'] != 'int8':
        raise ValueError(f"unknown encoding '{row['encoding']}'")
    scale = _tensor(_unplanes(parts['scale'], 4), torch.float32)
    whole = _tensor(numbers, torch.int8).float().reshape(shape)
    return (whole * scale.reshape(-1, *[1] * (len(shape) - 1))).to(dtype)


def _spread(values: np.ndarray, parts: Mapping[str, np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """Put zeros back between values, uint8 (kept, bytes) -> (n, bytes)."""
    if 'bits' not in parts:
        return values
    count = math.prod(shape)
    out = np.zeros((count, values.shape[1]), np.uint8)
    out[np.unpackbits(parts['bits'], count=count).astype(bool)] = values
    return out


def _unframe(frame: bytes, size: int) -> np.ndarray:
    zstandard = _need('zstandard')
    if zstandard.frame_content_size(frame) != size:
        raise ValueError('a frame is of another size than the index says')
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)


def _bytes(value: Tensor) -> np.ndarray:
    """uint8 (n, bytes of an element)."""
    return value.reshape(-1).view(torch.uint8).numpy().reshape(value.numel(), value.element_size())


def _tensor(content: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Back from `_bytes`, (n, )."""
    return torch.from_numpy(np.array(content).reshape(-1)).view(dtype)


def _planes(content: np.ndarray) -> np.ndarray:
    """All first bytes, all second bytes, ..."""
    return content.T


def _unplanes(content: np.ndarray, size: int) -> np.ndarray:
    return content.reshape(size, -1).T


def _digest(value: Tensor) -> str:
    return hashlib.sha256(_bytes(value).tobytes()).hexdigest()


def _need(name: str) -> ModuleType:
    """An optional library."""
    try:
        return __import__(name)
    except ImportError:
        raise UsageError(f"compressed checkpoints need '{name}', which is not installed: "
                         'pip install -r requirements/compression.txt') from None


# Files.


@dataclass(frozen=True)
class Compressed:
    """A checkpoint, encoded.

    Attributes:
        entries (List[Entry]): Of its state dict, in order.
        content (bytes): The file.
        dropped (List[str]): What of the checkpoint it does not hold, such as the optimiser's state.
    """
    entries: List[Entry]
    content: bytes
    dropped: List[str]


def compress(checkpoint: Mapping[str, Any], lossy: Lossy = Lossy()) -> Compressed:
    """Encode a checkpoint's ``state_dict`` and ``meta``.

    Raises:
        UsageError: If a pattern matches nothing, a weight cannot be stored, or a library is missing.
    """
    _need('zstandard')
    _need('safetensors')
    from safetensors.numpy import save
    state = checkpoint['state_dict']
    entries = encode_state(state, lossy)
    dropped = [key for key in checkpoint if key not in ('state_dict', 'meta')]
    meta = _plain(checkpoint.get('meta') or {}, 'meta', dropped)
    versions = {module: local['version'] for module, local in getattr(state, '_metadata', {}).items()
                if isinstance(local, dict) and isinstance(local.get('version'), int)}
    index = _json(dict(entries=[entry.row for entry in entries], versions=versions))
    frames = {f'{number}.{name}': frame for number, entry in enumerate(entries)
              for name, frame in entry.frames.items()}
    header = dict(format=FORMAT, version=VERSION, index=index, meta=_json(meta))
    header['sha256'] = _digest_of_file(header, frames)
    arrays = {name: np.frombuffer(frame, np.uint8) for name, frame in frames.items()}
    return Compressed(entries, save(arrays, metadata=header), dropped)


def write_compressed(compressed: Compressed, path: str) -> None:
    """Write a file, whole or not at all; its name must end in ``.ddz``, by which it is known.

    Raises:
        UsageError: If it does not.
    """
    from ..engine import write_atomically
    require_suffix(path)
    write_atomically(compressed.content, path)


def require_suffix(path: str) -> None:
    """Raise a `UsageError` unless a name ends in ``.ddz``."""
    if not str(path).endswith(SUFFIX):
        raise UsageError(f"'{path}' must end in {SUFFIX}: that is how a compressed checkpoint is recognised")


def read_compressed(path: str) -> Dict[str, Any]:
    """Read a ``.ddz`` file, from a path or URL; every entry is checked.

    Returns:
        dict: ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: If there is none.
        UsageError: If it is something else, truncated or altered, or a library is missing.
    """
    from mmengine.fileio import get
    _need('zstandard')
    _need('safetensors')
    path = str(path) if '://' in str(path) else str(Path(path).expanduser())
    if '://' not in path and not Path(path).is_file():
        raise FileNotFoundError(path)
    content = get(path)
    try:
        return _read(content)
    except UsageError as error:
        raise UsageError(f"'{path}' {error}") from None
    except Exception as error:
        # Whatever the parsers of a damaged file stumble on.
        raise UsageError(f"'{path}' is truncated, altered or no compressed checkpoint "
                         f'({type(error).__name__}): copy it or make it anew') from None


def _read(content: bytes) -> Dict[str, Any]:
    from safetensors.numpy import load
    arrays = load(content)
    size, = struct.unpack('<Q', content[:8])
    header = json.loads(content[8:8 + size])['__metadata__']
    if header.get('format') != FORMAT:
        raise UsageError('is a safetensors file, but no compressed checkpoint')
    if header['version'] != VERSION:
        raise UsageError(
            f"is of version {header['version']} of the format, of which this release knows {VERSION}: "
            'use a newer release')
    frames = {name: array.tobytes() for name, array in arrays.items()}
    if _digest_of_file(header, frames) != header['sha256']:
        raise UsageError('is altered: its checksum is another; copy it or make it anew')
    index = json.loads(header['index'])
    state: 'OrderedDict[str, Tensor]' = OrderedDict()
    values: List[Tensor] = []
    for number, row in enumerate(index['entries']):
        if row['encoding'] == 'same':
            value = values[row['as']].clone()
        else:
            value = _decode(row, {name: frames[f'{number}.{name}'] for name in row['frames']})
        if _digest(value) != row['sha256']:
            raise UsageError(
                f"is altered: the checksum of '{row['key']}' is another; copy it or make it anew")
        values.append(value)
        state[row['key']] = value
    # What torch puts beside a state dict, by which modules recognise older releases' keys.
    state._metadata = OrderedDict(
        (module, dict(version=version)) for module, version in index['versions'].items())
    return dict(state_dict=state, meta=_revive(json.loads(header['meta'])))


def _digest_of_file(header: Mapping[str, str], frames: Frames) -> str:
    digest = hashlib.sha256()
    for text in (header['format'], header['version'], header['index'], header['meta']):
        digest.update(struct.pack('<Q', len(text)) + text.encode())
    for name in sorted(frames):
        digest.update(f'{name} {len(frames[name])} '.encode() + frames[name])
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(',', ':'))


def _plain(value: Any, name: str, dropped: List[str]) -> Any:
    """What JSON holds of a meta dict. Tuples are marked; what is neither data nor number is named in
    ``dropped``."""
    if isinstance(value, dict):
        entries = {
            key: _plain(one, f'{name}.{key}', dropped)
            for key, one in value.items() if isinstance(key, str)
        }
        return {key: one for key, one in entries.items() if f'{name}.{key}' not in dropped}
    if isinstance(value, (list, tuple)):
        items = [_plain(one, name, dropped) for one in value]
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
        return {key: _revive(one) for key, one in value.items()}
    return [_revive(one) for one in value] if isinstance(value, list) else value
