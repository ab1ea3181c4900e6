"""Parts of an `EarlyExitDetector` from its config."""

import copy
from collections.abc import Sequence

from mmengine.model import ModuleList
from torch import nn

from mmdet.registry import MODELS

from ..errors import UsageError
from ..experimental import warn_if_experimental
from ..models.yolo import AnchorHead, YOLOLayer
from .gates import Gate
from .learned_gates import LearnedGate


def build_heads(
    heads: dict, detector: nn.Module, table: Sequence[YOLOLayer]
) -> tuple[tuple[int, ...], list[float], list[nn.Module]]:
    """The heads of some layers.

    Args:
        heads (dict): As of `EarlyExitDetector`; it stays as it is.
        detector (nn.Module): The base; what the config lacks is as in its ``bbox_head``.
        table (Sequence[YOLOLayer]): Its layers.

    Returns:
        tuple: Positions in the table, weights of losses, heads.

    Raises:
        UsageError: If layers or weights do not fit.
    """
    settings = {'type': 'ExitHead', **_of_base(detector.bbox_head), **heads}
    layers = settings.pop('layers', None)
    layers = tuple(range(len(table)) if layers is None else layers)
    weights = settings.pop('weights', 1.0)
    weights = [weights] * len(layers) if isinstance(weights, (int, float)) else list(weights)
    if (
        not layers
        or list(layers) != sorted(set(layers))
        or not 0 <= layers[0] <= layers[-1] < len(table)
    ):
        raise UsageError(
            f'heads.layers are positions from 0 to {len(table) - 1}, ascending, each once; got '
            f'{list(layers)}'
        )
    if len(weights) != len(layers) or any(weight < 0 for weight in weights):
        raise UsageError(
            f'heads.weights is a number from 0 on, or one for each of {len(layers)} heads; got '
            f'{weights}'
        )
    missing = [name for name in ('num_classes', 'anchors') if name not in settings]
    if missing:
        raise UsageError(
            f"heads needs {' and '.join(missing)}: the detector's head is no anchor head "
            'to take it from'
        )
    return (
        layers,
        weights,
        [
            MODELS.build(
                dict(settings, in_channels=table[position].channels, stride=table[position].stride)
            )
            for position in layers
        ],
    )


def _of_base(head: nn.Module) -> dict:
    """What auxiliary heads take over from the detector's."""
    if not isinstance(head, AnchorHead):
        return {}
    return dict(
        num_classes=head.num_classes,
        anchors=head.anchors.flatten(0, 1).tolist(),
        loss_weights=head.loss_weights,
        train_cfg=head.train_cfg,
        test_cfg=head.test_cfg,
    )


def build_propagation(propagation: dict | None, heads: Sequence[nn.Module]) -> ModuleList | None:
    """One for each head, or None."""
    if not propagation:
        return None
    warn_if_experimental('propagation', propagation.get('type', 'Propagation'))
    return ModuleList(
        MODELS.build({'type': 'Propagation', 'channels': head.channels, **propagation})
        for head in heads
    )


def build_gate(gate: dict | None, channels: Sequence[int], early_channels: int) -> Gate | None:
    """The gate of a config, or None. What learns is told the channels of what it looks at, if its
    config does not say them; also inside another.

    Args:
        gate (dict, optional): The config; it stays as it is.
        channels (Sequence[int]): C_l of the heads, (E - 1,), in order.
        early_channels (int): Of the early map.
    """
    if not gate:
        return None
    gate = copy.deepcopy(gate)
    for part in (gate, gate.get('gate')):
        kind = part.get('type') if part else None
        warn_if_experimental('gate', getattr(kind, '__name__', kind))
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, LearnedGate):
            part.setdefault('in_channels', list(channels))
    if gate.get('nothing'):
        gate['nothing'].setdefault('in_channels', early_channels)
    return MODELS.build(gate)


def learned_part(gate: nn.Module | None) -> nn.Module | None:
    """The gate, or the one that it wraps, that learns; None if there is none."""
    inner = getattr(gate, 'gate', None)
    return gate if hasattr(gate, 'loss') else inner if hasattr(inner, 'loss') else None
