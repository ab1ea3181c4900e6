"""What pipelines draw follows from the run's seed, the rank, the pass and the place in it: from
nothing else."""

import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import BatchSampler

from conftest import ROOT
from dynamicdet.datasets.seeding import SeededBatchSampler, drawing_from, seed_samples
from mmdet.registry import DATASETS

SIZE = (64, 64)
LOADING = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
PACKING = [dict(type='PackDetInputs')]
#: What shipped configs draw by, and more of mmdet's and mmcv's.
ALONE = [
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(32, 32), (48, 48), (64, 64), (96, 96)]),
    dict(type='RandomResize', scale=SIZE, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(40, 40)),
    dict(type='RandomAffine'),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='PhotoMetricDistortion'),
    dict(type='CachedMosaic', img_scale=SIZE, max_cached_images=6),
    dict(type='CachedMixUp', img_scale=SIZE, max_cached_images=6),
]
MIXING = [dict(type='Mosaic', img_scale=SIZE), dict(type='MixUp', img_scale=SIZE)]
#: As YOLOX's.
MIXED = [MIXING[0], dict(type='RandomAffine', border=(-32, -32)), MIXING[1], *ALONE[4:6], ALONE[0]]


@pytest.fixture(scope='module')
def build(digits):
    """``build(steps)``: the built-in data, 12 images, through a pipeline; mixed by
    `MultiImageMixDataset` or not."""
    plain = dict(
        type='CocoDataset',
        data_root=str(digits),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=tuple('0123456789')),
    )

    def _build(steps):
        if any(step in MIXING for step in steps):
            return DATASETS.build(
                dict(
                    type='MultiImageMixDataset',
                    dataset={**plain, 'pipeline': LOADING},
                    pipeline=[*steps, *PACKING],
                )
            )
        return DATASETS.build({**plain, 'pipeline': [*LOADING, *steps, *PACKING]})

    return _build


def passes(dataset, rank=0, workers=0, persistent=False, sampler='DefaultSampler'):
    """Two passes over a data set in its own order; what came in each, image by image."""
    loader = Runner.build_dataloader(
        dict(
            dataset=dataset,
            batch_size=4,
            num_workers=workers,
            persistent_workers=persistent,
            sampler=dict(type=sampler, shuffle=False),
        ),
        seed=0,
    )
    seed_samples(loader, 0, rank)
    return [[image for batch in loader for image in batch['inputs']] for _ in range(2)]


def same(images, others):
    """Image by image."""
    return [
        image.shape == other.shape and torch.equal(image, other)
        for image, other in zip(images, others)
    ]


@pytest.mark.parametrize('step', ALONE + MIXING, ids=lambda step: step['type'])
def test_epochs_and_ranks_differ_in_all_that_is_drawn(build, step):
    """The images come in one order: only what is drawn for them can differ."""
    first, second = passes(build([step]))
    again, _ = passes(build([step]))
    other_rank, _ = passes(build([step]), rank=1)
    assert len(first) == 12 and all(same(first, again))
    assert not all(same(first, second))
    assert not all(same(first, other_rank))


@pytest.mark.parametrize('workers, persistent', [(1, False), (1, True), (4, True)])
def test_any_number_of_workers_draws_the_same(build, workers, persistent):
    expected = passes(build(MIXED))
    for images, others in zip(
        expected, passes(build(MIXED), workers=workers, persistent=persistent)
    ):
        assert len(images) == 12 and all(same(images, others))


def test_workers_that_live_on_keep_their_caches(build):
    """Once `CachedMosaic` has five images, it mixes each; an epoch later it still has them."""
    mosaic = {**ALONE[7], 'prob': 1.0}
    size = (3, 128, 128)
    kept, lost = (
        passes(build([mosaic]), workers=1, persistent=persistent) for persistent in (True, False)
    )
    assert [image.shape == size for image in kept[0]] == [False] * 4 + [True] * 8
    assert all(image.shape == size for image in kept[1])
    assert [image.shape == size for image in lost[1]] == [False] * 4 + [True] * 8


def test_the_process_itself_draws_on_as_if_nothing_had_been_drawn(build):
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    with drawing_from(0):
        expected = draws()
    with drawing_from(0):
        passes(build(MIXED))
        # Each new iterator of torch's draws one number.
        assert draws()[:2] == expected[:2]


def test_seeds_of_samples_differ_by_place_pass_rank_and_run():
    def seeds(run, rank, epoch):
        sampler = SeededBatchSampler(BatchSampler(range(12), 4, False), run, rank)
        sampler.epoch = epoch
        return [one.seed for batch in sampler for one in batch]

    every = [
        seed
        for run in (0, 1)
        for rank in (0, 1)
        for epoch in (0, 1)
        for seed in seeds(run, rank, epoch)
    ]
    assert len(set(every)) == len(every) == 2 * 2 * 2 * 12


@pytest.mark.parametrize('name', ['_base_/digits', '_base_/digits_video'])
def test_the_built_in_datas_pipelines_draw_nothing(name):
    """So no figure from them depends on how data workers are seeded."""
    kinds = [step.type for step in Config.fromfile(ROOT / 'configs' / f'{name}.py').train_pipeline]
    assert kinds == ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackDetInputs']
