"""What each gate is worth on a recorded video run: AP against cost, beside fixed exits and the
oracle."""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO

from mmdet.registry import MODELS

from ..errors import UsageError
from ..routing.evaluation import check_truth, read_truth
from .curves import fixed_exits, gate_curve, line_at, pareto_front, settings_of
from .gate_fitting import fit_gate_parts, fit_halting_gate, shows_objects
from .gate_inputs import Evidence
from .gate_simulation import Replays, Seconds, evidence_by_exit, exit_costs, gate_difficulties
from .gates import Gate
from .oracle import oracle_rows
from .record import detections_of
from .streams import GRID

#: Gates that need no training: name -> config.
RULES: dict[str, dict] = {
    'entropy': dict(type='ScoreGate', kind='entropy'),
    'entropy, sum': dict(type='ScoreGate', kind='entropy', over='sum'),
    'confidence': dict(type='ScoreGate', kind='confidence'),
    'agreement': dict(type='AgreementGate'),
    'temporal': dict(type='TemporalGate'),
    'temporal + entropy': dict(type='TemporalGate', gate=dict(type='ScoreGate', kind='entropy')),
    'temporal + agreement': dict(type='TemporalGate', gate=dict(type='AgreementGate')),
}
#: Budgets of the oracle, evenly from the cheapest frame to the dearest.
_BUDGETS = 9
#: AP that may be lost, in points, in the table.
DROP = 1.0

Say = Callable[[str], None]


def load_truth(record: Mapping, path: str | None = None) -> COCO:
    """Ground truth of a record: a file, or what its provenance names.

    Raises:
        UsageError: If there is none, or it is of other data.
    """
    path = path or str(record['provenance'].get('ann_file', ''))
    if not Path(path).is_file():
        raise UsageError(
            f"there is no annotation file '{path}' of the record: name it by --ann-file"
        )
    try:
        coco = read_truth(path, record['provenance'].get('categories') or None)
    except UsageError as error:
        raise UsageError(f'{error}; or name another by --ann-file') from None
    check_truth(detections_of(record), coco)
    return coco


def fitted_gates(
    record: Mapping, coco: COCO, seed: int = 0, by: str = 'latencies'
) -> dict[str, Gate]:
    """Gates that are fitted to a record: halting gates, with and without a look at detections; and,
    if some of its frames show no object and others do, a temporal one that knows *no detection*."""
    channels = [len(features) for features in record['images'][0]['pooled']]
    gates = {}
    for name, looks in (('halting', False), ('halting, looking', True)):
        gates[name] = MODELS.build(
            dict(type='HaltingGate', in_channels=channels, looks_at_detections=looks)
        )
        fit_halting_gate(gates[name], record, coco, kind=by, seed=seed)
        gates[f'temporal + {name}'] = MODELS.build(dict(type='TemporalGate'))
        gates[f'temporal + {name}'].wrap(gates[name])
    shown = shows_objects(record, coco)
    if shown.any() and not shown.all():
        # Last: it repeats other frames than the temporal gates above, whose repeats are matched
        # with the truth once.
        parts = len(record['images'][0]['early']) // GRID**2
        gates['temporal, nothing'] = MODELS.build(
            dict(type='TemporalGate', nothing=dict(type='Presence', in_channels=parts))
        )
        fit_gate_parts(gates['temporal, nothing'], record, coco, by, seed)
    return gates


def decision_seconds(
    gate: Gate, record: Mapping, shown: Sequence[Evidence], frames: int = 20
) -> Seconds:
    """Median times on this machine, of one frame: to see whether there is nothing, and to decide at
    an exit."""
    times: list[float] = []
    looks: list[float] = []
    with torch.no_grad():
        for index in range(min(frames, len(shown[0].detections))):
            for evidence in shown:
                single = Evidence(
                    evidence.exit,
                    evidence.detections[index : index + 1],
                    evidence.earlier and evidence.earlier[index : index + 1],
                    [x[index : index + 1] for x in evidence.pooled],
                    None,
                )
                start = time.perf_counter()
                gate.difficulty(single)
                times.append(time.perf_counter() - start)
            if getattr(gate, 'nothing', None) is not None:
                early = torch.from_numpy(record['images'][index]['early'])[None]
                start = time.perf_counter()
                gate.sees_nothing(early)
                looks.append(time.perf_counter() - start)
    return float(np.median(looks)) if looks else 0.0, float(np.median(times))


