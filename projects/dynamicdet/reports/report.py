"""One page that shows what a calibrated detector does: numbers in words, a table, pictures."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from scipy.stats import spearmanr

from ..files import write_atomically
from ..routing.curve import (
    AREAS,
    check_record,
    difficulties_of,
    evaluate,
    gain_over_random,
    mix,
    trade_off,
)
from ..routing.record import RoutingRecord
from ..routing.thresholds import hard_share, threshold_for_share
from .figures import (
    agreement_figure,
    histogram_figure,
    picture_figure,
    png,
    sizes_figure,
    trade_off_figure,
)
from .report_page import BY_CALIBRATION, BY_QUANTILE, format_table, is_missed, make_page

__all__ = ['BY_CALIBRATION', 'BY_QUANTILE', 'format_table', 'misses', 'sentences', 'write_report']

#: So many of the easiest and of the hardest images are shown.
_GALLERY = 6


def write_report(
    record: RoutingRecord,
    coco: COCO,
    out_dir: str | Path,
    rows: Sequence[Mapping] | None = None,
    title: str = 'What the router is worth',
    calibrated: Sequence[Mapping] = (),
) -> Path:
    """Write ``report.html``, self-contained, its pictures as PNG files, and ``report.json``.

    Args:
        record (RoutingRecord): One pass over a data set; see `routing.curve`.
        coco (COCO): Its ground truth. Where all image entries have a ``difficulty``, as those of
            the built-in data, the router's is compared with it.
        out_dir (str or Path): Where to; made if absent. What is there is replaced file by file,
            the page last.
        rows (Sequence[Mapping], optional): As `routing.curve.trade_off` gives them. Defaults to
            its rows for this record.
        title (str): Title of the page.
        calibrated (Sequence[Mapping]): The rows of `routing.curve.by_calibration`. Defaults to
            none: the checkpoint is not calibrated.

    Returns:
        Path: The page.

    Raises:
        UsageError: As `routing.curve.trade_off`. A picture that cannot be read is no error: the
            page says so in its place.
    """
    check_record(record, coco)
    rows = trade_off(record, coco) if rows is None else rows
    ids = record.ids.tolist()
    exits = [evaluate(coco, mix(record, [exit] * len(ids)), ids) for exit in (0, 1)]
    correlation = _rank_correlation(record, coco)
    plots = _plots(record, coco, rows, exits, correlation)
    gallery = _gallery(record, coco)
    page = make_page(
        title,
        [*sentences(rows, record, exits), *misses(calibrated)],
        rows,
        list(plots.values()),
        gallery,
        record.provenance,
        calibrated,
    )
    numbers = dict(
        rows=list(rows),
        calibrated=list(calibrated),
        exits=exits,
        gain=gain_over_random(rows),
        rank_correlation=correlation,
        provenance=record.provenance,
    )
    out_dir = Path(out_dir)
    for name, (_, content, _) in plots.items():
        write_atomically(content, out_dir / f'{name}.png')
    for name, content, _ in itertools.chain(*gallery.values()):
        if content:
            write_atomically(content, out_dir / f'{name}.png')
    write_atomically(json.dumps(numbers, indent=1, default=str).encode(), out_dir / 'report.json')
    write_atomically(page.encode(), out_dir / 'report.html')
    return out_dir / 'report.html'


def sentences(
    rows: Sequence[Mapping], record: RoutingRecord, exits: Sequence[Mapping]
) -> list[str]:
    """What the numbers say, in plain words, whichever way they fall.

    Args:
        rows (Sequence[Mapping]): As `routing.curve.trade_off` gives them.
        record (RoutingRecord): See `routing.curve`.
        exits (Sequence[Mapping]): `routing.curve.evaluate` of exit 0 and of exit 1.
    """
    first, last = (scores['ap'] for scores in exits)
    said = (
        f'better than exit 0 by {last - first:.2f} AP' if last > first else 'NOT better than exit 0'
    )
    cheap, dear = record.gflops
    told = [
        f'On {len(record)} images, exit 1 is {said} ({last:.2f} against {first:.2f}), '
        f'for {dear:.2f} GFLOPs per image instead of {cheap:.2f}.'
    ]
    middle = min(rows, key=lambda row: abs(row['hard_share'] - 0.5))
    if not 0 < middle['hard_share'] < 1:
        return told + [
            'The router cannot be judged: no row of the table lies between none and all hard. Too '
            'many images have the same difficulty, or no such share was asked for.'
        ]
    told.append(_verdict(middle))
    gain = gain_over_random(rows)
    told.append(f'Over all shares between the ends, it {_gains(gain["mean"])} on average.')
    if gain['half'] is not None and last > first:
        side = 'above' if gain['half'] >= 0 else 'below'
        told.append(
            f'At half hard, its AP is {side} the straight line between the exits by '
            f'{abs(gain["half"]):.0%} of their difference.'
        )
    return told


def misses(calibrated: Sequence[Mapping]) -> list[str]:
    """A sentence on the hard share that calibrated thresholds miss most, if they miss any by more
    than chance.

    Args:
        calibrated (Sequence[Mapping]): As `routing.curve.by_calibration` gives them.
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
    known = f'(standard deviation of random routing {spread:.2f})'
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


