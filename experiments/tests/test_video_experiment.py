"""The experiment on early exit in video: its table of runs, its resamples, the arithmetic of its
page."""

import json
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / 'experiments'))
import video  # noqa: E402
import video_page as page  # noqa: E402
import video_results  # noqa: E402
from video import GATED, RUNS  # noqa: E402
from video_results import halves, resampled_videos  # noqa: E402


def test_runs_have_configs_and_start_from_runs_before_them():
    for place, run in enumerate(RUNS.values()):
        assert (ROOT / 'configs' / 'video' / f'{run.config}.py').is_file()
        assert run.start is None or run.start in list(RUNS)[:place]
    assert set(GATED) <= set(RUNS)
    for name, (_, base) in page.LABELS.items():
        assert name in RUNS and (base is None or base in page.LABELS)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ('WORK', 'RESULTS'):
        monkeypatch.setattr(video, name, tmp_path / name)
        (tmp_path / name).mkdir()
    return tmp_path


def have(*names, trained=True, results=True):
    for name in names:
        if trained:
            (video.WORK / name).mkdir(exist_ok=True)
            (video.WORK / name / 'trained').touch()
        for end in ('', '_clock') if results and name in GATED else ('',) if results else ():
            (video.RESULTS / f'{name}{end}.json').touch()


def test_on_a_new_machine_what_is_compared_is_trained_there(folders):
    assert video.to_do(list(RUNS)) == list(RUNS)
    done = [name for name in RUNS if name not in video.DETECTORS]
    have(*done, trained=False)
    # All is known: nothing to do, whatever became of the weights.
    assert video.to_do(list(RUNS)) == []
    # One that is missing needs weights that are gone, and with them all that is held against it.
    (video.RESULTS / 'distilled.json').unlink()
    assert video.to_do(list(RUNS)) == list(RUNS)
    video.forget(video.to_do(list(RUNS)))
    assert not list(video.RESULTS.iterdir())


def test_with_the_weights_only_what_is_missing_is_done(folders):
    have(*video.DETECTORS, results=False)
    have(*(name for name in RUNS if name not in video.DETECTORS))
    (video.RESULTS / 'distilled.json').unlink()
    (video.RESULTS / 'gumbel_clock.json').unlink()
    assert video.to_do(list(RUNS)) == ['distilled', 'gumbel']
    video.forget(['gumbel', 'distilled'])
    assert (video.RESULTS / 'gumbel.json').exists()


def test_energys_counter_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(video_results, 'RAPL', tmp_path / 'energy_uj')
    (tmp_path / 'max_energy_range_uj').write_text('9000000\n')
    (tmp_path / 'energy_uj').write_text('5000000\n')
    assert video_results.joules_since(2.0) == 3.0
    assert video_results.joules_since(8.0) == 6.0


def record(*lengths):
    return dict(
        images=[
            dict(video=video, frame=frame)
            for video, length in enumerate(lengths)
            for frame in range(length)
        ]
    )


def test_videos_are_resampled_whole():
    weights = resampled_videos(record(2, 3, 1))
    parts = weights[:, :2], weights[:, 2:5], weights[:, 5:]
    assert all((part == part[:, :1]).all() for part in parts)
    assert (sum(part[:, 0] for part in parts) == 3).all()
    assert len(np.unique(weights, axis=0)) > 3


def test_gates_are_fitted_to_one_half_of_the_videos_and_set_on_the_other():
    fit, choose = (
        {image['video'] for image in half['images']} for half in halves(record(1, 2, 1, 2, 3))
    )
    assert fit == {0, 2, 4} and choose == {1, 3}


def exit(ap, latency, resampled=None):
    return dict(
        ap=ap, gflops=latency * 10, latency=latency, resampled=resampled or [ap - 1, ap + 1]
    )


def row(ap, latency, **more):
    return dict(ap=ap, gflops=latency * 10, latency=latency, shares=[0, 1, 0], **more)


def run_of(*exits):
    cost = dict(early=0.001, looked=[0.011, 0.021])
    return dict(
        exits=list(exits),
        costs=dict(gflops=cost, latencies=cost),
        provenance=dict(images=40, device='a machine', torch='2', threads=1),
    )


def test_differences_are_paired():
    found = page.difference(exit(12, 1, [10, 15]), exit(9, 1, [8, 11]))
    # Of 2 and 4, not of the ends of each.
    assert found == '+3.00 (+2.05 to +3.95)'


def test_a_gate_is_held_against_the_full_detector_and_the_line():
    found = page.cells(row(28, 0.015), [row(10, 0.01), row(30, 0.02)])
    assert found[0] == '28.00' and found[2] == '15.00' and found[3] == '25%' and found[4] == '+8.00'


@pytest.fixture
def results(tmp_path, monkeypatch):
    for name, path in dict(RESULTS='video', PAGE='video.md', PICTURE='gates.png').items():
        monkeypatch.setattr(page, name, tmp_path / path)
    page.RESULTS.mkdir()
    joint = dict(
        run_of(exit(10, 0.01), exit(30, 0.02)),
        fixed=[row(10, 0.01, exit=0), row(30, 0.02, exit=1)],
        gates={
            'entropy': dict(rows=[row(20, 0.012), row(29.5, 0.014)], within=row(29.5, 0.014)),
            'none': dict(rows=[row(12, 0.02)], within=None),
        },
        oracles={'oracle': [row(20, 0.01), row(35, 0.02)]},
    )
    clock = dict(
        threads=2,
        frames=10,
        energy='RAPL',
        load_before=0.1,
        provenance=dict(device='a clock', torch='2', threads=1),
        ways={
            name: dict(ap=ap, seconds=seconds, median=seconds, joules_per_1000=5, exits=[0, 10, 0])
            for name, ap, seconds in (
                ('exit 0', 10, 0.01),
                ('exit 1', 30, 0.02),
                ('entropy', 29, 0.01),
            )
        },
    )
    runs = dict(joint=joint, joint_clock=clock, distilled=run_of(exit(12, 0.01), exit(29, 0.02)))
    for name, run in runs.items():
        (page.RESULTS / f'{name}.json').write_text(json.dumps(dict(run, run=name)))


def test_the_page_says_what_was_found(results):
    page.main()
    text = page.PAGE.read_text()
    assert (
        '| together, with distillation, against: all trained together | +2.00 (+2.00 to +2.00) | '
        '-1.00 (' in text
    )
    assert '| entropy | 29.50 | 0.1400 | 14.00 | 30% | ' in text and '| none | - |' in text
    # The oracle's cheapest point that loses at most 1 AP.
    assert '| oracle | 35.00 |' in text
    assert '| entropy | 29.00 | 10.00 | 10.00 | 50% | 5 | +19.00 | 0%, 100%, 0% |' in text
    assert '2 threads, a clock' in text
    assert page.PICTURE.read_bytes()[:4] == b'\x89PNG'
