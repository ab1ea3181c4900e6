"""One reader, one verdict: a mutant of a good annotation file is refused in one line, or serves
every reader as the good file does, to the same AP."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamicdet.annotations import mended_copy, read_annotations
from dynamicdet.datasets.check import check_coco
from dynamicdet.errors import UsageError
from dynamicdet.routing.evaluation import Mixtures, evaluate, read_truth
from dynamicdet.routing.record import RoutingRecord, read_record, write_record
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric

#: What users write where a file has other values; what means the same comes first.
SAME = dict(
    images=dict(
        id=(str, float, lambda one: one + 2**64, 'img{}'.format),
        width=(str, float, ' {} '.format),
        height=(str, '{}.0'.format),
        file_name=('./{}'.format,),
    ),
    annotations=dict(
        id=(
            str,
            lambda one: 0,
            lambda one: 7,
            lambda one: one - 1,
            lambda one: None,
            lambda one: True,
        ),
        bbox=(lambda box: list(map(str, box)), lambda box: [f'{one:e}' for one in box]),
        area=(str, float, lambda one: None),
        iscrowd=(str, bool, float, lambda one: None, lambda one: 'false'),
        ignore=(lambda one: 0, lambda one: None, lambda one: '0', lambda one: False),
    ),
    categories=dict(id=(str, float, 'c{}'.format, lambda one: one + 2**70)),
)
#: Values that are none of these.
NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.just([]),
    st.just({}),
    st.just('x'),
    st.just(''),
    st.just(float('nan')),
    st.just(float('inf')),
    st.just(10**400),
    st.just(-1),
    st.just([[1, 2, 3, 4]]),
    st.just(['1', '2', None, '4']),
    st.just([1, 2, 3]),
    st.just({'a': 1}),
)
#: Where nonsense that is taken would mean something else: an area, a mark or an id that counts.
FIELDS = [
    (group, key)
    for group in SAME
    for key in SAME[group]
    if key not in ('id', 'ignore', 'iscrowd', 'area')
]


@st.composite
def mutations(draw):
    """A change of one field in some entries, in what it says or in how it says it."""
    if draw(st.integers(0, 3)):
        group = draw(st.sampled_from(sorted(SAME)))
        key = draw(st.sampled_from(sorted(SAME[group])))
        change = draw(st.sampled_from(SAME[group][key]))
    else:
        group, key = draw(st.sampled_from(FIELDS))
        value = draw(NONSENSE)
        change = lambda one: copy.deepcopy(value)  # noqa: E731
    remove = group == 'annotations' and key in ('id', 'iscrowd', 'area') and draw(st.booleans())
    return group, key, None if remove else change, draw(st.sampled_from(('all', 'first', 'odd')))


def mutate(data, mutation):
    group, key, change, where = mutation
    entries = data[group]
    names = {}
    for entry in dict(all=entries, first=entries[:1], odd=entries[1::2])[where]:
        before = entry.get(key)
        if change is None:
            entry.pop(key, None)
        elif isinstance(before, (int, float, list, str, type(None))) and not (
            before is None and key != 'ignore'
        ):
            with contextlib.suppress(TypeError, ValueError, IndexError):
                entry[key] = change(before)
                names[str(before)] = entry[key]
    if key == 'id' and group in ('images', 'categories'):
        own = dict(images='image_id', categories='category_id')[group]
        for entry in data['annotations']:
            entry[own] = copy.deepcopy(names.get(str(entry[own]), entry[own]))


def detections(truth):
    """Of a detector that is nearly right: boxes off by some pixels, no two scores alike."""
    rng = np.random.default_rng(0)
    scores = rng.permutation(np.linspace(0.1, 0.9, len(truth['annotations']))).tolist()
    return [
        (
            one['image_id'],
            one['category_id'],
            (np.array(one['bbox']) + rng.normal(0, 2, 4)).tolist(),
            score,
        )
        for one, score in zip(truth['annotations'], scores)
    ]


@pytest.fixture(scope='module')
def good(digits):
    """The sound file's content, its pictures, and what all readers say of it."""
    data = json.loads((digits / 'annotations/instances_test.json').read_text())
    for entry in data['annotations']:
        entry.setdefault('iscrowd', 0)
    return data, str(digits / 'test')


