"""Detectors with fewer channels: how a layer loses some, and how a config says which detector has lost which.

A description of what is left is plain data, layer name -> [channels in, channels out, groups], for layers
that have lost some alone. A norm has as many channels in as out; so has a parameter of shape (1, C, 1, 1),
and a RoI extractor, which has no weights but knows how many channels it gives. Layers are named by their
first name.
"""
import copy
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet.models.detectors import BaseDetector
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from mmdet.registry import MODELS

from ..errors import UsageError
from ..models.router import Router

Channels = Dict[str, Sequence[int]]


class Kept(NamedTuple):
    """Channels of a layer that stay, ascending; None where all do."""
    entering: Optional[Tensor] = None
    leaving: Optional[Tensor] = None


def get(model: nn.Module, name: str) -> Any:
    """The module or parameter of a name."""
    for part in name.split('.'):
        model = getattr(model, part)
    return model


def channels_of(layer: Any) -> Optional[tuple]:
    """(in, out, groups) of a layer whose channels can be removed; None for others."""
    if isinstance(layer, nn.Conv2d) or isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
        return layer.in_channels, layer.out_channels, layer.groups
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, layer.num_channels, layer.num_groups
    own = None
    if isinstance(layer, _BatchNorm):
        own = layer.num_features
    elif isinstance(layer, Router):
        own = len(layer.mean)
    elif isinstance(layer, BaseRoIExtractor):
        own = layer.out_channels
    elif isinstance(layer, nn.Parameter) and layer.dim() == 4 and layer.numel() == layer.shape[1]:
        own = layer.shape[1]
    return None if own is None else (own, own, 1)


def shrink(model: nn.Module, kept: Mapping[str, Kept]) -> Channels:
    """Take channels out of layers, in place; module objects stay, their parameters are replaced.

    Args:
        model (nn.Module): Any model.
        kept (Mapping[str, Kept]): Layer name -> what stays. Of convolutions with groups and of group norms
            whole groups go.

    Returns:
        dict: The description.
    """
    for name, one in kept.items():
        layer = get(model, name)
        if isinstance(layer, nn.Parameter):
            _shrink_parameter(model, name, one.leaving)
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            _shrink_conv(layer, one)
        elif isinstance(layer, nn.Linear):
            _select(layer, 'weight', 0, one.leaving)
            _select(layer, 'weight', 1, one.entering)
            _select(layer, 'bias', 0, one.leaving)
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, Router):
            _select(layer, 'mean', 0, one.entering)
            _select(layer, 'std', 0, one.entering)
        elif isinstance(layer, BaseRoIExtractor):
            layer.out_channels = len(one.leaving)
        else:
            _shrink_norm(layer, one.leaving)
    return {name: list(channels_of(get(model, name))) for name in kept}


def _select(layer: nn.Module, name: str, dim: int, kept: Optional[Tensor]) -> None:
    """Keep some indices of a parameter's or buffer's dimension."""
    value = getattr(layer, name, None)
    if value is None or kept is None:
        return
    chosen = value.detach().index_select(dim, kept.to(value.device)).clone()
    setattr(layer, name,
            nn.Parameter(chosen, value.requires_grad) if isinstance(value, nn.Parameter) else chosen)


def _shrink_conv(layer: nn.Module, kept: Kept) -> None:
    out, entering = (1, 0) if isinstance(layer, nn.ConvTranspose2d) else (0, 1)
    if layer.groups > 1:
        # Groups go as a whole; what enters the others stays.
        groups = layer.groups * len(kept.leaving) // layer.out_channels
        layer.in_channels = layer.in_channels // layer.groups * groups
        layer.groups = groups
    else:
        _select(layer, 'weight', entering, kept.entering)
        layer.in_channels = layer.weight.shape[entering]
    _select(layer, 'weight', out, kept.leaving)
    _select(layer, 'bias', 0, kept.leaving)
    layer.out_channels = layer.weight.shape[out]


