"""What routing is worth, as one self-contained page: words, a chart with a slider, tables, a
gallery.

Numbers come from `analysis.analyze`; nothing is computed here but what places them.
"""

import html
import json
from collections.abc import Mapping, Sequence

from .analysis_script import SCRIPT
from .analysis_tables import (
    CURVES,
    bullets,
    correlation_table,
    curve_table,
    end_names,
    facts_list,
    merit_boxes,
    peer_table,
    strata_tables,
    transfer_table,
)
from .figures import EXIT_COLORS, MIN_SCORE

#: Curve -> color (Okabe-Ito, but for grays), dashes, whether it is drawn at first, what it means.
_LINES = dict(
    router=('#222222', '', True, 'the trained router; shaded: 95 % interval'),
    random=(
        '#8a8a8a',
        '6 4',
        True,
        'as many images, drawn at random; shaded: two standard deviations',
    ),
    honest=(
        '#009e73',
        '',
        True,
        'the exit of each image chosen on another view of it and scored on the image itself, so '
        'that luck does not count: what a router could be hoped to reach',
    ),
    oracle=(
        '#cc79a7',
        '',
        False,
        'the exit of each image chosen on the very detections that are scored, then refined on the '
        'AP of the whole set: a ceiling that rewards luck too',
    ),
)
_PEER_COLORS = (
    '#e69f00',
    '#56b4e9',
    '#7a5195',
    '#d55e00',
    '#5b8c00',
    '#0072b2',
    '#a6611a',
    '#003f5c',
)
_PEER_DASHES = ('2 3', '9 3', '9 3 2 3')

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; } p { max-width: 45rem; }
.lead { font-size: 1.08rem; }
.said { max-width: 45rem; padding-left: 1.2rem; } .said li { margin: .3rem 0; }
.note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th { font-weight: 600; vertical-align: bottom; }
td small { display: block; color: #555; white-space: nowrap; }
td .meaning { white-space: normal; max-width: 24rem; }
#chart { width: 100%; cursor: crosshair; } #chart svg { display: block; max-width: 100%; }
#chart text, .sides text { font-family: system-ui, sans-serif; }
fieldset { border: 0; padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
legend { float: left; padding: 0; margin-right: 1rem; font-weight: 600; line-height: 1.9rem; }
label { display: inline-flex; align-items: center; gap: .4rem; min-height: 1.9rem; cursor: pointer; }
.swatch { width: 1.6rem; height: .7rem; flex: none; }
input[type=range] { width: 100%; height: 2rem; margin: 0; accent-color: #222; }
.ends { display: flex; justify-content: space-between; color: #555; font-size: .9rem; }
.now { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.6rem, 1fr)); gap: .5rem;
  margin: .6rem 0; }
.now div { border: 1px solid #ccc; border-radius: .4rem; padding: .3rem .6rem; }
.now dt { color: #555; font-size: .82rem; } .now dd { font-size: 1.15rem; font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
.facts dt { font-weight: 600; }
.merit { display: grid; gap: .8rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); }
.merit > div { border-left: 4px solid #222; padding-left: .8rem; } .merit strong { font-size: 1.3rem; }
.merit p { margin: .2rem 0; }
.bars { min-width: 7rem; } .bar { display: block; height: .5rem; min-width: 1px; }
.bar + .bar { margin-top: 2px; }
figure { margin: 0; } figcaption { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
.gallery { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.sides svg { display: block; width: 100%; max-height: 24rem; background: #eee; }
.exit { font-size: .9rem; font-weight: 600; }
.gone { background: #eee; color: #555; padding: 4rem 1rem; text-align: center; }
:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
@media (max-width: 40rem) { body { padding: .7rem; } table { font-size: .78rem; }
  th, td { padding: .25rem .2rem; } td small { font-size: .65rem; white-space: normal; }
  .bars { min-width: 4.5rem; } .now dd { font-size: 1.05rem; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .4rem; } }
"""


def make_page(title: str, analysis: Mapping, gallery: str) -> str:
    """The page.

    Args:
        title (str): Title, plain text.
        analysis (Mapping): As `analysis.analyze` gives it.
        gallery (str): HTML, as `analysis_gallery.make_gallery` gives it.
    """
    lines = _lines(analysis)
    sections = (
        ('The trade-off', _chart(analysis, lines)),
        ('Is it worth it?', merit_boxes(analysis)),
        ('Why, and what to try', bullets(analysis['diagnosis'])),
        ('In numbers', curve_table(analysis)),
        ('Other routers on the same detections', peer_table(analysis)),
        ('Where the exits differ', strata_tables(analysis)),
        ('Does difficulty follow the benefit?', correlation_table(analysis)),
        ('Does a threshold carry over?', transfer_table(analysis)),
        ('Images', _images(gallery)),
        ('Where the numbers come from', facts_list(analysis['provenance'])),
    )
    body = ''.join(f'<h2>{heading}</h2>{content}' for heading, content in sections if content)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead(analysis))}</p>
{body}
<script type="application/json" id="data">{_json(_drawn(analysis, lines))}</script>
<script>{SCRIPT}</script>
</body></html>
"""


def lead(analysis: Mapping) -> str:
    """The whole in two sentences.

    Args:
        analysis (Mapping): As `analysis.analyze` gives it.
    """
    (first, cheap), (last, dear) = ((end['ap'], end['gflops']) for end in analysis['ends'])
    easy, hard = end_names(analysis)
    gain, half = analysis['merit'][0], analysis['router']['half']
    side = 'above' if gain['value'] >= 0 else 'BELOW'
    ends = (
        '' if gain['low'] is None else f' (95 % interval {gain["low"]:+.1f} to {gain["high"]:+.1f})'
    )
    return (
        f'On {analysis["images"]:,} images, {easy} reaches {first:.1f} AP for {cheap:.3g} GFLOPs '
        f'per image, {hard} {last:.1f} for {dear:.3g}. With {half["hard_share"]:.0%} of the images '
        f'hard, the router reaches {half["ap"]:.1f} for {half["gflops"]:.3g}, '
        f'{abs(gain["value"]):.1f} AP {side} random routing{ends}.'
    )


def _json(value: object) -> str:
    """As it may stand in a page: no tag can end it."""
    return json.dumps(value, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')


def _lines(analysis: Mapping) -> list[dict]:
    """What the chart can show: the curves, the router's first, then the peers'."""
    lines = [
        _line(CURVES[name], *look, analysis['curves'][name])
        for name, look in _LINES.items()
        if name in analysis['curves']
    ]
    for index, (name, peer) in enumerate(analysis['peers'].items()):
        color = _PEER_COLORS[index % len(_PEER_COLORS)]
        dash = _PEER_DASHES[index % len(_PEER_DASHES)]
        lines.append(_line(name, color, dash, False, '', peer['curve']))
    return lines


def _line(
    name: str, color: str, dash: str, shown: bool, meaning: str, curve: Sequence[Mapping]
) -> dict:
    return dict(
        name=name,
        color=color,
        dash=dash,
        shown=shown,
        meaning=meaning,
        points=[_point(row) for row in curve],
    )


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
    """What the script reads; see `analysis_script`."""
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
    names = ('name', 'color', 'dash', 'shown', 'points')
    return dict(
        points=points,
        start=start,
        colors=EXIT_COLORS,
        lines=[{name: line[name] for name in names} for line in lines],
    )


#: What stands under the slider: end of the element's id -> words.
_NOW = dict(
    threshold='threshold',
    share='hard share',
    easy='easy images',
    hard='hard images',
    ap='AP',
    gflops='GFLOPs/image',
    latency='per image',
)


def _chart(analysis: Mapping, lines: Sequence[Mapping]) -> str:
    switches = ''.join(
        f'<label><input type="checkbox" data-line="{index}">{_swatch(line)}'
        f'{html.escape(line["name"])}</label>'
        for index, line in enumerate(lines)
    )
    meanings = bullets(
        (f'{line["name"]}: {line["meaning"]}' for line in lines if line['meaning']), 'note'
    )
    now = ''.join(
        f'<div><dt>{words}</dt><dd id="now-{name}"></dd></div>' for name, words in _NOW.items()
    )
    easy, hard = end_names(analysis)
    first, last = (
        f'<span style="color:{color}">■</span> {name}'
        for color, name in zip(EXIT_COLORS, (easy, hard))
    )
    return f"""<p>An image is hard, and goes on to {hard}, where its difficulty is above the threshold.
Move the slider, or click into the chart.</p>
<fieldset><legend>Cost</legend>
<label><input type="radio" name="cost" value="gflops">GFLOPs</label>
<label><input type="radio" name="cost" value="latency">measured latency</label></fieldset>
<div id="chart"></div>
<label for="threshold">Threshold on difficulty</label>
<input type="range" id="threshold" min="0" max="{len(analysis['thresholds']) - 1}" step="1">
<div class="ends"><span>{first}: all easy, fast</span><span>all hard, slow: {last}</span></div>
<dl class="now">{now}</dl>
<fieldset><legend>Lines</legend>{switches}</fieldset>
{meanings}
<noscript><p>The chart needs JavaScript; the tables below have the same numbers.</p></noscript>"""


def _swatch(line: Mapping) -> str:
    return (
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" '
        f'stroke="{line["color"]}" stroke-width="3" stroke-dasharray="{line["dash"]}"/></svg>'
    )


def _images(gallery: str) -> str:
    said = (
        f'Both exits side by side: boxes with a score from {MIN_SCORE} up, class and score above '
        'them; '
        "dashed: annotated objects. The AP of an image is COCO's of that image by itself."
    )
    return f'<p>{html.escape(said)}</p>{gallery}' if gallery else ''
