"""What compression has done to a model, block by block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from ..errors import UsageError
from .encoding import Entry, decode_tensor

#: State entries that no training changes by gradients: statistics of norms, a dynamic detector's
#: settings.
_BUFFERS = (
    'running_mean',
    'running_var',
    'num_batches_tracked',
    'threshold',
    'delta',
    'difficulties',
    'latencies',
    'platt_scale',
    'platt_shift',
    'gflops',
    'class_weights',
    'curve',
    'trained',
    'mean',
    'std',
    'project',
)
#: Blocks as Muhawenayo counts them, for a two-stage detector: 26.8, 0.6 and 14.0 M parameters of a
#: Faster R-CNN R-50 with 13 classes. The backbone is with the neck.
TWO_STAGE = dict(backbone=['backbone', 'neck'], proposals=['rpn_head'], roi_heads=['roi_head'])
MEGABYTE = 1e6


class AccuracyAndLatency(NamedTuple):
    """AP and AP50 in percent, None where the evaluator has none; seconds of an image at batch 1,
    the mean over the exits that images took; and these shares, (K,), in [0, 1], empty where a
    detector has one exit."""

    ap: float | None
    ap50: float | None
    latency: float
    shares: Sequence[float] = ()


@dataclass(frozen=True)
class BlockSize:
    """A row: parameters, how many of them are zero, bytes in the file (also those of buffers), the
    sum of the weights' squares, and that of their errors in the file."""

    name: str
    parameters: int
    zeros: int
    in_file: int
    squares: float = 0.0
    lost: float = 0.0

    @property
    def pruned(self) -> float:
        """Share of parameters that are zero, in [0, 1]."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def megabytes(self) -> float:
        """Of the other parameters in float32, 1 MB = 1e6 bytes."""
        return 4 * (self.parameters - self.zeros) / MEGABYTE

    @property
    def error(self) -> float:
        """|w - w in the file| / |w|, of all weights together (Euclidean norms)."""
        return math.sqrt(self.lost / self.squares) if self.squares else 0.0


def block_sizes(
    state: Mapping[str, Tensor],
    entries: Sequence[Entry] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> list[BlockSize]:
    """Sizes of blocks, in the state's order.

    What a state dict holds twice counts once: weights that are equal bit for bit, or share their
        memory.
    Zeros are counted in weights (two or more dimensions), not in biases.

    Args:
        state (Mapping[str, Tensor]): The state dict, before it was encoded.
        entries (Sequence[Entry]): The same, encoded, for bytes in the file and errors.
        groups (Mapping[str, Sequence[str]], optional): Block -> patterns (`fnmatch`) of modules;
            what is below one belongs to it. What matches none is in a block of its first name.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    groups = groups or {}
    for pattern in (pattern for patterns in groups.values() for pattern in patterns):
        if not any(_belongs(key, pattern) for key in state):
            raise UsageError(f"the pattern '{pattern}' matches no entry of the checkpoint")
    sums: dict[str, list[float]] = {}
    pointers = set()
    for index, (key, value) in enumerate(state.items()):
        block = next(
            (
                name
                for name, patterns in groups.items()
                if any(_belongs(key, pattern) for pattern in patterns)
            ),
            key.split('.')[0],
        )
        sum_ = sums.setdefault(block, [0, 0, 0, 0.0, 0.0])
        sum_[2] += entries[index].size if entries else 0
        repeated = value.dim() > 1 and (
            bool(entries)
            and entries[index].row['encoding'] == 'same'
            or value.device.type != 'meta'
            and value.data_ptr() in pointers
        )
        if repeated or not value.is_floating_point() or key.split('.')[-1] in _BUFFERS:
            continue
        if value.device.type != 'meta':
            pointers.add(value.data_ptr())
        sum_[0] += value.numel()
        if value.dim() > 1:
            sum_[1] += value.numel() - int(value.count_nonzero())
            if entries:
                written = decode_tensor(entries[index].row, entries[index].frames).double()
                sum_[3] += float(value.cpu().double().square().sum())
                sum_[4] += float((value.cpu().double() - written).square().sum())
    return [BlockSize(name, *sums[name]) for name in sums]


def _belongs(key: str, pattern: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(key, f'{pattern}.*')


def total_size(sizes: Sequence[BlockSize], in_file: int, name: str = 'total') -> BlockSize:
    """All blocks together; ``in_file`` is the whole file, with its index."""
    sums = [
        sum(getattr(size, part) for size in sizes)
        for part in ('parameters', 'zeros', 'squares', 'lost')
    ]
    return BlockSize(name, *sums[:2], in_file, *sums[2:])


def compression_table(
    sizes: Sequence[BlockSize],
    in_file: int,
    worth: AccuracyAndLatency | None = None,
    before: AccuracyAndLatency | None = None,
    file_before: int = 0,
) -> list[str]:
    """Lines of a table: blocks, what is neither, and all.

    Args:
        sizes (Sequence[BlockSize]): From `block_sizes`.
        in_file (int): Bytes of the whole file.
        worth (AccuracyAndLatency, optional): Of the detector in the file.
        before (AccuracyAndLatency, optional): Of the detector that it was made of, which
            then has a row, too.
        file_before (int): Bytes of its file.
    """
    rest = BlockSize('(index)', 0, 0, in_file - sum(size.in_file for size in sizes))
    rows = [(size, None) for size in (*sizes, rest)] + [(total_size(sizes, in_file), worth)]
    if before is not None:
        original = total_size(sizes, file_before, 'original')
        rows.append((replace(original, lost=0.0), before))
    width = max(len(size.name) for size, _ in rows)
    head = f'{"block":{width}}  parameters   pruned  float32 left   in the file   error'
    lines = [head + '      AP    AP50    latency' * (worth is not None)]
    for size, accuracy in rows:
        lines.append(
            f'{size.name:{width}}  {size.parameters / 1e6:8.3f} M  {size.pruned:6.1%}  '
            f'{size.megabytes:9.3f} MB  {size.in_file / MEGABYTE:9.3f} MB  {size.error:6.2%}'
            + (_worth(accuracy) if accuracy else '')
        )
    return lines


def _worth(worth: AccuracyAndLatency) -> str:
    points = ''.join(
        f'{"-" if value is None else f"{value:.2f}":>8}' for value in (worth.ap, worth.ap50)
    )
    exits = ', '.join(f'{share:.0%} at exit {exit}' for exit, share in enumerate(worth.shares))
    return f'{points}  {1e3 * worth.latency:6.1f} ms' + (f' ({exits})' if exits else '')
