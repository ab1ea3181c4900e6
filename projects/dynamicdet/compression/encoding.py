"""How a tensor becomes bytes, and bytes a tensor: what ``.ddz`` files hold.

    raw        the bytes as they are
    sparse     bits of what is not zero, then only that
    codebook   a table of at most 256 values, and an index into it for each weight
    int8       w = scale of its output channel x integer in -127 ... 127
    binary     w = scale of its output channel x sign, a bit for each

With ``bits`` among its frames, an encoding holds only what is not zero. Floats are stored byte
plane by byte plane: signs and exponents repeat, mantissas do not. Numbers are little-endian; each
frame is zstd's.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..errors import UsageError
from ..experimental import warn_if_experimental
from .weight_sharing import cluster_weights

#: zstd's level for floats and integers of 8 bits, whose bytes do not repeat in sequences: higher
#: ones gain 2 % of floats, nothing of integers, and take ten times as long.
_LEVEL = 3
#: For the bits of what is not zero: at 90 % sparsity 0.659 MB for 10.86 M weights, where level 9
#: takes 0.732 and the entropy is 0.637. For indices into tables: of 2 bits 18 % less than at level
#: 3, of 4 bits 12 %, which is what Huffman's code takes, give or take 0.5 % (`entropy`).
_SLOW_LEVEL = 19
_DTYPES = {
    str(dtype).split('.')[1]: dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
Frames = dict[str, bytes]


@dataclass(frozen=True)
class Lossy:
    """Encodings that change weights.

    Args:
        int8 (Sequence[str], optional): Patterns (`fnmatch`) of keys to store as integers of 8 bits.
        codebook (int, optional): Bits of an index into a table of shared values, 2 to 8.
        codebook_keys (Sequence[str], optional): Patterns of keys that share values.
        binary (Sequence[str], optional): Patterns of keys of which only signs are kept, and one
            scale for each channel.

    Patterns apply to weights alone: floats of two or more dimensions. None: none; empty: all of
        them. What
    several ask for is binary rather than shared, and shared rather than integer.
    """

    int8: Sequence[str] | None = None
    codebook: int | None = None
    codebook_keys: Sequence[str] | None = None
    binary: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.codebook is not None and not 2 <= self.codebook <= 8:
            raise UsageError(f'a codebook has indices of 2 to 8 bits, not of {self.codebook}')

    def of(self, key: str, value: Tensor) -> str | None:
        """How an entry is encoded: ``binary``, ``codebook``, ``int8`` or not by these."""
        if not _is_weight(value):
            return None
        if self.binary is not None and _named(key, self.binary):
            return 'binary'
        if self.codebook is not None and _named(key, self.codebook_keys or ()):
            return 'codebook'
        return 'int8' if self.int8 is not None and _named(key, self.int8) else None


def _named(key: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(key, pattern) for pattern in patterns)


def _is_weight(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() >= 2 and value.numel() > 0


@dataclass(frozen=True)
class Entry:
    """An encoded entry: its row of the index, and its frames (none if it repeats an earlier
    entry)."""

    row: dict[str, Any]
    frames: Frames

    @property
    def size(self) -> int:
        """Bytes of its frames."""
        return _total(self.frames)

    @property
    def itemsize(self) -> int:
        """Bytes of an element, decoded."""
        return _DTYPES[self.row['dtype']].itemsize


# Encoding.


def encode_state(state: Mapping[str, Tensor], lossy: Lossy = Lossy()) -> list[Entry]:
    """Encode a state dict, each entry by what is smallest for it.

    Raises:
        UsageError: If a pattern matches no weight, or a weight cannot be stored.
    """
    _require_matches(state, lossy)
    entries: list[Entry] = []
    first: dict[tuple, int] = {}
    for index, (key, value) in enumerate(state.items()):
        value = value.detach().cpu().contiguous()
        dtype = str(value.dtype).split('.')[1]
        if dtype not in _DTYPES:
            raise UsageError(f"'{key}' is of type {dtype}, which the format does not hold")
        kind = lossy.of(key, value)
        # What a model holds twice, or what is equal, is stored once.
        identity = (dtype, tuple(value.shape), kind, tensor_digest(value))
        row: dict[str, Any] = dict(key=key, dtype=dtype, shape=list(value.shape))
        if identity in first:
            original = entries[first[identity]].row
            row.update(encoding='same', sha256=original['sha256'])
            entries.append(Entry({**row, 'as': first[identity]}, {}))
            continue
        first[identity] = index
        encoding, frames, sizes = _encode(key, value, kind, lossy.codebook or 8)
        row.update(encoding=encoding, frames=sizes)
        row['sha256'] = tensor_digest(decode_tensor(row, frames))
        if kind is None and row['sha256'] != identity[-1]:
            raise AssertionError(f'{key} does not come back as it was')
        entries.append(Entry(row, frames))
    if lossy.binary is not None:
        # Where it worked: what cannot be stored is said in one line.
        warn_if_experimental('encoding', 'binary')
    return entries


def _require_matches(state: Mapping[str, Tensor], lossy: Lossy) -> None:
    for patterns in (lossy.int8, lossy.codebook_keys, lossy.binary):
        for pattern in patterns or ():
            if not any(
                _is_weight(value) and fnmatchcase(key, pattern) for key, value in state.items()
            ):
                raise UsageError(
                    f"the pattern '{pattern}' matches no weight; a key is such as "
                    f"'{next((key for key, value in state.items() if _is_weight(value)), 'none')}'"
                )


def _encode(
    key: str, value: Tensor, kind: str | None, bits: int
) -> tuple[str, Frames, dict[str, int]]:
    """(encoding, frames, decoded size of each); the smallest of what is possible."""
    if kind is not None and not torch.isfinite(value).all():
        raise UsageError(f"'{key}' holds values that are not finite: it cannot be stored as {kind}")
    if kind == 'int8':
        scale, numbers = quantize_per_channel(value.float())
        return (
            'int8',
            *_smaller(dict(scale=_planes(_bytes(torch.from_numpy(scale)))), numbers.reshape(-1)),
        )
    if kind == 'codebook':
        table, indices = cluster_weights(value.float(), bits)
        return _with_table(torch.from_numpy(table).to(value.dtype), indices)
    if kind == 'binary':
        return _binary(*binarize_per_channel(value.float()))
    one_magnitude = _one_magnitude(value)
    if one_magnitude is not None:
        return _binary(*one_magnitude)
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


def _with_table(table: Tensor, indices: np.ndarray) -> tuple[str, Frames, dict[str, int]]:
    """Entry 0 of the table is zero if any weight is."""
    return ('codebook', *_smaller(dict(table=_planes(_bytes(table))), indices, _SLOW_LEVEL))


def _smaller(
    common: dict[str, np.ndarray], numbers: np.ndarray, level: int = _LEVEL
) -> tuple[Frames, dict[str, int]]:
    """One byte per number, or bits and only the numbers that are not zero."""
    kept = numbers != 0
    dense = _frames({**common, 'values': numbers}, level)
    if kept.all():
        return dense
    sparse = _frames({**common, 'bits': np.packbits(kept), 'values': numbers[kept]}, level)
    return sparse if _total(sparse[0]) < _total(dense[0]) else dense


def _binary(scale: np.ndarray, numbers: np.ndarray) -> tuple[str, Frames, dict[str, int]]:
    numbers = numbers.reshape(-1)
    kept = numbers != 0
    parts = dict(
        scale=_planes(_bytes(torch.from_numpy(scale))), signs=np.packbits(numbers[kept] > 0)
    )
    if not kept.all():
        parts['bits'] = np.packbits(kept)
    return ('binary', *_frames(parts))


def _frames(parts: Mapping[str, np.ndarray], level: int = _LEVEL) -> tuple[Frames, dict[str, int]]:
    """Each part as a frame, and its size before."""
    frames = {
        name: zstd_frame(part, _SLOW_LEVEL if name == 'bits' else level)
        for name, part in parts.items()
    }
    return frames, {name: part.nbytes for name, part in parts.items()}


def zstd_frame(part: np.ndarray, level: int = _SLOW_LEVEL) -> bytes:
    """A zstd frame of numbers."""
    content = np.ascontiguousarray(part).view(np.uint8).tobytes()
    return need_for_compression('zstandard').ZstdCompressor(level=level).compress(content)


def _total(frames: Frames) -> int:
    return sum(map(len, frames.values()))


def _few_values(value: Tensor) -> tuple[Tensor, np.ndarray] | None:
    """A table without loss and indices into it, where there are at most 256 values: weights that
    are shared already."""
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


def _one_magnitude(value: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """What `binarize_per_channel` gives, where it loses nothing: weights that are binary
    already."""
    if not _is_weight(value) or value.dtype == torch.float64 or value.numel() < 1024:
        return None
    rows = value.flatten(1)
    magnitudes = rows.abs()
    scale = magnitudes.amax(1, keepdim=True)
    zeros = rows == 0
    # Infinite or NaN scales would spoil zeros; a negative zero would lose its sign.
    if (
        not scale.isfinite().all()
        or not (zeros | (magnitudes == scale)).all()
        or (zeros & rows.signbit()).any()
    ):
        return None
    return scale[:, 0].float().numpy(), rows.sign().to(torch.int8).numpy()


def quantize_per_channel(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
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


def binarize_per_channel(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Signs, and one scale for each output channel: w ~ scale x sign. The mean of |w| as scale
    loses least in squares (Rastegari et al. 2016, XNOR-Net, eq. 6).

    Args:
        weight (Tensor): float32 (C, ...), finite. Zeros stay zeros, and have no part in the mean.

    Returns:
        tuple: scale, float32 (C, ); signs, int8 (C, n), -1, 0 or 1.
    """
    rows = weight.flatten(1)
    # float64: the mean of what is not zero must not become zero.
    scale = rows.double().abs().sum(1) / (rows != 0).sum(1).clamp(min=1)
    return scale.float().numpy(), rows.sign().to(torch.int8).numpy()


