"""The analysis in words and in plain tables, for the page and for a terminal."""

from collections.abc import Mapping, Sequence

from ..routing.curve import gain_over_random

#: Titles of the tables of budgets.
BY_QUANTILE = "By this set's quantile: thresholds that give these images the hard share"
BY_CALIBRATION = 'By the calibrated threshold: what is served when the hard share is asked for'

BASELINES = 'Plain detectors on the same images'
LEADS = 'AP of the router above the front of plain detectors, at equal cost'

NOT_CALIBRATED = (
    'No calibrated threshold was tried: the checkpoint is not calibrated (tools/calibrate.py), or '
    'no record of the validation set was given (--val-record).'
)


def end_names(analysis: Mapping) -> list[str]:
    """What the two exits are called."""
    return [f'exit {end["exit"]}' for end in analysis['ends']]


def share_cell(row: Mapping) -> str:
    """The hard share of a row, and the one that was asked for where it is another."""
    asked, got = f'{row["share"]:.0%}', f'{row["hard_share"]:.0%}'
    return got if got == asked else f'{got} (asked {asked})'


def calibrated_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """What calibrated thresholds serve: a heading, and a line of cells per row.

    Args:
        rows (Sequence[Mapping]): As `routing.curve.calibrated_trade_off` gives them.
    """
    lines = ['wanted,threshold,served,chance explains,AP,AP50,GFLOPs,ms'.split(',')]
    for row in rows:
        span = f'{row["chance_low"]:.1%} to {row["chance_high"]:.1%}'
        cells = [
            f'{row["share"]:.0%}',
            f'{row["threshold"]:.4f}',
            f'{row["hard_share"]:.1%}',
            f'{span} !' if is_missed(row) else span,
            f'{row["ap"]:.2f}',
            f'{row["ap50"]:.2f}',
            f'{row["gflops"]:.2f}',
            f'{1000 * row["latency"]:.1f}',
        ]
        lines.append(cells)
    return lines


def baseline_table(points: Sequence[Mapping]) -> list[list[str]]:
    """Plain detectors: a heading, and a line of cells for each.

    Args:
        points (Sequence[Mapping]): As `routing_analysis_baselines` gives them.
    """
    lines = [['detector', 'AP', '95 % interval', 'GFLOPs', 'ms']]
    for point in points:
        lines.append(
            [
                point['name'],
                f'{point["ap"]:.2f}',
                _span(point, '.2f'),
                f'{point["gflops"]:.3f}',
                f'{1000 * point["latency"]:.1f}',
            ]
        )
    return lines


def lead_table(leads: Sequence[Mapping]) -> list[list[str]]:
    """What the router has above plain detectors: a heading, and a line of cells per hard share.

    Args:
        leads (Sequence[Mapping]): As `routing_analysis_baselines` gives them.
    """
    lines = [['hard', 'AP', 'GFLOPs', 'at equal GFLOPs', 'ms', 'at equal ms']]
    for row in leads:
        lines.append(
            [
                share_cell(row),
                f'{row["ap"]:.2f}',
                f'{row["gflops"]:.3f}',
                _lead(row['lead_gflops']),
                f'{1000 * row["latency"]:.1f}',
                _lead(row['lead_latency']),
            ]
        )
    return lines


def _lead(estimate: Sequence[float | None] | None) -> str:
    if estimate is None:
        return 'none as cheap'
    value, low, high = estimate
    return f'{value:+.2f}' + ('' if low is None else f' ({low:+.2f} to {high:+.2f})')


def is_missed(row: Mapping) -> bool:
    """Whether more than chance parts the hard share that a calibrated threshold serves from the
    wanted one."""
    return not row['chance_low'] <= row['hard_share'] <= row['chance_high']


def budget_sentences(analysis: Mapping) -> list[str]:
    """What the budgets' numbers say, in plain words, whichever way they fall.

    Args:
        analysis (Mapping): As `routing_analysis.analyze_routing` gives it; ``images``, ``ends``,
            ``rows`` and, where it is there, the ``gain`` of ``router`` are read.
    """
    rows = analysis['rows']
    (first, cheap), (last, dear) = ((end['ap'], end['gflops']) for end in analysis['ends'])
    easy, hard = end_names(analysis)
    said = f'better than {easy} by {last - first:.2f} AP'
    if last <= first:
        said = f'NOT better than {easy}'
    sentences = [
        f'On {analysis["images"]:,} images, {hard} is {said} ({last:.2f} against {first:.2f}), '
        f'for {dear:.2f} GFLOPs per image instead of {cheap:.2f}.'
    ]
    middle = min(rows, key=lambda row: abs(row['hard_share'] - 0.5))
    if not 0 < middle['hard_share'] < 1:
        return sentences + [
            'The router cannot be judged: no row of the table lies between none and all hard. Too '
            'many images have the same difficulty.'
        ]
    sentences.append(_verdict(middle))
    gain = gain_over_random(rows)
    sentences.append(f'Over all shares between the ends, it {_gains(gain["mean"])} on average.')
    # As the tables: no ratio to what may be nothing.
    defined = analysis.get('router', dict(gain=gain['half']))['gain'] is not None
    if gain['half'] is not None and defined and last > first:
        side = 'above' if gain['half'] >= 0 else 'below'
        sentences.append(
            f'At half hard, its AP is {side} the straight line between the exits by '
            f'{abs(gain["half"]):.0%} of their difference.'
        )
    return sentences


