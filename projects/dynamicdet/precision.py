"""What stays in float32 whatever type a detector is turned into, by ``half()``, ``double()`` or
``to(dtype)``."""

from collections.abc import Callable

from torch import Tensor, nn

Convert = Callable[[Tensor], Tensor]


def _moved(convert: Convert) -> Convert:
    """The same conversion without the change of type."""

    def move(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

    return move


class KeepsType(nn.Module):
    """A module that keeps its type, parts included: what it computes is compared with numbers that
    were measured."""

    def _apply(self, fn: Convert, recurse: bool = True) -> nn.Module:
        return super()._apply(_moved(fn), recurse)


class KeepsTypeOfBuffers(nn.Module):
    """A module whose own buffers, such as thresholds, keep their type; its parts change theirs."""

    def _apply(self, fn: Convert, recurse: bool = True) -> nn.Module:
        for part in self.children() if recurse else ():
            part._apply(fn)
        return super()._apply(_moved(fn), recurse=False)