# Decoding.


def decode_tensor(row: Mapping[str, Any], frames: Frames) -> Tensor:
    """The tensor of a row."""
    dtype, shape = _DTYPES[row['dtype']], tuple(row['shape'])
    parts = {
        name: read_zstd_frame(content, row['frames'][name]) for name, content in frames.items()
    }
    if row['encoding'] in ('raw', 'sparse'):
        return _tensor(
            _spread(_unplanes(parts['values'], dtype.itemsize), parts, shape), dtype
        ).reshape(shape)
    if row['encoding'] == 'codebook':
        numbers = _spread(parts['values'][:, None], parts, shape)
        table = _tensor(_unplanes(parts['table'], dtype.itemsize), dtype)
        return table[torch.from_numpy(numbers[:, 0].astype(np.int64))].reshape(shape)
    if row['encoding'] not in ('int8', 'binary'):
        raise ValueError(f"unknown encoding '{row['encoding']}'")
    numbers = parts['values'] if row['encoding'] == 'int8' else _signs(parts, shape)
    scale = _tensor(_unplanes(parts['scale'], 4), torch.float32)
    whole = _tensor(_spread(numbers[:, None], parts, shape), torch.int8).float().reshape(shape)
    return (whole * scale.reshape(-1, *[1] * (len(shape) - 1))).to(dtype)


