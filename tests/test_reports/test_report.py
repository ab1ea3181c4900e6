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
from dynamicdet.reports.figures import picture_figure, png
from dynamicdet.reports.report import (
    BY_CALIBRATION,
    BY_QUANTILE,
    format_table,
    misses,
    sentences,
    write_report,
)
from dynamicdet.routing.curve import Chance, by_calibration, trade_off
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.record import RoutingRecord
from dynamicdet.routing.served import chance_interval

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
    )


def test_the_page_and_its_files(coco, record, tmp_path, capsys):
    out = tmp_path / 'deep' / 'report'
    page = write_report(record, coco, out, title='Digits & <more>')
    text = page.read_text()
    assert page == out / 'report.html'
    plots = {'trade_off.png', 'difficulty.png', 'sizes.png', 'agreement.png'}
    gallery = {f'{end}_{place}.png' for end in ('easiest', 'hardest') for place in range(1, 7)}
    # No temporary file stays.
    assert {path.name for path in out.iterdir()} == {'report.html', 'report.json', *plots, *gallery}
    assert text.count('src="data:image/png;base64,') == len(plots | gallery)
    assert '<h1>Digits &amp; &lt;more&gt;</h1>' in text and 'a&lt;b&gt;.py' in text
    # Not calibrated: one table, and nothing is missed.
    assert BY_CALIBRATION not in text and misses(()) == []
    assert 'Spearman&#x27;s rank correlation: 1.00' in text
    assert capsys.readouterr().out == ''


def test_the_page_needs_nothing_else(coco, record, tmp_path):
    text = write_report(record, coco, tmp_path / 'report').read_text()
    assert not re.search(r'<script|<link|@import|url\(|https?:', text)
    assert all(source.startswith('data:') for source in re.findall(r'src="([^"]*)', text))


def test_numbers(coco, record, tmp_path):
    write_report(record, coco, tmp_path / 'report')
    numbers = json.loads((tmp_path / 'report' / 'report.json').read_text())
    assert numbers['rows'] == trade_off(record, coco)
    assert numbers['provenance'] == record.provenance
    assert numbers['rank_correlation'] == pytest.approx(1)
    assert numbers['gain']['half'] == pytest.approx(0.5)
    first, second = numbers['exits']
    assert first['small'] == pytest.approx(100 * 51 / 101) and second['small'] == pytest.approx(100)
    assert first['large'] is second['large'] is None


def test_rows_that_are_given_are_used(coco, record, tmp_path):
    rows = trade_off(record, coco, shares=(0, 0.3, 1))
    write_report(record, coco, tmp_path / 'report', rows)
    assert json.loads((tmp_path / 'report' / 'report.json').read_text())['rows'] == rows


def test_data_without_a_difficulty_of_their_own(coco, record, tmp_path):
    del coco.imgs[5]['difficulty']
    text = write_report(record, coco, tmp_path / 'report').read_text()
    assert 'Spearman' not in text and not (tmp_path / 'report' / 'agreement.png').exists()


def test_pictures_that_are_gone_or_broken(coco, record, tmp_path):
    record.files[0] = str(tmp_path / 'gone <1>.jpg')
    (tmp_path / '1.png').write_bytes((tmp_path / '1.png').read_bytes()[:60])
    text = write_report(record, coco, tmp_path / 'report').read_text()
    assert text.count('picture not found') == 2
    assert 'gone &lt;1&gt;.jpg' in text


def test_few_images_that_are_all_alike(coco, record, tmp_path):
    record.difficulty[:] = 0.5
    record = record.take([6, 7])
    text = write_report(record, coco, tmp_path / 'report').read_text()
    assert 'cannot be judged' in text and 'rank correlation: not defined' in text


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
def test_the_verdict_is_honest(record, ap, said):
    rows = [row(25, 25, 0, share=0), row(ap, 30, 0.3), row(35, 35, 0, share=1)]
    text = ' '.join(sentences(rows, record, [dict(ap=25.0), dict(ap=35.0)]))
    assert 'exit 1 is better than exit 0 by 10.00 AP (35.00 against 25.00)' in text
    assert said in text and 'standard deviation of random routing 0.30' in text
    assert 'for 3.00 GFLOPs per image instead of 1.00' in text


