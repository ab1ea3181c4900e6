"""What entropy coding makes of the streams of a ``.ddz`` file: zstd, as written, against Huffman's
code.

Deep Compression (Han et al. 2016, section 4) writes indices, and the gaps between weights that are
left, in Huffman's code. zstd has such a code inside, for blocks of 128 kB with tables of their own,
and finds repetitions besides; in weights these are chance, and its fast levels lose by using them.

A *symbol* is a byte. A code's size is that of its bits and of the table that a reader needs.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..experimental import warn_if_experimental
from .encoding import Entry, read_zstd_frame, zstd_frame

#: Bits of the table for each symbol up to the largest: the length of its code word, from which a
#: canonical code follows; 63 at most, which takes 10^13 symbols.
_LENGTH_BITS = 6
#: The largest gap: more is said by a filler, as in Deep Compression.
_MAX_GAP = 255


def code_lengths(counts: Sequence[int]) -> np.ndarray:
    """Lengths of Huffman's code words.

    Args:
        counts (Sequence[int]): How often each symbol occurs, (k, ).

    Returns:
        np.ndarray: Bits of each symbol's word, int64 (k, ); 0 for what does not occur, 1 for what
        is alone.
    """
    lengths = np.zeros(len(counts), np.int64)
    # (count, tie break, symbols below)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    if len(heap) == 1:
        lengths[heap[0][2]] = 1
    while len(heap) > 1:
        (first, place, low), (second, _, high) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[low + high] += 1
        heapq.heappush(heap, (first + second, place, low + high))
    return lengths


def huffman_size(symbols: np.ndarray) -> int:
    """Bytes of a stream of bytes under a Huffman code of its own, with the table.

    Args:
        symbols (np.ndarray): uint8 (n, ).
    """
    counts = np.bincount(symbols)
    return _bytes(int(counts @ code_lengths(counts))) + _bytes(_LENGTH_BITS * len(counts))


def entropy_bytes(symbols: np.ndarray) -> float:
    """The least that any code of single symbols takes, in bytes, without a table (Shannon 1948)."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8 if len(counts) else 0.0


def index_gaps(kept: np.ndarray) -> np.ndarray:
    """Relative indices: how far each kept place is from the one before (Deep Compression, figure
    2).

    Args:
        kept (np.ndarray): bool (n, ).

    Returns:
        np.ndarray: uint8. ``k`` below 255: k places that are not kept, then one that is. 255: as
        many that are not kept, and no more said.
    """
    before = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    fillers = before // _MAX_GAP
    out = np.full(len(before) + int(fillers.sum()), _MAX_GAP, np.uint8)
    out[np.cumsum(fillers + 1) - 1] = before % _MAX_GAP
    return out


@dataclass(frozen=True)
class StreamSize:
    """Bytes of all streams of a kind, before and after coding."""

    name: str
    plain: int
    zstd: int
    huffman: int
    entropy: float


def compare_stream_sizes(entries: Sequence[Entry]) -> list[StreamSize]:
    """Sizes of what encoded entries hold, by kind of stream; each tensor's stream has a code of its
    own.

    Kinds are an encoding's frames, such as ``codebook values`` (indices) or ``sparse bits``
    (masks); byte planes of floats count as a stream each. Masks are there once more as ``...
    gaps``, the other way to say where weights are, which a file does not hold.
    """
    sums: dict[str, np.ndarray] = {}
    for entry in entries:
        for name, content in entry.frames.items():
            stream = read_zstd_frame(content, entry.row['frames'][name])
            kind = f'{entry.row["encoding"]} {name}'
            _add(sums, kind, _planes(entry, name, stream), len(content))
            if name == 'bits':
                other = index_gaps(np.unpackbits(stream).astype(bool))
                _add(sums, f'{entry.row["encoding"]} gaps', [other], len(zstd_frame(other)))
    return [
        StreamSize(name, *map(int, sizes[:3]), float(sizes[3]))
        for name, sizes in sorted(sums.items())
    ]


def stream_table(sizes: Sequence[StreamSize]) -> list[str]:
    """Lines of a table."""
    warn_if_experimental('encoding', 'Huffman')
    width = max((len(size.name) for size in sizes), default=0)
    lines = [f'{"stream":{width}}        bytes         zstd      Huffman   entropy (order 0)']
    for size in sizes:
        best = 'zstd' if size.zstd <= size.huffman else 'Huffman'
        least, most = sorted((size.zstd, size.huffman))
        lines.append(
            f'{size.name:{width}}  {size.plain:11}  {size.zstd:11}  {size.huffman:11}  '
            f'{size.entropy:11.0f}  {best} smaller by {1 - least / max(most, 1):.1%}'
        )
    return lines


def _add(sums: dict[str, np.ndarray], kind: str, streams: Sequence[np.ndarray], zstd: int) -> None:
    sizes = [
        sum(map(len, streams)),
        zstd,
        sum(map(huffman_size, streams)),
        sum(map(entropy_bytes, streams)),
    ]
    sums[kind] = sums.get(kind, 0) + np.array(sizes)


def _planes(entry: Entry, name: str, stream: np.ndarray) -> Sequence[np.ndarray]:
    """The byte planes of floats; a stream of symbols as it is."""
    is_float = (
        name in ('table', 'scale')
        or name == 'values'
        and entry.row['encoding'] in ('raw', 'sparse')
    )
    width = 4 if name == 'scale' else entry.itemsize
    return list(stream.reshape(width, -1)) if is_float else [stream]


def _bytes(bits: int) -> int:
    return -(-bits // 8)