def _signs(parts: Mapping[str, np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """-1 and 1 of what is not zero, as the bytes of int8."""
    count = math.prod(shape)
    if 'bits' in parts:
        count = int(np.unpackbits(parts['bits'], count=count).sum())
    return (np.unpackbits(parts['signs'], count=count).astype(np.int8) * 2 - 1).view(np.uint8)


def _spread(
    values: np.ndarray, parts: Mapping[str, np.ndarray], shape: Sequence[int]
) -> np.ndarray:
    """Put zeros back between values, uint8 (kept, bytes) -> (n, bytes)."""
    if 'bits' not in parts:
        return values
    count = math.prod(shape)
    out = np.zeros((count, values.shape[1]), np.uint8)
    out[np.unpackbits(parts['bits'], count=count).astype(bool)] = values
    return out


def read_zstd_frame(content: bytes, size: int) -> np.ndarray:
    """What `zstd_frame` wrote, uint8 (size, ).

    Raises:
        ValueError: If it is of another size.
    """
    zstandard = need_for_compression('zstandard')
    if zstandard.frame_content_size(content) != size:
        raise ValueError('a frame is of another size than the index says')
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(content), np.uint8)


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


def tensor_digest(value: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, in hexadecimal."""
    return hashlib.sha256(_bytes(value).tobytes()).hexdigest()


def need_for_compression(name: str) -> ModuleType:
    """An optional library."""
    return errors.import_optional(name, 'compressed checkpoints', 'compression')
