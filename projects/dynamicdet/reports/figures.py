"""The trade-off as a picture: numbers -> PNG. Nothing here touches matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: One color for one thing, in all pictures; told apart by color-blind readers too (Okabe-Ito).
EXIT_COLORS = ('#0072b2', '#d55e00')
#: Of plain detectors.
PLAIN_COLOR = '#8c2d04'
#: Latencies this far off a straight line, as a share of their range, have no axis.
_BENT = 0.02
_ROUTER, _RANDOM, _INK, _FAINT = '#222222', '#8a8a8a', '#333333', '#dddddd'


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def trade_off_figure(rows: Sequence[Mapping], baselines: Sequence[Mapping] = ()) -> Figure:
    """AP against GFLOPs per image (below) and latency (above), router and random routing.

    Args:
        rows (Sequence[Mapping]): As `routing.curve.trade_off` gives them.
        baselines (Sequence[Mapping]): Plain detectors, as `routing_analysis_baselines` gives them.
            Defaults to none.
    """
    rows = sorted(rows, key=lambda row: row['hard_share'])
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    # Narrow, so that the letters stay legible when a phone shrinks it.
    figure = Figure((5.2, 4.4), dpi=180, layout='constrained')
    axes = figure.add_subplot()
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=_INK)
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
    if baselines:
        axes.plot(
            [point['gflops'] for point in baselines],
            [point['ap'] for point in baselines],
            'D-',
            color=PLAIN_COLOR,
            markersize=5,
            label='plain detectors',
        )
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
    axes.set_xlabel('GFLOPs per image', fontsize=11, color=_INK)
    axes.set_ylabel('AP (%)', fontsize=11, color=_INK)
    axes.legend(fontsize=9, frameon=False, loc='lower right')
    _add_latency_axis(axes, column['gflops'], 1000 * column['latency'])
    return figure


def _add_latency_axis(axes: Axes, gflops: np.ndarray, milliseconds: np.ndarray) -> None:
    """GFLOPs rescaled. Left out where images of several sizes bend latency over GFLOPs."""
    if gflops[0] == gflops[-1]:
        return
    slope = (milliseconds[-1] - milliseconds[0]) / (gflops[-1] - gflops[0])
    line = milliseconds[0] + slope * (gflops - gflops[0])
    if not np.allclose(line, milliseconds, rtol=0, atol=_BENT * np.ptp(milliseconds)):
        return
    above = axes.twiny()
    above.set_xlim([milliseconds[0] + slope * (x - gflops[0]) for x in axes.get_xlim()])
    above.set_xlabel('latency (ms per image)', fontsize=11, color=_INK)
    above.tick_params(labelsize=10, colors=_INK)
    above.spines[['right']].set_visible(False)
