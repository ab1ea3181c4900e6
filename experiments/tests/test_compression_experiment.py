"""The experiment on compression: its table of steps, what it measures, the arithmetic of its
page."""

import json
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from conftest import ROOT, load_small
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.compression.encoding import Lossy
from dynamicdet.compression.pruning import layers_of_blocks
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.engine import PruningHook, WeightSharingHook
from dynamicdet.testing import randomize
from mmdet.registry import MODELS

sys.path.insert(0, str(ROOT / 'experiments'))
import compression_page as page  # noqa: E402
from compression_measure import measure_points  # noqa: E402
from compression_runs import START, TUNING, all_steps  # noqa: E402
from routing_runs import all_runs  # noqa: E402

STEPS = all_steps()


def test_steps_are_named_once_and_start_from_steps_before_them():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for place, step in enumerate(STEPS):
        assert step.start in (START, *names[:place]) and step.points
    assert START in {run.name for run in all_runs()}


def test_what_steps_do_fits_the_detector():
    cfg = Config.fromfile(ROOT / 'configs' / 'faster_rcnn_digits.py')
    known = {*cfg, *cfg.train_dataloader.dataset, *cfg.optim_wrapper.optimizer, *cfg.train_cfg}
    # A misspelt option would change nothing.
    assert {name.split('.')[-1] for name in TUNING} <= known | {'T_max', 'seed'}
    cfg.merge_from_dict(TUNING)
    assert cfg.val_dataloader is cfg.val_cfg is None and cfg.param_scheduler[1].T_max == 1
    model = MODELS.build(cfg.model)
    weights = [key for key, value in model.state_dict().items() if value.dim() > 1]
    for step in STEPS:
        for point in step.points.values():
            layers_of_blocks(model, [PruningBlock(**block) for block in point.get('blocks', ())])
            lossy = Lossy(**point.get('lossy', {}))
            for pattern in lossy.binary or ():
                assert any(Path(key).match(pattern) for key in weights)
        for hook in step.hooks or ():
            kind = dict(PruningHook=PruningHook, WeightSharingHook=WeightSharingHook)[hook['type']]
            own = kind(**{name: value for name, value in hook.items() if name != 'type'})
            # Well within 3,000 images at 8 an iteration.
            assert getattr(own, 'end', 0) < 3000 / 8


def test_points_are_measured_once(digits, tmp_path):
    cfg = load_small(
        'faster_rcnn_digits', digits, tmp_path, **{'model.neck.in_channels': [8, 16, 32, 64]}
    )
    cfg.model.pop('detector')
    cfg.dump(tmp_path / 'config.py')
    model = randomize(MODELS.build(cfg.model))
    write_checkpoint(dict(state_dict=model.state_dict()), str(tmp_path / 'a.pth'))
    block = dict(name='all', modules=['*'], target=0.5)
    points = dict(as_it_is={}, half=dict(blocks=[block]), int8=dict(lossy=dict(int8=[])))

    def measured(*names):
        measure_points(
            str(tmp_path / 'config.py'),
            str(tmp_path / 'a.pth'),
            {name: points[name] for name in names},
            tmp_path / 'out.json',
        )
        return json.loads((tmp_path / 'out.json').read_text())['points']

    first = measured('as_it_is', 'half')
    assert list(first) == ['as_it_is', 'half'] and set(first['half']) == {
        'ap',
        'ap50',
        'resampled_ap',
        'resampled_ap50',
        'bytes',
        'float32_megabytes',
        'pruned',
        'error',
    }
    assert first['as_it_is']['pruned'] == 0 and first['half']['pruned'] == pytest.approx(
        0.5, abs=0.02
    )
    assert first['half']['bytes'] < 0.75 * first['as_it_is']['bytes']
    assert len(first['half']['resampled_ap']) == 100
    # The third is of the detector as it was, not of its half; those that are there are kept.
    third = measured('as_it_is', 'half', 'int8')
    assert third['half'] == first['half'] and third['int8']['pruned'] == pytest.approx(0, abs=0.02)
    assert 0 < third['int8']['error'] < 0.02


# The page.