def _shrink_norm(layer: nn.Module, kept: Tensor) -> None:
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * len(kept) // layer.num_channels
        layer.num_channels = len(kept)
    else:
        layer.num_features = len(kept)
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        _select(layer, name, 0, kept)


def _shrink_parameter(model: nn.Module, name: str, kept: Tensor) -> None:
    parent, _, own = name.rpartition('.')
    # A ParameterList knows its entries by number.
    owner, value = get(model, parent), get(model, name)
    chosen = nn.Parameter(value.detach().index_select(1, kept.to(value.device)).clone(), value.requires_grad)
    setattr(owner, own, chosen)


def resize(model: nn.Module, channels: Channels) -> None:
    """Bring a freshly built model to a description, in place. Its values are of no meaning afterwards.

    Raises:
        UsageError: If the description is of another model.
    """
    kept = {}
    for name, wanted in channels.items():
        try:
            layer = get(model, name)
        except AttributeError:
            raise UsageError(f"channels: the detector has no layer '{name}'; the description is of another "
                             'detector') from None
        there = channels_of(layer)
        if there is None or len(wanted) != 3 or not all(
                isinstance(count, int) and 1 <= count <= most for count, most in zip(wanted, there)):
            raise UsageError(
                f"channels: '{name}' cannot have {list(wanted)} channels in, out and groups; the "
                f'detector has {list(there) if there else "none there"}')
        entering, leaving = (None if count == most else torch.arange(count)
                             for count, most in zip(wanted[:2], there))
        grouped = there[2] > 1 and leaving is None
        kept[name] = Kept(entering, torch.arange(wanted[1]) if grouped else leaving)
    made = shrink(model, kept)
    for name, wanted in channels.items():
        if made[name] != list(wanted):
            raise UsageError(
                f"channels: '{name}' cannot have {list(wanted)} channels in, out and groups: these do "
                'not go together')


def build_pruned(detector: dict,
                 channels: Channels,
                 backbone: Optional[dict] = None,
                 budget: Optional[dict] = None) -> BaseDetector:
    """Build a detector some of whose channels were removed: what ``type='PrunedDetector'`` stands for in
    configs, as tools/prune.py writes them.

    It is the detector's own class, with its own keys; nothing is around it. It has its size before a Runner
    builds optimiser and DDP.

    Args:
        detector (dict): Config of the detector as it was, dynamic or not.
        channels (dict): Layer name -> [channels in, channels out, groups], of layers that have lost some.
        backbone (dict, optional): Not looked at; mmdet's ``init_detector`` asks for ``model.backbone``.
        budget (dict, optional): Of a dynamic detector, in place of its own.

    Returns:
        BaseDetector: With ``removed_channels``, the description.

    Raises:
        UsageError: If the description is of another detector.
    """
    detector = copy.deepcopy(detector)
    if budget is not None:
        detector['budget'] = budget
    model = MODELS.build(detector)
    resize(model, channels)
    model.removed_channels = {name: list(counts) for name, counts in channels.items()}
    model.register_load_state_dict_pre_hook(_require_removed)
    return model


MODELS.register_module('PrunedDetector', module=build_pruned)


def _require_removed(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_) -> None:
    """Refuse the checkpoint of a detector that has all of its channels, or has lost others. A few other
    shapes are let pass, as everywhere: a head for other classes is one of fine-tuning."""
    own, wrong, there = model.state_dict(), [], 0
    for name in model.removed_channels:
        key = next((key for key in (f'{name}.weight', f'{name}.mean', name) if key in own), None)
        if key is not None and prefix + key in state:
            there += 1
            wrong += [key] if own[key].shape != state[prefix + key].shape else []
    if 2 * len(wrong) > there:
        raise UsageError(
            'the config is of a detector some of whose channels were removed, and this checkpoint has '
            f'others: {len(wrong)} of {there} layers do not fit, such as {wrong[0]}, '
            f'{tuple(state[prefix + wrong[0]].shape)} for {tuple(own[wrong[0]].shape)}; take the checkpoint '
            'that tools/prune.py wrote beside the config')
