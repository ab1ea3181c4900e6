"""What routing is worth, as one self-contained page: words, a chart with a slider, tables, a
gallery.

Numbers come from `routing_analysis.analyze_routing`, the layout is the template
``page.html.jinja``; nothing is computed here but what places the numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .figures import EXIT_COLORS, PLAIN_COLOR
from .routing_analysis_gallery import LETTERS, MIN_SCORE
from .routing_analysis_text import (
    BASELINES,
    BY_CALIBRATION,
    BY_QUANTILE,
    LEADS,
    NOT_CALIBRATED,
    baseline_table,
    budget_sentences,
    calibrated_table,
    end_names,
    lead_table,
    share_cell,
    share_miss_sentences,
)

#: Curve -> name, color (Okabe-Ito, but for grays), dashes, whether it is drawn at first, what it
#: means.
_CURVES = dict(
    router=('router', '#222222', '', True, 'the trained router; shaded: 95 % interval'),
    random=(
        'random',
        '#8a8a8a',
        '6 4',
        True,
        'as many images, drawn at random; shaded: two standard deviations',
    ),
    honest=(
        'honest oracle',
        '#009e73',
        '',
        True,
        'the exit of each image chosen on another view of it and scored on the image itself, so '
        'that luck does not count: what a router could be hoped to reach',
    ),
    oracle=(
        'oracle',
        '#cc79a7',
        '',
        False,
        'the exit of each image chosen on the very detections that are scored, then refined on the '
        'AP of the whole set: a ceiling that rewards luck too',
    ),
)
_PLAIN = 'plain detectors'
_PEER_COLORS = '#e69f00 #56b4e9 #7a5195 #d55e00 #5b8c00 #0072b2 #a6611a #003f5c'.split()
_PEER_DASHES = ('2 3', '9 3', '9 3 2 3')

_FOLDER = Path(__file__).parent
_TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_TEMPLATES.filters.update(
    form=lambda value, spec: '–' if value is None else format(value, spec),
    curve_name=lambda curve: _CURVES[curve][0],
    share_cell=share_cell,
)
_TEMPLATES.policies['json.dumps_kwargs'] = dict(separators=(',', ':'), allow_nan=False)


def make_page(title: str, analysis: Mapping, gallery: Sequence[Mapping]) -> str:
    """The page.

    Args:
        title (str): Title, plain text.
        analysis (Mapping): As `routing_analysis.analyze_routing` gives it.
        gallery (Sequence[Mapping]): As `routing_analysis_gallery.make_gallery` gives it.
    """
    lines = _lines(analysis)
    aps = [ap for part in analysis['strata'] for row in part['rows'] for ap in row['aps'] if ap]
    return _TEMPLATES.get_template('page.html.jinja').render(
        analysis,
        title=title,
        lead=' '.join([*budget_sentences(analysis), *share_miss_sentences(analysis['calibrated'])]),
        by_quantile=BY_QUANTILE,
        by_calibration=BY_CALIBRATION,
        not_calibrated=NOT_CALIBRATED,
        served=calibrated_table(analysis['calibrated']),
        plain_title=BASELINES,
        plain=baseline_table(analysis['baselines']['points']),
        leads_title=LEADS,
        leads=lead_table(analysis['baselines']['leads']),
        end_names=end_names(analysis),
        lines=lines,
        drawn=_drawn(analysis, lines),
        largest_ap=max(aps, default=1),
        gallery=gallery,
        facts=shown_facts(analysis['provenance']),
        colors=EXIT_COLORS,
        min_score=MIN_SCORE,
        letters=LETTERS,
        # The package's own: neither holds anything of the data.
        style=Markup((_FOLDER / 'page.css').read_text(encoding='utf-8')),
        script=Markup((_FOLDER / 'page.js').read_text(encoding='utf-8')),
    )


def shown_facts(provenance: Mapping[str, object]) -> dict[str, str]:
    """A provenance as a reader wants it, sorted: classes by name, not by the annotation file's
    numbers."""
    hidden = ('categories',) if provenance.get('classes') else ()
    return {
        name: ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in sorted(provenance.items())
        if name not in hidden
    }


def _lines(analysis: Mapping) -> list[dict]:
    """What the chart can show: the curves, the router's first, then the peers'."""
    lines = [
        (*look, analysis['curves'][name])
        for name, look in _CURVES.items()
        if name in analysis['curves']
    ]
    for index, (name, peer) in enumerate(analysis['peers'].items()):
        color = _PEER_COLORS[index % len(_PEER_COLORS)]
        dash = _PEER_DASHES[index % len(_PEER_DASHES)]
        lines.append((name, color, dash, False, '', peer['curve']))
    plain = analysis['baselines']['points']
    if plain:
        meaning = 'on the same images, from small to large; dots are what was run'
        lines.append((_PLAIN, PLAIN_COLOR, '', True, meaning, plain))
    names = ('name', 'color', 'dash', 'shown', 'meaning')
    return [
        dict(zip(names, line), dots=line[0] == _PLAIN, points=[_point(row) for row in line[-1]])
        for line in lines
    ]


def _point(row: Mapping) -> dict:
    """A point of a curve as the chart takes it: in milliseconds, rounded."""
    point = dict(
        gflops=float(f'{row["gflops"]:.6g}'),
        latency=float(f'{1000 * row["latency"]:.6g}'),
        ap=round(row['ap'], 3),
    )
    if row.get('low') is not None:
        point.update(low=round(row['low'], 3), high=round(row['high'], 3))
    return point


def _drawn(analysis: Mapping, lines: Sequence[Mapping]) -> dict:
    """What the script reads; see ``page.js``."""
    points = [
        dict(
            _point(row),
            threshold=round(row['threshold'], 6),
            share=round(row['hard_share'], 6),
            hard=row['hard'],
            easy=analysis['images'] - row['hard'],
        )
        for row in analysis['thresholds']
    ]
    start = min(range(len(points)), key=lambda index: abs(points[index]['share'] - 0.5))
    names = ('name', 'color', 'dash', 'shown', 'dots', 'points')
    return dict(
        points=points,
        start=start,
        colors=EXIT_COLORS,
        lines=[{name: line[name] for name in names} for line in lines],
    )