def ap_of_mmdet(path, images, found, classes):
    """By mmdet's own data set, with all its items loaded, and its metric."""
    with contextlib.redirect_stdout(io.StringIO()):
        steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
        dataset = CocoDataset(
            ann_file=path,
            data_prefix=dict(img=images),
            metainfo=dict(classes=classes),
            test_mode=True,
            pipeline=steps,
        )
        metric = CocoMetric(ann_file=path)
        metric.dataset_meta = dataset.metainfo
        boxes = 0
        for row in range(len(dataset)):
            item = dataset[row]
            boxes += len(item['gt_bboxes'])
            own = [one for one in found if one[0] == row]
            corners = torch.tensor([[x, y, x + w, y + h] for _, _, (x, y, w, h), _ in own]).reshape(
                -1, 4
            )
            metric.process(
                {},
                [
                    dict(
                        img_id=item['img_id'],
                        ori_shape=item['ori_shape'],
                        pred_instances=dict(
                            bboxes=corners,
                            scores=torch.tensor([one[3] for one in own]),
                            labels=torch.tensor([one[1] for one in own], dtype=torch.long),
                        ),
                    )
                ],
            )
        return metric.evaluate(len(dataset))['coco/bbox_mAP'], boxes


def judge(path, folder, images, found, classes):
    """What each reader makes of a file: AP by mmdet and by us, from a record as well, and the
    number of boxes that mmdet trains on. ``found`` names images and categories by their place."""
    data = read_annotations(path).data
    ids, categories = ([one['id'] for one in data[group]] for group in ('images', 'categories'))
    results = [
        dict(image_id=ids[image], category_id=categories[label], bbox=box, score=score)
        for image, label, box, score in found
    ]
    truth = read_truth(path)
    record = RoutingRecord.from_images(
        gflops=[1.0, 2.0],
        latencies=[1.0, 2.0],
        provenance={},
        images=[
            dict(
                id=one,
                file='',
                difficulty=0.5,
                detections=2 * [[each for each in results if each['image_id'] == one]],
            )
            for one in ids
        ],
    )
    write_record(record, folder / 'record.npz')
    recorded = Mixtures(read_record(folder / 'record.npz'), truth).ap([0] * len(ids))
    copied = mended_copy(path, folder)
    return dict(
        ours=evaluate(truth, results)['ap'],
        recorded=recorded,
        mmdet=ap_of_mmdet(copied, images, found, classes),
    )


@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.lists(mutations(), min_size=1, max_size=3))
def test_a_mutant_is_refused_or_means_the_same(good, tmp_path, changes):
    whole, images = good
    classes = tuple(one['name'] for one in whole['categories'])
    order = [
        {one['id']: place for place, one in enumerate(whole[group])}
        for group in ('images', 'categories')
    ]
    found = [
        (order[0][image], order[1][category], box, score)
        for image, category, box, score in detections(whole)
    ]
    path = tmp_path / 'good.json'
    if not path.exists():
        path.write_text(json.dumps(whole))
        (tmp_path / 'judged').write_text(
            json.dumps(judge(str(path), tmp_path, images, found, classes))
        )
    mutant = copy.deepcopy(whole)
    for change in changes:
        mutate(mutant, change)
    path = tmp_path / 'mutant.json'
    path.write_text(json.dumps(mutant))
    try:
        check_coco(str(path), images, classes)
    except UsageError as error:
        assert '\n' not in str(error) and str(path) in str(error) and len(str(error)) < 1000
        return
    wanted, said = (
        json.loads((tmp_path / 'judged').read_text()),
        judge(str(path), tmp_path, images, found, classes),
    )
    assert said['ours'] == pytest.approx(wanted['ours'], abs=1e-9)
    assert said['recorded'] == pytest.approx(wanted['ours'], abs=1e-6)
    assert list(said['mmdet']) == wanted['mmdet'] and 0 < wanted['ours'] < 100
