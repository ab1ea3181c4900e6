"""Measure how a detector's AP falls where one part of it is pruned."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..building import load_detector
from ..checkpoints import read_checkpoint
from ..compression.pruning import apply_masks, layers_of_blocks, prune_block
from ..compression.pruning_allocation import PruningAllocation, SensitivityCurve
from ..compression.pruning_blocks import PruningBlock, count_units, find_layers
from ..errors import UsageError
from ..files import write_atomically
from ..progress import Progress
from ..routing.evaluation import evaluate, read_truth
from .calibration import coco_results


class PrunedPart(NamedTuple):
    """What is pruned alone: the layers of a block, or one layer; ``weights`` is how many it has."""

    name: str
    block: PruningBlock
    weights: int


def parts_of(
    model: nn.Module,
    blocks: Mapping[str, Sequence[str]],
    layers: bool = False,
    structured: bool = False,
    most: float = 0.0,
) -> list[PrunedPart]:
    """Blocks, and where wanted each of their layers, whose names are then the layers'.

    Layers too small to be pruned by the share ``most`` are no parts: nothing would be left of them.

    Raises:
        UsageError: If a pattern matches nothing, or blocks overlap.
    """
    every = [
        PruningBlock(name, list(patterns), 0.0, structured=structured)
        for name, patterns in blocks.items()
    ]
    layers_by_block = layers_of_blocks(model, every)
    counts = [
        sum(layer.weight.numel() for layer in block_layers.values())
        for block_layers in layers_by_block
    ]
    parts = [PrunedPart(block.name, block, count) for block, count in zip(every, counts)]
    if layers:
        parts += [
            PrunedPart(
                name, PruningBlock(name, [name], 0.0, structured=structured), layer.weight.numel()
            )
            for block, block_layers in zip(every, layers_by_block)
            for name, layer in block_layers.items()
            if round(most * count_units(layer, block)) < count_units(layer, block)
        ]
    if len({part.name for part in parts}) < len(parts):
        raise UsageError('two parts have the same name: name a block other than a layer')
    return parts


def measure_sensitivity(
    model: nn.Module,
    loader: DataLoader,
    parts: Sequence[PrunedPart],
    shares: Sequence[float],
    images: int,
    metric: str,
    path: str,
    identity: dict[str, Any],
    progress: Progress,
) -> list[SensitivityCurve]:
    """AP at each share of each part, the rest as it is. What is measured is written at once, and
    not measured again by a later call.

    Args:
        model (nn.Module): Any detector, in eval mode; as it was afterwards.
        loader (DataLoader): Over a COCO-format data set, in order.
        parts (Sequence[PrunedPart]): What is pruned.
        shares (Sequence[float]): In [0, 1); 0 is added.
        images (int): How many are looked at, spread evenly over the set; 0 for all.
        metric (str): 'AP' or 'AP50'.
        path (str): JSON file of results.
        identity (dict): What the results are of; a file of something else is refused.
        progress (Callable): Wraps what is iterated over.

    Raises:
        UsageError: If a share is out of range, or the file is another measurement's.
    """
    shares = sorted({0.0, *shares})
    for part in parts:
        # Refuses shares outside [0, 1).
        for share in shares:
            PruningBlock(part.name, part.block.modules, share)
    blocks = {part.name: list(part.block.modules) for part in parts}
    saved = _resume(path, identity, blocks)
    results, blocks = saved['results'], {**saved['blocks'], **blocks}
    dataset, loader = loader.dataset, _part(loader, images)
    coco = truth_of(dataset)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # By key: nothing pruned is measured once.
    todo = {_key(part.name, share): (part, share) for part in parts for share in shares}
    todo = [part_share for key, part_share in todo.items() if key not in results]
    for part, share in progress(todo, f'{metric} of {len(loader.dataset)} images'):
        layers = layers_of_blocks(model, [part.block])[0]
        if share:
            apply_masks(model, prune_block(layers, part.block, share))
        value = _ap(model, loader, dataset, coco, metric)
        model.load_state_dict(state)
        results[_key(part.name, share)] = value
        content = dict(identity=identity, blocks=blocks, results=results)
        write_atomically(json.dumps(content, indent=1).encode(), path)
    return [
        SensitivityCurve(
            part.name, part.weights, shares, [results[_key(part.name, share)] for share in shares]
        )
        for part in parts
    ]


def identity_of(
    checkpoint: str, ann_file: str, images: int, metric: str, structured: bool
) -> dict[str, Any]:
    """What a file of results is of: weights by their SHA-256, images, metric, and how is pruned."""
    digest = hashlib.sha256()
    for key, value in sorted(read_checkpoint(checkpoint)['state_dict'].items()):
        digest.update(key.encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return dict(
        weights=digest.hexdigest(),
        ann_file=ann_file,
        images=images,
        metric=metric,
        structured=structured,
    )


def _key(name: str, share: float) -> str:
    # Nothing pruned is the same for all parts.
    return f'{name} {share:g}' if share else 'dense'


def _resume(path: str, identity: dict[str, Any], blocks: dict[str, list[str]]) -> dict[str, dict]:
    """What a file holds already: ``results``, and the patterns of the ``blocks`` that they are
    of."""
    if not Path(path).exists():
        return dict(results={}, blocks={})
    try:
        saved = json.loads(Path(path).read_text())
        known, before = saved['identity'], saved['blocks']
        saved['results']
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"'{path}' holds no measurement of sensitivity: name another file by --out"
        ) from None
    other = [name for name in identity if known.get(name) != identity[name]]
    if other:
        raise UsageError(
            f"'{path}' was measured with other {', '.join(other)}: name another file by --out, or "
            'remove '
            'it'
        )
    other = [name for name in blocks if before.get(name, blocks[name]) != blocks[name]]
    if other:
        raise UsageError(
            f"'{path}' has measured another block '{other[0]}', of {', '.join(before[other[0]])}: "
            'give this '
            'one another name, or name another file by --out'
        )
    return saved


def _part(loader: DataLoader, images: int) -> DataLoader:
    """Some of a loader's images, evenly spread."""
    count = len(loader.dataset)
    if not 0 < images < count:
        return loader
    chosen = np.linspace(0, count - 1, images).round().astype(int).tolist()
    return DataLoader(
        Subset(loader.dataset, chosen), loader.batch_size, collate_fn=loader.collate_fn
    )


