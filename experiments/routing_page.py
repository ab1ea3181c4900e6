"""The page of the experiment on routing: experiments/results/routing.md and its picture, from the
runs' numbers.

python experiments/routing_page.py
"""

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from routing_runs import DETECTORS, DYNAMIC, SIZES

from dynamicdet.files import write_atomically
from dynamicdet.routing.bootstrap import confidence_interval
from dynamicdet.routing.curve import SHARES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'routing'
#: Of experiments/routing_hook.py.
HOOK_RESULTS = ROOT / 'experiments' / 'results' / 'routing_hook'
#: Of experiments/routing_clock.py: setting -> what it is.
CLOCK_RESULTS = ROOT / 'experiments' / 'results' / 'routing_clock'
SETTINGS = dict(
    small='128 pixels, batch 1', batch='128 pixels, batch 8', large='640 pixels, batch 1'
)
PAGE = ROOT / 'experiments' / 'results' / 'routing.md'
#: The router that a run is judged by: chosen before the test set was looked at.
ROUTER = 'rank, held out'
#: What others are held against: the paper's objective on the images that the detector was trained
#: on.
PAPER = 'paper, trained on'
HEAD = """# The experiment on routing: numbers

Written by `python experiments/routing_page.py` from the files in [routing/](routing), one per run of
`python experiments/routing.py`; what it says is in [routing.md](../routing.md). AP on 1,000 test images
of the built-in data. Intervals are of 95 %, by {resamples} resamples of the test images, the same for all runs; where
there are several seeds, figures are means over them, with the least and the largest in brackets; behind a semicolon, the
least and the largest end of the seeds' intervals ("no interval": of a seed it is a ratio to what may be 0). Routers are fitted
to 1,000 images that no detector saw ("held out") or to 1,000 that it was trained on. "AP above the paper's": mean over
nine hard shares, against the paper's objective on images that the detector was trained on; "above ours": the same, against
"{router}"; intervals are of the mean over seeds. A figure that not all seeds have (efficacy, where the honest oracle gains nothing) says how many have. "At equal cost":
at half hard, against "{router}" at the share at which it costs as much; routers that look at exit 0's detections run its
neck and heads on every image; "Adaptive Feeding, by loss" was given the sign of the loss difference, not of the AP that
an image gains, as published: it is worse for it. Three exits: routed between the first and the last alone. The oracle
chooses by the true AP of each image under each exit, luck included, times its objects, and is refined on the set's AP (those
with † by the AP alone, not refined: no ceiling), the honest one by the AP of another view times its objects. The static
front: straight lines between plain detectors, as of two that share the images at random; a cheaper one that is better
takes the place of a dearer one. GFLOPs: 2 x multiply-adds;
latency: batch 1, one thread, in the run's own process, on machines that did other things too. A variant with * ran on
another machine than the plain detectors, from weights that the same command trained there: the same seed comes to other
weights, so its exits and routers compare with each other, and not with other rows. `specialized`, whose second exit
learned most from what the first got wrong, is no option any more: both exits were worse for it.
"""
CLOCK_HEAD = """### By the clock

`python experiments/routing_clock.py`, ms per image: plain detectors at 64, 96, 128 and 160 pixels (five times that in
the last row), exits, and half hard. Last column: AP above what plain detectors reach in the same time, by the APs of the
tables above; those of images five times as large were not measured, so there it says what the same APs would mean.
"""
#: Of routers that users' way trains.
HOOK_HEAD = """### Routers of `depth_resolution`, trained by RouterHook

`python experiments/routing_hook.py`: step 2 for four epochs of 1,000 images that step 1 saw, on cascades of {seeds}
seeds, trained on the machine marked *. Exits: {ends} AP; random routing, half hard: {random}.
"""

Runs = dict[tuple[str, str], list[dict]]


def read_runs() -> Runs:
    """(detector, variant) -> what each seed came to."""
    runs: Runs = defaultdict(list)
    for path in sorted(RESULTS.glob('*.json')):
        detector, variant, _ = path.stem.rsplit('-', 2)
        runs[detector, variant].append(json.loads(path.read_text()))
    return runs


