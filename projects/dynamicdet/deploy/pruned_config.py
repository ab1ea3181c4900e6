"""Remove channels of a trained detector, and write what is left so that any tool builds it."""

import copy
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict

from mmdet.models.detectors import BaseDetector

from ..checkpoints import write_checkpoint
from ..compression.channel_removal import RemovalPlan, plan_removal, remove_channels
from ..compression.pruning_blocks import PruningBlock
from ..errors import UsageError
from ..files import write_atomically
from ..measuring.flops import build_detector, count_parameters, measure_costs, stated_shape
from ..models import DynamicDetector
from ..models.pairs import each_exit


class Pruned(NamedTuple):
    """A detector without some channels.

    Attributes:
        model (BaseDetector): The detector.
        cfg (Config): Builds it.
        plan (RemovalPlan): What went.
        parameters (tuple[int, int]): Before and after.
    """

    model: BaseDetector
    cfg: Config
    plan: RemovalPlan
    parameters: tuple[int, int]


def parse_blocks(
    options: Sequence[str],
    exclude: Sequence[str] = (),
    over: str = 'layer',
    norm: float = 2,
    random: bool = False,
) -> list[PruningBlock]:
    """Blocks from ``PATTERN,...=SHARE``, whose names are their patterns.

    Raises:
        UsageError: If one is no such thing, or its share is outside [0, 1).
    """
    blocks = []
    for option in options:
        patterns, _, share = option.rpartition('=')
        try:
            target = float(share)
        except ValueError:
            target = None
        if not patterns or target is None:
            raise UsageError(
                f"--block needs PATTERN,...=SHARE, such as backbone=0.5; got '{option}'"
            )
        blocks.append(
            PruningBlock(
                patterns,
                patterns.split(','),
                target,
                tuple(exclude),
                'random' if random else 'magnitude',
                True,
                over,
                norm,
            )
        )
    return blocks


def prune_detector(
    cfg: Config, model: BaseDetector, blocks: Sequence[PruningBlock], round_to: int, seed: int = 0
) -> Pruned:
    """Remove channels of a model, in place.

    Args:
        cfg (Config): The model's, as it is.
        model (BaseDetector): Filled.
        blocks (Sequence[PruningBlock]): What goes; see `plan_removal`.
        round_to (int): Channels left are multiples of it.
        seed (int): Of random scores.
    """
    before = count_parameters(model)
    plan = plan_removal(model, blocks, round_to, seed)
    if not plan.kept:
        raise UsageError(
            f'nothing would be removed: the shares are less than {round_to} channels of any layer'
        )
    channels = remove_channels(model, plan)
    if isinstance(model, DynamicDetector):
        # Measured on another detector.
        model.difficulties = model.difficulties.new_zeros(0)
        model.latencies.fill_(float('nan'))
        model.gflops.fill_(float('nan'))
    return Pruned(model, pruned_config(cfg, channels), plan, (before, count_parameters(model)))


def pruned_config(cfg: Config, channels: dict[str, Sequence[int]]) -> Config:
    """The config of a detector that has lost channels, from the one that it had before."""
    cfg = copy.deepcopy(cfg)
    dense = cfg.model.detector if cfg.model.type == 'PrunedDetector' else cfg.model
    detectors = each_exit(dense.get('detector', {}))
    for part in (
        dense,
        *each_exit(dense.get('backbone', {})),
        *detectors,
        *(detector.get('backbone', {}) for detector in detectors),
    ):
        # Weights of all channels would not fit.
        if part.get('init_cfg'):
            part['init_cfg'] = None
    cfg.model = ConfigDict(
        type='PrunedDetector',
        detector=dense,
        channels=channels,
        backbone=dict(type=each_exit(dense.backbone or detectors[0].backbone)[0].type),
    )
    imports = list(cfg.get('custom_imports', {}).get('imports', []))
    if 'dynamicdet' not in imports:
        cfg.custom_imports = dict(imports=[*imports, 'dynamicdet'])
    return cfg


def describe_pruning(cfg: Config, made: Pruned, shape: Sequence[int] | None = None) -> list[str]:
    """Lines for a user: blocks, what stayed though it was asked for, parameters and GFLOPs.

    Raises:
        UsageError: If the shape cannot be measured.
    """
    lines = [
        f'{row.block}: {row.channels - row.left} of {row.channels} channels removed '
        f'({row.removed:.1%})'
        for row in made.plan.rows
    ]
    reasons: dict[str, list[str]] = {}
    for layer, why in made.plan.alone.items():
        reasons.setdefault(why, []).append(layer)
    lines += [
        f'left alone, {len(layers)}: {", ".join(layers[:3])}{", ..." if len(layers) > 3 else ""}: '
        f'{why}'
        for why, layers in reasons.items()
    ]
    before, after = made.parameters
    lines.append(f'parameters: {before / 1e6:.2f} M -> {after / 1e6:.2f} M ({after / before:.1%})')
    shape = tuple(shape or stated_shape(cfg))
    costs = [measure_costs(build_detector(config), shape) for config in (cfg, made.cfg)]
    for exit, (dense, small) in enumerate(zip(*(cost.exits for cost in costs))):
        name = f'exit {exit}, ' if len(costs[0].exits) > 1 else ''
        lines.append(
            f'{name}GFLOPs at {shape[0]} x {shape[1]}: {dense.flops / 1e9:.2f} -> '
            f'{small.flops / 1e9:.2f} ({small.flops / dense.flops:.1%})'
        )
    return lines


def write_pruned(
    made: Pruned, checkpoint: dict[str, Any], source: str, folder: str, name: str
) -> tuple[str, str]:
    """Write ``NAME.pth`` and ``NAME.py``, each whole or not at all.

    Returns:
        tuple[str, str]: Their paths.
    """
    weights, config = Path(folder, f'{name}.pth').resolve(), Path(folder, f'{name}.py')
    if Path(source).exists() and weights.exists() and weights.samefile(source):
        raise UsageError(f"--out would overwrite '{source}'")
    old = checkpoint.get('meta', {})
    meta = {key: old[key] for key in ('dataset_meta', 'source', 'seed') if key in old}
    meta['channels'] = made.model.removed_channels
    meta['removal'] = dict(
        checkpoint=str(source),
        date=datetime.datetime.now().isoformat(timespec='seconds'),
        blocks={row.block: row.removed for row in made.plan.rows},
    )
    write_checkpoint(dict(state_dict=made.model.state_dict(), meta=meta), str(weights))
    cfg = copy.deepcopy(made.cfg)
    for key in ('launcher', 'work_dir', 'resume'):
        cfg.pop(key, None)
    cfg.load_from = str(weights)
    write_atomically(cfg.pretty_text.encode(), config)
    return str(config), str(weights)
