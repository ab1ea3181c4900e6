"""The page of the experiment on compression: experiments/results/compression.md and its picture.

python experiments/compression_page.py
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from compression_runs import BITS, BLOCKS, METHODS, SHARES, TUNING
from routing_page import table

from dynamicdet.files import write_atomically
from dynamicdet.routing.bootstrap import confidence_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'compression'
PAGE = ROOT / 'experiments' / 'results' / 'compression.md'
PICTURE = ROOT / 'docs' / 'images' / 'compression.png'
HEAD = """# The experiment on compression: numbers

Written by `python experiments/compression_page.py` from the files in [compression/](compression), one
per step of `python experiments/compression_all.py`. Faster R-CNN R-18 of the experiment on routing; AP
and AP50 on {images} test images of the built-in data, seed {seed}; {device}, {threads} thread(s), torch
{torch}. Intervals are of 95 %, by {resamples} resamples of the test images, the same for all, so that
differences are paired. Fine-tuning: one epoch on {tuning} training images, at a learning rate of 3e-4, of
shared values 1e-4. MB are of whole `.ddz` files (1 MB = 1e6 bytes); in float32 it is {dense:.2f} MB.

"No loss" means that zero, or more, lies within the interval of the difference, at this share and all measured ones below.
The **knee** is the share at which the curve is farthest above the straight line between its ends, both axes
scaled to [0, 1] (Satopää et al. 2011).
"""
#: Curves of a block: label -> what its steps are called, where the share is to be filled in; the
#: point.
CURVES = {
    'L1 global': 'prune-l1_global-{block}',
    'L1 local': 'prune-l1_local-{block}',
    'random': 'prune-random-{block}',
    'structured': 'prune-structured-{block}',
    'L1 global, tuned': 'tuned-prune-{block}-{share}',
    **{
        f'{method.replace("_", " ").replace("l1", "L1")}, tuned': f'tuned-prune-{method}-{{block}}-{{share}}'
        for method in METHODS
        if method != 'l1_global'
    },
}

Points = dict[str, dict]


def read_points() -> Points:
    """'step/point' -> what was measured."""
    points = {}
    for path in sorted(RESULTS.glob('*.json')):
        for name, point in json.loads(path.read_text())['points'].items():
            points[f'{path.stem}/{name}'] = point
    return points


def at(points: Points, label: str, block: str, share: int) -> dict | None:
    """A point of a curve, or None. At 0 % it is the detector as it was, or fine-tuned alike."""
    tuned = label.endswith('tuned')
    if share == 0:
        return points.get('tuned-base/exact' if tuned else 'base/exact')
    step = CURVES[label].format(block=block, share=share)
    return points.get(f'{step}/exact' if tuned else f'{step}/{share}')


def difference(point: Mapping, base: Mapping, name: str) -> tuple[float, float, float]:
    """By how much a point is above another, and the ends of the paired interval."""
    pairs = np.array(point[f'resampled_{name}'], float) - np.array(base[f'resampled_{name}'], float)
    return (point[name] - base[name], *confidence_interval(pairs))


def without_loss(points: Points, label: str, block: str, base: Mapping, name: str = 'ap50') -> int:
    """The largest measured share up to which no measured share loses, in percent."""
    best = 0
    for share in SHARES:
        point = at(points, label, block, share)
        if point is None:
            continue
        if difference(point, base, name)[2] < 0:
            break
        best = share
    return best


def knee(shares: Sequence[float], values: Sequence[float]) -> float:
    """The share at which a falling curve is farthest above the line between its ends (see
    `HEAD`)."""
    x, y = (np.asarray(numbers, float) for numbers in (shares, values))
    if y[0] <= y[-1]:
        return float(x[-1])
    return float(x[np.argmax((y - y[-1]) / (y[0] - y[-1]) - (x[-1] - x) / (x[-1] - x[0]))])


def curve(points: Points, label: str, block: str) -> list[tuple[int, dict]]:
    """(share, point) of all that is known."""
    pairs = [(share, at(points, label, block, share)) for share in (0, *SHARES)]
    return [(share, point) for share, point in pairs if point is not None]


def known(points: Points, block: str) -> list[str]:
    """Curves of which a block has more than the end that all share."""
    return [label for label in CURVES if len(curve(points, label, block)) > 1]


def with_ends(point: Mapping, name: str) -> str:
    low, high = confidence_interval(point[f'resampled_{name}'])
    return f'{point[name]:.2f} ({low:.2f} to {high:.2f})'


def megabytes(point: Mapping | None) -> str:
    return f'{point["bytes"] / 1e6:.2f}' if point else '-'


def block_tables(points: Points, block: str) -> str:
    """AP50 and AP of all methods at all shares, with the size of the file that L1 global leaves."""
    parts, labels = [], known(points, block)
    for name in ('ap50', 'ap'):
        rows = []
        for share in (0, *SHARES):
            by_label = {label: at(points, label, block, share) for label in labels}
            cells = [
                '-'
                if point is None
                else with_ends(point, name)
                if label.startswith('L1 global')
                else f'{point[name]:.2f}'
                for label, point in by_label.items()
            ]
            files = [megabytes(by_label.get(label)) for label in ('L1 global', 'L1 global, tuned')]
            rows.append([f'{share} %', *cells, *files])
        parts += [f'{name.upper()}:\n', table(['pruned', *labels, 'MB', 'MB, tuned'], rows)]
    return '\n'.join(parts)


def knees(points: Points, block: str) -> str:
    rows = []
    for label in known(points, block):
        pairs = curve(points, label, block)
        base = points['base/exact']
        rows.append(
            [
                label,
                f'{knee(*zip(*((share, point["ap50"]) for share, point in pairs))):.0f} %',
                *(f'{without_loss(points, label, block, base, name)} %' for name in ('ap50', 'ap')),
                *tuned_alike(points, label, block),
            ]
        )
    return table(
        [
            'method',
            'knee (AP50)',
            'no loss of AP50 up to',
            'no loss of AP up to',
            'no loss of AP50 against the unpruned, fine-tuned alike, up to',
        ],
        rows,
    )


def tuned_alike(points: Points, label: str, block: str) -> list[str]:
    control = points.get('tuned-base/exact')
    if not label.endswith('tuned') or control is None:
        return ['-']
    return [f'{without_loss(points, label, block, control)} %']


def values_table(points: Points) -> str:
    """Weights that take few values: without fine-tuning and with."""
    base = points['base/exact']
    names = {
        'values/int8': 'int8',
        **{
            f'values/share-{bits}': f'{2**bits} shared values ({bits} bits)'
            for bits in reversed(BITS)
        },
        **{f'tuned-share-{bits}/exact': f'{2**bits} shared values, tuned' for bits in (4, 3, 2)},
        **{
            f'tuned-share-4-pruned-{share}/exact': f'{share} % pruned, 16 shared values, tuned'
            for share in (50, 70)
        },
        **{
            f'tuned-prune-both-{share}/int8': f'{share} % pruned, tuned, int8'
            for share in (30, 50, 70)
        },
        'values/binary-fc': 'binary: linear layers',
        'values/binary-backbone': 'binary: stages of the backbone',
        'values/binary-all': 'binary: all',
        'tuned-base/exact': 'fine-tuned alike, nothing else',
    }
    rows = [
        ['as it was', with_ends(base, 'ap50'), with_ends(base, 'ap'), '-', '-', megabytes(base)]
    ]
    for name, label in names.items():
        if name in points:
            point = points[name]
            rows.append(
                [
                    label,
                    with_ends(point, 'ap50'),
                    with_ends(point, 'ap'),
                    '{:+.2f} ({:+.2f} to {:+.2f})'.format(*difference(point, base, 'ap')),
                    f'{point["error"]:.1%}',
                    megabytes(point),
                ]
            )
    return table(
        ['weights', 'AP50', 'AP', 'AP against as it was', 'relative error in the file', 'MB'], rows
    )


def picture(points: Points) -> bytes:
    """AP50 against the share pruned, block by block; AP against the size of the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4.4), layout='constrained')
    panels = figure.subplots(1, len(BLOCKS) + 1)
    for axes, block in zip(panels, BLOCKS):
        for index, label in enumerate(CURVES):
            if label not in known(points, block):
                continue
            pairs = curve(points, label, block)
            shares = [share for share, _ in pairs]
            axes.plot(
                shares, [point['ap50'] for _, point in pairs], f'C{index}', marker='.', label=label
            )
            if label.startswith('L1 global') and pairs:
                axes.fill_between(
                    shares,
                    *zip(*(confidence_interval(point['resampled_ap50']) for _, point in pairs)),
                    color=f'C{index}',
                    alpha=0.15,
                )
        axes.set(title=block.replace('_', ' '), xlabel='pruned, %', ylabel='AP50, %')
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in panels[:-1] for line in axes.lines}
    panels[0].legend(lines.values(), lines, fontsize=7)
    families = {
        'shared values': 'values/share-',
        'shared values, tuned': 'tuned-share-',
        'int8': 'values/int8',
        'L1 global (both), tuned': 'tuned-prune-both-',
        'binary': 'values/binary-',
        'as it was': 'base/',
    }
    for index, (label, prefix) in enumerate(families.items()):
        files = sorted(
            (point['bytes'] / 1e6, point['ap'])
            for name, point in points.items()
            if name.startswith(prefix)
        )
        if files:
            panels[-1].plot(
                *zip(*files), f'C{index}', marker='o', markersize=4, linestyle='none', label=label
            )
    panels[-1].set(title='files', xlabel='MB of the .ddz file', ylabel='AP, %', xscale='log')
    panels[-1].grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=110)
    return file.getvalue()


def main() -> None:
    points = read_points()
    first = json.loads((RESULTS / 'base.json').read_text())
    head = HEAD.format(
        **first['provenance'] | dict(seed=first['seed']),
        resamples=first['resamples'],
        tuning=TUNING['train_dataloader.dataset.indices'],
        dense=points['base/exact']['float32_megabytes'],
    )
    parts = [head, f'![AP against pruned share and size](../../docs/images/{PICTURE.name})\n']
    for block in BLOCKS:
        parts += [
            f'## Pruned: {block.replace("_", " ")}\n',
            block_tables(points, block),
            knees(points, block),
        ]
    parts += ['## Few values\n', values_table(points)]
    write_atomically(picture(points), PICTURE)
    write_atomically('\n'.join(parts).encode(), PAGE)
    print(PAGE)


if __name__ == '__main__':
    main()