def test_a_second_exit_that_is_worse(record):
    rows = [row(25, 25, 0, share=0), row(24, 24, 0.3), row(20, 20, 0, share=1)]
    text = ' '.join(sentences(rows, record, [dict(ap=25.0), dict(ap=20.0)]))
    assert 'exit 1 is NOT better than exit 0' in text and 'straight line' not in text


def test_table():
    lines = format_table([row(31.5, 30, 0.25), dict(row(9, 10, 1, share=0.3), hard_share=0.34)])
    heading, rule, first, second = lines.split('\n')
    assert len({len(line) for line in (heading, rule, first, second)}) == 1
    assert first.split() == [
        '50%',
        '0.4000',
        '31.50',
        '60.00',
        '2.00',
        '15.0',
        '30.00',
        '±',
        '0.25',
        '+1.50',
    ]
    assert second.split()[:3] == ['34%', '(asked', '30%)'] and second.endswith('-1.00')


def test_what_calibrated_thresholds_serve_stands_beside_what_this_set_would(coco, record, tmp_path):
    """The calibration's images were all easier: for half of them hard, all of these are."""
    chance = Chance(Mixtures(record, coco), draws=2, resamples=0)
    rows = trade_off(record, coco, shares=(0, 0.5, 1), chance=chance)
    served = by_calibration(record, chance, np.linspace(0, 0.04, 100), (0, 0.5, 1))
    assert [one['hard_share'] for one in served] == [0, 1, 1] and [
        one['hard_share'] for one in rows
    ] == [0, 0.5, 1]
    assert [one['gflops'] for one in served] == [1, 3, 3] and served[1]['ap'] == rows[2][
        'ap'
    ] == pytest.approx(100)
    low, high = chance_interval(50, 100, IMAGES)
    lines = format_table(served, calibrated=True).splitlines()
    assert lines[3].split()[:2] == ['50%', f'{served[1]["threshold"]:.4f}']
    assert f'100.0%  {low:.1%} to {high:.1%} !' in lines[3] and '!' not in lines[2] + lines[4]
    (sentence,) = misses(served)
    assert 'for 50% hard sends 100.0% of these images on' in sentence
    page = write_report(record, coco, tmp_path / 'report', rows, calibrated=served).read_text()
    assert html.escape(sentence) in page and all(
        html.escape(title) in page for title in (BY_QUANTILE, BY_CALIBRATION)
    )
    assert json.loads((tmp_path / 'report' / 'report.json').read_text())['calibrated'] == served


def test_on_its_own_images_a_calibration_serves_what_was_asked_for(coco, record):
    chance = Chance(Mixtures(record, coco), draws=2, resamples=0)
    own = [image['difficulty'] for image in record]
    rows, served = trade_off(record, coco, chance=chance), by_calibration(record, chance, own)
    for name in ('threshold', 'hard_share', 'ap', 'gflops', 'latency'):
        assert [one[name] for one in served] == [one[name] for one in rows]
    assert misses(served) == []


def test_boxes_below_the_score_are_not_drawn():
    pixels = np.full((50, 80, 3), 200, np.uint8)

    def draw(score):
        detections = [dict(bbox=[20, 20, 30, 20], score=score, category_id=3)]
        return png(picture_figure(pixels, detections, {3: NAME}, 0.5, 1))

    nothing = png(picture_figure(pixels, [], {3: NAME}, 0.5, 1))
    assert draw(0.29) == nothing != draw(0.3)
    # 3.2 inches of 180 dots, in the shape of the picture.
    assert Image.open(io.BytesIO(nothing)).size == (576, 360)
