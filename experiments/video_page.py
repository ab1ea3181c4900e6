"""The page of the experiment on early exit in video: experiments/results/video.md and its picture.

python experiments/video_page.py
"""

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from routing_page import table
from steps import ROOT
from video import GATED, RUNS

from dynamicdet.files import write_atomically
from dynamicdet.routing.bootstrap import confidence_interval
from dynamicdet.video.curves import line_at

RESULTS = ROOT / 'experiments' / 'results' / 'video'
PAGE = ROOT / 'experiments' / 'results' / 'video.md'
PICTURE = ROOT / 'docs' / 'images' / 'video_gates.png'
HEAD = """# The experiment on early exit in video: numbers

Written by `python experiments/video_page.py` from the files in [video/](video), one per run of
`python experiments/video.py`; what it says is in [video.md](../video.md). A small YOLOv5 with six early
exits on {frames} frames of the built-in test videos, seed 0; {device}, {threads} thread(s), torch {torch}. Intervals are
of 95 %, by {resamples} resamples of whole videos, the same for all runs, so that differences are paired. GFLOPs: 2 x
multiply-adds. Gates are fitted to one half of the validation videos, and their thresholds are chosen on the other.
"""
CLOCK = """By the clock, frame by frame, batch 1, videos in turn by all ways, {threads} threads, {device}, torch {torch}; load
average {load} before; energy {energy}:
"""
#: How runs differ, and which other run each is held against.
LABELS: dict[str, tuple] = dict(
    joint=('all trained together', None),
    distilled=('together, with distillation', 'joint'),
    gumbel=('together, with gates', 'joint'),
    propagation=('+ propagation, trained alone', 'joint'),
    all=('+ propagation, then all trained', 'joint'),
    propagation_short=('+ propagation on short clips', 'joint'),
    heads=('heads on a frozen detector', 'joint'),
    heads_distilled=('the same, with distillation', 'heads'),
)

Runs = dict[str, dict]


def read_runs() -> Runs:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob('*.json'))}


def exits_table(runs: Runs) -> str:
    """AP of each exit of each run."""
    first = next(runs[name] for name in LABELS if name in runs)
    rows = [
        [label, *(f'{exit["ap"]:.2f}' for exit in runs[name]['exits'])]
        for name, (label, _) in LABELS.items()
        if name in runs
    ]
    return table(['', *(f'exit {number}' for number in range(len(first['exits'])))], rows)


def differences_table(runs: Runs) -> str:
    """By how much the exits of a run are above those of the one that it is held against."""
    rows = []
    for name, (label, base) in LABELS.items():
        if name in runs and base in runs:
            pairs = zip(runs[name]['exits'], runs[base]['exits'])
            rows.append(
                [f'{label}, against: {LABELS[base][0]}', *(difference(*pair) for pair in pairs)]
            )
    exits = len(next(runs[name] for name in LABELS if name in runs)['exits'])
    return table(['', *(f'exit {number}' for number in range(exits))], rows)


def difference(row: Mapping, other: Mapping) -> str:
    low, high = confidence_interval(np.subtract(row['resampled'], other['resampled']))
    return f'{row["ap"] - other["ap"]:+.2f} ({low:+.2f} to {high:+.2f})'


def costs_table(run: Mapping) -> str:
    """What leaving at an exit costs: with its head alone, and with all heads on the way."""
    rows = [
        [
            str(number),
            f'{exit["gflops"]:.4f}',
            f'{run["costs"]["gflops"]["looked"][number]:.4f}',
            f'{1e3 * exit["latency"]:.2f}',
            f'{1e3 * run["costs"]["latencies"]["looked"][number]:.2f}',
        ]
        for number, exit in enumerate(run['exits'])
    ]
    return table(
        ['exit', 'GFLOPs', 'with all heads on the way', 'ms', 'with all heads on the way'], rows
    )


def gates_table(run: Mapping) -> str:
    """Each gate where it loses at most 1 AP on the validation videos, and the oracles where they do
    here."""
    last = run['fixed'][-1]
    rows = [[f'exit {row["exit"]}', *cells(row, run['fixed'])] for row in run['fixed']]
    for name, result in run['gates'].items():
        rows.append(
            [name, *(cells(result['within'], run['fixed']) if result['within'] else ['-'] * 6)]
        )
    for name, oracle_rows in run['oracles'].items():
        good = [row for row in oracle_rows if row['ap'] >= last['ap'] - 1]
        rows.append([name, *(cells(good[0], run['fixed']) if good else ['-'] * 6)])
    return table(
        [
            '',
            'AP',
            'GFLOPs',
            'ms',
            'time saved',
            'above the line of fixed exits',
            'frames at exits -1, 0, 1, ...',
        ],
        rows,
    )


