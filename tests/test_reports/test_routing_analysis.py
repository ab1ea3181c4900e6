"""What is said of a record: known routers, the page, the terminal's tables."""

import contextlib
import copy
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from conftest import rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.reports import routing_analysis_estimates as estimates
from dynamicdet.reports.routing_analysis import (
    analyze_routing,
    format_analysis,
    two_exit_record,
    write_analysis,
)
from dynamicdet.reports.routing_analysis_curves import image_values, threshold_points
from dynamicdet.reports.routing_analysis_gallery import choose_images
from dynamicdet.reports.routing_analysis_text import budget_sentences
from dynamicdet.routing.curve import RandomRouting
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.record import RoutingRecord

IMAGES = 40
BOX = [10, 12, 20, 20]
NAME = '</script><b>"x"</b>'


@pytest.fixture(scope='module')
def coco():
    """One object in the first half of the images, three in the second."""
    coco = COCO()
    annotations = []
    for image in range(IMAGES):
        for place in range(1 if image < IMAGES / 2 else 3):
            box = [BOX[0] + 25 * place, *BOX[1:]]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    bbox=box,
                    area=400,
                    category_id=3,
                    iscrowd=0,
                )
            )
    coco.dataset = dict(
        images=[dict(id=index, width=96, height=48) for index in range(IMAGES)],
        categories=[dict(id=3, name=NAME)],
        annotations=annotations,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@pytest.fixture(scope='module')
def perfect(coco, tmp_path_factory):
    """Exit 1 finds all, exit 0 all of the first half, and the router knows: rising difficulties."""
    folder = tmp_path_factory.mktemp('pictures')
    generator = np.random.default_rng(0)
    images = []
    for index in range(IMAGES):
        path = folder / f'{index}.png'
        Image.new('RGB', (96, 48), (5 * index, 90, 120)).save(path)
        found = [
            dict(bbox=one['bbox'], score=0.9, category_id=3)
            for one in coco.loadAnns(coco.getAnnIds(imgIds=[index]))
        ]
        # A miss where there is something, a ghost of low score everywhere.
        ghost = [
            dict(bbox=[60, 30, 9, 9], score=float(generator.uniform(0.05, 0.3)), category_id=3)
        ]
        both = [(found if index < IMAGES / 2 else []) + ghost, found + ghost]
        images.append(
            dict(
                id=index,
                file=str(path),
                difficulty=(index + 1) / 50,
                detections=both,
                view=both,
                losses=[1.0 if index < IMAGES / 2 else 3.0, 1.0 + 0.01 * index],
                objects=len(found),
                features=generator.normal(size=4).astype(np.float32),
                entropy=float(generator.uniform(0, 8)),
            )
        )
    return RoutingRecord.from_images(
        images,
        gflops=[1.0, 3.0],
        latencies=[0.010, 0.020],
        provenance=dict(config='a<b>.py', branch0_gflops=0.5, branch0_latency=0.002, seed=0),
    )


def rerouted(record, difficulties):
    return dataclasses.replace(record, difficulty=np.array(difficulties, float))


def elsewhere(record):
    """The same of other images."""
    return dataclasses.replace(record, files=[f'other/{file}' for file in record.files])


def without(record, *names):
    return dataclasses.replace(record, **dict.fromkeys(names))


@pytest.fixture(scope='module')
def analysis(perfect, coco):
    return analyze_routing(perfect, coco, (elsewhere(perfect), coco), bootstrap=20)


def merit(analysis, name):
    return next(one for one in analysis['merit'] if one['name'] == name)


def values(curve, key='ap'):
    return [point[key] for point in curve]


# Two exits of several.


def test_a_pair_of_exits(perfect):
    images = list(perfect)
    for image in images:
        image['detections'] = [[], *image['detections']]
        image['losses'] = [9.0, *image['losses']]
        image['view'] = [[], *image['view']]
    record = rebuilt(perfect, images, gflops=[0.5, 1.0, 3.0], latencies=[0.001, 0.010, 0.020])
    pair = two_exit_record(record, (1, -1))
    assert pair.gflops == [1.0, 3.0] and pair.latencies == [0.010, 0.020]
    for image, other in zip(pair, perfect):
        for name in ('detections', 'losses', 'view', 'objects'):
            assert image[name] == other[name]
    # What exit 0's heads cost is not what exit 1's do.
    assert pair.provenance['exits'] == '1 and 2' and 'branch0_gflops' not in pair.provenance
    assert two_exit_record(record).provenance['exits'] == '0 and 2'
    assert two_exit_record(record).provenance['branch0_gflops'] == 0.5
    for exits in ((0, 3), (-4, 1), (1, 1), (2, -1)):
        with pytest.raises(UsageError, match='two different exits'):
            two_exit_record(record, exits)


def test_more_than_two_are_refused(perfect, coco):
    record = perfect.take_exits([0, 1, 1])
    with pytest.raises(UsageError, match='the record has 3: choose two'):
        analyze_routing(record, coco, bootstrap=0)


# What the numbers are.


def test_a_perfect_router(analysis):
    curves = analysis['curves']
    assert values(curves['router'])[0] == analysis['ends'][0]['ap'] < 60
    # Half of the images are all that there is to gain.
    np.testing.assert_allclose(values(curves['router'])[5:], 100, atol=1e-6)
    assert values(curves['random'])[5] < 90
    assert merit(analysis, 'efficacy')['value'] == pytest.approx(1, abs=0.02)
    chord = (analysis['ends'][0]['ap'] + 100) / 2
    expected = (100 - chord) / (100 - analysis['ends'][0]['ap'])
    assert merit(analysis, 'normalized gain at half hard')['value'] == pytest.approx(expected)
    assert expected == pytest.approx(0.5)
    gain = merit(analysis, 'gain at half hard, AP')
    assert gain['value'] == pytest.approx(100 - values(curves['random'])[5])
    assert 0 < gain['low'] <= gain['value'] <= gain['high']
    assert values(curves['router'], 'gflops')[::5] == pytest.approx([1, 2, 3])
    assert values(curves['router'], 'latency')[::5] == pytest.approx([0.010, 0.015, 0.020])


def test_an_inverted_router(perfect, coco):
    found = analyze_routing(
        rerouted(perfect, [1 - image['difficulty'] for image in perfect]), coco, bootstrap=20
    )
    assert merit(found, 'efficacy')['value'] < -0.5
    assert merit(found, 'normalized gain at half hard')['value'] == pytest.approx(-0.5)
    assert any('costs' in sentence or 'worse' in sentence for sentence in found['diagnosis'])
    assert any('against the benefit on test' in sentence for sentence in found['diagnosis'])


def test_a_ratio_to_what_may_be_nothing_is_given_nowhere(perfect, coco):
    """Exits swapped on every other image: whether they differ cannot be told. With a calibration,
    the diagnosis does not speak of val."""
    images = list(perfect)
    for image in images[::2]:
        image['detections'] = image['detections'][::-1]
    record = rebuilt(perfect, images)
    found = analyze_routing(record, coco, bootstrap=40, calibration=[0.1, 0.2, 0.3, 0.4])
    said = ' '.join(found['diagnosis'])
    assert 'the normalized gain, is not defined' in said
    assert merit(found, 'normalized gain at half hard')['value'] is None
    assert found['router']['gain'] is None
    assert all(peer['gain'] is None for peer in found['peers'].values())
    assert 'straight line' not in ' '.join(budget_sentences(found))
    assert 'calibrated threshold' in said and 'threshold of val' not in said


def test_oracles_bound_the_perfect_router(analysis):
    for name in ('honest', 'oracle'):
        np.testing.assert_allclose(values(analysis['curves'][name])[5:], 100, atol=1e-6)


def test_the_oracles_programme_is_certified(analysis, perfect, coco):
    """Two exits and a whole number of images: no choice within the budget is worth more."""
    found = analysis['certificate']
    assert found['value'] == pytest.approx(found['bound']) and found['price'] >= 0
    values = image_values(perfect, coco, Mixtures(perfect, coco))
    by_hand = (
        values[0].sum() + np.sort(np.maximum(values[1] - values[0], 0))[-(IMAGES // 2) :].sum()
    )
    assert found['value'] * IMAGES == pytest.approx(by_hand)


def test_memory_of_training_images_is_told(perfect, coco):
    memorized, new = (
        dataclasses.replace(perfect, losses=np.tile(losses, (IMAGES, 1)))
        for losses in ([2.0, 1.0], [1.0, 2.0])
    )
    said = analyze_routing(new, coco, bootstrap=20, training=elsewhere(memorized))['diagnosis']
    assert any('remember their training images' in sentence for sentence in said)
    said = analyze_routing(new, coco, bootstrap=20, training=elsewhere(new))['diagnosis']
    assert not any('remember their training images' in sentence for sentence in said)


def test_records_that_do_not_go_together_are_refused(perfect, coco):
    for others in (dict(validation=(perfect, coco)), dict(training=perfect)):
        with pytest.raises(
            UsageError, match='40 images .* are in the record that is judged and in the'
        ):
            analyze_routing(perfect, coco, bootstrap=0, **others)
    with pytest.raises(UsageError, match='the training record lacks losses'):
        analyze_routing(perfect, coco, bootstrap=0, training=elsewhere(without(perfect, 'losses')))
    other = elsewhere(perfect)
    other.ids = other.ids + 1000
    with pytest.raises(UsageError, match='another number of objects'):
        analyze_routing(perfect, coco, (other, coco), bootstrap=0)


def test_a_peer_that_learned_from_other_features_is_left_out(perfect, coco):
    wider = elsewhere(perfect)
    wider.features = np.ones((IMAGES, 7), np.float32)
    assert (
        'learns from 7 features per image'
        in analyze_routing(perfect, coco, (wider, coco), bootstrap=0)['left_out']['ridge']
    )


def test_a_router_without_a_choice_is_not_compared_at_its_cost(perfect, coco):
    """All difficulties are equal: it sends all images or none, and costs what no peer costs."""
    for difficulties in ([0.5] * IMAGES, [0.2] * 12 + [1.0] * 28):
        said = ' '.join(
            analyze_routing(rerouted(perfect, difficulties), coco, bootstrap=20)['diagnosis']
        )
        assert 'A simpler router is better' not in said
    assert 'At 70% hard, the nearest to half that ties allow' in said


def test_the_slider_has_each_share_once(analysis, perfect, coco):
    points = analysis['thresholds']
    assert [point['hard'] for point in points] == list(range(IMAGES + 1))
    assert points[0]['threshold'] == 1 and points[-1]['threshold'] == -1
    difficulties = np.array([image['difficulty'] for image in perfect])
    mixtures = Mixtures(perfect, coco)
    for point in points[::7]:
        is_hard = difficulties > point['threshold']
        assert is_hard.sum() == point['hard'] and point['hard_share'] == is_hard.mean()
        assert point['ap'] == pytest.approx(mixtures.ap(is_hard))
        assert point['gflops'] == pytest.approx(1 + 2 * is_hard.mean())
        assert point['latency'] == pytest.approx(0.010 + 0.010 * is_hard.mean())


def test_equal_difficulties_are_not_parted(perfect, coco):
    record = rerouted(perfect, [0.2] * 30 + [0.7] * 10)
    random_routing = RandomRouting(Mixtures(record, coco), resamples=0)
    points = threshold_points(record, random_routing, np.array([0.2] * 30 + [0.7] * 10, np.float32))
    assert [point['hard'] for point in points] == [0, 10, 40]


def test_peers_pay_for_what_they_look_at(analysis):
    peers = analysis['peers']
    # Exit 0 is unsure just where it misses.
    doubt = peers['doubt of best']
    assert doubt['half']['ap'] == pytest.approx(100) and doubt['gain'] == pytest.approx(0.5)
    assert doubt['half']['gflops'] == pytest.approx(2 + 0.5 * 0.5)
    assert doubt['half']['latency'] == pytest.approx(0.015 + 0.5 * 0.002)
    assert doubt['curve'][0]['gflops'] == pytest.approx(1)
    assert peers['image entropy']['half']['gflops'] == pytest.approx(2)
    known = peers['true loss x objects']
    assert known['half']['ap'] == pytest.approx(100) and 'annotations' in known['meaning']
    assert known['half']['gflops'] == pytest.approx(2)
    assert analysis['left_out'] == {}


def test_all_parts_of_the_page_agree_on_what_large_images_cost(perfect, coco):
    """The hard half is four times as dear: what half hard costs is not half way between the exits'
    means."""
    sizes = [1.0 if index < IMAGES / 2 else 4.0 for index in range(IMAGES)]
    images = [
        dict(image, gflops=[size, 2 * size], latencies=[size / 100, size / 50])
        for image, size in zip(perfect, sizes)
    ]
    found = analyze_routing(
        rebuilt(perfect, images, gflops=[2.5, 5.0], latencies=[0.025, 0.05]), coco, bootstrap=0
    )
    (middle,) = (point for point in found['thresholds'] if point['hard_share'] == 0.5)
    routed = [found['curves']['router'][5], found['router']['half'], middle]
    assert [one['gflops'] for one in routed] == pytest.approx([4.5] * 3)
    assert [one['latency'] for one in routed] == pytest.approx([0.045] * 3)
    assert found['curves']['random'][5]['gflops'] == pytest.approx(3.75)
    assert [
        found['curves'][name][-1]['gflops'] for name in ('router', 'random', 'oracle')
    ] == pytest.approx([5] * 3)


def test_old_records_say_less(perfect, coco):
    record = without(perfect, 'view', 'losses', 'features', 'objects', 'entropy')
    record.provenance = {}
    found = analyze_routing(record, coco, bootstrap=0)
    assert set(found['curves']) == {'router', 'random', 'oracle'}
    assert [one['name'] for one in found['merit']] == [
        'gain at half hard, AP',
        'normalized gain at half hard',
    ]
    assert (
        'features' in found['left_out']['ridge']
        and 'record anew' in found['left_out']['detections']
    )
    # What annotations and detections say, no more is needed for.
    assert set(found['peers']) == {'true ap class', 'true reward'} and found['calibrated'] == []
    assert [one['name'] for one in found['correlations']] == [
        'per-image AP gained',
        'per-image AP gained, by class',
        'reward by ORIC',
    ]
    assert found['curves']['router'][3]['low'] is None
    assert format_analysis(found)


def test_strata(analysis):
    size, objects, difficulty = analysis['strata']
    assert [(row['count'], row['aps'][1]) for row in size['rows']] == [
        (80, pytest.approx(100)),
        (0, None),
        (0, None),
    ]
    first, second = objects['rows']
    assert (first['name'], first['count']) == ('1', 20) and first['aps'] == pytest.approx(
        [100, 100]
    )
    assert (second['name'], second['count']) == ('3-4', 20) and second['aps'] == pytest.approx(
        [0, 100]
    )
    assert [row['count'] for row in difficulty['rows']] == [4] * 10
    assert difficulty['rows'][0]['aps'] == pytest.approx([100, 100])


def test_correlations_and_transfer(analysis):
    found = {one['name']: one for one in analysis['correlations']}
    assert found['per-image AP gained']['value'] > 0.8
    assert found['number of objects']['value'] > 0.8
    assert abs(found['entropy of the image']['value']) < 0.5
    for row, own in zip(analysis['calibrated'], analysis['rows'], strict=True):
        assert row['hard_share'] == own['hard_share'] == pytest.approx(row['share'])
        assert row['ap'] == own['ap']


def test_it_can_be_written_as_json(analysis):
    json.dumps(analysis, allow_nan=False)
    assert analysis['images'] == IMAGES and analysis['provenance']['config'] == 'a<b>.py'


# Estimates.


@pytest.fixture(scope='module')
def random_routing(perfect, coco):
    return RandomRouting(Mixtures(perfect, coco), resamples=30)


def test_gap_and_its_interval(random_routing, analysis):
    value, low, high = estimates.exit_gap(random_routing)
    assert value == pytest.approx(100 - analysis['ends'][0]['ap'])
    assert 0 < low < value < high < 100
    # The same choice twice: no difference on any resample.
    assert estimates.ap_difference(random_routing, [0] * IMAGES, [0] * IMAGES) == (0, 0, 0)


def test_gaps_of_strata(perfect, random_routing):
    one, three = estimates.strata_gaps(perfect, random_routing)
    assert one['name'] == 'images with 1 object' and one['gap'] == pytest.approx(
        (0, 0, 0), abs=1e-6
    )
    assert three['name'] == 'images with 3-4 objects' and three['gap'] == pytest.approx(
        (100, 100, 100)
    )


def test_transfer_between_sets_that_differ(random_routing, perfect):
    scores = np.array([image['difficulty'] for image in perfect], np.float32)
    same = estimates.threshold_transfer(scores, scores, random_routing)
    assert same['got'][0] == 0.5 and same['got'][1] < 0.5 < same['got'][2]
    harder = estimates.threshold_transfer(scores / 2, scores, random_routing)
    # The middle of the halved scores is their lower quarter: three quarters lie above.
    assert harder['asked'] == 0.5 and harder['got'][0] == pytest.approx(0.75, abs=0.03)
    assert harder['got'][1] > 0.5


def test_leads_of_peers_at_equal_cost(perfect, random_routing):
    """A charged peer is compared with a router that may send more images on."""
    scores = np.array([image['difficulty'] for image in perfect], np.float32)
    inverted = 1 - scores
    leads = estimates.peer_leads(
        perfect,
        random_routing,
        inverted,
        dict(doubt_of_best=scores, image_entropy=scores, loss=scores),
    )
    assert set(leads) == {'doubt of best', 'image entropy'}
    half = random_routing.mixtures.ap(inverted > np.sort(inverted)[IMAGES // 2 - 1])
    # 0.5 of 2 GFLOPs between the exits buy a quarter more hard images: 25 of 40 instead of 20.
    more = random_routing.mixtures.ap(inverted >= np.sort(inverted)[-25])
    assert more > half
    assert leads['image entropy'][0] == pytest.approx(100 - half)
    assert leads['doubt of best'][0] == pytest.approx(100 - more)


def test_spread():
    assert estimates.difficulty_spread(np.linspace(0, 1, 101)) == pytest.approx(0.9)


# The gallery.


def test_images_of_the_gallery():
    difficulties = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], np.float32)
    image_ap = np.array([[50, 10, 90, 50, 80, 20], [50, 80, 95, 60, 30, 20]], float)
    chosen = choose_images(difficulties, image_ap, count=2)
    assert chosen == dict(easiest=[0, 1], hardest=[5, 4], wrongly_easy=[1, 2], wrongly_hard=[4])
    nothing = choose_images(difficulties, image_ap[[0, 0]])
    assert nothing['wrongly_easy'] == nothing['wrongly_hard'] == []


# The page.


@pytest.fixture(scope='module')
def page(perfect, coco, analysis, tmp_path_factory):
    record = copy.deepcopy(perfect)
    record.files[0] = '/nowhere/gone <1>.jpg'
    return write_analysis(
        record, coco, analysis, tmp_path_factory.mktemp('out') / 'deep', title='A & <b>'
    )


def test_files(page, analysis):
    assert sorted(path.name for path in page.parent.iterdir()) == ['routing.html', 'routing.json']
    assert json.loads((page.parent / 'routing.json').read_text()) == analysis
    assert page.stat().st_size < 3e6


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    # A namespace is a name, not an address that is fetched.
    text = text.replace("'http://www.w3.org/2000/svg'", '')
    assert not re.search(r'<link|@import|url\(|https?:|src=', text)
    hrefs = re.findall(r'href="([^"]*)', text)
    assert hrefs and all(one.startswith(('data:image/jpeg;base64,', '#')) for one in hrefs)


def test_nothing_that_is_named_becomes_markup(page):
    text = page.read_text()
    assert text.count('</script>') == 2 and '<b>' not in text
    assert '<h1>A &amp; &lt;b&gt;</h1>' in text and 'gone &lt;1&gt;.jpg' in text
    assert 'a&lt;b&gt;.py' in text and text.count('picture not found') == 1


def test_what_the_script_reads(page, analysis):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])
    assert len(data['points']) == IMAGES + 1 and data['points'][data['start']]['share'] == 0.5
    for point, row in zip(data['points'], analysis['thresholds']):
        assert point['easy'] + point['hard'] == IMAGES
        assert point['ap'] == pytest.approx(row['ap'], abs=1e-3)
        assert point['latency'] == pytest.approx(1000 * row['latency'], abs=1e-3)
    names = [line['name'] for line in data['lines']]
    assert names[:4] == ['router', 'random', 'honest oracle', 'oracle'] and len(set(names)) == len(
        names
    )
    assert all('low' in point for point in data['lines'][0]['points'])


def test_every_element_that_the_script_takes_is_there(page):
    text = page.read_text()
    for name in (
        'threshold',
        'chart',
        'data',
        *(
            f'now-{key}'
            for key in ('threshold', 'share', 'easy', 'hard', 'ap', 'gflops', 'latency')
        ),
    ):
        assert len(re.findall(f'id="{name}"', text)) == 1
    assert text.count('name="cost"') == 2
    assert len(re.findall('data-line="', text)) == 4 + 17


def test_pictures_are_kept_once(page):
    """Of the easiest, hardest and wrongly routed images; the second drawing uses the first one's
    pixels."""
    text = page.read_text()
    names = re.findall(r'<image id="([^"]*)"', text)
    assert len(names) == len(set(names)) == 3 + 4
    assert re.findall(r'<use href="#([^"]*)"', text) == names
    assert 'There are none.' in text


# The terminal.


def test_tables_of_text(analysis):
    text = format_analysis(analysis)
    lines = text.split('\n')
    at = next(index for index, line in enumerate(lines) if line.startswith('hard'))
    assert lines[at].split() == [
        'hard',
        'threshold',
        'AP',
        '95',
        '%',
        'interval',
        'random',
        'oracle',
        'honest',
        'oracle',
        'GFLOPs',
        'ms',
    ]
    row = lines[at + 6].split()
    assert row[0] == '50%' and row[2] == '100.00' and row[-2:] == ['2.000', '15.0']
    for sentence in analysis['diagnosis']:
        assert f'- {sentence}' in lines
    assert max(map(len, (line for line in lines if not line.startswith('- ')))) < 100
