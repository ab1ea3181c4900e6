"""A second device without one: tensors that say that they are elsewhere, and are computed on the
CPU.

Torch refuses to mix them with the CPU's as it does with a GPU's, and every wait of the host for the
device, or copy to it, is counted. What a kernel does inside stays unseen.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mmcv._ext
import torch
from mmengine.structures import instance_data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

FAR = 'far'
#: For these a GPU tells the host how large the result is.
_SIZED_BY_VALUES = (
    'nonzero',
    'masked_select',
    '_unique2',
    'unique_dim',
    'unique_consecutive',
    'bincount',
    'equal',
)
#: mmcv's own operators, which know no devices but their own.
_OPERATORS = ('nms', 'roi_align_forward', 'roi_align_backward', 'modulated_deform_conv_forward')


class _Module(_DummyBackendModule):
    """What torch asks a backend: types for autocast, and seeds."""

    def get_amp_supported_dtype(self) -> list:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


_setup_privateuseone_for_python_backend(FAR, _Module())

#: Of all that happened: 'to host', 'to device', and names of operators that the host waits for.
events: Counter = Counter()


class FarTensor(Tensor):
    """Holds its values in ``near``, on the CPU."""

    @staticmethod
    def __new__(cls, near: Tensor) -> 'FarTensor':
        far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=torch.device(FAR, 0),
        )
        far.near = near
        return far

    def __repr__(self) -> str:
        return f'FarTensor({self.near})'

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.tolist:
            events['to host'] += 1
            return args[0].near.detach().tolist()
        if function is Tensor.numpy:
            raise TypeError("can't convert a far tensor to numpy: use Tensor.cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return _compute(function, args, kwargs or {})


class _Masks(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, FarTensor) and value.dtype == torch.bool


class FarMask(metaclass=_Masks):
    """As torch.cuda.BoolTensor."""


class _Far(TorchDispatchMode):
    """Makes new tensors where they are asked for."""

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return _compute(function, args, kwargs or {})


def _compute(function: Callable, args: tuple, kwargs: dict) -> Any:
    name = function.overloadpacket.__name__
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    far = any(isinstance(one, FarTensor) for one in tensors)
    moved = kwargs.get('device')
    if far:
        _note(name, args)
        near = [one for one in tensors if not isinstance(one, FarTensor) and one.dim()]
        # Indices may be on the CPU: torch copies them.
        if near and name not in (
            'copy_',
            '_to_copy',
            'index',
            'index_put_',
            'index_put',
            '_index_put_impl_',
            'set_',
        ):
            raise RuntimeError(f'Expected all tensors to be on the same device: aten::{name}')
        events['to device'] += len(near) * (name != '_to_copy')
    if moved is not None:
        kwargs = dict(kwargs, device=torch.device('cpu'))
        there = torch.device(moved).type == FAR
        if name == '_to_copy' and there != far:
            events['to device' if there else 'to host'] += 1
        far = there
    elif name == 'copy_':
        far = isinstance(args[0], FarTensor)
        if not far:
            events['to host'] += 1
    result = _KERNELS.get(name, function)(*tree_map(_near, args), **tree_map(_near, kwargs))
    if (
        name.endswith('_')
        and args
        and isinstance(args[0], FarTensor)
        and isinstance(result, Tensor)
    ):
        return args[0]
    return _wrapped(result) if far else result


def _gru_cell(
    entering: Tensor, own: Tensor, state: Tensor, bias: Tensor, own_bias: Tensor
) -> tuple:
    """The next state (Cho et al., arXiv 1406.1078), and what the way back needs."""
    (reset, keep, new), (own_reset, own_keep, own_new) = (
        (entering + bias).chunk(3, 1),
        (own + own_bias).chunk(3, 1),
    )
    reset, keep = (reset + own_reset).sigmoid(), (keep + own_keep).sigmoid()
    new = (new + reset * own_new).tanh()
    return new + keep * (state - new), torch.cat([reset, keep, new, own_new, state], 1)


def _gru_cell_backward(gradient: Tensor, kept: Tensor, has_bias: bool) -> tuple:
    reset, keep, new, own_new, state = kept.chunk(5, 1)
    to_new = gradient * (1 - keep) * (1 - new**2)
    gates = [to_new * own_new * reset * (1 - reset), gradient * (state - new) * keep * (1 - keep)]
    entering, own = torch.cat([*gates, to_new], 1), torch.cat([*gates, to_new * reset], 1)
    return entering, own, gradient * keep, entering.sum(0), own.sum(0)


#: What torch asks a device for, and a CPU does in parts.
_KERNELS = dict(
    _thnn_fused_gru_cell=_gru_cell,
    _thnn_fused_gru_cell_backward_impl=_gru_cell_backward,
    _thnn_fused_gru_cell_backward=_gru_cell_backward,
)


def _wrapped(result: Any) -> Any:
    return tree_map(lambda one: FarTensor(one) if isinstance(one, Tensor) else one, result)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value


def _note(name: str, args: tuple) -> None:
    if name == '_local_scalar_dense' or name in _SIZED_BY_VALUES:
        events[name] += 1
    if name == 'fake_quantize_per_channel_affine_cachemask' and not args[2].is_floating_point():
        # Of zero points that are integers it looks at the least and the largest.
        events['_local_scalar_dense'] += 2
    if name in ('index', 'index_put', 'index_put_', '_index_put_impl_'):
        masks = [
            one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)
        ]
        # One value for all is filled in without looking.
        if masks and (name == 'index' or args[2].numel() > 1):
            events[f'{name} by mask'] += 1


@contextlib.contextmanager
def far_device(monkeypatch: Any) -> Iterator[str]:
    """While this is open, the device may be used; it is given by its name."""
    for name in _OPERATORS:
        own = getattr(mmcv._ext, name)
        monkeypatch.setattr(
            mmcv._ext, name, lambda *args, own=own, **kwargs: _wrapped_call(own, args, kwargs)
        )
    # It knows the types of tensors of some devices.
    monkeypatch.setattr(instance_data, 'IndexType', instance_data.IndexType | FarTensor)
    monkeypatch.setattr(instance_data, 'BoolTypeTensor', instance_data.BoolTypeTensor | FarMask)
    before = torch._C._only_lift_cpu_tensors()
    # A list that becomes a tensor is copied to the device, and seen to be.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Far():
            yield FAR
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _wrapped_call(own: Callable, args: tuple, kwargs: dict) -> Any:
    every = tree_leaves((args, kwargs))
    far = any(isinstance(one, FarTensor) for one in every)
    if far and any(isinstance(one, Tensor) and not isinstance(one, FarTensor) for one in every):
        raise RuntimeError(f'Expected all tensors to be on the same device: {own}')
    result = own(*tree_map(_near, args), **tree_map(_near, kwargs))
    return _wrapped(result) if far else result


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """What happens inside; complete when it closes."""
    before, found = events.copy(), Counter()
    yield found
    found.update(events - before)
