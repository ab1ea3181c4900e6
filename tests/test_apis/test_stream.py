import itertools
import math
import threading

import pytest
import torch

from conftest import same_detections, spread_scores
from dynamicdet.apis.stream import Stream
from dynamicdet.errors import UsageError
from dynamicdet.models.budget_control import BudgetControl, build_budget_controller
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.budget_controller import BudgetController
from dynamicdet.routing.thresholds import thresholds_for_share
from dynamicdet.testing import randomize, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS

COUNT = 10
#: Each kind of detector in its smallest form: heads shared and not, images needed behind the first
#: backbone and not, three exits, one backbone at two resolutions.
KINDS = dict(
    two_stage=dict(name='faster_rcnn'),
    one_stage=dict(name='retinanet', shared=False, reuse_stages=0),
    smaller_first=dict(name='yolox', shared=False, reuse_stages=0, first_scale=0.5),
    three_exits=dict(name='retinanet', backbones=3),
    one_backbone=dict(name='retinanet', backbones=1, reuse_stages=0, first_scale=0.5),
)


def images(count=COUNT, sizes=((64, 96),)):
    """Batches of one; of several sizes, one after the other."""
    found = []
    for index in range(count):
        batch = tiny_batch((1,), sizes[index % len(sizes)], seed=index, masks=False)
        batch['data_samples'][0].set_metainfo(dict(img_id=index))
        found.append(batch)
    return found


def merge(batches):
    return {
        key: [one for batch in batches for one in batch[key]] for key in ('inputs', 'data_samples')
    }


def cut(batches, size):
    return [merge(batches[at : at + size]) for at in range(0, len(batches), size)]


def build(kind='two_stage', share=0.5):
    """A detector whose router parts `images` in about equal numbers for all exits."""
    model = spread_scores(randomize(MODELS.build(tiny_dynamic(**KINDS[kind])))).eval()
    with torch.no_grad():
        data = [model.data_preprocessor(batch, False) for batch in images(20)]
        scores = [model.score(one['inputs'], one['data_samples']).item() for one in data]
    model.threshold.copy_(torch.tensor(thresholds_for_share(scores, share, model.num_exits)))
    return model


@pytest.fixture(scope='module')
def model():
    return build()


@torch.no_grad()
def predict(model, batches):
    return [sample for batch in batches for sample in model.test_step(batch)]


def require_same(found, wanted):
    assert sum(len(one.pred_instances) for one in wanted) > 0
    assert [one.img_id for one in found] == [one.img_id for one in wanted] and len(found) == len(
        wanted
    )
    for one, other in zip(found, wanted):
        assert one.exit == other.exit and one.difficulty == pytest.approx(
            other.difficulty, abs=1e-6
        )
        # In other batches sums are rounded otherwise.
        assert same_detections(one.pred_instances, other.pred_instances)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'settings', [dict(batch_size=4, hard_batch=3), dict(batch_size=3, collect_easy=True)]
)
def test_it_finds_what_predict_finds_in_order(kind, settings):
    model = build(kind)
    wanted = predict(model, cut(images(), settings['batch_size']))
    assert len({one.exit for one in wanted}) == model.num_exits
    with Stream(model, **settings) as stream:
        require_same(list(stream.run(images())), wanted)
        assert stream.waiting == 0


def test_results_need_not_wait_for_others(model):
    wanted, passes = predict(model, cut(images(), 4)), []
    easy = [one.img_id for one in wanted if one.exit == 0]
    settings = dict(hard_batch=100, in_order=False, on_pass=lambda *told: passes.append(told))
    with Stream(model, 4, **settings) as stream:
        early = [sample for batch in cut(images(), 4) for sample in stream.put(batch)]
        # The last two make no batch.
        assert stream.arrived == COUNT % 4 and stream.waiting == COUNT - stream.arrived - len(early)
        early += stream.step()
        assert [one.img_id for one in early] == easy and 0 < len(easy) < COUNT
        late = stream.step()
        assert stream.step() == [] and stream.waiting == stream.arrived == 0
    require_same(sorted(early + late, key=lambda one: one.img_id), wanted)
    assert [(what, count) for what, _, count in passes] == [
        ('first', 4),
        ('first', 4),
        ('first', 2),
        ('later', COUNT - len(easy)),
    ]
    assert all(seconds > 0 for _, seconds, _ in passes)


