"""The page of the experiment on dynamic and compressed together, and its picture.

python experiments/dynamic_compressed_page.py        # experiments/results/dynamic_compressed.md
"""

import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from compression_page import difference
from dynamic_compressed import FULL, FULL_SIDE, SHARE
from dynamic_compressed_measure import SIDES
from routing_page import table
from routing_runs import DETECTORS, PRETRAINING

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'dynamic_compressed'
PAGE = ROOT / 'experiments' / 'results' / 'dynamic_compressed.md'
PICTURE = ROOT / 'docs' / 'images' / 'dynamic_compressed.png'
NAMES = dict(
    yolox='Dy-YOLOX-nano', faster_rcnn='Dy-Faster R-CNN', faster_rcnn_r50='Dy-Faster R-CNN R-50'
)
MODES = dict(exit0='exit 0', half='half hard', exit1='exit 1')
HEAD = """# The experiment on dynamic and compressed together: numbers

Written by `python experiments/dynamic_compressed_page.py` from the files in
[dynamic_compressed/](dynamic_compressed), one per step of `python experiments/dynamic_compressed.py`.
The detectors are `depth_resolution`, seed 0, of the experiment on routing, with a router fitted to held-out
images (objective `rank`). AP on {images} test images of the built-in data; the threshold of half hard is from
the validation images. Intervals are of 95 %, by {resamples} resamples of the test images, the same for all,
so that differences are paired. Pruned: {share:.0%} of the channels removed from all layers, then tuned for one
epoch of {tuning:,} images; "tuned alike" is the detector with all channels after the same, so that what pruning costs
is told from what more training gives. MB are 1e6 bytes, of a `.ddz` file for torch and of all files
of a deployment folder for ONNX Runtime (in 8 bits with `--compress`); shares are of the whole detector's checkpoint in float32.
"""
CLOCK = """Latencies: {machine};
batch 1, mean of {images} test images of {side} x {side} pixels in memory, from preprocessing to boxes, median
of {rounds} rounds in which all variants took turns; half hard is half of these images. Load average
{load_before:.2f} before, {load_after:.2f} after (this measurement alone makes 1).
"""
LARGE = """The same detectors on the same images, enlarged to {side} x {side} pixels, where networks outweigh
preprocessing, proposals and NMS, which are Python in all variants: {images} images, median of {rounds} rounds,
load average {load_before:.2f} and {load_after:.2f}. They were not trained at that size: latencies alone.
"""
MACHINE = (
    '{device}, {threads} thread(s), {vnni} VNNI, {amx} AMX, torch {torch}, ONNX Runtime '
    '{onnxruntime}, OpenVINO {openvino}'
)
NO_CLOCK = 'Latencies are not measured yet: `python experiments/dynamic_compressed.py --clock`.\n'


FULL_SIZE = """## {name}, of the size that users have

Random weights, so latencies alone; {machine};
batch 1, {images} images of {side} x {side} pixels, median of {rounds} rounds, load average {load_before:.2f} before. No
layer was tried in 8 bits by itself.
"""


class Variant(NamedTuple):
    """A row of the table and, where it is timed, a line of the picture."""

    label: str
    kind: str
    form: str
    #: Which form is as fast; None is not timed.
    timed: str | None


VARIANTS = (
    Variant('float32 eager', 'whole', 'eager', 'eager'),
    Variant('float32 eager, file in int8', 'whole', 'eager_int8', 'eager'),
    Variant('ONNX Runtime float32', 'whole', 'float32', 'float32'),
    Variant('int8', 'whole', 'int8', 'int8'),
    Variant('int8, OpenVINO', 'whole', 'int8_openvino', 'int8_openvino'),
    Variant('int8, predictions too', 'whole', 'int8_all', None),
    Variant('tuned alike, not pruned', 'tuned', 'eager', None),
    Variant('pruned, eager', 'pruned', 'eager', 'eager'),
    Variant('pruned, eager, file in int8', 'pruned', 'eager_int8', 'eager'),
    Variant('pruned, ONNX Runtime float32', 'pruned', 'float32', 'float32'),
    Variant('pruned + int8', 'pruned', 'int8', 'int8'),
    Variant('pruned + int8, OpenVINO', 'pruned', 'int8_openvino', 'int8_openvino'),
    Variant('pruned + int8, predictions too', 'pruned', 'int8_all', None),
)

