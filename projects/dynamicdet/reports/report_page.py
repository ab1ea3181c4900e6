"""The report's words and layout: rows -> a table of plain text, or a page of HTML."""

import base64
import html
from collections.abc import Mapping, Sequence

from .page import shown_facts
from .figures import MIN_SCORE


def _share_cell(row: Mapping) -> str:
    asked, got = f'{row["share"]:.0%}', f'{row["hard_share"]:.0%}'
    return got if got == asked else f'{got} (asked {asked})'


#: Heading, what a row shows there, what it means. By this set's quantile.
_COLUMNS = (
    ('hard share', _share_cell, 'share of the images that leave at exit 1, the slow one'),
    (
        'threshold',
        lambda row: f'{row["threshold"]:.4f}',
        'an image is hard when its difficulty is above it; -1: all are hard, 1: none is',
    ),
    (
        'AP',
        lambda row: f'{row["ap"]:.2f}',
        'average precision of the boxes, as COCO defines it (IoU 0.50 to 0.95), in percent',
    ),
    ('AP50', lambda row: f'{row["ap50"]:.2f}', 'the same at IoU 0.50 alone, in percent'),
    (
        'GFLOPs/image',
        lambda row: f'{row["gflops"]:.2f}',
        'compute, mean per image, 2 x multiply-adds, in 10^9',
    ),
    (
        'latency, ms',
        lambda row: f'{1000 * row["latency"]:.1f}',
        "time per image at batch 1: the two exits' own times, weighted by the hard share",
    ),
    (
        'random AP',
        lambda row: f'{row["random_ap"]:.2f} ± {row["random_std"]:.2f}',
        'AP where as many images, drawn at random, are hard: mean and standard deviation',
    ),
    (
        'gain',
        lambda row: f'{row["ap"] - row["random_ap"]:+.2f}',
        'AP minus random AP: what the router is worth at this share',
    ),
)

#: The same, by the calibrated threshold.
_CALIBRATED = (
    ('wanted', lambda row: f'{row["share"]:.0%}', 'hard share that was asked for'),
    (
        'calibrated threshold',
        lambda row: f'{row["threshold"]:.4f}',
        "what the calibration's images give for it, and tools/test.py goes by",
    ),
    (
        'served',
        lambda row: f'{row["hard_share"]:.1%}',
        'hard share of these images by that threshold',
    ),
    (
        'chance explains',
        lambda row: f'{row["chance_low"]:.1%} to {row["chance_high"]:.1%}{" !" * is_missed(row)}',
        "hard shares to be expected, 99 in 100 times, on images like the calibration's; !: it was "
        'another',
    ),
    *(column for column in _COLUMNS if column[0] in ('AP', 'AP50', 'GFLOPs/image', 'latency, ms')),
)

#: Titles of both tables.
BY_QUANTILE = "By this set's quantile: thresholds that give these images the hard share"
BY_CALIBRATION = 'By the calibrated threshold: what is served when the hard share is asked for'

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.lead { font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap; vertical-align: bottom;
         border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; white-space: normal; }
figure { margin: 0; } img { display: block; max-width: 100%; height: auto; }
figure > img.plot { width: 40rem; }
figcaption { color: #555; font-size: .9rem; max-width: 40rem; }
.gallery { display: grid; gap: 1rem;
           grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.gallery img { width: 100%; } .gallery figcaption { overflow-wrap: anywhere; }
.gone { background: #eee; color: #555; padding: 4rem 1rem; text-align: center; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: .7rem; } table { font-size: .62rem; }
                            th, td { padding: .25rem .13rem; } }
"""


def is_missed(row: Mapping) -> bool:
    """Whether more than chance parts the hard share that a calibrated threshold serves from the
    wanted one."""
    return not row['chance_low'] <= row['hard_share'] <= row['chance_high']


def format_table(rows: Sequence[Mapping], calibrated: bool = False) -> str:
    """The trade-off as a table of plain text.

    Args:
        rows (Sequence[Mapping]): As `routing.curve.trade_off` gives them, or
            `routing.curve.by_calibration`.
        calibrated (bool): Whether they are of the latter. Defaults to False.
    """
    columns = _CALIBRATED if calibrated else _COLUMNS
    lines = [[heading for heading, _, _ in columns]]
    lines += [[cell(row) for _, cell, _ in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join(
        '  '.join(text.rjust(width) for text, width in zip(line, widths)) for line in lines
    )


def make_page(
    title: str,
    lead: Sequence[str],
    rows: Sequence[Mapping],
    plots: Sequence[tuple[str, bytes, str]],
    gallery: Mapping[str, Sequence[tuple]],
    provenance: Mapping,
    calibrated: Sequence[Mapping] = (),
) -> str:
    """The report as self-contained HTML.

    Args:
        title (str): Title.
        lead (Sequence[str]): Sentences to open with.
        rows (Sequence[Mapping]): As `routing.curve.trade_off` gives them.
        plots (Sequence[tuple]): Heading, PNG, caption of each.
        gallery (Mapping[str, Sequence[tuple]]): 'easiest', 'hardest' -> per image its name, PNG
            (None if the picture could not be read) and caption.
        provenance (Mapping): Name -> value.
        calibrated (Sequence[Mapping]): As `routing.curve.by_calibration` gives them; none without a
            calibration.
    """
    shown = ''.join(_pictures(end, pictures) for end, pictures in gallery.items())
    columns = (*_COLUMNS, *_CALIBRATED) if calibrated else _COLUMNS
    meanings = dict((heading, meaning) for heading, _, meaning in columns).items()
    served = ''
    if calibrated:
        served = f'<h2>{html.escape(BY_CALIBRATION)}</h2><div class="wide">{_table(calibrated, _CALIBRATED)}</div>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(' '.join(lead))}</p>
<h2>{html.escape(BY_QUANTILE)}</h2>
<div class="wide">{_table(rows, _COLUMNS)}</div>
{served}
{''.join(_plot(*plot) for plot in plots)}
{shown}
<h2>What the columns mean</h2>{_definitions(meanings)}
<h2>Where the numbers come from</h2>{_definitions(shown_facts(provenance).items())}
</body></html>
"""


def _table(rows: Sequence[Mapping], columns: Sequence[tuple]) -> str:
    head = ''.join(
        f'<th>{html.escape(heading).replace("/", "/<wbr>")}</th>' for heading, _, _ in columns
    )
    body = ''.join(
        '<tr>' + ''.join(f'<td>{html.escape(cell(row))}</td>' for _, cell, _ in columns) + '</tr>'
        for row in rows
    )
    return f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _definitions(pairs: Sequence[tuple[str, object]]) -> str:
    return (
        '<dl>'
        + ''.join(
            f'<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>'
            for name, value in pairs
        )
        + '</dl>'
    )


def _plot(heading: str, content: bytes, caption: str) -> str:
    return (
        f'<h2>{html.escape(heading)}</h2><figure>{_image(content, caption, "plot")}'
        f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _pictures(end: str, pictures: Sequence[tuple]) -> str:
    return (
        f'<h2>The {end} images</h2><p>At the threshold for half hard: boxes of the exit that '
        f'each takes, scores from {MIN_SCORE}.</p>'
        f'<div class="gallery">{"".join(map(_picture, pictures))}</div>'
    )


def _picture(shown: tuple[str, bytes | None, str]) -> str:
    _, content, caption = shown
    inner = _image(content, caption) if content else '<div class="gone">picture not found</div>'
    return f'<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _image(content: bytes, alternative: str, kind: str = 'picture') -> str:
    return (
        f'<img class="{kind}" alt="{html.escape(alternative)}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    )
