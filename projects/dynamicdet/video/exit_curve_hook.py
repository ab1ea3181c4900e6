"""Draw the AP of each exit over the epochs."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS

from ..files import write_atomically
from .all_exits import exit_of


@HOOKS.register_module()
class ExitCurveHook(Hook):
    """After each validation: a line in ``exit_curve.json``, and ``exit_curve.png``, in the work
    dir. A run that is resumed goes on with them.

    Args:
        metric (str): What to draw. Defaults to 'bbox_mAP'.
    """

    priority = 'LOW'

    def __init__(self, metric: str = 'bbox_mAP') -> None:
        self.metric = metric

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Take what `ExitsMetric` found."""
        ap_by_exit = {
            exit_of(name): float(value)
            for name, value in (metrics or {}).items()
            if exit_of(name) is not None and name.endswith(f'/{self.metric}')
        }
        if not ap_by_exit or runner.rank != 0:
            return
        folder = Path(runner.work_dir)
        history = updated_history(
            read_history(folder / 'exit_curve.json'),
            runner.epoch or runner.iter,
            [ap_by_exit[exit] for exit in sorted(ap_by_exit)],
        )
        write_atomically(json.dumps(history).encode(), folder / 'exit_curve.json')
        write_atomically(draw_history(history, self.metric), folder / 'exit_curve.png')


def read_history(path: Path) -> list[dict]:
    """What earlier epochs found; nothing if there is no whole file."""
    try:
        return [
            dict(epoch=int(entry['epoch']), ap=[float(ap) for ap in entry['ap']])
            for entry in json.loads(path.read_text())
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def updated_history(history: list[dict], epoch: int, ap: list[float]) -> list[dict]:
    """History up to an epoch: what a run that starts anew left of later ones is gone."""
    return [*(entry for entry in history if entry['epoch'] < epoch), dict(epoch=epoch, ap=ap)]


def draw_history(history: list[Mapping], metric: str = 'bbox_mAP') -> bytes:
    """A PNG: the metric over epochs, a line for each exit, early ones light."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=140, layout='constrained')
    axes = figure.add_subplot()
    exits = max(len(entry['ap']) for entry in history)
    for exit in range(exits):
        known = [entry for entry in history if exit < len(entry['ap'])]
        axes.plot(
            [entry['epoch'] for entry in known],
            [entry['ap'][exit] for entry in known],
            'o-',
            markersize=3,
            color=colormaps['viridis_r'](0.1 + 0.9 * exit / max(1, exits - 1)),
            label='last' if exit == exits - 1 else f'exit {exit}',
        )
    axes.set(xlabel='epoch', ylabel=metric)
    axes.legend(
        fontsize=7, frameon=False, ncols=1 + exits // 12, loc='center left', bbox_to_anchor=(1, 0.5)
    )
    axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