#: The side that the detectors were trained at, and the larger one.
SMALL, LARGER = SIDES

Results = dict[str, dict]


def read_results() -> Results:
    """'detector-kind' -> what the step came to."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob('*.json'))}


def point(results: Results, detector: str, variant: Variant) -> dict | None:
    step = results.get(f'{detector}-{variant.kind}')
    return step and step['points'].get(variant.form)


def milliseconds(
    results: Results, detector: str, variant: Variant, mode: str, side: int = SMALL
) -> float | None:
    step = results.get(f'{detector}-clock_{side}')
    name = f'{detector}-{variant.kind}/{variant.timed}/{mode}'
    return step and variant.timed and 1e3 * step['points'][name]['median']


def below(measured: Mapping, base: Mapping, mode: str) -> str:
    """How far a variant's AP is from that of float32 eager."""
    return '{:+.2f} ({:+.2f} to {:+.2f})'.format(*difference(measured[mode], base[mode], 'ap'))


def machine_of(facts: Mapping) -> str:
    return MACHINE.format(
        **dict(facts, **{name: 'with' if facts[name] else 'without' for name in ('vnni', 'amx')})
    )


def table_of(results: Results, detector: str) -> str:
    base = point(results, detector, VARIANTS[0])
    original = results[f'{detector}-whole']['original_bytes']
    rows = []
    for variant in VARIANTS:
        measured = point(results, detector, variant)
        if measured is None:
            continue
        times = [milliseconds(results, detector, variant, mode) for mode in MODES]
        rows.append(
            [
                variant.label,
                *(f'{measured[mode]["ap"]:.2f}' for mode in MODES),
                *(below(measured, base, mode) for mode in ('half', 'exit1')),
                f'{measured["hard_share"]:.0%}',
                f'{measured["bytes"] / 1e6:.2f} ({measured["bytes"] / original:.1%})',
                *('-' if ms is None else f'{ms:.1f}' for ms in times),
            ]
        )
    ap, times = ([f'{what}, {mode}' for mode in MODES.values()] for what in ('AP', 'ms'))
    return table(
        [
            'variant',
            *ap,
            'half hard, against float32 eager',
            'exit 1, against float32 eager',
            'hard share',
            'file, MB',
            *times,
        ],
        rows,
    )


def goals(results: Results, detector: str) -> str:
    """What the issue asks for, and what there is, at exit 1."""
    by_label = {variant.label: variant for variant in VARIANTS}
    base, quantized, small, control = (
        point(results, detector, by_label[label])
        for label in ('float32 eager', 'int8', 'pruned + int8', 'tuned alike, not pruned')
    )
    original = results[f'{detector}-whole']['original_bytes']
    rows = []
    if quantized:
        rows.append(
            [
                'int8: AP lost, exit 1',
                'at most 0.5',
                f'{base["exit1"]["ap"] - quantized["exit1"]["ap"]:.2f}',
            ]
        )
    if small:
        rows += [
            [
                'pruned + int8: AP lost, exit 1',
                'at most 1.0',
                f'{base["exit1"]["ap"] - small["exit1"]["ap"]:.2f}',
            ],
            ['pruned + int8: file', 'at most 12 %', f'{small["bytes"] / original:.1%}'],
        ]
    if small and control:
        rows.append(
            [
                'the same against "tuned alike"',
                'not asked for',
                f'{control["exit1"]["ap"] - small["exit1"]["ap"]:.2f}',
            ]
        )
    asked = (
        ('int8', 'ONNX Runtime float32', '3, with VNNI'),
        ('pruned + int8', 'float32 eager', '8'),
    )
    for side, runtime, (fast, slow, goal) in itertools.product(SIDES, ('', ', OpenVINO'), asked):
        fast += runtime
        times = [
            milliseconds(results, detector, by_label[label], 'exit1', side)
            for label in (slow, fast)
        ]
        if None not in times:
            rows.append(
                [
                    f'{fast}: times as fast as {slow}, exit 1, {side} pixels',
                    f'at least {goal}',
                    f'{times[0] / times[1]:.2f}',
                ]
            )
    return table(['goal', 'wanted', 'measured'], rows)


