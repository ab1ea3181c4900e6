"""The report's pictures: numbers -> PNG. Nothing here touches matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: One color for one thing, in all pictures; told apart by color-blind readers too (Okabe-Ito).
EXIT_COLORS = ('#0072b2', '#d55e00')
_ROUTER, _RANDOM, _INK, _FAINT = '#222222', '#8a8a8a', '#333333', '#dddddd'
#: Inches and dots per inch: narrow, so that the letters stay legible when a phone shrinks it.
_WIDTH, _DPI = 5.2, 180


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def trade_off_figure(rows: Sequence[Mapping]) -> Figure:
    """AP against GFLOPs per image (below) and latency (above), router and random routing.

    Args:
        rows (Sequence[Mapping]): As `routing.curve.trade_off` gives them.
    """
    rows = sorted(rows, key=lambda row: row['hard_share'])
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    figure, axes = _figure(4.4)
    at_random, spread = column['random_ap'], column['random_std']
    axes.fill_between(
        column['gflops'],
        at_random - spread,
        at_random + spread,
        color=_RANDOM,
        alpha=0.25,
        linewidth=0,
        label='± 1 standard deviation',
    )
    axes.plot(column['gflops'], at_random, '--', color=_RANDOM, label='random routing, mean')
    axes.plot(column['gflops'], column['ap'], 'o-', color=_ROUTER, markersize=5, label='router')
    for row in rows:
        if 0 < row['hard_share'] < 1:
            axes.annotate(
                f'{row["hard_share"]:.0%}',
                (row['gflops'], row['ap']),
                (-4, 6),
                textcoords='offset points',
                ha='right',
                fontsize=9,
                color=_INK,
            )
    for row in rows:
        if row['hard_share'] in (0, 1):
            exit = int(row['hard_share'])
            axes.plot(
                row['gflops'],
                row['ap'],
                's',
                color=EXIT_COLORS[exit],
                markersize=10,
                label=f'exit {exit} for all images',
            )
    axes.margins(x=0.07, y=0.12)
    axes.set(xlabel='GFLOPs per image', ylabel='AP (%)')
    axes.legend(fontsize=9, frameon=False, loc='lower right')
    _add_latency_axis(axes, rows)
    return figure


def _add_latency_axis(axes: Axes, rows: Sequence[Mapping]) -> None:
    """Both costs are linear in the hard share, so that one axis is the other, rescaled."""
    (x0, ms0), (x1, ms1) = [(row['gflops'], 1000 * row['latency']) for row in (rows[0], rows[-1])]
    if x0 == x1:
        return
    above = axes.twiny()
    above.set_xlim([ms0 + (x - x0) / (x1 - x0) * (ms1 - ms0) for x in axes.get_xlim()])
    above.set_xlabel('latency (ms per image)', fontsize=11, color=_INK)
    above.tick_params(labelsize=10, colors=_INK)
    above.spines[['right']].set_visible(False)


def _figure(height: float) -> tuple:
    """A figure with one set of axes, in the report's look."""
    figure = Figure((_WIDTH, height), dpi=_DPI, layout='constrained')
    axes = figure.add_subplot()
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=_INK)
    axes.xaxis.label.set(fontsize=11, color=_INK)
    axes.yaxis.label.set(fontsize=11, color=_INK)
    return figure, axes
