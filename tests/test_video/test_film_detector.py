"""Films with regions, on real mmdet configs, shrunk."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import same_detections, spread_scores
from dynamicdet.building import build_loader
from dynamicdet.errors import UsageError
from dynamicdet.measuring.flops import count_flops
from dynamicdet.testing import randomize, tiny_dynamic
from dynamicdet.video.demo import FrameDetector, run_demo
from dynamicdet.video.film_detector import FilmDetector
from dynamicdet.video.film_stakes import (
    cell_changes,
    spans_of,
    spread,
    stakes_of,
    thumbnail_of,
    touches,
    velocities,
)
from dynamicdet.video.sources import open_source
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

ONE_BACKBONE = dict(backbones=1, reuse_stages=0, first_scale=0.5)
SIZE = (160, 256)
WHOLE = [[0.0, 0.0, 256.0, 160.0]]


def build(name='retinanet', settings=ONE_BACKBONE, **film):
    cfg = tiny_dynamic(name, regions={}, shared=True, **settings)
    model = MODELS.build(dict(cfg, type='FilmDetector', **film))
    return spread_scores(randomize(model)).eval()


@pytest.fixture(scope='module')
def shared():
    """Weights of all tests that share a detector, by type."""
    return build()


def like(shared, **film):
    """The same detector with other settings, that remembers nothing."""
    model = copy.deepcopy(shared)
    model.reset()
    model._rates = {}
    for name, value in film.items():
        setattr(model, name, value)
    return model


def picture(step=0, scene=0, size=SIZE):
    """A square of 24 pixels that moves by 4 a frame over a scene, (3, H, W)."""
    image = np.random.default_rng(scene).integers(40, 90, (3, *size)).astype(np.uint8)
    image[:, 40:64, 20 + 4 * step : 44 + 4 * step] = 220
    return torch.from_numpy(image)


def sample_of(number, film=0, size=SIZE):
    return DetDataSample(
        metainfo=dict(
            img_id=number,
            img_shape=size,
            ori_shape=size,
            scale_factor=(1.0, 1.0),
            video_id=film,
            frame_id=number,
        )
    )


@torch.no_grad()
def detect(model, *frames):
    """Detect in frames, (picture, number, film) each, as one batch."""
    inputs = [image for image, *_ in frames]
    samples = [sample_of(number, film, tuple(image.shape[1:])) for image, number, film in frames]
    return model.test_step(dict(inputs=inputs, data_samples=samples))


def plain_results(model, threshold, image):
    """What the detector without memory makes of a picture."""
    model = like(model)
    model.set_budget(threshold=threshold)
    (sample,) = detect(model, (image, 0, None))
    assert len(sample.pred_instances)
    return sample


def same(one, other):
    return same_detections(one.pred_instances, other.pred_instances)


def calls_of(model):
    """Pictures that the backbone is given from now on: their shapes."""
    seen = []
    model.backbone.nets[0].register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    return seen


def test_a_still_film_costs_nothing_after_its_first_frame(shared):
    model = like(shared, every=2)
    model.set_budget(threshold=0.05)
    seen = calls_of(model)
    (first,) = detect(model, (picture(), 0, 'a'))
    assert first.exit >= 0 and first.gflops > 0 and len(first.pred_instances)
    ran = len(seen)
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (3, *SIZE)).astype(np.uint8))
    for number in range(1, 6):
        # As of a sensor.
        (sample,) = detect(model, (picture() + noise.roll(number, 2), number, 'a'))
        assert (sample.exit, sample.gflops, sample.regions) == (-1, 0.0, []) and same(sample, first)
    assert len(seen) == ran
    # Nor at no price.
    model.set_budget(threshold=-1)
    (sample,) = detect(model, (picture(), 6, 'a'))
    assert sample.exit == -1 and len(seen) == ran


def test_an_infinite_price_is_exit_0_on_every_nth_frame(shared):
    model = like(shared, every=3)
    model.set_budget(threshold=1)
    for number in range(7):
        (sample,) = detect(model, (picture(number), number, 'a'))
        assert sample.exit == (0 if number % 3 == 0 else -1) and sample.regions == []
        if number % 3 == 0:
            assert same(sample, plain_results(model, 1, picture(number)))


@pytest.mark.parametrize('every', [1, 10])
def test_no_price_is_the_full_second_exit_on_each_frame(shared, every):
    model = like(shared, every=every)
    model.set_budget(threshold=0)
    for number in range(3):
        (sample,) = detect(model, (picture(number), number, 'a'))
        assert sample.exit == 1 and same(sample, plain_results(model, 0, picture(number)))


def test_the_second_exit_looks_at_whole_frames(shared):
    """At any price, and exit 0 at none; at regions as before."""
    model = like(shared, every=3, whole_exit=1)
    model.set_budget(threshold=1)
    seen = calls_of(model)
    for number in range(4):
        (sample,) = detect(model, (picture(number), number, 'a'))
        assert sample.exit == (-1 if number % 3 else 1)
        assert sample.regions == ([] if number % 3 else WHOLE)
        assert (sample.gflops > 0) == (number % 3 == 0)
    assert [shape[2:] for shape in seen] == [SIZE, SIZE]
    assert same(sample, plain_results(model, 0, picture(3)))
    # Nothing is found: what moves is all that is at stake.
    model.branches[0].bbox_head.test_cfg.score_thr = 1.0
    model.set_budget(threshold=0.02)
    detect(model, (picture(0), 0, 'b'))
    seen.clear()
    (sample,) = detect(model, (picture(2), 1, 'b'))
    assert sample.exit == 1 and len(sample.regions) == len(seen) == 1
    assert max(seen[0][2:]) < max(SIZE)


def test_the_second_exit_looks_at_whole_frames_in_tiles():
    model = build(every=3, whole_exit=1)
    model.regions = type(model.regions)(model.regions.class_weights.numel(), tile=128)
    model.set_budget(threshold=1)
    seen = calls_of(model)
    (sample,) = detect(model, (picture(), 0, 'a'))
    assert sample.exit == 1 and sample.regions == WHOLE
    assert len(seen) > 1 and max(max(shape[2:]) for shape in seen) == 128


def test_a_cut_and_another_size_begin_anew(shared):
    model = like(shared, every=100, cut=15)
    model.set_budget(threshold=1)
    large = (SIZE[0], SIZE[1] + 64)
    images = [picture(), picture(1), 255 - picture(), picture(size=large), picture(1, size=large)]
    samples = [detect(model, (image, number, 'a'))[0] for number, image in enumerate(images)]
    assert [sample.exit for sample in samples] == [0, -1, 0, 0, -1]
    for place in (2, 3):
        assert same(samples[place], plain_results(model, 1, images[place]))
    # And so does a film's first frame.
    assert detect(model, (picture(2, size=large), 0, 'a'))[0].exit == 0


def most_at_stake(gains, threshold):
    """The cell with the most at stake: random weights find large objects everywhere."""
    row, column = np.unravel_index(gains.argmax(), gains.shape)
    return [(int(row), int(column), int(row) + 1, int(column) + 1)] if gains.any() else []


def moving(model, films, batch):
    """Results of some films, by film and frame, so many films at a time."""
    model.regions.choose = most_at_stake
    model.set_budget(threshold=0.5)
    every = {}
    for start in range(0, len(films), batch):
        for number in range(5):
            some = films[start : start + batch]
            samples = detect(
                model, *((picture(number + film, film), number, film) for film in some)
            )
            every.update({(film, number): sample for film, sample in zip(some, samples)})
    return every


def test_films_side_by_side_are_each_alone_and_runs_are_alike(shared):
    films = [0, 1, 2]
    alone = moving(like(shared, every=4), films, 1)
    again = moving(like(shared, every=4), films, 1)
    together = moving(like(shared, every=4), films, 3)
    # Whole frames and regions, or this says little.
    assert len({sample.gflops for sample in alone.values()}) > 1
    for key, sample in alone.items():
        for other in (again[key], together[key]):
            assert (sample.exit, sample.regions) == (other.exit, other.regions)
            assert same(sample, other) and other.gflops == pytest.approx(sample.gflops, rel=1e-6)
    # Frames of one film in one batch run one after the other.
    model = like(shared, every=4)
    model.regions.choose = most_at_stake
    model.set_budget(threshold=0.5)
    for number, sample in enumerate(detect(model, *((picture(n), n, 0) for n in range(5)))):
        assert sample.regions == alone[0, number].regions and same(sample, alone[0, number])


def test_memory_is_bounded(shared):
    model = like(shared)
    model._streams.limit = 2
    model.set_budget(threshold=1)
    for film in range(4):
        detect(model, (picture(), 0, film))
    assert len(model._streams) == 2
    model.train()
    assert len(model._streams) == 0


def test_regions_follow_what_moves_and_costs_are_what_ran(shared):
    model = like(shared)
    # Nothing is found: what moves is all that is at stake.
    model.branches[0].bbox_head.test_cfg.score_thr = 1.0
    model.set_budget(threshold=0.02)
    costs = []
    for number in range(3):
        (sample,) = detect(model, (picture(2 * number), number, 'a'))
        costs.append(sample.gflops)
    assert sample.exit == 1 and len(sample.regions) == 1 and sample.difficulty > 0.02
    left, top, right, bottom = sample.regions[0]
    assert left <= 20 + 8 < 44 + 16 <= right and top <= 40 < 64 <= bottom
    assert (right - left) * (bottom - top) < 0.25 * SIZE[0] * SIZE[1]
    # What ran before is not counted by the model itself; its rounding of odd maps is left out.
    flops, (sample,) = count_flops(lambda: detect(model, (picture(6), 3, 'a')))
    assert sample.gflops == pytest.approx(flops / 1e9, rel=0.02)
    flops, (sample,) = count_flops(lambda: detect(model, (picture(6), 0, 'b')))
    assert sample.gflops == pytest.approx(flops / 1e9, rel=0.02)
    assert 0 < costs[2] < 0.3 * plain_results(shared, 0, picture()).gflops


def test_what_a_region_holds_takes_the_place_of_what_was_there(shared):
    model = like(shared)
    model.set_budget(threshold=0.05)
    (first,) = detect(model, (picture(), 0, 'a'))
    known = {tuple(box) for box in first.pred_instances.bboxes.tolist()}
    rectangle = (1, 0, 2, 2)
    model.regions.choose = lambda gains, threshold: [rectangle]
    (sample,) = detect(model, (picture(1), 1, 'a'))
    # Nothing moved yet: what is not replaced is where it was.
    new = [box for box in sample.pred_instances.bboxes.tolist() if tuple(box) not in known]
    assert new and len(new) < len(sample.pred_instances)
    for left, top, right, bottom in new:
        assert 0 <= (left + right) / 2 < 64 and 32 <= (top + bottom) / 2 < 64
    assert sample.regions == [[0, 0, 96, 96]]


def test_a_pair_and_two_stages_and_merged_exits(shared):
    pair = tiny_dynamic('faster_rcnn')['detector']
    one = tiny_dynamic('retinanet')['detector']
    for settings in (
        dict(detector=[one, pair], objective='ap'),
        dict(tiny_dynamic('mask_rcnn', merge='nms', **ONE_BACKBONE), shared=True),
    ):
        model = MODELS.build(dict(settings, type='FilmDetector', change=0.0))
        model = spread_scores(randomize(model)).eval()
        samples = []
        for threshold in (0.5, 0, 0, 1):
            model.set_budget(threshold=threshold)
            number = len(samples)
            samples += detect(model, (picture(number), number, 'a'))
        assert [sample.exit for sample in samples[1:]] == [1, 1, -1]
        assert samples[2].gflops == pytest.approx(samples[1].gflops)


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(ONE_BACKBONE, every=0), 'every'),
        (dict(ONE_BACKBONE, change=-1.0), 'change'),
        (dict(ONE_BACKBONE, cut=float('nan')), 'cut'),
        (dict(ONE_BACKBONE, regions=None), 'regions'),
        (dict(), 'backbones=1'),
    ],
)
def test_what_a_film_detector_takes(settings, said):
    settings = {'regions': {}, **settings}
    film = {name: settings.pop(name) for name in ('every', 'change', 'cut') if name in settings}
    with pytest.raises(UsageError, match=said):
        MODELS.build(dict(tiny_dynamic('retinanet', **settings), type='FilmDetector', **film))


# By hand.


def test_changes_of_cells():
    before = torch.zeros(3, 64, 100)
    after = before.clone()
    # One of 16 parts of the cell in row 1 and column 2; of one channel.
    after[0, 40:48, 64:72] = 30
    changes = cell_changes(thumbnail_of(after, 32), thumbnail_of(before, 32))
    wanted = np.zeros((2, 4))
    wanted[1, 2] = 10
    assert np.allclose(changes, wanted)


def test_stakes_lie_under_the_boxes():
    boxes = np.array([[0.0, 0, 31, 31], [40, 10, 100, 60], [-90, -90, -80, -80]])
    spans = spans_of(boxes, (2, 4), 32)
    assert spans.tolist() == [[0, 0, 1, 1], [0, 1, 2, 4], [0, 0, 1, 1]]
    stakes = spread(np.array([0.5, 0.6, 0.25]), spans, (2, 4))
    assert np.allclose(stakes, [[0.75, 0.1, 0.1, 0.1], [0, 0.1, 0.1, 0.1]])
    mask = np.array([[0, 0, 0, 0], [1, 0, 0, 1]], bool)
    assert touches(mask, spans).tolist() == [False, True, False]
    # What appears, appears where nothing is.
    stakes = stakes_of(np.array([0.5]), spans[:1], mask, 0.4)
    assert np.allclose(stakes, [[0.5, 0, 0, 0], [0.2, 0, 0, 0.2]])


def test_velocity_is_half_of_the_newest_motion():
    before = np.array([[0.0, 0, 10, 10], [100, 0, 110, 10]]), np.array([0, 1])
    after = np.array([[8.0, 0, 18, 10], [100, 4, 110, 14], [50, 50, 60, 60]]), np.array([0, 1, 1])
    first = velocities(before, np.zeros((2, 2)), after, 2)
    assert np.allclose(first, [[2, 0], [0, 1], [0, 0]])
    # Where it was expected: 8 farther on, which is more than it is large.
    later = after[0] + [12.0, 0, 12, 0], after[1]
    assert np.allclose(velocities(after, first, later, 4)[0], [2.5, 0])
    assert velocities((np.zeros((0, 4)), np.zeros(0)), np.zeros((0, 2)), after, 1).shape == (3, 2)


# Tools.


def test_the_demo_writes_exits_and_costs(tmp_path):
    for number in range(4):
        image = picture(max(number, 1) - 1).permute(1, 2, 0).numpy()
        cv2.imwrite(str(tmp_path / f'{number:03}.png'), image)
    cfg = dict(tiny_dynamic('retinanet', regions={}, **ONE_BACKBONE), type='FilmDetector')
    cfg = dict(cfg, budget=dict(threshold=0.05))
    model = spread_scores(randomize(MODELS.build(copy.deepcopy(cfg))))
    classes = ('a', 'b', 'c')
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=classes))),
        tmp_path / 'film.pth',
    )
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(256, 160), keep_ratio=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
        ),
    ]
    dataset = dict(
        type='CocoDataset',
        ann_file='',
        data_prefix=dict(img=''),
        metainfo=dict(classes=classes),
        pipeline=pipeline,
    )
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=cfg,
            visualizer=dict(type='DetLocalVisualizer'),
            test_dataloader=dict(dataset=dataset),
        )
    )
    detector = FrameDetector(cfg, str(tmp_path / 'film.pth'), 'cpu', score=0.0)
    assert isinstance(detector.model, FilmDetector)
    summary = run_demo(detector, open_source(str(tmp_path), 25), tmp_path / 'out' / 'film.mp4')
    lines = [
        json.loads(line) for line in (tmp_path / 'out' / 'film.jsonl').read_text().splitlines()
    ]
    exits = [line['exit'] for line in lines]
    # The second is the first once more.
    assert exits[0] >= 0 and exits[1] == -1 and len(exits) == 4 == summary.frames
    costs = [line['gflops'] for line in lines]
    assert costs[0] > 0 == costs[1]
    assert summary.gflops == pytest.approx(np.mean(costs), abs=1e-6)
    assert lines[0]['detections'] == lines[1]['detections']


def test_films_of_a_data_set_begin_anew(shared, tmp_path):
    """As ``tools/test.py`` runs them: frames in the order of time, several in a batch."""
    images = []
    for video in (1, 2):
        for frame in range(3):
            images.append(
                dict(
                    id=len(images) + 1,
                    file_name=f'{video}_{frame}.png',
                    height=SIZE[0],
                    width=SIZE[1],
                    video_id=video,
                    frame_id=frame,
                )
            )
            image = picture(2 * frame, scene=video).permute(1, 2, 0).numpy()
            cv2.imwrite(str(tmp_path / images[-1]['file_name']), image)
    videos = [dict(id=video, name=str(video)) for video in (1, 2)]
    categories = [dict(id=1, name='a')]
    truth = dict(videos=videos, images=images, annotations=[], categories=categories)
    (tmp_path / 'films.json').write_text(json.dumps(truth))
    keys = ('img_id', 'ori_shape', 'img_shape', 'scale_factor', 'video_id', 'frame_id')
    dataset = dict(
        type='VideoDataset',
        data_root=str(tmp_path),
        ann_file='films.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=('a',)),
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=SIZE[::-1], keep_ratio=True),
            dict(type='PackDetInputs', meta_keys=keys),
        ],
    )
    sampler = dict(type='DefaultSampler', shuffle=False)
    loader = build_loader(dict(batch_size=4, num_workers=0, sampler=sampler, dataset=dataset))
    model = like(shared, every=100)
    model.set_budget(threshold=1)
    with torch.no_grad():
        samples = [sample for batch in loader for sample in model.test_step(batch)]
    assert [sample.img_id for sample in samples] == [1, 2, 3, 4, 5, 6]
    assert [sample.exit for sample in samples] == [0, -1, -1, 0, -1, -1]
