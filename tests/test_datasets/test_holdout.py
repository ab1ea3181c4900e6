import copy
from logging.handlers import BufferingHandler

import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.logging import MMLogger

from dynamicdet.cli import apply_router_holdout
from dynamicdet.datasets.check import check_dataloaders
from dynamicdet.errors import UsageError
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmdet.registry import DATASETS


@pytest.fixture
def whole(digits):
    """Config of the 12 training images."""
    return dict(
        type='CocoDataset',
        data_root=f'{digits}/',
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=tuple('0123456789')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')],
    )


def part(whole, name, **settings):
    return DATASETS.build(dict(type='HoldOut', dataset=copy.deepcopy(whole), part=name, **settings))


def ids(dataset):
    return [dataset.get_data_info(index)['img_id'] for index in range(len(dataset))]


def split(whole, **settings):
    return ids(part(whole, 'cascade', **settings)), ids(part(whole, 'router', **settings))


@pytest.mark.parametrize('seed', [0, 1])
def test_parts_are_disjoint_and_have_all(whole, seed):
    every = ids(DATASETS.build(whole))
    cascade, router = split(whole, share=0.4, seed=seed)
    assert cascade and router and not set(cascade) & set(router)
    assert sorted(cascade + router) == sorted(every)
    # In the order of the data set.
    assert cascade == [image for image in every if image in cascade]


def test_parts_depend_on_seed_alone(whole):
    assert split(whole, share=0.4) == split(whole, share=0.4)
    assert split(whole, share=0.4) != split(whole, share=0.4, seed=1)
    # Of a subset an image stays in its part.
    few = split(dict(whole, indices=-8), share=0.4)
    for own, all_of_it in zip(few, split(whole, share=0.4)):
        assert set(own) == set(all_of_it) & set(sum(few, []))
    # A larger share holds out these images and others.
    assert set(split(whole, share=0.3)[1]) < set(split(whole, share=0.8)[1])


def test_the_share_is_met_about():
    from dynamicdet.datasets.holdout import _draw

    for seed in range(3):
        held = sum(_draw(image, seed) < 0.1 for image in range(10_000))
        # Three standard deviations of a binomial.
        assert abs(held - 1000) < 3 * (10_000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize('seed', range(5))
def test_the_share_is_rounded_and_said(whole, seed):
    """0.2 of 12 are 2, whichever these are."""
    logger, log = MMLogger.get_current_instance(), BufferingHandler(100)
    logger.addHandler(log)
    cascade, router = split(whole, share=0.2, seed=seed)
    logger.removeHandler(log)
    assert (len(cascade), len(router)) == (10, 2)
    said = [one.getMessage() for one in log.buffer if one.levelname == 'INFO']
    assert len(said) == 2
    assert all('router_holdout 0.2: 2 of 12 training images are kept' in one for one in said)


def test_it_is_the_data_set_itself(whole):
    plain, router = DATASETS.build(whole), part(whole, 'router', share=0.4)
    assert type(router) is type(plain) and router.metainfo == plain.metainfo
    assert router.cat_ids == plain.cat_ids and router.ann_file == plain.ann_file
    row = ids(plain).index(ids(router)[0])
    assert (router[0]['inputs'] == plain[row]['inputs']).all()
    sampler = DefaultSampler(router, shuffle=True)
    batches = list(AspectRatioBatchSampler(sampler, batch_size=2))
    assert sorted(index for batch in batches for index in batch) == list(range(len(router)))


def test_a_repeated_data_set_takes_it_inside(whole):
    inner = dict(type='HoldOut', dataset=whole, share=0.4)
    repeated = DATASETS.build(dict(type='RepeatDataset', times=2, dataset=inner))
    assert len(repeated) == 2 * len(part(whole, 'cascade', share=0.4))
    with pytest.raises(UsageError, match='inside RepeatDataset, not around it'):
        part(dict(type='RepeatDataset', times=2, dataset=whole), 'router')


def test_the_data_check_looks_inside(whole):
    whole['ann_file'] = 'annotations/nothing.json'
    cfg = dict(train_dataloader=dict(dataset=dict(type='HoldOut', dataset=whole)))
    with pytest.raises(UsageError, match='train_dataloader.dataset.dataset'):
        check_dataloaders(cfg, ('train',))


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(share=1.0), 'a share in'),
        (dict(share=0), 'a share in'),
        (dict(share=1e-9), 'a part without any'),
    ],
)
def test_what_is_refused(whole, settings, said):
    with pytest.raises(UsageError, match=said):
        part(whole, 'router', **settings)
    with pytest.raises(UsageError, match="part 'cascade' or 'router'"):
        part(whole, 'test')


@pytest.mark.parametrize(
    'share, loader, said',
    [
        (1.5, dict(dataset=dict(type='CocoDataset')), 'got 1.5'),
        ('x', dict(dataset=dict(type='CocoDataset')), 'got x'),
        (0.5, 5, 'has 5'),
        (0.5, dict(batch_size=2), 'has None'),
        (0.5, dict(dataset=[]), r'has \[\]'),
        (0.5, dict(dataset=dict(ann_file='a.json')), 'a.json'),
        (0.5, dict(dataset=dict(type='ConcatDataset', datasets=[7])), 'has 7'),
    ],
)
def test_what_cannot_be_held_out_of_is_said(share, loader, said):
    with pytest.raises(UsageError, match=f'router_holdout .*{said}'):
        apply_router_holdout(
            Config(
                dict(
                    router_holdout=share,
                    model=dict(type='DynamicDetector'),
                    train_dataloader=loader,
                )
            )
        )


@pytest.mark.parametrize(
    'wrapped',
    [
        lambda one: one,
        lambda one: dict(type='RepeatDataset', times=2, dataset=one),
        lambda one: dict(type='ConcatDataset', datasets=[one]),
    ],
)
def test_one_line_of_a_config_holds_images_out(whole, wrapped):
    """No image is in both steps, and none is lost."""
    seen = {}
    for step, settings in dict(cascade={}, router=dict(train_router=True)).items():
        cfg = Config(
            dict(
                router_holdout=0.4,
                model=dict(type='DynamicDetector', **settings),
                train_dataloader=dict(dataset=wrapped(copy.deepcopy(whole))),
            )
        )
        apply_router_holdout(cfg)
        data = DATASETS.build(cfg.train_dataloader.dataset)
        seen[step] = [data.get_data_info(index)['img_id'] for index in range(len(data))]
    assert seen['cascade'] and seen['router'] and not set(seen['cascade']) & set(seen['router'])
    assert sorted({*seen['cascade'], *seen['router']}) == sorted(ids(DATASETS.build(whole)))
    apply_router_holdout(cfg)
    cfg.router_holdout = 0.4
    with pytest.raises(UsageError, match='HoldOut already'):
        apply_router_holdout(cfg)
