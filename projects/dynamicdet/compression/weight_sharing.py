"""Weight sharing: the weights of a layer take few values, which are trained (Deep Compression, Han
et al. 2016, section 3).

A layer's *table* holds k values, at most 256; its *indices* say which of them each weight is. The
model keeps its ordinary weights, tied: those of one index are equal. So an optimizer, DDP, EMA and
a checkpoint see the model that they know, and a ``.ddz`` file finds the table by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .pruning_blocks import require_patterns

REDUCTIONS = ('sum', 'mean')


@dataclass(frozen=True)
class WeightSharingBlock:
    """Layers that share values, each among its own weights.

    Args:
        name (str): For messages.
        modules (Sequence[str]): Patterns of module names, as `pruning_blocks.PruningBlock` has
            them.
        bits (int): Of an index, 2 to 8: a layer has at most 2^bits values, zero among them.
        exclude (Sequence[str]): Patterns of modules that stay as they are.
    """

    name: str
    modules: Sequence[str]
    bits: int = 4
    exclude: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise UsageError(f"block '{self.name}': an index has 2 to 8 bits, not {self.bits}")
        require_patterns(self)


class WeightSharing(NamedTuple):
    """Who shares with whom in a layer.

    Attributes:
        indices (Tensor): uint8 (n, ), in the order of the weight's elements, on its device.
        members (Tensor): int64 (k, ), how many elements have each index.
        pruned (bool): Whether index 0 is of weights that are zero and stay so.
        order (Tensor, optional): int32 (n, ), elements by their index; None on a CPU, which adds in
            order anyway.
    """

    indices: Tensor
    members: Tensor
    pruned: bool
    order: Tensor | None = None


def share_weights(weight: Tensor, bits: int) -> WeightSharing:
    """Let the weights of a layer share 2^bits values, in place.

    Args:
        weight (Tensor): Floats of any shape, finite. Zeros stay zeros.
        bits (int): 2 to 8.
    """
    flat = weight.detach().float().cpu()
    if not flat.isfinite().all():
        raise UsageError('weights that are not finite cannot be shared: did the training diverge?')
    table, indices = cluster_weights(flat, bits)
    sharing = weight_sharing_of(
        torch.from_numpy(indices).to(weight.device), bool((flat == 0).any())
    )
    _spread(weight, torch.from_numpy(table).to(weight.device), sharing)
    return sharing


def weight_sharing_of(indices: Tensor, pruned: bool) -> WeightSharing:
    """Who shares, by indices."""
    order = None if indices.device.type == 'cpu' else indices.argsort(stable=True).int()
    return WeightSharing(indices, torch.bincount(indices), pruned, order)


def tie_weights(weight: Tensor, sharing: WeightSharing) -> None:
    """Set each weight to the mean of those of its index, in place; pruned ones to zero."""
    _spread(weight, _sums(weight, sharing) / sharing.members.clamp(min=1), sharing)


def tie_gradient(gradient: Tensor, sharing: WeightSharing, reduction: str = 'sum') -> None:
    """Give every weight the gradient of its shared value, in place; pruned ones none.

    The gradient of a shared value is the sum over its weights (Han et al. 2016, eq. 3). Optimizers
    work element by element, so weights that were equal stay equal, and the value moves as one
    parameter would.

    Args:
        gradient (Tensor): Of the weight's shape.
        sharing (WeightSharing): Who shares.
        reduction (str): ``sum``, or ``mean``: the sum over the number of weights, which suits
            learning rates that were found for single weights.
    """
    sums = _sums(gradient, sharing)
    _spread(gradient, sums / sharing.members.clamp(min=1) if reduction == 'mean' else sums, sharing)


def _sums(values: Tensor, sharing: WeightSharing) -> Tensor:
    """Sums over the elements of each index, float64 (k, ); the same each time."""
    values = values.detach().flatten()
    if sharing.order is None:
        return torch.bincount(sharing.indices, values.double(), minlength=len(sharing.members))
    # There bincount adds as threads come by.
    ordered = values.index_select(0, sharing.order).double()
    return torch.segment_reduce(ordered, 'sum', lengths=sharing.members, unsafe=True)


@torch.no_grad()
def _spread(out: Tensor, table: Tensor, sharing: WeightSharing) -> None:
    if sharing.pruned:
        table[0] = 0
    out.copy_(table.to(out.dtype)[sharing.indices.int()].view(out.shape))


def cluster_weights(
    weight: Tensor, bits: int, iterations: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """Shared values by k-means in one dimension, begun with equal distances (Deep Compression, Han
    et al. 2016).

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
    indices = (
        np.searchsorted(middles, flat).astype(np.uint8)
        if len(table)
        else np.zeros(flat.size, np.uint8)
    )
    if zeros.any():
        table = np.concatenate([np.zeros(1, np.float32), table])
        indices = np.where(zeros, 0, indices + 1).astype(np.uint8)
    return table, indices


def _lloyd(values: np.ndarray, count: int, iterations: int) -> np.ndarray:
    """k-means of sorted values: clusters are runs, whose means are differences of running sums."""
    sums, squares = (np.concatenate([[0.0], np.cumsum(powers)]) for powers in (values, values**2))
    centroids = np.linspace(values[0], values[-1], count)
    for _ in range(iterations):
        cuts = np.concatenate(
            [[0], np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2), [len(values)]]
        )
        sizes = np.diff(cuts)
        means = np.where(sizes > 0, np.diff(sums[cuts]) / np.maximum(sizes, 1), centroids)
        if not sizes.all():
            # Pruning leaves a hole around zero. A cluster without members halves the one that loses
            # most.
            worst = (np.diff(squares[cuts]) - sizes * means**2).argmax()
            means[sizes.argmin()] = (means[worst] + values[cuts[worst + 1] - 1]) / 2
            means.sort()
        if np.array_equal(means, centroids):
            break
        centroids = means
    return centroids
