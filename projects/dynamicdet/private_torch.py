"""All that is used of torch's private API, in one place: it may move with any release.

``tests/test_private_apis.py`` fails when it does. Overridden methods, such as
``nn.Module._load_from_state_dict``, stay in the classes that override them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Tensors with shapes and without values: FLOPs of large images are counted in no time. It has no
# public name.
from torch._subclasses.fake_tensor import FakeTensorMode as ShapesOnly

# Leaves of nested tuples, lists and dicts. It has no public name.
from torch.utils._pytree import tree_leaves

__all__ = [
    'FUSED_CONVOLUTION',
    'FUSED_SUM_CONVOLUTION',
    'ShapesOnly',
    'changes_of',
    'float_tensor_type',
    'has_bfloat16_convolutions',
    'pack_convolution_weight',
    'tree_leaves',
]

#: oneDNN's convolution with the activation behind it, and its convolution that adds to a sum. They
#: were made for torch's compiler: eager torch has no public form of them. None where the build has
#: no oneDNN.
FUSED_CONVOLUTION: Callable | None = getattr(torch.ops.mkldnn, '_convolution_pointwise', None)
FUSED_SUM_CONVOLUTION: Callable | None = getattr(torch.ops.mkldnn, '_convolution_pointwise_', None)


def pack_convolution_weight(
    weight: Tensor,
    padding: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    shape: list[int],
) -> Tensor:
    """A convolution's weight in oneDNN's own order, for inputs of a shape (N, C, H, W)."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, shape
    )


def has_bfloat16_convolutions() -> bool:
    """Whether oneDNN has convolutions in bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def changes_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place. Not for tensors of inference mode."""
    return tensor._version


def float_tensor_type(sizes: Sequence[int | None]) -> Any:
    """The type of a float32 tensor in a graph of the exporter; None where a size is free."""
    return torch._C.TensorType.get().with_dtype(torch.float32).with_sizes(list(sizes))
