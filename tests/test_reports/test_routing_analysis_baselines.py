import dataclasses

import numpy as np
import pytest

from dynamicdet.errors import UsageError
from dynamicdet.reports.figures import png, trade_off_figure
from dynamicdet.reports.routing_analysis import analyze_routing, format_analysis, write_analysis
from dynamicdet.reports.routing_analysis_baselines import baseline_front, front_shares
from dynamicdet.reports.routing_analysis_text import baseline_table, lead_table

# Exit 1 finds all objects, exit 0 those of the first half; 1 and 3 GFLOPs, 10 and 20 ms.
from test_report import coco, record  # noqa: F401  isort: skip


def plain(source, exit, gflops, latency):
    """A plain detector that finds what an exit finds."""
    return dataclasses.replace(
        source.take_exits([exit, exit]), gflops=[gflops] * 2, latencies=[latency] * 2
    )


def test_a_front_by_hand():
    """Cheap and bad, dearer and worse, dearer and as good, dear and best."""
    assert baseline_front([10, 5, 10, 30, 20], [1, 2, 3, 5, 4]) == [0, 4, 3]
    assert baseline_front([7], [1]) == [0] and baseline_front([7, 9], [1, 1]) == [1]


def test_shares_by_hand():
    assert front_shares([1, 3, 4], 0.9) is None
    assert front_shares([1, 3, 4], 1).tolist() == [1, 0, 0]
    assert front_shares([1, 3, 4], 1.5) == pytest.approx([0.75, 0.25, 0])
    assert front_shares([1, 3, 4], 9).tolist() == [0, 0, 1]


def test_leads_at_equal_cost(record, coco, tmp_path):  # noqa: F811
    """Plain detectors that are the exits, at their GFLOPs but twice as slow: the router is a
    perfect one, and its way between the exits is better than the straight line."""
    baselines = {'large': plain(record, 1, 3.0, 0.040), 'small': plain(record, 0, 1.0, 0.020)}
    found = analyze_routing(record, coco, bootstrap=30, baselines=baselines)
    points, leads = (found['baselines'][name] for name in ('points', 'leads'))
    assert [point['name'] for point in points] == ['small', 'large']
    low, high = points[0]['ap'], points[1]['ap']
    assert high == pytest.approx(100) and points[0]['low'] < low < points[0]['high']
    ends = leads[0], leads[-1]
    assert [end['lead_gflops'] for end in ends] == [[0, 0, 0], [0, 0, 0]]
    middle = leads[5]
    # Straight between the plain ones at half hard, by GFLOPs.
    chord = (low + high) / 2
    assert middle['lead_gflops'][0] == pytest.approx(middle['ap'] - chord)
    assert middle['lead_gflops'][0] == pytest.approx(100 - chord, abs=1e-6)
    # None is as fast as the exits at half hard, 15 ms; as all hard, 20 ms, the small one is.
    assert middle['lead_latency'] is None
    assert leads[-1]['lead_latency'][0] == pytest.approx(100 - low)
    said = ' '.join(found['diagnosis'])
    assert 'AP more than plain detectors at equal GFLOPs' in said
    assert 'No plain detector is as cheap as the router at half hard, by milliseconds' in said
    text = format_analysis(found)
    assert 'Plain detectors on the same images' in text and 'none as cheap' in text
    page = write_analysis(record, coco, found, tmp_path).read_text()
    assert 'plain detectors' in page and 'none as cheap' in page
    assert png(trade_off_figure(found['rows'], points)).startswith(b'\x89PNG')


def test_a_better_plain_detector_is_said(record, coco):  # noqa: F811
    found = analyze_routing(
        dataclasses.replace(record, difficulty=record.difficulty[::-1].copy()),
        coco,
        bootstrap=30,
        baselines={'whole': plain(record, 1, 0.5, 0.001)},
    )
    said = ' '.join(found['diagnosis'])
    assert 'AP less than plain detectors at equal GFLOPs' in said
    assert 'Take a plain detector of a size between the exits' in said


def test_without_intervals_and_without_baselines(record, coco):  # noqa: F811
    found = analyze_routing(record, coco, bootstrap=0, baselines={'a': plain(record, 1, 3.0, 0.02)})
    assert found['baselines']['points'][0]['low'] is None
    assert found['baselines']['leads'][-1]['lead_gflops'] == [0, None, None]
    assert lead_table(found['baselines']['leads'])[-1][3] == '+0.00'
    assert baseline_table(found['baselines']['points'])[1][2] == ''
    bare = analyze_routing(record, coco, bootstrap=0)
    assert bare['baselines'] == dict(points=[], leads=[])
    assert 'plain detectors' not in format_analysis(bare).lower()


def test_other_pictures_are_refused(record, coco):  # noqa: F811
    other = plain(record, 1, 3.0, 0.02).take(np.arange(len(record))[::-1])
    with pytest.raises(UsageError, match="'a' is of other pictures"):
        analyze_routing(record, coco, bootstrap=0, baselines={'a': other})
