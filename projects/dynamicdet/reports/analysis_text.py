"""The analysis on a terminal: plain tables."""

from collections.abc import Mapping, Sequence


def format_analysis(analysis: Mapping) -> str:
    """Tables and sentences.

    Args:
        analysis (Mapping): As `analysis.analyze` gives it.
    """
    parts = [
        _heading('The trade-off'),
        _trade_off(analysis['curves']),
        _heading('Figures of merit'),
        _named(analysis['merit']),
    ]
    if analysis['peers']:
        parts += [_heading('Routers at half hard, on the same detections'), _peers(analysis)]
    for table in analysis['strata']:
        parts += [
            _heading(f'AP of each exit {_lower(table["title"])}'),
            _stratum(table, analysis['ends']),
        ]
    parts += [_heading('Rank correlation of difficulty with'), _named(analysis['correlations'])]
    if analysis['transfer']:
        parts += [
            _heading('Thresholds chosen on the validation set'),
            _transfer(analysis['transfer']),
        ]
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
                f'{row["hard_share"]:.0%}',
                f'{row["threshold"]:.4f}',
                f'{row["ap"]:.2f}',
                _span(row, '.2f'),
                *(f'{curves[name][at]["ap"]:.2f}' for name in others),
                f'{row["gflops"]:.3f}',
                f'{1000 * row["latency"]:.1f}',
            ]
        )
    return _table(lines)


def _span(one: Mapping, form: str) -> str:
    return '' if one.get('low') is None else f'{one["low"]:{form}} to {one["high"]:{form}}'


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


def _stratum(table: Mapping, ends: Sequence[Mapping]) -> str:
    lines = [[table['name'], table['counts'], *(f'exit {end["exit"]}' for end in ends), 'gain']]
    for row in table['rows']:
        gain = '-' if None in row['aps'] else f'{row["aps"][1] - row["aps"][0]:+.1f}'
        lines.append([row['name'], str(row['count']), *map(_number, row['aps']), gain])
    return _table(lines)


def _transfer(rows: Sequence[Mapping]) -> str:
    lines = [['wanted', 'threshold', 'hard here', 'AP here', 'AP at own threshold']]
    lines += [
        [
            f'{row["share"]:.0%}',
            f'{row["threshold"]:.4f}',
            f'{row["test_share"]:.1%}',
            f'{row["ap"]:.2f}',
            f'{row["own_ap"]:.2f}',
        ]
        for row in rows
    ]
    return _table(lines)