def cells(row: Mapping, fixed: Sequence[Mapping]) -> list[str]:
    above = row['ap'] - line_at(fixed, row['latency'], 'latency')
    return [
        f'{row["ap"]:.2f}',
        f'{row["gflops"]:.4f}',
        f'{1e3 * row["latency"]:.2f}',
        f'{1 - row["latency"] / fixed[-1]["latency"]:.0%}',
        # There is none below the first exit's cost.
        f'{above:+.2f}' if np.isfinite(above) else '-',
        ', '.join(f'{share:.0%}' for share in row['shares']),
    ]


def clock_table(clock: Mapping) -> str:
    """The same, run frame by frame."""
    last = list(clock['ways'].values())[
        -1 - sum(not name.startswith('exit ') for name in clock['ways'])
    ]
    rows = [
        [
            name,
            f'{way["ap"]:.2f}',
            f'{1e3 * way["seconds"]:.2f}',
            f'{1e3 * way["median"]:.2f}',
            f'{1 - way["seconds"] / last["seconds"]:.0%}',
            f'{way["joules_per_1000"]:.0f}',
            line_by_the_clock(clock, way),
            ', '.join(f'{count / clock["frames"]:.0%}' for count in way['exits']),
        ]
        for name, way in clock['ways'].items()
    ]
    return table(
        [
            '',
            'AP',
            'ms, mean',
            'ms, median',
            'time saved',
            'J per 1,000 frames',
            'above the line of fixed exits',
            'frames at exits -1, 0, 1, ...',
        ],
        rows,
    )


def line_by_the_clock(clock: Mapping, way: Mapping) -> str:
    """AP above what fixed exits have for the same time."""
    fixed = [way for name, way in clock['ways'].items() if name.startswith('exit ')]
    above = way['ap'] - line_at(fixed, way['seconds'], 'seconds')
    return f'{above:+.2f}' if np.isfinite(above) else '-'


def picture(runs: Runs) -> bytes:
    """AP against latency of all gates, fixed exits and oracles, run by run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    known = [name for name in GATED if name in runs]
    figure = Figure(figsize=(5.2 * len(known) + 2, 4.6), layout='constrained')
    grid = np.atleast_1d(figure.subplots(1, len(known), sharey=True))
    colors = colormaps['tab20'].colors
    names = list(dict.fromkeys(gate for name in known for gate in runs[name]['gates']))
    for axes, name in zip(grid, known):
        run = runs[name]
        draw(axes, run['fixed'], 's--', color='#222222', label='fixed exits')
        for (oracle, rows), color in zip(run['oracles'].items(), ('#8a8a8a', '#c0c0c0')):
            draw(axes, rows, ':', color=color, linewidth=2, label=oracle)
        for gate, result in run['gates'].items():
            draw(
                axes,
                result['rows'],
                '.-',
                markersize=4,
                color=colors[names.index(gate) % 20],
                label=gate,
            )
        axes.set(title=LABELS[name][0], xlabel='ms per frame')
        axes.grid(alpha=0.3)
    grid[0].set_ylabel('AP, %')
    lines = {line.get_label(): line for axes in grid for line in axes.lines}
    grid[-1].legend(
        lines.values(), lines, fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5)
    )
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=110)
    return file.getvalue()


def draw(axes, rows: Sequence[Mapping], style: str, **look: object) -> None:
    axes.plot([1e3 * row['latency'] for row in rows], [row['ap'] for row in rows], style, **look)


def main() -> None:
    runs = read_runs()
    first = next(runs[name] for name in RUNS if name in runs)
    provenance = first['provenance']
    head = HEAD.format(
        frames=provenance['images'],
        device=provenance['device'],
        torch=provenance['torch'],
        threads=provenance['threads'],
        resamples=len(first['exits'][0]['resampled']),
    )
    parts = [
        head,
        f'![AP against time per frame](../../docs/images/{PICTURE.name})\n',
        '## Exits\n',
        'AP:\n',
        exits_table(runs),
        'AP above the run that it is held against:\n',
        differences_table(runs),
    ]
    for name in GATED:
        if name in runs:
            parts += [
                f'## Gates: {LABELS[name][0]}\n',
                costs_table(runs[name]),
                'Least time for at most 1 AP lost, from records:\n',
                gates_table(runs[name]),
            ]
        if f'{name}_clock' in runs:
            clock = runs[f'{name}_clock']
            # Files of before say neither machine nor load.
            load = f'{clock["load_before"]:.2f}' if 'load_before' in clock else 'not noted'
            parts += [
                CLOCK.format(
                    **{
                        **runs[name]['provenance'],
                        **clock.get('provenance', {}),
                        **clock,
                        'load': load,
                    }
                ),
                clock_table(clock),
            ]
    write_atomically(picture(runs), PICTURE)
    write_atomically('\n'.join(parts).encode(), PAGE)
    print(PAGE)


if __name__ == '__main__':
    main()