def large_table(results: Results, detector: str) -> str:
    """Latencies at the larger side, and how often as fast as the same without compression."""
    # A file in 8 bits is as fast as what it was made from.
    timed = [variant for variant in VARIANTS if variant.form == variant.timed]
    times = {
        variant.label: [milliseconds(results, detector, variant, mode, LARGER) for mode in MODES]
        for variant in timed
    }
    eager, graphs = (times[label][-1] for label in ('float32 eager', 'ONNX Runtime float32'))
    rows = [
        [
            label,
            *(f'{ms:.1f}' for ms in row_times),
            f'{eager / row_times[-1]:.2f}',
            f'{graphs / row_times[-1]:.2f}',
        ]
        for label, row_times in times.items()
    ]
    return table(
        [
            'variant',
            *(f'ms, {mode}' for mode in MODES.values()),
            'times as fast as eager, exit 1',
            'as ONNX Runtime float32',
        ],
        rows,
    )


def picture(results: Results, detectors: list[str]) -> bytes:
    """AP against latency: a line for each variant, from exit 0 through half hard to exit 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(detectors), 4.4), layout='constrained')
    for axes, detector in zip(figure.subplots(1, len(detectors), squeeze=False)[0], detectors):
        for index, variant in enumerate(
            variant for variant in VARIANTS if variant.form == variant.timed
        ):
            measured = point(results, detector, variant)
            if measured is None:
                continue
            axes.plot(
                [milliseconds(results, detector, variant, mode) for mode in MODES],
                [measured[mode]['ap'] for mode in MODES],
                f'C{index}',
                marker='.',
                label=variant.label,
            )
        axes.set(title=NAMES[detector], xlabel='latency, ms', ylabel='AP, %')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=110)
    return file.getvalue()


def main() -> None:
    results = read_results()
    known = [detector for detector in DETECTORS if f'{detector}-whole' in results]
    if not known:
        raise UsageError(f'{RESULTS} has no results: run experiments/dynamic_compressed.py first')
    first = results[f'{known[0]}-whole']
    timed = [detector for detector in known if f'{detector}-clock_{SMALL}' in results]
    parts = [
        HEAD.format(
            images=first['provenance']['images'],
            resamples=first['resamples'],
            share=SHARE,
            tuning=PRETRAINING,
        )
    ]
    if timed:
        write_atomically(picture(results, timed), PICTURE)
        parts.append(f'![AP against latency](../../docs/images/{PICTURE.name})\n')
    for detector in known:
        clock, larger = (results.get(f'{detector}-clock_{side}') for side in SIDES)
        facts = clock and dict(clock['provenance'], machine=machine_of(clock['provenance']))
        parts += [
            f'## {NAMES[detector]}\n',
            CLOCK.format(**facts) if facts else NO_CLOCK,
            table_of(results, detector),
        ]
        if larger:
            parts += [LARGE.format(**larger['provenance']), large_table(results, detector)]
        parts.append(goals(results, detector))
    for full in (full for full in FULL if f'{full}-clock_{FULL_SIDE}' in results):
        facts = results[f'{full}-clock_{FULL_SIDE}']['provenance']
        parts += [
            FULL_SIZE.format(**dict(facts, machine=machine_of(facts), name=NAMES[full])),
            large_table(results, full),
        ]
    write_atomically('\n'.join(parts).encode(), PAGE)
    print(PAGE)


if __name__ == '__main__':
    cli.run(main)
