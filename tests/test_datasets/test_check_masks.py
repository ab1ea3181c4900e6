"""Outlines of objects, before mmdet and pycocotools stumble over them."""

import numpy as np
import pytest
from mmengine.config import Config
from pycocotools import mask as mask_utils

from dynamicdet.datasets.annotation_repair import learns_masks
from dynamicdet.datasets.check_masks import check_outlines
from dynamicdet.errors import UsageError

IMAGES = [dict(id=1, width=6, height=4)]
POLYGON = [1, 1, 5, 1, 5, 3]
RUNS = mask_utils.encode(np.asfortranarray(np.eye(4, 6, dtype=np.uint8)))
COMPRESSED = dict(size=[4, 6], counts=RUNS['counts'].decode())


def check(outline, **more):
    return check_outlines(IMAGES, [dict(id=3, image_id=1, segmentation=outline, **more)], 'the set')


@pytest.mark.parametrize(
    'outline',
    [
        [POLYGON],
        [POLYGON, [0, 0, 2.5, 0, 2, 2, 0, 2]],
        COMPRESSED,
        dict(size=[4, 6], counts=[4, 12, 8]),
    ],
)
def test_outlines_that_mmdet_reads(outline):
    assert check(outline) == []


@pytest.mark.parametrize(
    'outline, said',
    [
        (None, "has no 'segmentation'"),
        ([], "has no 'segmentation'"),
        (POLYGON, 'no list of polygons'),
        ('RLE', 'no list of polygons'),
        ([[1, 1, 5, 1]], 'fewer than three points'),
        ([[]], 'fewer than three points'),
        ([POLYGON + [1]], 'odd count'),
        ([[1, 1, 5, 1, 5, '3']], 'no finite numbers'),
        ([[1, 1, 5, 1, 5, float('nan')]], 'no finite numbers'),
        ([[1, 1, 5, 1, 5, [3]]], 'no finite numbers'),
        ([[1e9, 1, 5, 1, 5, 3]], 'or beyond 1048576'),
        ([[-(10**400), 1, 5, 1, 5, 3]], 'or beyond 1048576'),
        ({**COMPRESSED, 'size': [6, 4]}, 'has run lengths of the size [6, 4]'),
        (dict(size=[4, 6]), 'has no run lengths'),
        (dict(size=[4, 6], counts=[4, 13, 8]), 'not those of its image'),
        (dict(size=[4, 6], counts='~~~~~~~~'), 'cannot be decoded'),
        (dict(size=[4, 6], counts='01P'), 'cannot be decoded'),
        (dict(size=[4, 6], counts='ü'), 'cannot be decoded'),
        (dict(size=[4, 6], counts=5), 'has no run lengths'),
        # Cut short, or too long: what pycocotools would make of memory that is not the mask's.
        (dict(size=[4, 6], counts=''), 'not those of its image'),
        (dict(size=[4, 6], counts=COMPRESSED['counts'][:-1]), 'not those of its image'),
        (dict(size=[4, 6], counts=COMPRESSED['counts'] + '4'), 'not those of its image'),
    ],
)
def test_outlines_that_nobody_reads(outline, said):
    with pytest.raises(UsageError, match='the set: annotation 3 .image 1.') as error:
        check(outline)
    assert said in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('share', [0, 0.003, 0.5, 1])
def test_run_lengths_as_pycocotools_writes_them(share):
    mask = np.asfortranarray(np.random.default_rng(0).random((90, 130)) < share).astype(
        np.uint8, order='F'
    )
    runs = mask_utils.encode(mask)
    image = dict(id=1, width=130, height=90)
    outline = dict(size=[90, 130], counts=runs['counts'].decode())
    assert check_outlines([image], [dict(id=3, image_id=1, segmentation=outline)], 'the set') == []


def test_polygons_that_training_leaves_out():
    (line,) = check([POLYGON, [1, 2]])
    assert line.startswith('1 annotation(s) have a polygon of fewer than three points')


def test_who_needs_them():
    def cfg(mask, metric):
        steps = [dict(type='LoadAnnotations', with_mask=mask)]
        return Config(
            dict(
                train_dataloader=dict(dataset=dict(dataset=dict(pipeline=steps))),
                val_evaluator=[dict(metric=metric)],
            )
        )

    kinds = (False, 'bbox'), (True, 'bbox'), (False, 'segm'), (False, ['bbox', 'segm'])
    assert [learns_masks(cfg(*one)) for one in kinds] == [False, True, True, True]
