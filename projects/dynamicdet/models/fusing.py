"""Fewer operations for the same result, at inference."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, fuse_conv_bn
from torch import Tensor, nn

from ..private_torch import (
    FUSED_CONVOLUTION,
    FUSED_SUM_CONVOLUTION,
    changes_of,
    has_bfloat16_convolutions,
    pack_convolution_weight,
)


class Fusible:
    """A part that knows to fuse itself. Others may have an attribute of that name which is
    something else."""

    @abstractmethod
    def fuse(self) -> None:
        """Become a part with fewer operations and the same result. Norms were put into convolutions
        before."""


def fusible_parts(model: nn.Module) -> list[Fusible]:
    """A model's own parts to fuse, as YOLOv5 and YOLOv7 have; none in others."""
    return [module for module in model.modules() if isinstance(module, Fusible)]


def can_fuse(model: nn.Module) -> bool:
    """Whether a model has parts of its own to fuse."""
    return bool(fusible_parts(model))


def fuse(model: nn.Module) -> nn.Module:
    """Put norms into convolutions, activations behind them, and what else a model's parts know to
    fuse, for inference.

    In place and for good: a fused model cannot be trained or loaded into. A model without parts of
    its own to fuse is left as it is: some heads, such as RTMDet's, have several norms for one
    convolution. So is each of a pair's detectors (``whole_detectors``) for itself.

    Args:
        model (nn.Module): Any detector.

    Returns:
        nn.Module: The same, in eval mode.
    """
    model.eval()
    for detector in getattr(model, 'whole_detectors', [[model]]):
        if any(map(can_fuse, detector)):
            for part in detector:
                _fuse(part)
    return model


def _fuse(model: nn.Module) -> None:
    # mmcv's walks over everything; parts rely on their norms being gone.
    fuse_conv_bn(model)
    for part in fusible_parts(model):
        part.fuse()
    _replace_convolutions(model)


def _replace_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvModule) and isinstance(child.activate, nn.SiLU):
            setattr(module, name, InferenceConv(child.conv, silu=True))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, InferenceConv(child, silu=False))
        elif not isinstance(child, InferenceConv):
            _replace_convolutions(child)


def _knows(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions of a type on this processor: bfloat16 takes AVX-512."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16_convolutions())


class InferenceConv(nn.Module):
    """A convolution and the SiLU behind it.

    On a CPU one operation of oneDNN, in channels-last order, with weights that are brought into
    oneDNN's own order once: torch would do so at every call. They follow changes of the weights,
    but for those made through ``.data``. Elsewhere, and under autograd, two of torch's operations.
    """

    def __init__(self, conv: nn.Conv2d, silu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.silu = silu
        self._weights = None

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x, (N, C, H, W), with its SiLU if it has one."""
        if not self._can_pack(x):
            y = self.conv(x)
            return F.silu(y, inplace=True) if self.silu else y
        return FUSED_CONVOLUTION(*self._operands(x), 'swish' if self.silu else 'none', [], '')

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total`` plus the convolution of x; on a CPU in place. For convolutions without a
        SiLU."""
        if not self._can_pack(x):
            return total + self.conv(x)
        operands = self._operands(x)
        total = total.to(operands[0].dtype).contiguous(memory_format=torch.channels_last)
        return FUSED_SUM_CONVOLUTION.binary(total, *operands, 'add', None, None, [], '')

    def _can_pack(self, x: Tensor) -> bool:
        # Tensors of a subclass are there to be watched, not computed; inference mode's count no
        # changes.
        return (
            FUSED_CONVOLUTION is not None
            and x.device.type == 'cpu'
            and type(x) is Tensor
            and x.dtype in (torch.float32, torch.bfloat16)
            and not torch.is_grad_enabled()
            and not self.conv.weight.is_inference()
            and _knows(self._dtype())
        )

    def _dtype(self) -> torch.dtype:
        """As torch's own convolutions, under autocast in its type."""
        return (
            torch.get_autocast_dtype('cpu')
            if torch.is_autocast_enabled('cpu')
            else self.conv.weight.dtype
        )

    def __getstate__(self) -> dict:
        # oneDNN's order can be neither copied nor written.
        return {**self.__dict__, '_weights': None}

    def _operands(self, x: Tensor) -> tuple:
        conv = self.conv
        x = x.to(self._dtype()).contiguous(memory_format=torch.channels_last)
        weight, bias = self._packed(x)
        return x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups

    def _packed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        conv = self.conv
        # Anew where the model was moved or cast, or its weights changed since.
        key = (x.dtype, conv.weight.data_ptr(), changes_of(conv.weight))
        if self._weights is None or self._weights[0] != key:
            packed = pack_convolution_weight(
                conv.weight.to(x.dtype),
                conv.padding,
                conv.stride,
                conv.dilation,
                conv.groups,
                list(x.shape),
            )
            self._weights = key, (packed, None if conv.bias is None else conv.bias.to(x.dtype))
        return self._weights[1]