def truth_of(dataset: Any) -> COCO:
    """Ground truth of a data set, or a `UsageError` if it is not in COCO format."""
    if not getattr(dataset, 'ann_file', '') or not hasattr(dataset, 'cat_ids'):
        raise UsageError('sensitivity is measured on a data set in COCO format')
    return read_truth(dataset.ann_file, dataset.cat_ids)


@torch.no_grad()
def _ap(model: nn.Module, loader: DataLoader, dataset: Any, coco: COCO, metric: str) -> float:
    """Percent."""
    results, ids = [], []
    for batch in loader:
        for sample in model.test_step(batch):
            ids.append(sample.img_id)
            results += [
                dict(detection, image_id=sample.img_id)
                for detection in coco_results(sample, dataset.cat_ids)
            ]
    ap = evaluate(coco, results, ids)[metric.lower()]
    if ap is None:
        raise UsageError('there is no object in these images: take more of them')
    return float(ap)


def sensitivity_table(curves: Sequence[SensitivityCurve]) -> list[str]:
    """Lines of a table: AP of each part at each share, most sensitive first (by mean loss)."""
    width = max(len(curve.name) for curve in curves)
    lines = [
        f'{"part":{width}}  weights  ' + ' '.join(f'{share:7.0%}' for share in curves[0].shares)
    ]
    for curve in sorted(curves, key=lambda curve: np.mean(curve.aps)):
        lines.append(
            f'{curve.name:{width}}  {curve.weights / 1e6:5.2f} M  '
            + ' '.join(f'{ap:7.2f}' for ap in curve.aps)
        )
    return lines


def draw_sensitivity(
    curves: Sequence[SensitivityCurve], allocation: PruningAllocation, metric: str
) -> bytes:
    """A PNG: AP against share, a line per part; where the suggestion stands on it, a circle."""
    from ..reports.figures import png

    figure = Figure((7, 4.6), 150, layout='constrained')
    axes = figure.add_subplot()
    # Who suffers most first; too many lines say nothing.
    for curve in sorted(curves, key=lambda curve: np.mean(curve.aps))[:12]:
        (line,) = axes.plot(curve.shares, curve.aps, '.-', label=curve.name)
        if curve.name in allocation.shares:
            place = list(curve.shares).index(allocation.shares[curve.name])
            axes.plot(
                curve.shares[place],
                curve.aps[place],
                'o',
                markersize=9,
                fillstyle='none',
                color=line.get_color(),
            )
    axes.set(xlabel='share pruned', ylabel=f'{metric} (%)')
    axes.legend(fontsize=7, frameon=False, title='most sensitive', title_fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)
    return png(figure)


def load_any_detector(cfg, checkpoint: str, device: str) -> nn.Module:
    """A config's detector from its checkpoint, in eval mode on a device."""
    init_default_scope('mmdet')
    return load_detector(cfg, checkpoint, device, plain=True)[0]


def blocks_of(model: nn.Module) -> dict[str, list[str]]:
    """Parts of a detector by their first names; of a dynamic one its backbones and branches by
    their second."""
    names = {}
    for layer in find_layers(model):
        first, second = (layer.split('.') + [''])[:2]
        deep = (
            first in ('branches',)
            or first == 'backbone'
            and second in ('first', 'second', 'third', 'connections')
        )
        names[f'{first}.{second}' if deep else first] = None
    return {name: [name] for name in names}
