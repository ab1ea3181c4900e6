"""A router fitted to records ends up in the checkpoint, whole and with where it comes from."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import rebuilt, run_tool
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.measuring.router_from_records import (
    fit_router_to_records,
    ground_truths,
    insert_router,
)
from dynamicdet.routing import build_objective
from dynamicdet.routing.record import RoutingRecord, require_of_detector, write_record
from dynamicdet.routing.router_fitting import rank_correlation
from dynamicdet.testing import tiny_detector, tiny_dynamic
from mmdet.registry import MODELS


def build(**settings):
    torch.manual_seed(0)
    return MODELS.build(tiny_dynamic('fcos', shared=False, **settings))


def make_record(model, images=60, first=0, seed=0, folder='a'):
    """The first feature says what an image gains."""
    rng = np.random.default_rng(seed)
    entries = []
    for index in range(first, first + images):
        features = rng.random(len(model.router.mean)).astype(np.float32)
        loss = 3 + rng.random()
        entries.append(
            dict(
                id=index,
                file=f'{folder}/{index}.jpg',
                difficulty=0.5,
                detections=[[], []],
                features=features,
                losses=[loss + float(features[0]), loss],
                objects=1 + index % 3,
            )
        )
    return RoutingRecord.from_images(entries, [1.0, 2.0], [0.1, 0.2], dict(ann_file=''))


def features(record):
    return record.features


def fit(model, records, objective='paper', **settings):
    return fit_router_to_records(model.router, records, build_objective(objective), **settings)


@pytest.fixture
def files(tmp_path):
    """Config, checkpoint of step 1 with an optimizer and an old calibration, and two records, as
    files."""
    model = build()
    Config(
        dict(
            model=tiny_dynamic('fcos', shared=False),
            custom_imports=dict(imports=['dynamicdet']),
            default_scope='mmdet',
        )
    ).dump(tmp_path / 'config.py')
    state = model.state_dict()
    state['difficulties'], state['threshold'] = torch.tensor([0.1, 0.2]), torch.tensor(0.15)
    write_checkpoint(
        dict(
            state_dict=state,
            meta=dict(epoch=3, calibration=dict(threshold=0.15)),
            optimizer=dict(state={}),
        ),
        str(tmp_path / 'cascade.pth'),
    )
    for name, first in (('a', 0), ('b', 60)):
        write_record(make_record(model, first=first, seed=first), tmp_path / f'{name}.npz')
    return tmp_path


def test_the_tool(files):
    before = (files / 'cascade.pth').read_bytes()
    result = run_tool(
        'fit_router.py',
        files / 'config.py',
        files / 'cascade.pth',
        '--records',
        files / 'a.npz',
        files / 'b.npz',
        '--objective',
        'rank',
        '--seed',
        3,
        '--out',
        files / 'out' / 'new.pth',
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (
        '120 rows of 120 images' in result.stdout
        and str(files / 'out' / 'new.pth') in result.stdout
    )
    assert (files / 'cascade.pth').read_bytes() == before
    assert [path.name for path in (files / 'out').iterdir()] == ['new.pth']
    checkpoint = read_checkpoint(str(files / 'out' / 'new.pth'))
    meta = checkpoint['meta']['router']
    assert meta['records'] == [str(files / 'a.npz'), str(files / 'b.npz')] and meta['seed'] == 3
    assert meta['objective']['fit'] == 'rank' and meta['objective']['gain'] == 'loss_sum'
    assert (meta['rows'], meta['images']) == (120, 120) and 0.25 < meta['correlation'] <= 1
    assert checkpoint['meta']['epoch'] == 3 and 'calibration' not in checkpoint['meta']
    assert 'optimizer' not in checkpoint
    json.dumps(meta)


def test_a_linear_router_by_class(files):
    """Image 0, 3, ... of a record has an object of a rare class; the others, of a frequent one."""
    for name, first in (('a', 0), ('b', 60)):
        truth = files / f'{name}.json'
        annotations = [
            dict(
                id=index + 1,
                image_id=index,
                category_id=1 if index % 3 else 2,
                bbox=[0, 0, 9, 9],
                area=81,
                iscrowd=0,
            )
            for index in range(first, first + 60)
        ]
        truth.write_text(
            json.dumps(
                dict(
                    images=[
                        dict(id=index, file_name=f'{index}.jpg', width=64, height=64)
                        for index in range(first, first + 60)
                    ],
                    annotations=annotations,
                    categories=[dict(id=1, name='often'), dict(id=2, name='rare')],
                )
            )
        )
        record = make_record(build(), first=first, seed=first)
        record.provenance['ann_file'] = str(truth)
        write_record(record, files / f'{name}.npz')
    result = run_tool(
        'fit_router.py',
        files / 'config.py',
        files / 'cascade.pth',
        '--records',
        files / 'a.npz',
        files / 'b.npz',
        '--objective=rank',
        '--gain=loss',
        '--by-class',
        '--linear',
        '--out',
        files / 'new.pth',
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert '(penalty ' in result.stdout
    checkpoint = read_checkpoint(str(files / 'new.pth'))
    meta = checkpoint['meta']['router']
    assert meta['objective']['by_class'] is True and meta['objective']['gain'] == 'loss'
    assert meta['linear'] is True
    # Both records' objects count: 80 and 40, weights 1 / 100 and 1 / 60.
    often, rare = 120 / (80 + 40 * 100 / 60), 120 / (80 * 60 / 100 + 40)
    records = [make_record(build(), first=first, seed=first) for first in (0, 60)]
    gains = [
        (image['losses'][0] - image['losses'][1]) * (often if image['id'] % 3 else rare)
        for record in records
        for image in record
    ]
    assert float(checkpoint['state_dict']['delta']) == pytest.approx(np.median(gains), rel=1e-5)


def test_the_tool_refuses_in_one_line(files):
    result = run_tool(
        'fit_router.py',
        files / 'config.py',
        files / 'cascade.pth',
        '--records',
        files / 'a.npz',
        '--out',
        files / 'new.pth',
        '--cfg-options',
        'model.router.pools=mean,max',
    )
    assert result.returncode == 2 and not (files / 'new.pth').exists()
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith(
            'error: the records have 120 features per image, and the router of this config takes '
            '240'
        )
    )


def test_records_of_another_detector_are_refused():
    record = make_record(build())
    with pytest.raises(UsageError, match='3 exits and this detector 2'):
        require_of_detector(record.provenance, 3, 2, 'a.pth')
    with pytest.warns(UserWarning, match="of 'b.pth', not of 'a.pth'"):
        require_of_detector(dict(checkpoint='b.pth'), 2, 2, 'a.pth')
    require_of_detector(record.provenance, record.exits, 2, 'a.pth')


def test_records_are_known_by_weights_whatever_their_files_are_called():
    record = rebuilt(
        make_record(build()), provenance=dict(checkpoint='calibrated.pth', exits_digest='0123')
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        require_of_detector(record.provenance, record.exits, 2, 'epoch_2.pth', '0123')
    with pytest.warns(UserWarning, match="other weights than those of 'calibrated.pth'"):
        require_of_detector(record.provenance, record.exits, 2, 'calibrated.pth', '4567')


def test_the_router_is_put_into_the_checkpoint():
    model, record = build(), make_record(build())
    found, images = fit(model, [record])
    before = copy.deepcopy(model.state_dict())
    before['difficulties'] = torch.tensor([0.1, 0.2])
    # As from a process that was wrapped for distribution.
    given = dict(state_dict={f'module.{name}': value for name, value in before.items()})
    got = insert_router(model, given, found, dict(seed=0))['state_dict']
    gains = [one['losses'][0] - one['losses'][1] for one in record]
    assert images == 60 and got['delta'].item() == pytest.approx(np.median(gains))
    assert got['difficulties'].numel() == 0 and got['threshold'] == 0.5
    for name, value in before.items():
        if not name.startswith('router.') and name not in ('delta', 'difficulties'):
            assert torch.equal(got[name], value) or value.isnan().all(), name
    model.load_state_dict(got)
    with torch.no_grad():
        phi = model.router.score(torch.from_numpy(features(record)))
    assert rank_correlation(phi.numpy(), gains) > 0.8


def test_views_of_an_image_count_as_one_image():
    model = build()
    twice = [make_record(model), make_record(model, seed=1)]
    assert fit(model, twice)[1] == 60
    twice[1] = make_record(model, seed=1, folder='b')
    assert fit(model, twice)[1] == 120


def test_features_from_another_record():
    """Folds whose gains come from cascades of their own; what the router sees is looked up by
    id."""
    model = build()
    folds = [make_record(model, first=0), make_record(model, first=60, seed=1)]
    whole = RoutingRecord.from_images([one for fold in folds[::-1] for one in list(fold)[::-1]])
    expected, _ = fit(model, folds)
    for fold in folds:
        fold.features = fold.features * 0
    got, _ = fit(model, folds, features_from=[whole])
    for name, value in expected.state.items():
        torch.testing.assert_close(got.state[name], value)
    assert fit(model, folds)[0].correlation == 0
    with pytest.raises(
        UsageError, match=r'60 images \(such as 60\) are not in the records of features'
    ):
        fit(model, folds, features_from=[make_record(model)])
    with pytest.raises(UsageError, match=r'image 0 \(a/0.jpg\) is twice'):
        fit(model, folds, features_from=[whole, make_record(model)])
    # Data sets number their images alike.
    with pytest.raises(
        UsageError, match=r"image 0 is 'a/0.jpg', and 'b/0.jpg' in the records of features"
    ):
        fit(model, folds[:1], features_from=[make_record(model, folder='b')])


def test_other_widths_are_refused():
    model, wide = build(), build(router=dict(type='Router', pools=('mean', 'std')))
    with pytest.raises(
        UsageError, match='have 240 features per image, and the router of this config takes 120'
    ):
        fit(model, [make_record(wide)])
    with pytest.raises(UsageError, match=r'different widths: \[120, 240\]'):
        fit(model, [make_record(model), make_record(wide, first=60)])
    assert fit(wide, [make_record(wide)])[0].state['mean'].shape == (240,)


def test_gains_in_ap_come_from_the_record_s_own_annotations(tmp_path):
    """Exit 1 finds what there is in the images whose first feature is large."""
    model = build()
    record = make_record(model)
    box = dict(bbox=[0, 0, 10, 10], category_id=1)
    images = list(record)
    for image in images:
        found = [dict(box, score=0.9)] if image['features'][0] > 0.5 else []
        image['detections'] = [[], found]
    record = rebuilt(record, images)
    annotations = [
        dict(box, id=index, image_id=image['id'], area=100, iscrowd=0)
        for index, image in enumerate(record, 1)
    ]
    (tmp_path / 'truth.json').write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=image['id'], file_name=f'{image["id"]}.png', width=64, height=64)
                    for image in record
                ],
                annotations=annotations,
                categories=[dict(id=1, name='it')],
            )
        )
    )
    record.provenance['ann_file'] = str(tmp_path / 'truth.json')
    objective = build_objective('ap')
    cocos = ground_truths([record, record], objective)
    assert cocos[0] is cocos[1] and ground_truths([record], build_objective('rank')) is None
    found, _ = fit(model, [record], objective, cocos=cocos[:1])
    gains = features(record)[:, 0] > 0.5
    assert found.quantiles[0] == 0 and found.quantiles[100] == pytest.approx(100, abs=1e-3)
    assert found.quantiles[50].item() == pytest.approx(100 * np.median(gains), abs=1e-3)
    record.provenance['ann_file'] = str(tmp_path / 'gone.json')
    with pytest.raises(UsageError, match='no annotation file at'):
        ground_truths([record], objective)


def test_other_checkpoints_are_refused():
    model = build()
    found, _ = fit(model, [make_record(model)])
    with pytest.raises(UsageError, match='plain detector'):
        insert_router(
            model, dict(state_dict=MODELS.build(tiny_detector('fcos')).state_dict()), found, {}
        )
    other = MODELS.build(tiny_dynamic('retinanet', shared=False)).state_dict()
    with pytest.raises(UsageError, match='does not fit this config'):
        insert_router(model, dict(state_dict=other), found, {})
