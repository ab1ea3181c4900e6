"""What the layers, heads and exits of an early-exit detector cost.

FLOPs are 2 x multiply-adds, as in `measuring.flops`: norms, activations, resizing and what turns
outputs into detections count as none.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..measuring.flops import PartCost, count_flops, count_parameters
from ..private_torch import ShapesOnly
from ..timing import time_call


class LayerCosts(NamedTuple):
    """A layer of the table; costs are for one image.

    Attributes:
        name (str): Of its module.
        stride (int): Pixels per cell.
        main (PartCost): The layer itself: parameters and FLOPs.
        head (PartCost, optional): Its auxiliary head, without propagation; None if it has none.
        propagation (PartCost, optional): The head's.
        products (int): Of ``propagation.flops``, those of attention's two products: counters that
            look at layers alone, as the seed's, leave them out.
        seconds (tuple[float, ...]): That main, head and propagation took, 0 for what is not there;
            empty if not measured.
    """

    name: str
    stride: int
    main: PartCost
    head: PartCost | None
    propagation: PartCost | None
    products: int
    seconds: tuple = ()


@torch.no_grad()
def layer_costs(model: nn.Module, shape: Sequence[int]) -> list[LayerCosts]:
    """Of each layer, by running them without values.

    Args:
        model (EarlyExitDetector): In any mode; it stays as it is.
        shape (Sequence[int]): Height and width, multiples of 32.
    """
    rows, exits = [], dict(zip(model.exit_layers, range(len(model.heads))))
    with ShapesOnly(allow_non_fake_inputs=True):
        device = next(model.parameters()).device
        layers = _all_layers(model, torch.zeros(1, 3, *shape, device=device))
        for position, layer in enumerate(model.table):
            flops, x = count_flops(lambda: layers.take(position))
            main, head, propagation, products = (
                PartCost(count_parameters(model.detector.get_submodule(layer.name)), flops),
                None,
                None,
                0,
            )
            if position in exits:
                exit_head = model.heads[exits[position]]
                flops, features = count_flops(lambda: exit_head.features(x))
                head = PartCost(
                    count_parameters(exit_head),
                    flops + count_flops(lambda: exit_head((features,)))[0],
                )
                if model.propagation is not None:
                    module = model.propagation[exits[position]]
                    propagation = PartCost(
                        count_parameters(module), _propagation_flops(module, features)
                    )
                    products = 4 * features[0].numel() * module.size**2
            rows.append(LayerCosts(layer.name, layer.stride, main, head, propagation, products))
    return rows


def _all_layers(model: nn.Module, images: Tensor):
    """Like ``model.lazy``, but every layer's map may be taken, and a second time as an output."""
    from .lazy_layers import LazyLayers

    return LazyLayers(
        model.detector, model.table, images, (*range(len(model.table)), *model.output_layers)
    )


def _propagation_flops(module: nn.Module, features: Tensor) -> int:
    gap = torch.ones(len(features), dtype=torch.long, device=features.device)
    return count_flops(lambda: module(features, module.remember(features), gap))[0]


