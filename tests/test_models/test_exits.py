"""What an exit may be: one of several backbones in a row, or one backbone at another resolution."""

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict

from conftest import same_detections
from dynamicdet.errors import UsageError
from dynamicdet.models.paired_losses import ExitView
from dynamicdet.models.specialization import specialized_losses
from dynamicdet.testing import randomize, tiny_batch, tiny_detector, tiny_dynamic
from mmdet.registry import MODELS

KINDS = {
    'three backbones': dict(backbones=3),
    'three backbones, own stems, own branches': dict(backbones=3, reuse_stages=0, shared=False),
    'one backbone': dict(backbones=1, reuse_stages=0, first_scale=0.5),
    'one backbone, own branches': dict(backbones=1, reuse_stages=0, first_scale=0.5, shared=False),
}


def build(name='faster_rcnn', **settings):
    return randomize(MODELS.build(tiny_dynamic(name, **settings)))


def batch(model, objects=(2, 1, 3)):
    return model.data_preprocessor(tiny_batch(objects), True)


@pytest.mark.parametrize('settings', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('name', ['faster_rcnn', 'yolox'])
def test_every_exit_trains(name, settings):
    model = build(name, **settings).train()
    data = batch(model)
    total, logged = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
    assert torch.isfinite(total)
    assert {key.split('.')[0] for key in logged if '.' in key} == {
        f'exit{k}' for k in range(model.num_exits)
    }
    total.backward()
    reached = {part for part, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for prefix in [f'backbone.{net}.' for net in model.backbone.names] + [
        f'branches.{index}.' for index in range(len(model.branches))
    ]:
        assert any(part.startswith(prefix) for part in reached), prefix


@pytest.mark.parametrize('settings', KINDS.values(), ids=KINDS)
def test_images_leave_at_the_exit_that_their_difficulty_says(settings):
    """And find what they find when they are alone and forced to that exit."""
    model = build(**settings).eval()
    data = batch(model)
    scores = model.score(data['inputs'], data['data_samples'])
    order = scores.argsort().tolist()
    wanted = [0] * 3
    middles = ((scores.sort().values[1:] + scores.sort().values[:-1]) / 2).tolist()
    cuts = middles if model.num_exits == 3 else middles[:1]
    for place, row in enumerate(order):
        wanted[row] = min(place, len(cuts))
    model.threshold.copy_(torch.tensor(cuts).reshape(model.threshold.shape))
    with torch.no_grad():
        found = model.predict(data['inputs'], data['data_samples'])
        assert [sample.exit for sample in found] == wanted
        mixed = [sample.pred_instances.clone() for sample in found]
        for exit in set(wanted):
            forced = torch.full(model.threshold.shape, 1.0)
            forced.view(-1)[:exit] = -1
            model.threshold.copy_(forced)
            data = batch(model)
            for row, sample in enumerate(model.predict(data['inputs'], data['data_samples'])):
                assert sample.exit == exit
                if wanted[row] == exit:
                    assert same_detections(sample.pred_instances, mixed[row])


def test_nothing_behind_the_last_exit_needed_is_run():
    model = build(backbones=3).eval()
    data = batch(model)
    model.threshold.copy_(torch.tensor([-1.0, 1.0]))
    model.backbone.third.forward = model.backbone.third.layer2.forward = None
    with torch.no_grad():
        assert [s.exit for s in model.predict(data['inputs'], data['data_samples'])] == [1, 1, 1]


def test_three_backbones_start_as_three_plain_ones():
    """CBNetV2: the norms of the connections start at zero, so each exit is the plain detector."""
    plain = randomize(MODELS.build(tiny_detector('retinanet'))).eval()
    model = MODELS.build(tiny_dynamic('retinanet', backbones=3)).eval()
    load_state_dict(model, model.spread_plain_weights(plain.state_dict()))
    data = batch(model)
    with torch.no_grad():
        want = plain._forward(data['inputs'])
        for exit in model._forward(data['inputs'], data['data_samples'])['exits']:
            for got, wanted in zip(exit[0], want[0]):
                assert torch.allclose(got, wanted, atol=1e-5)


def test_one_backbone_is_the_plain_detector_at_two_sizes():
    plain = randomize(MODELS.build(tiny_detector('retinanet'))).eval()
    model = MODELS.build(
        tiny_dynamic('retinanet', backbones=1, reuse_stages=0, first_scale=0.5)
    ).eval()
    load_state_dict(model, model.spread_plain_weights(plain.state_dict()))
    data = batch(model)
    with torch.no_grad():
        small, large = model._forward(data['inputs'], data['data_samples'])['exits']
        assert all(torch.equal(a, b) for a, b in zip(large[0], plain._forward(data['inputs'])[0]))
    assert small[0][0].shape[-1] * 2 == large[0][0].shape[-1]


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(backbones=1, reuse_stages=0), 'differ by resolution'),
        (dict(backbones=5), '1 to 4 backbones'),
        (dict(backbones=0), '1 to 4 backbones'),
        (dict(specialize=-1.0), 'specialize is a power'),
        (dict(specialize=float('nan')), 'specialize is a power'),
        (dict(backbones=2.5), 'backbones a whole one'),
        (dict(specialize='much'), 'specialize must be a number'),
        (dict(first_scale='half'), 'first_scale must be a number'),
    ],
)
def test_what_makes_no_exits_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        MODELS.build(tiny_dynamic('retinanet', **settings))


class TestSpecialization:
    def views(self, model, objects):
        data = batch(model, objects)
        return [
            ExitView(model.branch(exit), model.backbone.select(maps), samples, ratio)
            for exit, (maps, samples, ratio) in enumerate(
                model._all_exits(data['inputs'], data['data_samples'])
            )
        ]

    def image_losses(self, view, index):
        maps = tuple(m[index : index + 1] for m in view.maps)
        return view.branch.parse_losses(view.branch.loss(maps, [view.sample[index]]))[0]

    def test_power_0_is_the_mean_over_images(self):
        views = self.views(build('retinanet').train(), (2, 1, 3))
        (losses,) = specialized_losses(views[0], views[1:], 0.0)
        want = sum(self.image_losses(views[1], index) for index in range(3)) / 3
        assert torch.allclose(sum(losses.values()), want)

    def test_images_count_by_what_the_first_exit_gets_wrong(self):
        views = self.views(build('retinanet').train(), (2, 1, 3))
        (losses,) = specialized_losses(views[0], views[1:], 2.0)
        wrong = [
            count * self.image_losses(views[0], index).item()
            for index, count in enumerate((2, 1, 3))
        ]
        want = sum(w**2 * self.image_losses(views[1], index) for index, w in enumerate(wrong))
        assert torch.allclose(sum(losses.values()), want / sum(w**2 for w in wrong), rtol=1e-4)

    def test_no_gradient_from_the_weights(self):
        """Or the first exit would learn to be wrong where the second is good."""
        model = build('retinanet', shared=False).train()
        views = self.views(model, (2, 1))
        (losses,) = specialized_losses(views[0], views[1:], 1.0)
        sum(losses.values()).backward()
        assert all(p.grad is None for p in model.branches[0].parameters())

    def test_in_training_an_image_without_objects_too(self):
        model = build('faster_rcnn', specialize=1.0).train()
        data = batch(model, (0, 2))
        total, logged = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
        assert torch.isfinite(total) and any(key.startswith('exit1.') for key in logged)
