"""The report's pictures: numbers -> PNG. Nothing here touches matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

#: One color for one thing, in all pictures; told apart by color-blind readers too (Okabe-Ito).
EXIT_COLORS = ('#0072b2', '#d55e00')
_ROUTER, _RANDOM, _INK, _FAINT = '#222222', '#8a8a8a', '#333333', '#dddddd'
#: Inches and dots per inch: narrow, so that the letters stay legible when a phone shrinks it.
_WIDTH, _DPI = 5.2, 180
#: Boxes below this score are left out of the pictures of the gallery.
MIN_SCORE = 0.3


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


def histogram_figure(difficulties: np.ndarray, threshold: float) -> Figure:
    """How the difficulties are spread, and where half of the images are hard.

    Args:
        difficulties (np.ndarray): (n,), in [0, 1].
        threshold (float): That of a hard share of 50 %.
    """
    figure, axes = _figure(3.4)
    bins = np.linspace(difficulties.min(), difficulties.max(), 41)
    if bins[0] == bins[-1]:
        bins = bins[0] + np.linspace(-0.05, 0.05, 41)
    hard = difficulties > np.float32(threshold)
    axes.hist(
        [difficulties[~hard], difficulties[hard]],
        bins,
        stacked=True,
        color=EXIT_COLORS,
        label=['leave at exit 0', 'leave at exit 1'],
    )
    if 0 <= threshold < 1:
        axes.axvline(threshold, color=_ROUTER, linestyle='--', label=f'threshold {threshold:.3f}')
    axes.set(xlabel='difficulty, from the router', ylabel='images')
    axes.legend(
        fontsize=9,
        frameon=False,
        ncols=3,
        loc='lower center',
        bbox_to_anchor=(0.5, 1),
        columnspacing=1.2,
    )
    return figure


def agreement_figure(given: np.ndarray, difficulties: np.ndarray) -> Figure:
    """The router's difficulty against the one that the data were made with, image by image.

    Args:
        given (np.ndarray): That of the data, (n,).
        difficulties (np.ndarray): The router's, (n,), in [0, 1].
    """
    figure, axes = _figure(3.8)
    axes.plot(given, difficulties, '.', color=_RANDOM, alpha=0.5, markersize=4, label='an image')
    edges = np.linspace(given.min(), given.max(), 11)
    bins = np.digitize(given, edges[1:-1])
    filled = np.unique(bins)
    axes.plot(
        [given[bins == b].mean() for b in filled],
        [difficulties[bins == b].mean() for b in filled],
        'o-',
        color=_ROUTER,
        markersize=5,
        label='mean over a tenth of the range',
    )
    axes.set(xlabel='difficulty in the annotation file', ylabel='difficulty, from the router')
    axes.legend(fontsize=9, frameon=False, loc='upper left')
    return figure


def sizes_figure(scores: Sequence[Mapping], objects: Mapping[str, int]) -> Figure:
    """AP of both exits by object size, as bars.

    Args:
        scores (Sequence[Mapping]): Of exit 0 and of exit 1: size -> AP in percent, or None.
        objects (Mapping): Size -> number of objects.
    """
    figure, axes = _figure(3.6)
    for place, size in enumerate(objects):
        if scores[0][size] is None:
            axes.annotate(
                'no objects',
                (place, 0),
                (0, 4),
                textcoords='offset points',
                ha='center',
                fontsize=10,
                color=_RANDOM,
            )
            continue
        for exit in (0, 1):
            bar = axes.bar(
                place + 0.38 * (exit - 0.5),
                scores[exit][size],
                0.36,
                color=EXIT_COLORS[exit],
                label=f'exit {exit}' if place == 0 else None,
            )
            axes.bar_label(bar, fmt='%.1f', fontsize=9, padding=2, color=_INK)
    axes.set_xticks(
        range(len(objects)), [f'{size}\n({count:,})' for size, count in objects.items()]
    )
    axes.set(xlabel='size (number of objects)', ylabel='AP (%)', xlim=(-0.6, len(objects) - 0.4))
    axes.tick_params(axis='x', length=0)
    axes.margins(y=0.22)
    axes.grid(False, axis='x')
    axes.legend(fontsize=9, frameon=False, ncols=2, loc='upper right')
    return figure


def picture_figure(
    pixels: np.ndarray,
    detections: list[dict],
    names: Mapping[int, str],
    difficulty: float,
    exit: int,
) -> Figure:
    """An image with its boxes.

    Args:
        pixels (np.ndarray): (H, W, 3), RGB.
        detections (list[dict]): COCO results, boxes (x, y, w, h) in pixels.
        names (Mapping[int, str]): Category id -> name.
        difficulty (float): The router's.
        exit (int): The exit that the detections are of.
    """
    height, width = pixels.shape[:2]
    # Panoramas and strips keep a readable height or width.
    figure = Figure((3.2, 3.2 * np.clip(height / width, 0.4, 2)), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation='bilinear')
    axes.set_axis_off()
    for detection in sorted(detections, key=lambda detection: detection['score']):
        if detection['score'] >= MIN_SCORE:
            _draw_box(axes, detection, names, EXIT_COLORS[exit], pixels.shape)
    axes.text(
        0.015,
        0.985,
        f'difficulty {difficulty:.2f}, exit {exit}',
        transform=axes.transAxes,
        va='top',
        fontsize=8.5,
        color='white',
        bbox=dict(facecolor='black', alpha=0.75, pad=2, edgecolor='none'),
    )
    return figure


def _draw_box(
    axes: Axes, detection: dict, names: Mapping[int, str], color: str, image_shape: tuple
) -> None:
    x, y, width, height = detection['bbox']
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.6))
    category = detection['category_id']
    # Above the box and to the right of its corner, unless that leaves the image.
    top, right = y < 0.06 * image_shape[0], x > 0.85 * image_shape[1]
    # A dollar sign is no formula.
    axes.text(
        min(x + width, image_shape[1]) if right else max(x, 0),
        max(y, 0),
        f'{names.get(category, category)} {detection["score"]:.2f}',
        va='top' if top else 'bottom',
        ha='right' if right else 'left',
        fontsize=7.5,
        color='white',
        parse_math=False,
        clip_on=True,
        bbox=dict(facecolor=color, alpha=0.85, pad=1, edgecolor='none'),
    )


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
