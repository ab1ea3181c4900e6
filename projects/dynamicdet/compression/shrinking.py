"""Detectors with fewer channels: how a layer loses some, and how a config says which detector has
lost which.

A description of what is left is plain data, layer name -> [channels in, channels out, groups], for
layers that have lost some alone. A norm has as many channels in as out; so has a parameter of shape
(1, C, 1, 1), and a RoI extractor, which has no weights but knows how many channels it gives. Layers
are named by their first name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..routing.router import Router

Channels = dict[str, Sequence[int]]


class KeptChannels(NamedTuple):
    """Channels of a layer that stay, ascending; None where all do."""

    entering: Tensor | None = None
    leaving: Tensor | None = None


class ChannelRule(NamedTuple):
    """How modules that are no layers of torch, such as a RoI extractor, go along when channels are
    removed.

    Attributes:
        channels (Callable): Module -> how many channels it is given, which are those that it gives.
        select (Callable): (module, `KeptChannels`) -> None: keeps these, in place.
        is_told (bool): Whether it has no weights, and knows only how many channels it is given.
    """

    channels: Callable[[Any], int]
    select: Callable[[Any, KeptChannels], None]
    is_told: bool = False


#: Kinds of modules beside torch's own layers. The framework that has them registers them.
CHANNEL_RULES: dict[type[nn.Module], ChannelRule] = {}


def _shrink_router(router: Router, kept: KeptChannels) -> None:
    select_channels(router, 'mean', 0, kept.entering)
    select_channels(router, 'std', 0, kept.entering)


CHANNEL_RULES[Router] = ChannelRule(lambda router: len(router.mean), _shrink_router)


def rule_of(layer: Any) -> ChannelRule | None:
    """The rule of a module; None of one that needs none."""
    return next((rule for kind, rule in CHANNEL_RULES.items() if isinstance(layer, kind)), None)


def select_channels(layer: nn.Module, name: str, dim: int, kept: Tensor | None) -> None:
    """Keep some indices of a dimension of a parameter or buffer, in place.

    Args:
        layer (nn.Module): Whose it is.
        name (str): Of the parameter or buffer; nothing happens where there is none.
        dim (int): The dimension.
        kept (Tensor, optional): The indices, int64; None for all.
    """
    value = getattr(layer, name, None)
    if value is None or kept is None:
        return
    chosen = value.detach().index_select(dim, kept.to(value.device)).clone()
    setattr(
        layer,
        name,
        nn.Parameter(chosen, value.requires_grad) if isinstance(value, nn.Parameter) else chosen,
    )


def get_by_name(model: nn.Module, name: str) -> Any:
    """The module or parameter of a name."""
    for part in name.split('.'):
        model = getattr(model, part)
    return model


def channels_of(layer: Any) -> tuple | None:
    """(in, out, groups) of a layer whose channels can be removed; None for others."""
    if isinstance(layer, nn.Conv2d) or isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
        return layer.in_channels, layer.out_channels, layer.groups
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, layer.num_channels, layer.num_groups
    count = None
    if isinstance(layer, _BatchNorm):
        count = layer.num_features
    elif rule_of(layer):
        count = rule_of(layer).channels(layer)
    elif isinstance(layer, nn.Parameter) and layer.dim() == 4 and layer.numel() == layer.shape[1]:
        count = layer.shape[1]
    return None if count is None else (count, count, 1)


def shrink_layers(model: nn.Module, kept: Mapping[str, KeptChannels]) -> Channels:
    """Take channels out of layers, in place; module objects stay, their parameters are replaced.

    Args:
        model (nn.Module): Any model.
        kept (Mapping[str, KeptChannels]): Layer name -> what stays. Of convolutions with
            groups and of group norms whole groups go.

    Returns:
        dict: The description.
    """
    for name, channels in kept.items():
        layer = get_by_name(model, name)
        if isinstance(layer, nn.Parameter):
            _shrink_parameter(model, name, channels.leaving)
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            _shrink_conv(layer, channels)
        elif isinstance(layer, nn.Linear):
            select_channels(layer, 'weight', 0, channels.leaving)
            select_channels(layer, 'weight', 1, channels.entering)
            select_channels(layer, 'bias', 0, channels.leaving)
            layer.out_features, layer.in_features = layer.weight.shape
        elif rule_of(layer):
            rule_of(layer).select(layer, channels)
        else:
            _shrink_norm(layer, channels.leaving)
    return {name: list(channels_of(get_by_name(model, name))) for name in kept}


def _shrink_conv(layer: nn.Module, kept: KeptChannels) -> None:
    out, entering = (1, 0) if isinstance(layer, nn.ConvTranspose2d) else (0, 1)
    if layer.groups > 1:
        # Groups go as a whole; what enters the others stays.
        groups = layer.groups * len(kept.leaving) // layer.out_channels
        layer.in_channels = layer.in_channels // layer.groups * groups
        layer.groups = groups
    else:
        select_channels(layer, 'weight', entering, kept.entering)
        layer.in_channels = layer.weight.shape[entering]
    select_channels(layer, 'weight', out, kept.leaving)
    select_channels(layer, 'bias', 0, kept.leaving)
    layer.out_channels = layer.weight.shape[out]


def _shrink_norm(layer: nn.Module, kept: Tensor) -> None:
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * len(kept) // layer.num_channels
        layer.num_channels = len(kept)
    else:
        layer.num_features = len(kept)
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        select_channels(layer, name, 0, kept)


def _shrink_parameter(model: nn.Module, name: str, kept: Tensor) -> None:
    parent, _, attribute = name.rpartition('.')
    # A ParameterList knows its entries by number.
    owner, value = get_by_name(model, parent), get_by_name(model, name)
    chosen = nn.Parameter(
        value.detach().index_select(1, kept.to(value.device)).clone(), value.requires_grad
    )
    setattr(owner, attribute, chosen)


def resize_channels(model: nn.Module, channels: Channels) -> None:
    """Bring a freshly built model to a description, in place. Its values are of no meaning
    afterwards.

    Raises:
        UsageError: If the description is of another model.
    """
    kept = {}
    for name, wanted in channels.items():
        try:
            layer = get_by_name(model, name)
        except AttributeError:
            raise UsageError(
                f"channels: the detector has no layer '{name}'; the description is of another "
                'detector'
            ) from None
        there = channels_of(layer)
        if (
            there is None
            or len(wanted) != 3
            or not all(
                isinstance(count, int) and 1 <= count <= most for count, most in zip(wanted, there)
            )
        ):
            raise UsageError(
                f"channels: '{name}' cannot have {list(wanted)} channels in, out and groups; the "
                f'detector has {list(there) if there else "none there"}'
            )
        entering, leaving = (
            None if count == most else torch.arange(count) for count, most in zip(wanted[:2], there)
        )
        grouped = there[2] > 1 and leaving is None
        kept[name] = KeptChannels(entering, torch.arange(wanted[1]) if grouped else leaving)
    made = shrink_layers(model, kept)
    for name, wanted in channels.items():
        if made[name] != list(wanted):
            raise UsageError(
                f"channels: '{name}' cannot have {list(wanted)} channels in, out and groups: these "
                'do '
                'not go together'
            )
