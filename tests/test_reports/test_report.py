"""Budgets on the page: what the exits, the router and calibrated thresholds give."""

import contextlib
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from conftest import rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.reports.figures import png, trade_off_figure
from dynamicdet.reports.routing_analysis import analyze_routing, format_analysis, write_analysis
from dynamicdet.reports.routing_analysis_gallery import show_image
from dynamicdet.reports.routing_analysis_text import (
    BY_CALIBRATION,
    BY_QUANTILE,
    budget_sentences,
    calibrated_table,
    share_cell,
    share_miss_sentences,
)
from dynamicdet.routing.budget_report import share_prediction_interval
from dynamicdet.routing.curve import RandomRouting, calibrated_trade_off, trade_off
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.record import RoutingRecord

IMAGES = 14
BOX = [10, 12, 20, 20]
NAME = '<b>$x$ & "y"</b>'


@pytest.fixture
def coco():
    coco = COCO()
    images = [
        dict(id=index, width=64, height=48, difficulty=index / IMAGES) for index in range(IMAGES)
    ]
    coco.dataset = dict(
        images=images,
        categories=[dict(id=3, name=NAME)],
        annotations=[
            dict(id=index + 1, image_id=index, bbox=BOX, area=400, category_id=3, iscrowd=0)
            for index in range(IMAGES)
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@pytest.fixture
def record(tmp_path):
    """Exit 1 finds all objects, exit 0 those of the first half; difficulties rise."""
    hit = [dict(bbox=BOX, score=0.9, category_id=3)]
    images = []
    for index in range(IMAGES):
        path = tmp_path / f'{index}.png'
        Image.new('RGB', (64, 48), (10 * index, 90, 120)).save(path)
        images.append(
            dict(
                id=index,
                file=str(path),
                difficulty=(index + 1) / 20,
                detections=[hit if index < IMAGES / 2 else [], hit],
            )
        )
    return RoutingRecord.from_images(
        images,
        gflops=[1.0, 3.0],
        latencies=[0.010, 0.020],
        provenance=dict(config='a<b>.py', seed=0),
    )


def row(ap, random_ap, random_std, share=0.5):
    return dict(
        share=share,
        threshold=0.4,
        hard_share=share,
        ap=ap,
        ap50=60.0,
        gflops=2.0,
        latency=0.015,
        random_ap=random_ap,
        random_std=random_std,
        gain_low=-0.1,
        gain_high=2.0,
    )


def write_report(record, coco, out, calibration=(), **kwargs):
    analysis = analyze_routing(record, coco, bootstrap=0, calibration=calibration)
    return write_analysis(record, coco, analysis, out, name='report', **kwargs)


def numbers_of(page):
    return json.loads(page.with_suffix('.json').read_text())


def tables_of(page):
    """Heading above it -> cells of the table; of small print the standard deviations alone."""
    found = {}
    for heading, table in re.findall(
        r'<h[23]>([^<]*)</h[23]>(?:(?!<h[23]).)*?<table>(.*?)</table>', page.read_text(), re.S
    ):
        table = re.sub(r'<small>(± [^<]*)</small>', r' \1', table)
        table = re.sub(r'<small.*?</small>', '', table, flags=re.S)
        rows = [re.findall(r'<t[dh][^>]*>(.*?)</t[dh]>', row, re.S) for row in table.split('<tr>')]
        found[html.unescape(heading)] = [list(map(html.unescape, row)) for row in rows]
    return found


def correlation(numbers):
    return {one['name']: one['value'] for one in numbers['correlations']}.get(
        'difficulty in the annotation file', 'absent'
    )


def ends(*aps):
    return [dict(exit=exit, ap=ap, gflops=1.0 + 2 * exit) for exit, ap in enumerate(aps)]


def test_the_page_and_its_files(coco, record, tmp_path, capsys):
    out = tmp_path / 'deep' / 'report'
    page = write_report(record, coco, out, title='Digits & <more>')
    text = page.read_text()
    assert page == out / 'report.html'
    # No temporary file stays.
    assert {path.name for path in out.iterdir()} == {'report.html', 'report.json'}
    # Of the easiest, the hardest and those of the first half that gain nothing by going on.
    assert text.count('href="data:image/jpeg;base64,') == text.count('class="pair"') == 8
    assert '<h1>Digits &amp; &lt;more&gt;</h1>' in text and 'a&lt;b&gt;.py' in text
    assert NAME not in text and html.escape(NAME, quote=False) in text.replace('&#34;', '"')
    # Not calibrated: one table, and nothing is missed.
    assert BY_CALIBRATION not in text and share_miss_sentences(()) == []
    assert 'is not calibrated' in text
    assert tables_of(page)['Does difficulty follow the benefit?'][-1][:2] == [
        'difficulty in the annotation file',
        '+1.00',
    ]
    assert capsys.readouterr().out == ''


def test_numbers(coco, record, tmp_path):
    numbers = numbers_of(write_report(record, coco, tmp_path))
    assert numbers['rows'] == trade_off(record, coco, resamples=0)
    assert numbers['provenance'] == record.provenance
    assert correlation(numbers) == pytest.approx(1)
    assert numbers['merit'][1]['value'] == pytest.approx(0.5)
    small, _, large = numbers['strata'][0]['rows']
    assert small['aps'] == pytest.approx([100 * 51 / 101, 100]) and large['aps'] == [None, None]


def test_data_without_a_difficulty_of_their_own(coco, record, tmp_path):
    del coco.imgs[5]['difficulty']
    assert correlation(numbers_of(write_report(record, coco, tmp_path))) == 'absent'


def test_pictures_that_are_gone_or_broken(coco, record, tmp_path):
    record.files[0] = str(tmp_path / 'gone <1>.jpg')
    (tmp_path / '1.png').write_bytes((tmp_path / '1.png').read_bytes()[:60])
    text = write_report(record, coco, tmp_path / 'report').read_text()
    assert text.count('picture not found') == 2
    assert 'gone &lt;1&gt;.jpg' in text


def test_few_images_that_are_all_alike(coco, record, tmp_path):
    record.difficulty[:] = 0.5
    page = write_report(record.take([6, 7]), coco, tmp_path)
    assert 'cannot be judged' in page.read_text()
    assert correlation(numbers_of(page)) is None
    assert tables_of(page)['Does difficulty follow the benefit?'][-1][1] == 'not defined'


@pytest.mark.parametrize(
    'images, said',
    [
        (lambda images: [], 'no images'),
        (lambda images: [dict(images[0], difficulty=float('nan'))], 'image 0 .* difficulty nan'),
    ],
)
def test_bad_records_write_nothing(coco, record, tmp_path, images, said):
    with pytest.raises(UsageError, match=said):
        write_report(rebuilt(record, images(record)), coco, tmp_path / 'report')
    assert not (tmp_path / 'report').exists()


def test_a_failure_leaves_the_page_that_was_there(coco, record, tmp_path):
    page = write_report(record, coco, tmp_path / 'report')
    before = page.read_bytes()
    (page.parent / 'report.json').unlink()
    (page.parent / 'report.json').mkdir()
    with pytest.raises(OSError):
        write_report(record, coco, tmp_path / 'report', title='New')
    assert page.read_bytes() == before
    assert not list(page.parent.glob('.*'))


@pytest.mark.parametrize(
    'ap, said',
    [
        (29.0, 'does NOT gain over random routing: it loses 1.00 AP'),
        (30.2, 'gains 0.20 AP over random routing, which is within one standard deviation'),
        (30.4, 'gains 0.40 AP over random routing, which is within two standard deviations'),
        (31.0, 'gains 1.00 AP over random routing, more than two standard deviations'),
    ],
)
def test_the_verdict_is_honest(ap, said):
    rows = [row(25, 25, 0, share=0), row(ap, 30, 0.3), row(35, 35, 0, share=1)]
    text = ' '.join(budget_sentences(dict(images=14, rows=rows, ends=ends(25.0, 35.0))))
    assert 'exit 1 is better than exit 0 by 10.00 AP (35.00 against 25.00)' in text
    assert said in text and 'standard deviation of random routing 0.30' in text
    assert '; 95 % interval of the gain -0.10 to +2.00)' in text
    assert 'for 3.00 GFLOPs per image instead of 1.00' in text


def test_a_second_exit_that_is_worse():
    rows = [row(25, 25, 0, share=0), row(24, 24, 0.3), row(20, 20, 0, share=1)]
    text = ' '.join(budget_sentences(dict(images=14, rows=rows, ends=ends(25.0, 20.0))))
    assert 'exit 1 is NOT better than exit 0' in text and 'straight line' not in text


def test_table_of_budgets(coco, record, tmp_path):
    """Two images share a difficulty: a tenth of fourteen is one, and there are none or two."""
    record.difficulty[12:] = 0.7
    page = write_report(record, coco, tmp_path)
    head, *rows = [row for row in tables_of(page)[BY_QUANTILE] if row]
    assert head == [
        'hard share',
        'threshold',
        'AP',
        'AP50',
        'random AP',
        'gain',
        'oracle',
        'GFLOPs',
        'ms',
    ]
    half = trade_off(record, coco, shares=[0.5], resamples=0)[0]
    assert rows[5] == [
        '50%',
        f'{half["threshold"]:.4f}',
        '100.00',
        '100.00',
        f'{half["random_ap"]:.2f} ± {half["random_std"]:.2f}',
        f'{100 - half["random_ap"]:+.2f}',
        '100.00',
        '2.00',
        '15.0',
    ]
    assert {len(line) for line in rows} == {len(head)}
    assert rows[1][0] in ('0% (asked 10%)', '14% (asked 10%)')
    lines = format_analysis(numbers_of(page)).split('\n')
    at = lines.index(BY_QUANTILE) + 2
    assert lines[at + 2].startswith(rows[1][0]) and rows[1][0] == share_cell(
        numbers_of(page)['rows'][1]
    )


def test_what_calibrated_thresholds_serve_stands_beside_what_this_set_would(coco, record, tmp_path):
    """The calibration's images were all easier: for half of them hard, all of these are."""
    calibration = np.linspace(0, 0.04, 100)
    page = write_report(record, coco, tmp_path, calibration)
    numbers = numbers_of(page)
    rows, served = ([numbers[name][at] for at in (0, 5, 10)] for name in ('rows', 'calibrated'))
    assert [one['hard_share'] for one in served] == [0, 1, 1] and [
        one['hard_share'] for one in rows
    ] == [0, 0.5, 1]
    assert [one['gflops'] for one in served] == [1, 3, 3] and served[1]['ap'] == rows[2][
        'ap'
    ] == pytest.approx(100)
    low, high = share_prediction_interval(50, 100, IMAGES)
    table = calibrated_table(served)
    assert table[2][:2] == ['50%', f'{served[1]["threshold"]:.4f}']
    assert table[2][2:4] == ['100.0%', f'{low:.1%} to {high:.1%} !']
    # What is forced is certain.
    assert [table[at][3] for at in (1, 3)] == ['0.0% to 0.0%', '100.0% to 100.0%']
    (sentence,) = share_miss_sentences(served)
    assert 'for 50% hard sends 100.0% of these images on' in sentence
    (said,) = share_miss_sentences(numbers['calibrated'])
    text = html.unescape(page.read_text())
    assert said in text and BY_QUANTILE in text and BY_CALIBRATION in text
    random_routing = RandomRouting(Mixtures(record, coco), draws=2, resamples=0)
    assert numbers['calibrated'] == calibrated_trade_off(record, random_routing, calibration)
    shown = [row for row in tables_of(page)[BY_CALIBRATION] if row]
    assert shown == calibrated_table(numbers['calibrated'])
    lines = format_analysis(numbers).split('\n')
    assert lines[lines.index(BY_CALIBRATION) + 8].split()[0] == '50%'


def test_on_its_own_images_a_calibration_serves_what_was_asked_for(coco, record):
    random_routing = RandomRouting(Mixtures(record, coco), draws=2, resamples=0)
    own = [image['difficulty'] for image in record]
    rows, served = (
        trade_off(record, coco, random_routing=random_routing),
        calibrated_trade_off(record, random_routing, own),
    )
    for name in ('threshold', 'hard_share', 'ap', 'gflops', 'latency'):
        assert [one[name] for one in served] == [one[name] for one in rows]
    assert share_miss_sentences(served) == []


def test_boxes_below_the_score_are_not_drawn(record):
    def boxes(*scores):
        found = [dict(bbox=[20, 20, 30, 20], score=score, category_id=3) for score in scores]
        image = dict(record[0], detections=[[], found])
        return show_image(image, ['0', '1'], [], {3: NAME})

    assert boxes(0.29) == boxes()
    assert boxes(0.29, 0.3)['sides'][1]['label'] == 'Exit 1: 1 box'
    # In the shape of the picture, 64 x 48.
    assert (boxes()['width'], boxes()['height']) == (320, 240)


def test_picture_of_the_trade_off(coco, record):
    rows = trade_off(record, coco, resamples=0)
    figure = trade_off_figure(rows)
    above = figure.axes[1]
    # One axis of costs is the other, rescaled: 1 to 3 GFLOPs are 10 to 20 ms.
    assert above.get_xlim() == pytest.approx([5 * x + 5 for x in figure.axes[0].get_xlim()])
    content = png(figure)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
    # 5.2 x 4.4 inches of 180 dots; both exits and the router are drawn in their colors.
    assert pixels.shape == (792, 936, 3)
    for color in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0x22, 0x22, 0x22)):
        assert (pixels == color).all(-1).sum() > 50
    rows[5]['latency'] += 0.001
    assert len(trade_off_figure(rows).axes) == 1
