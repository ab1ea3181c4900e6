"""Configs of several plain detectors, one for each exit."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..cascade.weights import JOINED
from ..errors import UsageError


def each_exit(config: Mapping | Sequence[Mapping] | None) -> list[Any]:
    """A config, or one for each exit, as a list."""
    if config is None or isinstance(config, Mapping):
        return [config]
    if not config or not all(isinstance(entry, Mapping) for entry in config):
        raise UsageError(
            f'a detector is a dict, or a list of one for each exit; got {str(config)[:100]}'
        )
    return list(config)


def pad_alike(preprocessors: Sequence[dict | None]) -> None:
    """Let the first preprocessor of several pad batches to sides that suit all."""
    divisors = [(preprocessor or {}).get('pad_size_divisor', 1) for preprocessor in preprocessors]
    if len(divisors) > 1 and preprocessors[0]:
        preprocessors[0]['pad_size_divisor'] = math.lcm(*divisors)


def initial_weights(detectors: Sequence[Mapping]) -> dict | None:
    """``init_cfg`` of all detectors together: their checkpoints' names as one.

    Raises:
        UsageError: If some have one and others do not.
    """
    init_cfgs = [copy.deepcopy(detector.get('init_cfg')) for detector in detectors]
    if len(init_cfgs) == 1 or not any(init_cfgs):
        return init_cfgs[0]
    named = [
        init_cfg.get('checkpoint') if isinstance(init_cfg, Mapping) else None
        for init_cfg in init_cfgs
    ]
    if not all(named):
        raise UsageError(
            'init_cfg of a pair names a checkpoint for each of its detectors, or for none'
        )
    return dict(type='Pretrained', checkpoint=JOINED + ','.join(named))