def _plots(
    record: RoutingRecord,
    coco: COCO,
    rows: Sequence[Mapping],
    exits: Sequence[Mapping],
    correlation: float | None,
) -> dict[str, tuple[str, bytes, str]]:
    """Name -> heading, PNG, caption."""
    difficulties = difficulties_of(record)
    threshold = threshold_for_share(difficulties, 0.5)
    share = hard_share(difficulties, threshold)
    plots = dict(
        trade_off=(
            'The trade-off',
            trade_off_figure(rows),
            'What each hard share (percent at the points) costs and brings. Above the dashed line, '
            'the router chooses better than chance.',
        ),
        difficulty=(
            'Difficulties',
            histogram_figure(difficulties, threshold),
            f'How the router spreads the images, and the threshold for half hard: {share:.0%} are '
            'above it and go on to exit 1.',
        ),
        sizes=(
            'Each exit alone, by size of object',
            sizes_figure(
                [dict(scores, all=scores['ap']) for scores in exits], _count_objects(record, coco)
            ),
            'By the area of the objects: small below 32 x 32 pixels, large from 96 x 96.',
        ),
    )
    given = _given_difficulties(record, coco)
    if given is not None:
        value = 'not defined' if correlation is None else f'{correlation:.2f}'
        plots['agreement'] = (
            "The router's difficulty and that of the data",
            agreement_figure(given, difficulties),
            'The difficulty that the images were made with, which the router never sees, against '
            f"the router's. Spearman's rank correlation: {value} (1: same order, 0: unrelated).",
        )
    return {
        name: (heading, png(figure), caption) for name, (heading, figure, caption) in plots.items()
    }


def _given_difficulties(record: RoutingRecord, coco: COCO) -> np.ndarray | None:
    """Difficulties in the annotation file, (n,), in the record's order; None unless it has all."""
    entries = coco.loadImgs(record.ids.tolist())
    if not all('difficulty' in entry for entry in entries):
        return None
    return np.array([entry['difficulty'] for entry in entries], float)


def _rank_correlation(record: RoutingRecord, coco: COCO) -> float | None:
    """Spearman's, in [-1, 1], of the router's difficulties and the annotation file's; None where
    the file has none or either side is constant."""
    given, difficulties = _given_difficulties(record, coco), difficulties_of(record)
    if given is None or np.ptp(given) == 0 or np.ptp(difficulties) == 0:
        return None
    return float(spearmanr(given, difficulties).statistic)


def _count_objects(record: RoutingRecord, coco: COCO) -> dict[str, int]:
    """Objects of the record's images by size; crowds are left out, as in AP."""
    found = coco.getAnnIds(imgIds=record.ids.tolist(), iscrowd=False)
    areas = [annotation['area'] for annotation in coco.loadAnns(found)]
    return {size: sum(low <= area <= high for area in areas) for size, (low, high) in AREAS.items()}


def _gallery(record: RoutingRecord, coco: COCO) -> dict[str, list[tuple[str, bytes | None, str]]]:
    """The easiest and the hardest images: name, PNG if it can be read, caption."""
    difficulties = difficulties_of(record)
    threshold = np.float32(threshold_for_share(difficulties, 0.5))
    names = {category['id']: category['name'] for category in coco.cats.values()}
    order = np.argsort(difficulties, kind='stable').tolist()
    count = min(_GALLERY, max(1, len(order) // 2))
    chosen = dict(easiest=order[:count], hardest=order[::-1][:count])
    return {
        end: [
            _shown(
                record[int(index)], names, int(difficulties[index] > threshold), f'{end}_{place}'
            )
            for place, index in enumerate(indices, 1)
        ]
        for end, indices in chosen.items()
    }


def _shown(image: Mapping, names: Mapping[int, str], exit: int, name: str) -> tuple:
    caption = f'{Path(image["file"]).name}: difficulty {image["difficulty"]:.3f}, exit {exit}'
    try:
        # Boxes are in the frame that mmcv reads, turned as the camera says.
        with Image.open(image['file']) as file:
            pixels = np.asarray(ImageOps.exif_transpose(file).convert('RGB'))
    except (OSError, SyntaxError):  # Pillow's word for some broken files is the latter.
        return name, None, caption
    figure = picture_figure(pixels, image['detections'][exit], names, image['difficulty'], exit)
    return name, png(figure), caption