def share_miss_sentences(calibrated: Sequence[Mapping]) -> list[str]:
    """A sentence on the hard share that calibrated thresholds miss most, if they miss any by more
    than chance.

    Args:
        calibrated (Sequence[Mapping]): As `routing.curve.calibrated_trade_off` gives them.
    """
    missed = [row for row in calibrated if is_missed(row)]
    if not missed:
        return []
    worst = max(missed, key=lambda row: abs(row['hard_share'] - row['share']))
    return [
        f'The calibrated threshold for {worst["share"]:.0%} hard sends {worst["hard_share"]:.1%} '
        f'of these images on, where chance explains {worst["chance_low"]:.1%} to '
        f'{worst["chance_high"]:.1%}: they differ from those of the calibration. Calibrate on '
        'images like these, or hold the budget online.'
    ]


def _verdict(row: Mapping) -> str:
    gain, spread = row['ap'] - row['random_ap'], row['random_std']
    where = 'half' if round(row['hard_share'], 2) == 0.5 else f'{row["hard_share"]:.0%}'
    head = f'With {where} of the images hard, the router'
    known = f'(standard deviation of random routing {spread:.2f}'
    if row['gain_low'] is not None:
        known += f'; 95 % interval of the gain {row["gain_low"]:+.2f} to {row["gain_high"]:+.2f}'
    known += ')'
    gained = f'{head} {_gains(gain)} over random routing'
    if gain <= 0:
        return f'{head} does NOT gain over random routing: it {_gains(gain)} {known}.'
    if gain <= spread:
        return f'{gained}, which is within one standard deviation {known}: it may well be chance.'
    if gain <= 2 * spread:
        return f'{gained}, which is within two standard deviations {known}: it may be chance.'
    return f'{gained}, more than two standard deviations {known}.'


def _gains(gain: float) -> str:
    return f'{"gains" if gain >= 0 else "loses"} {abs(gain):.2f} AP'


def format_analysis(analysis: Mapping) -> str:
    """Tables and sentences.

    Args:
        analysis (Mapping): As `routing_analysis.analyze_routing` gives it.
    """
    parts = [
        _heading(BY_QUANTILE),
        _trade_off(analysis['curves']),
        *_calibrated(analysis['calibrated']),
        _heading('Figures of merit'),
        _named(analysis['merit']),
    ]
    if analysis['baselines']['points']:
        parts += [
            _heading(BASELINES),
            _table(baseline_table(analysis['baselines']['points'])),
            _heading(LEADS),
            _table(lead_table(analysis['baselines']['leads'])),
        ]
    if analysis['peers']:
        parts += [_heading('Routers at half hard, on the same detections'), _peers(analysis)]
    for table in analysis['strata']:
        parts += [
            _heading(f'AP of each exit {_lower(table["title"])}'),
            _stratum(table, end_names(analysis)),
        ]
    parts += [_heading('Rank correlation of difficulty with'), _named(analysis['correlations'])]
    parts += [_heading('Diagnosis'), '\n'.join(f'- {line}' for line in analysis['diagnosis'])]
    return '\n'.join(parts)


def _heading(text: str) -> str:
    return f'\n{text}\n{"-" * len(text)}'


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns to the right, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [
        [
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths))
        ]
        for line in lines
    ]
    return '\n'.join('  '.join(line).rstrip() for line in padded)


def _trade_off(curves: Mapping) -> str:
    others = [name for name in ('random', 'oracle', 'honest') if name in curves]
    titles = dict(random='random', oracle='oracle', honest='honest oracle')
    lines = [
        [
            'hard',
            'threshold',
            'AP',
            '95 % interval',
            *(titles[name] for name in others),
            'GFLOPs',
            'ms',
        ]
    ]
    for at, row in enumerate(curves['router']):
        lines.append(
            [
                share_cell(row),
                f'{row["threshold"]:.4f}',
                f'{row["ap"]:.2f}',
                _span(row, '.2f'),
                *(f'{curves[name][at]["ap"]:.2f}' for name in others),
                f'{row["gflops"]:.3f}',
                f'{1000 * row["latency"]:.1f}',
            ]
        )
    return _table(lines)


def _calibrated(rows: Sequence[Mapping]) -> list[str]:
    if not rows:
        return [f'\n{NOT_CALIBRATED}']
    return [_heading(BY_CALIBRATION), _table(calibrated_table(rows))]


def _span(estimate: Mapping, form: str) -> str:
    return (
        ''
        if estimate.get('low') is None
        else f'{estimate["low"]:{form}} to {estimate["high"]:{form}}'
    )


def _named(rows: Sequence[Mapping]) -> str:
    lines: list[list[str]] = []
    for row in rows:
        value = 'not defined' if row['value'] is None else f'{row["value"]:+.2f}'
        lines.append([row['name'], value, _span(row, '+.2f')])
    return _table(lines) if lines else '(nothing)'


def _peers(analysis: Mapping) -> str:
    lines = [['router', 'hard', 'AP', 'normalized gain', 'GFLOPs']]
    for name, peer in [('this router', analysis['router']), *analysis['peers'].items()]:
        gain = 'not defined' if peer['gain'] is None else f'{peer["gain"]:+.2f}'
        half = peer['half']
        lines.append(
            [name, f'{half["hard_share"]:.0%}', f'{half["ap"]:.2f}', gain, f'{half["gflops"]:.3f}']
        )
    return _table(lines)


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}'


def _stratum(table: Mapping, ends: Sequence[str]) -> str:
    lines = [[table['name'], table['counts'], *ends, 'gain']]
    for row in table['rows']:
        gain = '-' if None in row['aps'] else f'{row["aps"][1] - row["aps"][0]:+.1f}'
        lines.append([row['name'], str(row['count']), *map(_number, row['aps']), gain])
    return _table(lines)