@pytest.mark.parametrize('arriving', [1, 3, COUNT])
def test_batches_arrive_in_any_size(model, arriving):
    wanted = predict(model, cut(images(), 4))
    with Stream(model, 4) as stream:
        require_same(list(stream.run(cut(images(), arriving))), wanted)


@pytest.mark.parametrize('share, exits', [(0, 0), (1, 1)])
def test_all_easy_and_all_hard(model, share, exits):
    kept = model.threshold.clone()
    model.set_budget(threshold=1 - 2 * share)
    passes = count_passes(model)
    with Stream(model, 4, hard_batch=5) as stream:
        found = list(stream.run(images()))
    del model.deepen
    model.threshold.copy_(kept)
    assert {one.exit for one in found} == {exits} and len(found) == COUNT
    # An all-easy stream never runs the second backbone.
    assert passes == [5, 5][: 2 * share]


def count_passes(model):
    """How many images each later pass has, in a list that grows; ``del model.deepen`` ends it."""
    passes, deepen = [], model.deepen

    def counted(state):
        passes.append(len(state))
        return deepen(state)

    model.deepen = counted
    return passes


def test_hard_images_of_several_batches_run_together(model):
    hard = sum(one.exit for one in predict(model, images(20)))
    passes = count_passes(model)
    with Stream(model, batch_size=2, hard_batch=4) as stream:
        assert len(list(stream.run(images(20)))) == 20
    del model.deepen
    assert hard >= 8 and passes == [4] * (hard // 4) + [hard % 4] * (hard % 4 > 0)


def test_few_wait_however_many_sizes_there_are(model):
    sizes = [(64, 96), (96, 64), (64, 64), (96, 96), (64, 128)]
    batches = images(20, sizes)
    wanted = predict(model, batches)
    with Stream(model, batch_size=1, hard_batch=4) as stream:
        found = []
        for batch in batches:
            found += stream.put(batch)
            assert stream.waiting < 4
        require_same(found + stream.flush(), wanted)


def test_results_do_not_pile_up_behind_one_image(model):
    scores = [one.difficulty for one in predict(model, images(20))]
    kept = model.threshold.clone()
    model.set_budget(threshold=thresholds_for_share(scores, 1 / 20))
    hardest = scores.index(max(scores))
    with Stream(model, batch_size=1, hard_batch=8, most_behind=3) as stream:
        for index, batch in enumerate(images(20)):
            stream.put(batch)
            if index < hardest + 3:
                assert stream.waiting == (index >= hardest)
        assert stream.waiting == 0
    model.threshold.copy_(kept)


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


def test_a_deadline_counts_from_arrival(model):
    clock = Clock()
    kept = model.threshold.clone()
    model.set_budget(threshold=-1)
    with Stream(model, batch_size=2, hard_batch=8, deadline=1, clock=clock) as stream:
        assert stream.due() is None
        assert stream.put(images(1)[0]) == []
        clock.time = 0.6
        # The second image fills the first pass; both are hard and wait.
        assert stream.put(images(2)[1]) == [] and stream.waiting == 2
        assert stream.due() == pytest.approx(0.4)
        clock.time = 0.99
        assert stream.poll() == []
        clock.time = 1.0
        assert stream.due() == 0
        assert [one.img_id for one in stream.poll()] == [0, 1] and stream.due() is None
        # Before the first pass as well.
        assert stream.put(images(3)[2]) == []
        clock.time = 2.0
        assert [one.img_id for one in stream.poll()] == [2]
    model.threshold.copy_(kept)


@pytest.mark.parametrize('deadline', [0, 0.01])
def test_a_deadline_holds_while_the_source_pauses(model, deadline):
    """The source goes on only when its first image has come out: without a deadline this would
    never end."""
    seen = threading.Event()

    def source():
        yield images(1)[0]
        assert seen.wait(60)
        yield from images(3)[1:]

    with Stream(model, batch_size=8, deadline=deadline) as stream:
        found = stream.run(source())
        first = next(found)
        seen.set()
        assert [one.img_id for one in (first, *found)] == [0, 1, 2]


def test_nothing_yet(model):
    with Stream(model, batch_size=2) as stream:
        assert [one.img_id for one in stream.run([None, *images(3), None])] == [0, 1, 2]
        assert list(stream.run([])) == []


@pytest.mark.parametrize('deadline', [None, 60, math.inf])
def test_errors_of_the_source_come_through(model, deadline):
    """After the results of what came before."""

    def source():
        yield from images(3)
        raise OSError('the camera is gone')

    found = []
    with (
        Stream(model, batch_size=2, deadline=deadline) as stream,
        pytest.raises(OSError, match='camera'),
    ):
        for one in stream.run(source()):
            found.append(one.img_id)
    assert found == [0, 1, 2]


def test_a_stream_that_is_left_early_stops_reading(model):
    before, batch = threading.active_count(), images(1)[0]
    with Stream(model, batch_size=1, hard_batch=1, deadline=60) as stream:
        found = stream.run(batch for _ in itertools.count())
        next(found)
        (reader,) = threading.enumerate()[before:]
        found.close()
        reader.join(60)
        assert not reader.is_alive()


def test_a_controller_sets_the_thresholds(model):
    kept = model.threshold.clone()
    controller = BudgetController(dict(hard_share=1))
    with Stream(model, 4, controller=controller) as stream:
        for one in stream.run(images()):
            # Between its batches the detector is its owner's.
            assert one.exit == 1 and torch.equal(model.threshold, kept)
    assert controller.mean == 1


def test_a_controller_is_told_the_time(model):
    with Stream(model, 4, controller=BudgetController(dict(target_latency=1e-6))) as stream:
        list(stream.run(images(12)))
    # Three measurements, each far too long: 4 images, 3 spans, a hundredth.
    assert (
        stream.controller.share == pytest.approx(0.5 - 3 * 0.12)
        and 1e-6 < stream.controller.mean < 60
    )


@pytest.mark.parametrize(
    'settings',
    [
        dict(batch_size=0),
        dict(batch_size=2.5),
        dict(hard_batch=0),
        dict(deadline=-1),
        dict(deadline=float('nan')),
        dict(most_behind=0),
    ],
)
def test_bad_settings(model, settings):
    with pytest.raises(UsageError):
        Stream(model, **settings)


# Without a stream.


def test_online_while_a_detector_works(model):
    kept = model.threshold.clone()
    model.budget, model._budget_waits = (
        Budget('hard_share', 0.5),
        True,
    )  # a config's, not calibrated
    controller = build_budget_controller(model, dict(target_latency=1e-6))
    with BudgetControl(model, controller):
        predict(model, cut(images(), 5))
        assert torch.allclose(model.threshold, torch.tensor(controller.threshold))
    assert controller.share == pytest.approx(0.5 - 2 * 0.15) and torch.equal(model.threshold, kept)
    assert model._budget_waits and model.budget == Budget('hard_share', 0.5)
    model.budget, model._budget_waits = None, False
    predict(model, images(1))
    # What comes later is not its business.
    assert controller.status()['images'] == COUNT


def test_online_starts_from_the_calibration():
    model = build()
    model.difficulties, model.latencies = torch.linspace(0, 1, 101), torch.tensor([0.1, 0.3])
    controller = build_budget_controller(model, dict(target_latency=0.15))
    assert controller.share == pytest.approx(0.25) and controller.threshold == pytest.approx(
        0.75, abs=0.01
    )
    with pytest.raises(UsageError, match='calibrate'):
        build_budget_controller(model, dict(target_gflops=3))
    model.gflops = torch.tensor([2.0, 4.0])
    assert build_budget_controller(model, dict(target_gflops=3)).share == 0.5