def analyze_gates(
    record: Mapping,
    coco: COCO,
    gates: Mapping[str, Gate],
    chosen_on: tuple | None = None,
    by: str = 'gflops',
    timed: bool = True,
    say: Say = lambda what: None,
) -> dict:
    """Curves of gates, fixed exits and oracles.

    Args:
        record (Mapping): Of test videos.
        coco (COCO): Its ground truth.
        gates (Mapping[str, Gate]): By name.
        chosen_on (tuple, optional): Record and ground truth of other videos, on which settings are
            chosen. Without, they are chosen on the same frames, which flatters every gate with many
            settings.
        by (str): The cost by which: 'gflops' or 'latency'. Defaults to 'gflops'.
        timed (bool): Whether the gates' own time counts, as measured here. Defaults to True.
        say (Callable): Told what is being done.

    Returns:
        dict: ``fixed``: rows; ``gates``: by name ``rows``, ``seconds`` of a decision, and
            ``within``: the row
        that costs least among those chosen to lose at most 1 AP (None: there is none); ``oracles``:
        by name rows; ``by``, ``own_choice``, ``provenance``.
    """
    replays, shown = Replays(record, coco), evidence_by_exit(record)
    analysis = dict(
        fixed=fixed_exits(record, replays),
        gates={},
        oracles={},
        by=by,
        own_choice=chosen_on is None,
        provenance=record['provenance'],
    )
    val = chosen_on and (chosen_on[0], Replays(*chosen_on), evidence_by_exit(chosen_on[0]))
    for name, gate in gates.items():
        say(name)
        seconds = decision_seconds(gate.eval(), record, shown) if timed else (0.0, 0.0)
        analysis['gates'][name] = _one_gate(gate, (record, replays, shown), val, by, seconds)
    kind = 'gflops' if by == 'gflops' else 'latencies'
    costs = exit_costs(record, kind, looks=False)
    for name, reuses in (('oracle, no memory', False), ('oracle, reusing', True)):
        say(name)
        analysis['oracles'][name] = oracle_rows(
            record, replays, np.linspace(costs.min(), costs.max(), _BUDGETS), kind, reuses
        )
    return analysis


def _one_gate(gate: Gate, test: tuple, val: tuple | None, by: str, seconds: Seconds) -> dict:
    """Settings are chosen on one record, and run on the other."""
    record, replays, shown = val or test
    difficulties = gate_difficulties(gate, shown)
    rows = gate_curve(
        record, replays, gate, difficulties, settings_of(record, gate, difficulties), seconds
    )
    last = fixed_exits(record, replays)[-1]['ap']
    best = pareto_front(rows, by)
    good = [place for place, row in enumerate(best) if row['ap'] >= last - DROP - 1e-9]
    if val:
        record, replays, shown = test
        best = gate_curve(
            record,
            replays,
            gate,
            gate_difficulties(gate, shown),
            [row['thresholds'] for row in best],
            seconds,
        )
    return dict(rows=best, seconds=seconds, within=best[good[0]] if good else None)


def format_gate_analysis(analysis: Mapping) -> str:
    """A table for the terminal."""
    by, fixed = analysis['by'], analysis['fixed']
    last = fixed[-1]
    lines = [
        f'{"":24} {"AP":>6} {"GFLOPs":>8} {"ms":>8} {"saved":>6} {"over line":>10}  shares of '
        'exits -1, 0, 1, ...'
    ]
    for row in fixed:
        lines.append(_line(f'exit {row["exit"]}', row, last, fixed, by))
    lines.append(
        f'least {by} for at most {DROP:g} AP lost, '
        + ('chosen on these frames' if analysis['own_choice'] else 'chosen on the other record')
    )
    for name, gate_rows in analysis['gates'].items():
        lines.append(
            _line(name, gate_rows['within'], last, fixed, by)
            if gate_rows['within']
            else f'{name:24} none'
        )
    for name, rows in analysis['oracles'].items():
        good = [row for row in rows if row['ap'] >= last['ap'] - DROP]
        lines.append(_line(name, good[0], last, fixed, by) if good else f'{name:24} none')
    return '\n'.join(lines)


def _line(name: str, row: Mapping, last: Mapping, fixed: Sequence[Mapping], by: str) -> str:
    over = row['ap'] - line_at(fixed, row[by], by)
    shares = ' '.join(f'{share:.2f}' for share in row['shares'])
    # Cheaper than all fixed exits: there is no line to be over.
    over = '-' if np.isnan(over) else f'{over:+.2f}'
    return (
        f'{name:24} {row["ap"]:6.2f} {row["gflops"]:8.3f} {1e3 * row["latency"]:8.2f} '
        f'{1 - row[by] / last[by]:6.1%} {over:>10}  {shares}'
    )


def write_gate_analysis(analysis: Mapping, folder: str) -> Path:
    """Write ``gates.json`` and ``gates.png``; the picture's path."""
    from ..files import write_atomically

    write_atomically(json.dumps(analysis, default=str).encode(), Path(folder) / 'gates.json')
    write_atomically(draw_analysis(analysis), Path(folder) / 'gates.png')
    return Path(folder) / 'gates.png'


def draw_analysis(analysis: Mapping) -> bytes:
    """A PNG: AP against GFLOPs and against latency, of all gates, fixed exits and oracles."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=130, layout='constrained')
    colors = colormaps['tab20'].colors
    for axes, (key, label, unit) in zip(
        figure.subplots(1, 2, sharey=True),
        (('gflops', 'GFLOPs per frame', 1), ('latency', 'ms per frame', 1e3)),
    ):
        axes.plot(
            [unit * row[key] for row in analysis['fixed']],
            [row['ap'] for row in analysis['fixed']],
            's--',
            color='#222222',
            label='fixed exits',
        )
        for color, (name, rows) in zip(('#8a8a8a', '#c0c0c0'), analysis['oracles'].items()):
            axes.plot(
                [unit * row[key] for row in rows],
                [row['ap'] for row in rows],
                ':',
                color=color,
                label=name,
                linewidth=2,
            )
        for number, (name, gate_rows) in enumerate(analysis['gates'].items()):
            rows = gate_rows['rows']
            axes.plot(
                [unit * row[key] for row in rows],
                [row['ap'] for row in rows],
                '.-',
                markersize=4,
                color=colors[number % len(colors)],
                label=name,
            )
        axes.set(xlabel=label)
        axes.spines[['top', 'right']].set_visible(False)
    figure.axes[0].set_ylabel('AP (%)')
    figure.axes[1].legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