@torch.no_grad()
def final_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """FLOPs of the detector's own head for one image."""
    with ShapesOnly(allow_non_fake_inputs=True):
        device = next(model.parameters()).device
        maps = [
            torch.zeros(1, layer.channels, *(side // layer.stride for side in shape), device=device)
            for layer in (model.table[position] for position in model.output_layers)
        ]
        return count_flops(lambda: model.detector.bbox_head(maps))[0]


def exit_gflops(
    model: nn.Module, shape: Sequence[int], rows: Sequence[LayerCosts] | None = None
) -> list[float]:
    """GFLOPs of a frame that leaves at exit -1, 0, ..., E - 1, all heads included that the gate
    looks at on the way, or all where exits are merged, and propagation as if every frame had a
    memory: (E + 1,).

    Args:
        model (EarlyExitDetector): As of `layer_costs`.
        shape (Sequence[int]): As of `layer_costs`.
        rows (Sequence[LayerCosts], optional): From `layer_costs`, where they are known.
    """
    rows = rows or layer_costs(model, shape)
    looks = bool(model.merge) or model.gate is not None and model.gate.looks_at_detections
    heads = [
        sum(part.flops for part in (rows[position].head, rows[position].propagation) if part)
        for position in model.exit_layers
    ]
    flops_by_exit = [_flops_up_to(model, rows, [model.early_layer])]
    for exit, position in enumerate(model.exit_layers):
        passed_heads = sum(heads[:exit]) if looks else 0
        flops_by_exit.append(_flops_up_to(model, rows, [position]) + passed_heads + heads[exit])
    whole = _flops_up_to(model, rows, model.output_layers) + final_flops(model, shape)
    flops_by_exit.append(whole + looks * sum(heads))
    return [flops / 1e9 for flops in flops_by_exit]


def _flops_up_to(model: nn.Module, rows: Sequence[LayerCosts], positions: Sequence[int]) -> int:
    """Of all layers that some need, themselves included."""
    needed, waiting = set(), list(positions)
    while waiting:
        position = waiting.pop()
        if position not in needed:
            needed.add(position)
            waiting.extend(model.table[position].inputs)
    return sum(rows[position].main.flops for position in needed)


@torch.no_grad()
def layer_seconds(
    model: nn.Module, rows: Sequence[LayerCosts], shape: Sequence[int], repeats: int = 5
) -> list[LayerCosts]:
    """The same rows with what each part took for one image on the model's device: medians of some
    runs."""
    device = next(model.parameters()).device
    images = torch.rand(1, 3, *shape, device=device)
    every = [_seconds_once(model, images) for _ in range(repeats + 1)][1:]  # the first one warms up
    return [
        row._replace(seconds=tuple(map(statistics.median, zip(*repeated))))
        for row, repeated in zip(rows, zip(*every))
    ]


def _seconds_once(model: nn.Module, images: Tensor) -> list[tuple]:
    exits = dict(zip(model.exit_layers, range(len(model.heads))))
    layers, rows = _all_layers(model, images), []
    gap = torch.ones(1, dtype=torch.long, device=images.device)
    for position in range(len(model.table)):
        main, x = time_call(lambda: layers.take(position), images.device)
        head = mixing = 0.0
        if position in exits:
            exit_head = model.heads[exits[position]]
            head, features = time_call(
                lambda: (lambda f: (f, exit_head((f,))))(exit_head.features(x))[0], images.device
            )
            if model.propagation is not None:
                module = model.propagation[exits[position]]
                mixing, _ = time_call(
                    lambda: module(features, module.remember(features), gap), images.device
                )
        rows.append((main, head, mixing))
    return rows


def as_table(model: nn.Module, rows: Sequence[LayerCosts], shape: Sequence[int]) -> str:
    """The seed's table as plain text: of each layer time, GFLOPs and parameters of the main branch,
    of its head and of the head's propagation; sums; and what exits cost."""
    parts = ('main branch', 'head') + ('propagation',) * (model.propagation is not None)
    lines = [
        f'{"":<24}{"stride":>6}'
        + ''.join(f'{part + ":":>14}{"ms":>7}{"GFLOPs":>8}{"k par.":>8}' for part in parts)
    ]
    cells = [
        [(row.main, row.head, row.propagation)[place] for row in rows]
        for place in range(len(parts))
    ]
    for number, row in enumerate(rows):
        lines.append(
            f'{f"{number} {row.name}":<24}{row.stride:>6}'
            + ''.join(
                _cell(column[number], row.seconds[place : place + 1])
                for place, column in enumerate(cells)
            )
        )
    totals = [[part for part in column if part] for column in cells]
    lines.append(
        f'{"all":<30}'
        + ''.join(
            _cell(
                PartCost(
                    sum(part.parameters for part in column), sum(part.flops for part in column)
                ),
                [sum(row.seconds[place] for row in rows)] if rows[0].seconds else [],
            )
            for place, column in enumerate(totals)
        )
    )
    final = PartCost(count_parameters(model.detector.bbox_head), final_flops(model, shape))
    lines.append(f'{"the detector" + chr(39) + "s own head":<30}{_cell(final, [])}')
    for exit, gflops in enumerate(exit_gflops(model, shape, rows), start=-1):
        lines.append(f'a frame that leaves at exit {exit:>2}: {gflops:8.2f} GFLOPs')
    if model.propagation is not None:
        products, flops, heads = (
            sum(column)
            for column in zip(
                *((row.products, row.propagation.flops, row.head.flops) for row in rows if row.head)
            )
        )
        lines.append(
            f'propagation over its head: {flops / heads:.0%} of the FLOPs; '
            f'{(flops - products) / heads:.0%} '
            "without attention's two products, which counters by layer leave out"
        )
    return '\n'.join(lines)


def _cell(part: PartCost | None, seconds: Sequence[float]) -> str:
    if part is None:
        return f'{"-":>37}'
    time = f'{1000 * seconds[0]:.2f}' if seconds else ''
    return f'{time:>21}{part.flops / 1e9:>8.3f}{part.parameters / 1e3:>8.1f}'
