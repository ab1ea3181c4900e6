"""The experiment on dynamic and compressed together: its steps, what it measures, its page."""

import json
import shutil
import sys

import pytest
from mmengine.config import Config

from conftest import ROOT, load_small
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.deploy.deployment import deploy
from dynamicdet.errors import UsageError
from dynamicdet.testing import randomize
from mmdet.registry import MODELS

sys.path.insert(0, str(ROOT / 'experiments'))
import dynamic_compressed as experiment  # noqa: E402
import dynamic_compressed_measure as measure  # noqa: E402
import dynamic_compressed_page as page  # noqa: E402
from routing_runs import DETECTORS, all_runs  # noqa: E402

STEPS = [
    f'{detector}-{kind}'
    for kind in ('whole', 'pruned', 'tuned')
    for detector in ('yolox', 'faster_rcnn')
]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of the experiment, empty, with the weights of both starts."""
    for name in ('RESULTS', 'WORK', 'ROUTING'):
        monkeypatch.setattr(experiment, name, tmp_path / name)
        (tmp_path / name).mkdir()
    for detector in DETECTORS:
        experiment.start_of(detector).mkdir()
        (experiment.start_of(detector) / 'trained').touch()
    return tmp_path


def test_starts_are_runs_of_the_experiment_on_routing():
    assert {experiment.start_of(detector).name for detector in DETECTORS} <= {
        run.name for run in all_runs()
    }


def test_steps_to_do(folders):
    assert experiment.to_do(['']) == STEPS
    (experiment.RESULTS / 'yolox-whole.json').touch()
    assert experiment.to_do(['yolox']) == ['yolox-pruned', 'yolox-tuned']
    # Weights that are gone are trained first, where a step needs them.
    (experiment.start_of('yolox') / 'trained').unlink()
    assert experiment.to_do(['']) == ['yolox-start', *STEPS[1:]]
    assert experiment.to_do(['faster_rcnn']) == STEPS[1::2]
    for kind in ('pruned', 'tuned'):
        (experiment.RESULTS / f'yolox-{kind}.json').touch()
    assert experiment.to_do(['yolox']) == []


def test_the_clock_needs_all_that_it_times(folders):
    with pytest.raises(UsageError, match='yolox-whole lacks detectors to time'):
        experiment.by_the_clock([''])
    for side in measure.SIDES:
        (experiment.RESULTS / f'yolox-clock_{side}.json').touch()
    experiment.by_the_clock(['yolox'])


@pytest.fixture(scope='module')
def whole(digits, tmp_path_factory):
    """A folder as a step leaves it: config, calibrated checkpoint, graphs in float32."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('experiment') / 'whole'
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        folder / 'work',
        True,
        **{'model.backbone.base_channels': 8, 'model.detector.neck.in_channels': [8, 16, 32, 64]},
    )
    model = randomize(MODELS.build(cfg.model))
    model.threshold.fill_(0.5)
    folder.mkdir()
    cfg.dump(folder / measure.CONFIG)
    write_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(folder / measure.WEIGHTS))
    deploy(
        Config.fromfile(folder / measure.CONFIG),
        str(folder / measure.WEIGHTS),
        str(folder / 'float32'),
    )
    return folder


def test_aps_are_measured_once(whole, tmp_path, monkeypatch):
    out = tmp_path / 'points.json'
    monkeypatch.setattr(
        measure, 'FORMS', {form: measure.FORMS[form] for form in ('eager', 'float32')}
    )
    measure.measure_ap(whole, out)
    found = json.loads(out.read_text())
    points = found['points']
    assert list(points) == ['eager', 'float32'] and found['provenance']['images'] == 6
    for one in points.values():
        assert 0 <= one['hard_share'] <= 1
        assert all(set(one[mode]) == {'ap', 'ap50', 'resampled_ap'} for mode in page.MODES)
        assert len(one['half']['resampled_ap']) == 100
    # The same detector, up to the last digits of floats.
    assert points['eager']['exit1']['ap'] == pytest.approx(
        points['float32']['exit1']['ap'], abs=0.5
    )
    assert points['eager']['bytes'] < found['original_bytes']
    assert points['float32']['bytes'] == sum(
        path.stat().st_size for path in (whole / 'float32').iterdir()
    )
    # What is there is kept; what a file in 8 bits holds is added.
    points['eager']['bytes'] = 1
    out.write_text(json.dumps(found))
    monkeypatch.setattr(measure, 'FORMS', dict(eager=None, eager_int8=None))
    measure.measure_ap(whole, out)
    again = json.loads(out.read_text())['points']
    assert (
        again['eager']['bytes'] == 1
        and again['eager_int8']['bytes'] < 0.4 * found['original_bytes']
    )


@pytest.mark.openvino
def test_graphs_are_measured_by_another_runtime_too(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, 'FORMS', dict(float32=()))
    monkeypatch.setattr(measure, 'RUN_BY', dict(by_openvino=('float32', 'openvino')))
    measure.measure_ap(whole, tmp_path / 'points.json')
    points = json.loads((tmp_path / 'points.json').read_text())['points']
    assert list(points) == ['float32', 'by_openvino']
    assert points['by_openvino']['exit1']['ap'] == pytest.approx(
        points['float32']['exit1']['ap'], abs=0.5
    )
    assert points['by_openvino']['bytes'] == points['float32']['bytes']


