"""The tables of the routing page: numbers of an analysis -> HTML, each with what it means in a
sentence."""

import html
from collections.abc import Iterable, Mapping, Sequence

from .figures import EXIT_COLORS

#: Curve -> what it is called.
CURVES = dict(router='router', random='random', honest='honest oracle', oracle='oracle')


def end_names(analysis: Mapping) -> list[str]:
    """What the two exits are called."""
    return [f'exit {end["exit"]}' for end in analysis['ends']]


def curve_table(analysis: Mapping) -> str:
    """AP of the router, random routing and oracles, and costs, at each share."""
    curves = analysis['curves']
    others = [name for name in curves if name != 'router']
    rows = []
    for at, row in enumerate(curves['router']):
        rows.append(
            [
                f'{row["hard_share"]:.0%}',
                _cell(row),
                *(_cell(curves[name][at]) for name in others),
                f'{row["gflops"]:.3g}',
                f'{1000 * row["latency"]:.1f}',
            ]
        )
    said = _paragraph(
        "AP is COCO's for boxes (IoU 0.50 to 0.95), in percent, at each share of hard images; "
        'in small print the 95 % interval, of random routing two standard deviations. GFLOPs '
        'count a multiply-add twice; both costs are means per image.'
    )
    return said + _table(['hard', 'AP', *(CURVES[name] for name in others), 'GFLOPs', 'ms'], rows)


def merit_boxes(analysis: Mapping) -> str:
    """The figures of merit."""
    boxes = (
        f'<div><p>{html.escape(one["name"])}</p><strong>{_value(one["value"])}</strong>'
        + _paragraph(_said_interval(one), 'note')
        + _paragraph(one['meaning'], 'note')
        + '</div>'
        for one in analysis['merit']
    )
    return f'<div class="merit">{"".join(boxes)}</div>'


def peer_table(analysis: Mapping) -> str:
    """The router beside its peers, at half hard."""
    if not analysis['peers']:
        return ''
    rows = [['<strong>this router</strong>', *_peer_cells(analysis['router'])]]
    rows += [
        [_named(name, peer['meaning']), *_peer_cells(peer)]
        for name, peer in analysis['peers'].items()
    ]
    said = _paragraph(
        'Each takes half of the images as hard, by its own measure, or as near as ties allow; the '
        'gain is the normalized one. Those that look at the detections of the first exit must run '
        'its neck and heads on hard images too: that is charged. Switch their curves on above.'
    )
    absent = [f'{name}: {why}' for name, why in analysis['left_out'].items()]
    return (
        said
        + _table(['router', 'hard', 'AP', 'gain', 'GFLOPs'], rows)
        + (_paragraph('Left out:', 'note') + bullets(absent, 'note') if absent else '')
    )


def _peer_cells(peer: Mapping) -> list[str]:
    half = peer['half']
    return [
        f'{half["hard_share"]:.0%}',
        f'{half["ap"]:.2f}',
        _value(peer['gain']) + _small(_span(peer, '+.2f')),
        f'{half["gflops"]:.3g}',
    ]


def strata_tables(analysis: Mapping) -> str:
    """AP of both exits on parts of the data."""
    tables = analysis['strata']
    known = [ap for table in tables for row in table['rows'] for ap in row['aps'] if ap is not None]
    top = max(known, default=1) or 1
    parts = [
        _paragraph(
            'AP of both exits alone, on parts of the data. Routing pays where one part gains by '
            'the dear exit and another does not; where all gain alike, no router can do much '
            'better than count objects.'
        )
    ]
    for table in tables:
        rows = [
            [
                html.escape(row['name']),
                f'{row["count"]:,}',
                *map(_number, row['aps']),
                _difference(row['aps']),
                _bars(row['aps'], top),
            ]
            for row in table['rows']
        ]
        head = [table['name'], table['counts'], *end_names(analysis), 'gain', '']
        parts.append(f'<h3>{html.escape(table["title"])}</h3>{_table(head, rows)}')
    return ''.join(parts)


def correlation_table(analysis: Mapping) -> str:
    """What difficulty goes with."""
    rows = [
        [_named(one['name'], one['meaning']), _value(one['value']), _span(one, '+.2f')]
        for one in analysis['correlations']
    ]
    said = _paragraph(
        "Spearman's rank correlation with the router's difficulty, over images: 1 means the "
        'same order, 0 that they have nothing to do with each other, -1 the opposite order.'
    )
    return said + _table(['of difficulty with', 'correlation', '95 % interval'], rows)


def transfer_table(analysis: Mapping) -> str:
    """What the validation set's thresholds do here."""
    if not analysis['transfer']:
        return _paragraph(
            'Not measured: give the record of the validation set by --val-record. Thresholds are '
            'then chosen there and used here.'
        )
    rows = [
        [
            f'{row["share"]:.0%}',
            f'{row["threshold"]:.4f}',
            f'{row["test_share"]:.1%}',
            f'{row["ap"]:.2f}',
            f'{row["own_ap"]:.2f}',
        ]
        for row in analysis['transfer']
    ]
    said = _paragraph(
        'Thresholds chosen on the validation set for a wanted share, and what they give here: the '
        'share that is really hard, its AP, and the AP of a threshold chosen here for the share '
        'wanted.'
    )
    return said + _table(
        ['wanted', 'threshold', 'hard here', 'AP here', 'AP at own threshold'], rows
    )


def shown_facts(provenance: Mapping[str, object]) -> dict[str, str]:
    """A provenance as a reader wants it: classes by name, not by the annotation file's numbers."""
    hidden = ('categories',) if provenance.get('classes') else ()
    return {
        name: ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in provenance.items()
        if name not in hidden
    }


def facts_list(provenance: Mapping) -> str:
    """Where the numbers come from."""
    pairs = (
        f'<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>'
        for name, value in sorted(shown_facts(provenance).items())
    )
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def bullets(sentences: Iterable[str], kind: str = 'said') -> str:
    """A list of plain sentences."""
    return f'<ul class="{kind}">{"".join(f"<li>{html.escape(one)}</li>" for one in sentences)}</ul>'


def _paragraph(text: str, kind: str = '') -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f'<p>{html.escape(text)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML, headings plain text."""
    heading = ''.join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{heading}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>'
    )


def _named(name: str, meaning: str) -> str:
    return f'{html.escape(name)}<small class="meaning">{html.escape(meaning)}</small>'


def _cell(row: Mapping) -> str:
    return f'{row["ap"]:.2f}{_small(_span(row, ".1f"))}'


def _small(text: str) -> str:
    return f'<small>{text}</small>' if text else ''


def _value(value: float | None) -> str:
    return 'not defined' if value is None else f'{value:+.2f}'


def _span(one: Mapping, form: str) -> str:
    """An interval, or nothing."""
    return '' if one['low'] is None else f'{one["low"]:{form}} to {one["high"]:{form}}'


def _said_interval(one: Mapping) -> str:
    span = _span(one, '+.2f')
    return f'95 % interval {span}' if span else 'no interval'


def _number(value: float | None) -> str:
    return '–' if value is None else f'{value:.1f}'


def _difference(aps: Sequence[float | None]) -> str:
    return '–' if None in aps else f'{aps[1] - aps[0]:+.1f}'


def _bars(aps: Sequence[float | None], top: float) -> str:
    """AP of both exits as lengths, against the largest of the page."""
    bars = ''.join(
        f'<span class="bar" style="width:{100 * ap / top:.0f}%;background:{color}"></span>'
        for ap, color in zip(aps, EXIT_COLORS)
        if ap is not None
    )
    return f'<div class="bars" aria-hidden="true">{bars}</div>'
