"""What compression has done to a model, block by block."""
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Dict, List, Mapping, Optional, Sequence

from torch import Tensor

from ..errors import UsageError
from .checkpoint import Entry

#: State entries that no training changes by gradients: statistics of norms, a dynamic detector's settings.
_BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked', 'threshold', 'delta', 'difficulties',
            'latencies', 'gflops', 'mean', 'std', 'project')
#: Blocks as Muhawenayo counts them, for a two-stage detector: 26.8, 0.6 and 14.0 M parameters of a Faster
#: R-CNN R-50 with 13 classes. The backbone is with the neck.
TWO_STAGE = dict(backbone=['backbone', 'neck'], proposals=['rpn_head'], roi_heads=['roi_head'])
MEGABYTE = 1e6


@dataclass(frozen=True)
class BlockSize:
    """A row: parameters, how many of them are zero, and bytes in the file (also those of buffers)."""
    name: str
    parameters: int
    zeros: int
    in_file: int

    @property
    def pruned(self) -> float:
        """Share of parameters that are zero, in [0, 1]."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def megabytes(self) -> float:
        """Of the other parameters in float32, 1 MB = 1e6 bytes."""
        return 4 * (self.parameters - self.zeros) / MEGABYTE


def block_sizes(state: Mapping[str, Tensor],
                entries: Sequence[Entry] = (),
                groups: Optional[Mapping[str, Sequence[str]]] = None) -> List[BlockSize]:
    """Sizes of blocks, in the state's order.

    What a state dict holds twice counts once: weights that are equal bit for bit, or share their memory.
    Zeros are counted in weights (two or more dimensions), not in biases.

    Args:
        state (Mapping[str, Tensor]): The state dict, before it was encoded.
        entries (Sequence[Entry]): The same, encoded, for bytes in the file.
        groups (Mapping[str, Sequence[str]], optional): Block -> patterns (`fnmatch`) of modules; what is
            below one belongs to it. What matches none is in a block of its first name.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    groups = groups or {}
    for pattern in (pattern for patterns in groups.values() for pattern in patterns):
        if not any(_belongs(key, pattern) for key in state):
            raise UsageError(f"the pattern '{pattern}' matches no entry of the checkpoint")
    sums: Dict[str, List[int]] = {}
    seen = set()
    for index, (key, value) in enumerate(state.items()):
        block = next(
            (name for name, patterns in groups.items() if any(_belongs(key, one) for one in patterns)),
            key.split('.')[0])
        sum_ = sums.setdefault(block, [0, 0, 0])
        sum_[2] += entries[index].size if entries else 0
        repeated = value.dim() > 1 and (bool(entries) and entries[index].row['encoding'] == 'same'
                                        or value.device.type != 'meta' and value.data_ptr() in seen)
        if repeated or not value.is_floating_point() or key.split('.')[-1] in _BUFFERS:
            continue
        if value.device.type != 'meta':
            seen.add(value.data_ptr())
        sum_[0] += value.numel()
        sum_[1] += value.numel() - int(value.count_nonzero()) if value.dim() > 1 else 0
    return [BlockSize(name, *sums[name]) for name in sums]


def _belongs(key: str, pattern: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(key, f'{pattern}.*')


def total(sizes: Sequence[BlockSize], in_file: int) -> BlockSize:
    """All blocks together; ``in_file`` is the whole file, with its index."""
    return BlockSize('total', sum(size.parameters for size in sizes), sum(size.zeros for size in sizes),
                     in_file)


def table(sizes: Sequence[BlockSize], in_file: int) -> List[str]:
    """Lines of a table: blocks, what is neither, and all."""
    rest = BlockSize('(index)', 0, 0, in_file - sum(size.in_file for size in sizes))
    width = max(len(size.name) for size in (*sizes, rest))
    lines = [f'{"block":{width}}  parameters   pruned  float32 left   in the file']
    for size in (*sizes, rest, total(sizes, in_file)):
        lines.append(f'{size.name:{width}}  {size.parameters / 1e6:8.3f} M  {size.pruned:6.1%}  '
                     f'{size.megabytes:9.3f} MB  {size.in_file / MEGABYTE:9.3f} MB')
    return lines
