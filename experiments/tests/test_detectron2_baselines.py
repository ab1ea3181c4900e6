"""What the experiment writes of the runs that are there."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import detectron2_baselines as experiment
import pytest

ARGS = argparse.Namespace(epochs=5, router_epochs=4, seeds=3)


def _routing(ap: float, points: list) -> str:
    rows = [
        dict(hard_share=share, ap=ap + share, random_ap=ap, gflops=1 + share, latency=0.01, ap50=0)
        for share in (0.0, 0.5, 1.0)
    ]
    facts = dict(device='a CPU', threads=1, torch='2', checkpoint='private')
    return json.dumps(dict(rows=rows, baselines=dict(points=points), provenance=facts, images=500))


def test_a_summary_and_a_picture(tmp_path, monkeypatch):
    for name in ('WORK', 'RESULT', 'PICTURE'):
        monkeypatch.setattr(experiment, name, tmp_path / name.lower())
    experiment.publish(ARGS)
    assert not experiment.RESULT.exists()
    point = dict(name='faster_rcnn_R_18_digits', ap=12.0, gflops=0.4, latency=0.02)
    for name, points in (('dynamic-0', [point]), ('dynamic-2', []), ('mmdet-1', [])):
        folder = tmp_path / 'work' / name / 'report'
        folder.mkdir(parents=True)
        (folder / 'routing.json').write_text(_routing(10.0, points))
    experiment.publish(ARGS)
    summary = json.loads(experiment.RESULT.read_text())
    assert summary['schedule']['iterations'] == 1500 and summary['images'] == 500
    assert [*summary['detectron2']] == ['0', '2'] and [*summary['mmdet']] == ['1']
    assert summary['plain'] == [point] and summary['machine']['device'] == 'a CPU'
    assert 'private' not in experiment.RESULT.read_text()
    assert experiment.PICTURE.read_bytes().startswith(b'\x89PNG')
    assert experiment.short(point['name']) == 'R-18'


def test_what_it_runs_is_there():
    for path in (*experiment.PLAIN.values(), experiment.DYNAMIC, experiment.MMDET):
        assert (experiment.ROOT / path).is_file()


def test_a_failed_tool_is_named(tmp_path):
    with pytest.raises(experiment.UsageError, match='failed with status 3: see the end of'):
        experiment.run(sys.executable, '-c', 'raise SystemExit(3)', log=tmp_path / 'a' / 'log.txt')