def several(values: Sequence[float], digits: int = 2, sign: str = '') -> str:
    """Mean, and range where there are several."""
    text = f'{np.mean(values):{sign}.{digits}f}'
    return (
        text
        if len(values) == 1
        else f'{text} ({min(values):{sign}.{digits}f} to {max(values):{sign}.{digits}f})'
    )


def with_interval(estimates: Sequence[Mapping], name: str) -> str:
    """A figure of merit; its interval, of several seeds from the least to the largest end of
    theirs."""
    known = [estimate for estimate in estimates if estimate[name] is not None]
    if not known:
        return '-'
    text = several([estimate[name] for estimate in known], sign='+')
    if len(known) < len(estimates):
        text += f', {len(known)} of {len(estimates)} seeds'
    ends = [(estimate['low'], estimate['high']) for estimate in known]
    if None in np.ravel(ends):
        return text + '; no interval'
    lows, highs = zip(*ends)
    return text + f'; {min(lows):+.2f} to {max(highs):+.2f}'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def curve(run: Mapping, router: str = ROUTER) -> tuple[np.ndarray, np.ndarray]:
    """GFLOPs and AP at all shares."""
    first, last = run['gflops'][0], run['gflops'][-1]
    ap = [run['exits'][0]['ap'], *run['routers'][router]['ap'], run['exits'][-1]['ap']]
    return first + np.array(SHARES) * (last - first), np.array(ap)


def front(plain: Sequence[Mapping], gflops: float, resample: int | None = None) -> float:
    """AP that plain detectors reach at a cost, on the upper hull of theirs; NaN outside of it.

    Between two of them a straight line: a fleet that runs both, images drawn at random. A cheaper
        one that is better
    takes the place of a dearer one.
    """
    costs = [run['gflops'] for run in plain]
    ap = [run['ap'] if resample is None else run['resampled'][resample] for run in plain]
    if not min(costs) <= gflops <= max(costs):
        return np.nan
    best = max(plain_ap for cost, plain_ap in zip(costs, ap) if cost <= gflops)
    for cost, cheaper_ap in zip(costs, ap):
        for other, its in zip(costs, ap):
            if cost <= gflops < other:
                best = max(best, cheaper_ap + (gflops - cost) / (other - cost) * (its - cheaper_ap))
    return best