def point(value, spread=0.0, **more):
    resampled = [value - spread, value, value + spread]
    return dict(
        ap=value,
        ap50=value,
        resampled_ap=resampled,
        resampled_ap50=resampled,
        bytes=1e6,
        error=0.0,
        float32_megabytes=13.0,
        **more,
    )


def test_the_knee_by_hand():
    """Level up to 60, then down to 0 at 90: farthest above the line from (0, 80) to (90, 0) at
    60."""
    assert page.knee([0, 30, 60, 90], [80, 80, 80, 0]) == 60
    assert page.knee([0, 30, 60, 90], [80, 79, 30, 0]) == 30
    # What never falls has none before its end.
    assert page.knee([0, 50, 90], [5, 5, 6]) == 90


def test_differences_are_paired():
    """Both move together on each resample: the difference is sure, though neither is."""
    assert page.difference(point(52.0, spread=5), point(50.0, spread=5), 'ap') == (2, 2, 2)


def test_no_loss_ends_where_the_interval_is_below_zero():
    base = point(50.0)
    values = {
        10: point(50.0),
        20: point(49.0, spread=2),
        30: point(48.0, spread=1),
        40: point(50.0),
    }
    points = {f'prune-l1_global-both/{share}': one for share, one in values.items()}
    assert page.without_loss(points, 'L1 global', 'both', base) == 20
    assert page.without_loss({}, 'L1 global', 'both', base) == 0
    # What is not measured says nothing.
    del points['prune-l1_global-both/10']
    assert page.without_loss(points, 'L1 global', 'both', base) == 20


def test_a_page_of_what_is_known(tmp_path, monkeypatch):
    facts = dict(
        seed=0, resamples=3, provenance=dict(images=6, device='a machine', threads=1, torch='2')
    )
    points = {
        step.name: {name: point(60.0 - index) for index, name in enumerate(step.points)}
        for step in STEPS
        if not step.name.startswith('tuned-prune-both-9')
    }
    for name, own in points.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(dict(facts, points=own)))
    monkeypatch.setattr(page, 'RESULTS', tmp_path)
    monkeypatch.setattr(page, 'PAGE', tmp_path / 'page.md')
    monkeypatch.setattr(page, 'PICTURE', tmp_path / 'page.png')
    page.main()
    text = (tmp_path / 'page.md').read_text()
    assert (tmp_path / 'page.png').read_bytes().startswith(b'\x89PNG')
    rows = [line.split(' | ') for line in text.splitlines() if line.startswith('| 90 %')]
    assert len(rows) == 6 and [row[5] for row in rows] == ['60.00 (60.00 to 60.00)'] * 4 + ['-'] * 2
    # The sweep's last of nine; the unpruned is 60, from which every share loses.
    assert all(row[1].startswith('52.00') for row in rows)
    # Other methods are tuned in both blocks alone, at some shares.
    heads = [line for line in text.splitlines() if line.startswith('| pruned | L1 global')]
    assert ['structured, tuned' in line for line in heads] == [False] * 4 + [True] * 2
    assert text.count('16 shared values') == 4 and 'a machine' in text


def test_steps_to_do(tmp_path, monkeypatch):
    import compression_all as experiment

    for name in ('RESULTS', 'WORK', 'ROUTING'):
        monkeypatch.setattr(experiment, name, tmp_path / name)
        (tmp_path / name).mkdir()
    assert experiment.to_do(['']) == STEPS
    for step in STEPS:
        (tmp_path / 'RESULTS' / f'{step.name}.json').touch()
    assert experiment.to_do(['']) == []
    # Its start has a result, but no weights any more.
    (tmp_path / 'RESULTS' / 'tuned-share-4-pruned-50.json').unlink()
    both = ['tuned-prune-both-50', 'tuned-share-4-pruned-50']
    assert [step.name for step in experiment.to_do([''])] == both
    (tmp_path / 'WORK' / 'tuned-prune-both-50').mkdir()
    (tmp_path / 'WORK' / 'tuned-prune-both-50' / 'trained').touch()
    assert [step.name for step in experiment.to_do(['pruned'])] == both[1:]
