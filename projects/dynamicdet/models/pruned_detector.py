"""Detectors that have lost channels, as a config describes them; and the modules of mmdet that lose
some with them."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from mmdet.models.detectors import BaseDetector
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from mmdet.registry import MODELS

from ..compression.shrinking import (
    CHANNEL_RULES,
    ChannelRule,
    Channels,
    KeptChannels,
    resize_channels,
)
from ..errors import UsageError


def _shrink_extractor(extractor: BaseRoIExtractor, kept: KeptChannels) -> None:
    extractor.out_channels = len(kept.leaving)


CHANNEL_RULES[BaseRoIExtractor] = ChannelRule(
    lambda extractor: extractor.out_channels, _shrink_extractor, is_told=True
)


def build_pruned(
    detector: dict, channels: Channels, backbone: dict | None = None, budget: dict | None = None
) -> BaseDetector:
    """Build a detector some of whose channels were removed: what ``type='PrunedDetector'`` stands
    for in configs, as tools/prune.py writes them.

    It is the detector's own class, with its own keys; nothing is around it. It has its size before
    a Runner builds optimizer and DDP.

    Args:
        detector (dict): Config of the detector as it was, dynamic or not.
        channels (dict): Layer name -> [channels in, channels out, groups], of layers that have lost
            some.
        backbone (dict, optional): Not looked at; mmdet's ``init_detector`` asks for
            ``model.backbone``.
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
    resize_channels(model, channels)
    model.removed_channels = {name: list(counts) for name, counts in channels.items()}
    model.register_load_state_dict_pre_hook(_require_removed)
    return model


MODELS.register_module('PrunedDetector', module=build_pruned)


def _require_removed(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_) -> None:
    """Refuse the checkpoint of a detector that has all of its channels, or has lost others. A few
    other shapes are let pass, as everywhere: a head for other classes is one of fine-tuning."""
    fresh, wrong, present = model.state_dict(), [], 0
    for name in model.removed_channels:
        key = next((key for key in (f'{name}.weight', f'{name}.mean', name) if key in fresh), None)
        if key is not None and prefix + key in state:
            present += 1
            wrong += [key] if fresh[key].shape != state[prefix + key].shape else []
    if 2 * len(wrong) > present:
        raise UsageError(
            'the config is of a detector some of whose channels were removed, and this checkpoint '
            f'has others: {len(wrong)} of {present} layers do not fit, such as {wrong[0]}, '
            f'{tuple(state[prefix + wrong[0]].shape)} for {tuple(fresh[wrong[0]].shape)}; take the '
            'checkpoint that tools/prune.py wrote beside the config'
        )