def lead(run: Mapping, plain: Sequence[Mapping]) -> tuple[float, float, float, float]:
    """At half hard: GFLOPs, AP above the static front, and the ends of its interval."""
    gflops = (run['gflops'][0] + run['gflops'][-1]) / 2
    router = run['routers'][ROUTER]
    half_hard_ap = router['ap'][len(router['ap']) // 2]
    leads = [ap - front(plain, gflops, index) for index, ap in enumerate(router['resampled_half'])]
    low, high = confidence_interval(leads)
    return gflops, half_hard_ap - front(plain, gflops), low, high


def ran_elsewhere(runs: Sequence[Mapping], plain: Mapping[str, Mapping]) -> bool:
    """Whether one of these ran on another machine than the plain detectors, if there are any."""
    devices, its = (
        {run['provenance']['device'] for run in group} for group in (runs, plain.values())
    )
    return bool(plain) and not devices <= its


def exits_table(dynamic: Mapping[str, Sequence[Mapping]]) -> str:
    rows = []
    for variant, runs in dynamic.items():
        rows.append(
            [
                variant,
                str(len(runs)),
                ', '.join(
                    several([run['exits'][k]['ap'] for run in runs])
                    for k in range(len(runs[0]['exits']))
                ),
                ', '.join(f'{cost:.3f}' for cost in runs[0]['gflops']),
                ', '.join(
                    several([1e3 * run['latencies'][k] for run in runs], 1)
                    for k in range(len(runs[0]['exits']))
                ),
                several([run['oracle']['ap'][4] for run in runs])
                + ' †' * (not all('refined' in run['oracle'] for run in runs)),
                several([run['honest']['ap'][4] for run in runs]),
                several([run['random'][4] for run in runs]),
                ', '.join(
                    f'{name} {np.mean([run["share_gaining"][name] for run in runs]):.0%}'
                    for name in runs[0]['share_gaining']
                ),
            ]
        )
    head = [
        'variant',
        'seeds',
        'AP of each exit',
        'GFLOPs',
        'ms',
        'oracle, half hard',
        'honest oracle, half hard',
        'random, half hard',
        'images with L1 > L2',
    ]
    return table(head, rows)


def strata_table(dynamic: Mapping[str, Sequence[Mapping]]) -> str:
    """AP of each exit by size, and by number of objects, of the kinds that the test set has; means
    over seeds."""
    first = next(iter(dynamic.values()))[0]
    sizes = [size for size, ap in first['by_size'].items() if ap[0] is not None]
    counts = [row['objects'] for row in first['by_objects'] if row['images']]
    rows = []
    for variant, runs in dynamic.items():
        strata = [[run['by_size'][size] for run in runs] for size in sizes]
        strata += [
            [row['ap'] for run in runs for row in run['by_objects'] if row['objects'] == count]
            for count in counts
        ]
        rows.append(
            [
                variant,
                *(', '.join(f'{ap:.1f}' for ap in np.mean(stratum, axis=0)) for stratum in strata),
            ]
        )
    return table(['AP of each exit', *sizes, *(f'objects: {count}' for count in counts)], rows)


def routers_table(runs: Sequence[Mapping]) -> str:
    rows = []
    for kind in ('routers', 'peers'):
        for name in runs[0][kind]:
            results = [run[kind][name] for run in runs]
            rows.append(
                [
                    words(name, results),
                    several([result['ap'][4] for result in results]),
                    several([result['ap'][0] for result in results]),
                    with_interval([result['normalized_gain'] for result in results], 'gain'),
                    with_interval([result['efficacy'] for result in results], 'efficacy'),
                    above(runs, kind, name, PAPER),
                    above(runs, kind, name, ROUTER),
                    several([at_equal_cost(run, run[kind][name]) for run in runs], sign='+'),
                    correlations([result['correlation']['loss_objects'] for result in results]),
                ]
            )
    return table(
        [
            'router',
            'AP, half hard',
            'AP, 10 % hard',
            'normalized gain, half hard',
            'efficacy',
            "AP above the paper's",
            'AP above ours',
            'AP above ours at equal cost',
            'rank correlation with loss saved x objects',
        ],
        rows,
    )


def words(name: str, results: Sequence[Mapping]) -> str:
    """A router's name. Runs from before Adaptive Feeding was given the AP gained say of no
    target."""
    by_loss = name == 'adaptive_feeding' and not all('target' in result for result in results)
    return name.replace('_', ' ') + ', by loss' * by_loss


def at_equal_cost(run: Mapping, result: Mapping) -> float:
    """At half hard: AP above the router that runs are judged by, at its share that costs as
    much."""
    first, last = run['gflops'][0], run['gflops'][-1]
    return result['ap'][4] - np.interp((first + last + result.get('charge', 0.0)) / 2, *curve(run))


def above(runs: Sequence[Mapping], kind: str, name: str, other: str) -> str:
    """AP above another router, at equal shares: mean over shares and seeds, and its interval over
    images.

    All runs have the same resamples of the same images, so differences are paired, also over seeds.
    """
    pairs = [(run[kind][name], run['routers'][other]) for run in runs]
    low, high = paired_interval(pairs)
    return f'{np.mean([np.subtract(a["ap"], b["ap"]) for a, b in pairs]):+.2f} ({low:+.2f} to {high:+.2f})'


def paired_interval(pairs: Sequence[tuple[Mapping, Mapping]]) -> tuple[float, float]:
    """Of the difference of two routers' AP, in the mean over shares and runs, over images."""
    return confidence_interval(
        np.mean([np.subtract(a['resampled_mean'], b['resampled_mean']) for a, b in pairs], axis=0)
    )


def all_exits_table(runs: Sequence[Mapping]) -> str:
    """AP and cost along the shares, beside those of the first and the last exit alone at the same
    cost."""
    rows = []
    for place, share in enumerate(SHARES[1:-1]):
        results = [run['all_exits'][ROUTER] for run in runs]
        pairs = [
            np.interp(result['gflops'][place], *curve(run)) for result, run in zip(results, runs)
        ]
        rows.append(
            [
                f'{share:.0%}',
                several([result['gflops'][place] for result in results], 3),
                several([result['ap'][place] for result in results]),
                several(pairs),
            ]
        )
    return table(
        ['hard share', 'GFLOPs', 'AP', 'AP of the first and the last exit at that cost'], rows
    )


def hook_table(runs: Sequence[Mapping]) -> str:
    """Routers of `RouterHook`, a cascade for each seed; as `routers_table`."""
    rows = []
    for name in runs[0]['routers']:
        results = [run['routers'][name] for run in runs]
        leads = ['-'] * 2
        if name != 'paper':
            papers = [run['routers']['paper'] for run in runs]
            leads = [difference(results, papers, place) for place in (0, None)]
        rows.append(
            [
                name,
                *(several([result['ap'][place] for result in results]) for place in (4, 2, 0)),
                *leads,
                several([result['earning'] for result in results]),
            ]
        )
    return table(
        [
            'router',
            'AP, half hard',
            'AP, 30 % hard',
            'AP, 10 % hard',
            "above the paper's, 10 % hard",
            'mean over shares',
            'correlation of its rank with loss saved x objects',
        ],
        rows,
    )


def difference(results: Sequence[Mapping], other: Sequence[Mapping], place: int | None) -> str:
    """AP of some runs above others' at a share; or in the mean over shares, with its interval over
    images."""
    pairs = list(zip(results, other))
    if place is not None:
        return several([a['ap'][place] - b['ap'][place] for a, b in pairs], sign='+')
    mean = several([np.mean(np.subtract(a['ap'], b['ap'])) for a, b in pairs], sign='+')
    low, high = paired_interval(pairs)
    return f'{mean}; interval {low:+.2f} to {high:+.2f}'


def correlations(values: Sequence[float | None]) -> str:
    """A router that gives all images the same score has none."""
    known = [value for value in values if value is not None]
    return several(known) if known else '-'


def plain_table(plain: Mapping[str, Mapping]) -> str:
    rows = [
        [
            name,
            f'{run["gflops"]:.3f}',
            f'{run["ap"]:.2f}',
            '{:.2f} to {:.2f}'.format(*confidence_interval(run['resampled'])),
        ]
        for name, run in sorted(plain.items(), key=lambda item: item[1]['gflops'])
    ]
    return table(['plain detector', 'GFLOPs', 'AP', 'interval'], rows)


def leads_table(dynamic: Mapping[str, Sequence[Mapping]], plain: Mapping[str, Mapping]) -> str:
    rows = []
    for variant, runs in dynamic.items():
        if ran_elsewhere(runs, plain):
            continue
        leads = [
            entry
            for entry in (lead(run, list(plain.values())) for run in runs)
            if np.isfinite(entry[1])
        ]
        if not leads:
            rows.append([variant, '-', 'no plain detector is as dear, or none as cheap', '-'])
            continue
        ends = (
            f'{leads[0][2]:+.2f} to {leads[0][3]:+.2f}'
            if len(leads) == 1
            else '; '.join(f'{low:+.2f} to {high:+.2f}' for _, _, low, high in leads)
        )
        rows.append(
            [
                variant,
                f'{np.mean([entry[0] for entry in leads]):.3f}',
                several([entry[1] for entry in leads], sign='+'),
                ends,
            ]
        )
    return table(
        ['variant', 'GFLOPs at half hard', 'AP above the static front', 'interval, seed by seed'],
        rows,
    )


def clock_table(
    detector: str, dynamic: Mapping[str, Sequence[Mapping]], plain: Mapping[str, Mapping]
) -> str:
    """Times of plain detectors and of exits, and the lead over the static front in time."""
    rows = []
    for name, said in SETTINGS.items():
        path = CLOCK_RESULTS / f'{detector}-{name}.json'
        if not path.exists():
            continue
        points = {
            key: 1e3 * point['median']
            for key, point in json.loads(path.read_text())['points'].items()
        }
        timed = [dict(plain[size], gflops=points[f'plain_{size}']) for size in SIZES]
        for variant in sorted({key.rsplit('_', 1)[0] for key in points} & set(dynamic)):
            half = points[f'{variant}_half']
            leads = [
                run['routers'][ROUTER]['ap'][4] - front(timed, half) for run in dynamic[variant]
            ]
            rows.append(
                [
                    said,
                    variant,
                    ', '.join(f'{run["gflops"]:.1f}' for run in timed),
                    *(f'{points[f"{variant}_{end}"]:.1f}' for end in ('exit0', 'half', 'exit1')),
                    several(leads, sign='+'),
                ]
            )
    return table(
        [
            'images',
            'variant',
            'plain',
            'exit 0',
            'half hard',
            'exit 1',
            'AP above the static front in time',
        ],
        rows,
    )


def picture(runs: Runs) -> bytes:
    """AP against GFLOPs: plain detectors, their front, dynamic ones of seed 0."""
    from matplotlib.figure import Figure

    known = [name for name in DETECTORS if any(detector == name for detector, _ in runs)]
    figure = Figure(figsize=(6.2 * len(known), 4.6), layout='constrained')
    for axes, detector in zip(np.atleast_1d(figure.subplots(1, len(known))), known):
        plain = plain_runs(runs, detector)
        for name, run in plain.items():
            axes.plot(run['gflops'], run['ap'], 'ks', markersize=4)
            axes.annotate(
                name,
                (run['gflops'], run['ap']),
                textcoords='offset points',
                xytext=(5, -9),
                fontsize=8,
            )
        costs = np.linspace(
            *[end(run['gflops'] for run in plain.values()) for end in (min, max)], 200
        )
        axes.plot(
            costs, [front(list(plain.values()), cost) for cost in costs], 'k:', label='static front'
        )
        for (run_detector, variant), seed_runs in runs.items():
            # Those on few images are compared with each other, not with detectors of more.
            if (
                run_detector == detector
                and variant in DYNAMIC
                and not ran_elsewhere(seed_runs, plain)
            ):
                color = f'C{list(DYNAMIC).index(variant)}'
                axes.plot(*curve(seed_runs[0]), color, marker='.', label=variant.replace('_', ' '))
        axes.set(title=detector.replace('_', ' '), xlabel='GFLOPs per image', ylabel='AP, %')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=110)
    return file.getvalue()