def test_latencies_of_all_folders_in_turns(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / 'pruned')
    monkeypatch.setattr(
        measure, 'FORMS', {form: measure.FORMS[form] for form in ('eager', 'float32')}
    )
    measure.measure_latencies([whole, tmp_path / 'pruned'], 96, 2, 1, tmp_path / 'clock.json')
    found = json.loads((tmp_path / 'clock.json').read_text())
    assert set(found['points']) == {
        f'{folder}/{form}/{mode}'
        for folder in ('whole', 'pruned')
        for form in ('eager', 'float32')
        for mode in page.MODES
    }
    assert all(0 < one['median'] < 60 for one in found['points'].values())
    assert found['provenance']['images'] == 2 and found['provenance']['side'] == 96
    assert all(isinstance(found['provenance'][name], bool) for name in ('vnni', 'amx'))


# The page.


def known(detector, kind, **points):
    """A step whose APs at exit 1 are as given, those at exit 0 and half hard 20 and 5 below."""

    def mode(ap):
        return dict(ap=ap, ap50=ap, resampled_ap=[ap - 1, ap + 1])

    return {
        f'{detector}-{kind}': dict(
            original_bytes=20e6,
            resamples=2,
            provenance=dict(images=6),
            points={
                form: dict(
                    bytes=size,
                    hard_share=0.5,
                    exit0=mode(ap - 20),
                    half=mode(ap - 5),
                    exit1=mode(ap),
                )
                for form, (ap, size) in points.items()
            },
        )
    }


def clock(detector, milliseconds, side=128):
    facts = dict(
        images=2,
        side=side,
        rounds=1,
        vnni=False,
        amx=True,
        load_before=0.1,
        load_after=1.0,
        onnxruntime='1',
        openvino='3',
        torch='2',
        device='a machine',
        threads=1,
    )
    # OpenVINO takes four fifths.
    milliseconds = {
        **milliseconds,
        **{
            (kind, f'{form}_openvino'): 0.8 * one
            for (kind, form), one in milliseconds.items()
            if form == 'int8'
        },
    }
    return {
        f'{detector}-clock_{side}': dict(
            provenance=facts,
            points={
                f'{detector}-{kind}/{form}/{mode}': dict(median=one * share / 1e3)
                for (kind, form), one in milliseconds.items()
                for mode, share in dict(exit0=0.5, half=0.75, exit1=1).items()
            },
        )
    }


def write(results, tmp_path, monkeypatch):
    for name, content in results.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    monkeypatch.setattr(page, 'RESULTS', tmp_path)
    monkeypatch.setattr(page, 'PAGE', tmp_path / 'page.md')
    monkeypatch.setattr(page, 'PICTURE', tmp_path / 'page.png')
    page.main()
    return (tmp_path / 'page.md').read_text()


def rows_of(text):
    rows = (line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| '))
    found = {}
    for name, *cells in rows:
        # The table of the larger images comes second.
        found.setdefault(name, cells)
    return found


def test_a_page_by_hand(tmp_path, monkeypatch):
    times = {
        ('whole', 'eager'): 40,
        ('whole', 'float32'): 20,
        ('whole', 'int8'): 10,
        ('pruned', 'eager'): 30,
        ('pruned', 'float32'): 12,
        ('pruned', 'int8'): 5,
    }
    results = {
        **known(
            'yolox',
            'whole',
            eager=(50, 16e6),
            eager_int8=(49.9, 5e6),
            float32=(50, 21e6),
            int8=(49.6, 6e6),
        ),
        **known(
            'yolox',
            'pruned',
            eager=(49.5, 8e6),
            eager_int8=(49.4, 2e6),
            float32=(49.5, 10e6),
            int8=(48.8, 2.2e6),
        ),
        **known('yolox', 'tuned', eager=(50.5, 16e6)),
        **clock('yolox', times),
        **clock(
            'yolox',
            {name: 10 * one - (name[1] == 'int8') * 5 * one for name, one in times.items()},
            640,
        ),
    }
    text = write(results, tmp_path, monkeypatch)
    assert (tmp_path / 'page.png').read_bytes().startswith(b'\x89PNG')
    assert 'a machine, 1 thread(s), without VNNI, with AMX' in text and 'OpenVINO 3;' in text
    rows = rows_of(text)
    assert rows['pruned + int8'] == [
        '28.80',
        '43.80',
        '48.80',
        '-1.20 (-1.20 to -1.20)',
        '-1.20 (-1.20 to -1.20)',
        '50%',
        '2.20 (11.0%)',
        '2.5',
        '3.8',
        '5.0',
    ]
    # A file in 8 bits is as fast as what it was made from.
    assert (
        rows['float32 eager, file in int8'][-3:]
        == rows['float32 eager'][-3:]
        == ['20.0', '30.0', '40.0']
    )
    assert (
        rows['int8: AP lost, exit 1'][1] == '0.40'
        and rows['pruned + int8: AP lost, exit 1'][1] == '1.20'
    )
    assert rows['pruned + int8: file'][1] == '11.0%'
    assert rows['the same against "tuned alike"'][1] == '1.70'
    assert rows['int8: times as fast as ONNX Runtime float32, exit 1, 128 pixels'][1] == '2.00'
    assert rows['pruned + int8: times as fast as float32 eager, exit 1, 128 pixels'][1] == '8.00'
    assert rows['pruned + int8: times as fast as float32 eager, exit 1, 640 pixels'][1] == '16.00'
    assert (
        'enlarged to 640 x 640' in text
        and '| pruned + int8 | 12.5 | 18.8 | 25.0 | 16.00 | 8.00 |' in text
    )


def test_a_page_of_what_is_known(tmp_path, monkeypatch):
    text = write(known('faster_rcnn', 'whole', eager=(50, 16e6)), tmp_path, monkeypatch)
    assert 'Latencies are not measured yet' in text and not (tmp_path / 'page.png').exists()
    assert rows_of(text)['float32 eager'][-3:] == ['-'] * 3 and 'YOLOX' not in text


def test_no_results_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match='has no results'):
        write({}, tmp_path, monkeypatch)