def plain_runs(runs: Runs, detector: str) -> dict[str, dict]:
    return {
        variant.removeprefix('plain_'): seed_runs[0]
        for (run_detector, variant), seed_runs in runs.items()
        if run_detector == detector and variant.startswith('plain_')
    }


def page(runs: Runs) -> str:
    """The page, in Markdown."""
    parts = [
        HEAD.format(resamples=100, router=ROUTER),
        '![AP against GFLOPs](../../docs/images/routing_front.png)\n',
    ]
    for detector in DETECTORS:
        plain = plain_runs(runs, detector)
        dynamic = {
            variant + '*' * ran_elsewhere(seed_runs, plain): seed_runs
            for (run_detector, variant), seed_runs in runs.items()
            if run_detector == detector and 'exits' in seed_runs[0]
        }
        if not dynamic:
            continue
        parts += [f'## {detector}\n', '### Exits\n', exits_table(dynamic), strata_table(dynamic)]
        if plain:
            parts += [
                '### Against plain detectors\n',
                plain_table(plain),
                f'\nThe router is "{ROUTER}".\n',
                leads_table(dynamic, plain),
            ]
            if list(CLOCK_RESULTS.glob(f'{detector}-*.json')):
                parts += [CLOCK_HEAD, clock_table(detector, dynamic, plain)]
        for variant, seed_runs in dynamic.items():
            parts += [f'### Routers of `{variant}`\n', routers_table(seed_runs)]
            if 'all_exits' in seed_runs[0]:
                parts += [
                    'Over all exits, a threshold for each, by "' + ROUTER + '":\n',
                    all_exits_table(seed_runs),
                ]
        trained = [
            json.loads(path.read_text()) for path in sorted(HOOK_RESULTS.glob(f'{detector}-*.json'))
        ]
        if trained:
            parts += [
                HOOK_HEAD.format(
                    ends=', '.join(several([run['exits'][k] for run in trained]) for k in range(2)),
                    random=several([run['random'][4] for run in trained]),
                    seeds=len(trained),
                ),
                hook_table(trained),
            ]
    return '\n'.join(parts)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    runs = read_runs()
    write_atomically(picture(runs), ROOT / 'docs' / 'images' / 'routing_front.png')
    write_atomically(page(runs).encode(), PAGE)
    print(PAGE)


if __name__ == '__main__':
    main()
