"""Dy-YOLOv7 and X against the numbers of the published implementation; keys of all of its
family."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from foreign import DATA, build, reference, weights
from mmengine.structures import InstanceData

from dynamicdet.cascade.weights import require_complete
from dynamicdet.exchange.rules import apply_rules
from dynamicdet.interop.convert import convert_checkpoint
from dynamicdet.interop.yolov7 import dynamic_rules, static_rules
from dynamicdet.models import fuse
from mmdet.structures import DetDataSample

REFERENCE = reference('dy-yolov7')


class Published(NamedTuple):
    """A detector with the weights of a published file, and the numbers of the published
    implementation."""

    model: torch.nn.Module
    numbers: dict
    outputs: dict


@pytest.fixture(
    scope='module',
    params=[('dy_yolov7', 'dy-yolov7'), ('dy_yolov7_x', 'dy-yolov7x')],
    ids=lambda names: names[0],
)
def published(request, tmp_path_factory):
    """From a file as it is released, by the converter."""
    config, file = request.param
    path = tmp_path_factory.mktemp('weights') / f'{file}-step2.pt'
    state = {
        key: torch.from_numpy(np.asarray(value))
        for key, value in weights.checkpoint(DATA / f'{file}.json').items()
    }
    torch.save({'model': state}, path)
    model = build(config)
    checkpoint, _ = convert_checkpoint(str(path), 'dynamicdet', model)
    path.unlink()  # hundreds of MB
    model.load_state_dict(checkpoint['state_dict'])
    numbers = reference(file)
    with torch.no_grad():
        outputs = model.eval()._forward(torch.from_numpy(weights.inputs(numbers['input'])))
    return Published(model, numbers, outputs)


def theirs(head, exit):
    """Raw maps in the published order: (N, A, H, W, 5 + C) of each level."""
    maps = []
    for cls, box, objectness in zip(*exit):
        parts = [part.unflatten(1, (head.num_anchors, -1)) for part in (box, objectness, cls)]
        maps.append(torch.cat(parts, dim=2).permute(0, 1, 3, 4, 2))
    return maps


def decoded(head, maps):
    levels = []
    for level, raw in enumerate(maps):
        at = torch.ones(raw.shape[:-1]).nonzero(as_tuple=True)
        boxes = head.decode(raw[at][:, :4], level, *at[1:])
        levels.append(torch.cat([boxes, raw[at][:, 4:].sigmoid()], dim=1).view(len(raw), -1, 85))
    return torch.cat(levels, dim=1)


def assert_close(got, want, tolerance=1e-3):
    assert list(got.shape) == want['shape']
    values = got.flatten()[want['index']].numpy()
    wanted = np.asarray(want['value'], np.float32)
    np.testing.assert_allclose(values, wanted, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got.mean(), want['mean'], atol=tolerance)
    np.testing.assert_allclose(got.std(correction=0), want['std'], rtol=tolerance)


def test_difficulty_is_one_less_their_score(published):
    assert published.outputs['difficulty'].item() == pytest.approx(
        1 - published.numbers['router_score'], abs=1e-3
    )


@pytest.mark.parametrize('exit, name', enumerate(('first', 'second')))
def test_maps_and_boxes(published, exit, name):
    head, wanted = published.model.branch(exit).bbox_head, published.numbers[name]
    maps = theirs(head, published.outputs['exits'][exit])
    for got, want in zip(maps, wanted['raw'], strict=True):
        assert_close(got, want)
    assert_close(decoded(head, maps), wanted['decoded'])


def targets(spec):
    rows = torch.tensor(spec['targets_image_class_cxcywh_normalised'])
    height, width = spec['images']['shape'][2:]
    instances = []
    for image in range(spec['images']['shape'][0]):
        own = rows[rows[:, 0] == image]
        center, half = own[:, 2:4], own[:, 4:] / 2
        boxes = torch.cat([center - half, center + half], dim=1)
        instances.append(
            InstanceData(
                bboxes=boxes * boxes.new_tensor([width, height] * 2), labels=own[:, 1].long()
            )
        )
    return instances


def test_losses(published):
    """Of the batch and of each image, both detectors: box, objectness, class, sum."""
    spec = published.numbers['loss']
    instances, images = targets(spec), torch.from_numpy(weights.inputs(spec['images']))
    with torch.no_grad():
        exits = published.model._forward(images)['exits']

    def losses(exit, rows):
        parts = [[level[rows] for level in part] for part in exits[exit]]
        own = published.model.branch(exit).bbox_head.loss_by_feat(*parts, instances[rows], [{}] * 2)
        values = [own[f'loss_{name}'].item() for name in ('bbox', 'obj', 'cls')]
        return values + [sum(values)]

    for exit, name in enumerate(('first', 'second')):
        assert losses(exit, slice(None)) == pytest.approx(spec[name], rel=1e-3)
        for image, one in enumerate(spec['per_image']):
            assert losses(exit, slice(image, image + 1)) == pytest.approx(one[name], rel=1e-3)


def test_step_2_sees_these_losses(published):
    """What the router learns from: each image's sum, under both exits, from a batch."""
    model, spec = published.model, published.numbers['loss']
    images = torch.from_numpy(weights.inputs(spec['images']))
    shape = tuple(images.shape[2:])
    samples = [
        DetDataSample(gt_instances=own, metainfo=dict(img_shape=shape, batch_input_shape=shape))
        for own in targets(spec)
    ]
    losses, features = model.exit_losses(images, samples)
    for exit, name in enumerate(('first', 'second')):
        wanted = [one[name][-1] for one in spec['per_image']]
        assert losses[exit].tolist() == pytest.approx(wanted, rel=1e-3)
    assert features.shape == (2, sum(model.backbone.channels))


def test_fused_boxes_are_the_same(published):
    """Last: it changes the model for good."""
    model, images = published.model, torch.from_numpy(weights.inputs(published.numbers['input']))
    with torch.no_grad():
        after = fuse(model)._forward(images)
    for exit in range(2):
        head = model.branch(exit).bbox_head
        old, new = (
            decoded(head, theirs(head, one['exits'][exit])) for one in (published.outputs, after)
        )
        torch.testing.assert_close(new, old, atol=1e-3, rtol=1e-3)


def static_keys(file, backbone):
    """Keys and shapes of the static detector of the same family: their layers, numbered on."""
    for key, shape in reference(file)['state_dict']:
        part, _, rest = key.partition('.')
        number, _, rest = rest.partition('.')
        if part in ('model_b', 'model_h'):
            yield key, f'model.{int(number) + backbone * (part == "model_h")}.{rest}', shape


@pytest.mark.parametrize('config', ['yolov7', 'dy_yolov7'])
@pytest.mark.parametrize('kind', ['training', 'inference'])
def test_the_static_release(tmp_path, config, kind):
    """The first detector of the reference as if it were a plain YOLOv7, whole modules of half
    precision or not; with implicit knowledge or, as in the files for inference, within the
    convolutions."""
    values = {
        key: torch.from_numpy(np.asarray(value))
        for key, value in weights.checkpoint(DATA / 'dy-yolov7.json').items()
    }
    state = {ours: values[key] for key, ours, _ in static_keys('dy-yolov7', 51)}
    if kind == 'inference':
        for level in range(3):
            weight, bias = (state[f'model.105.m.{level}.{name}'] for name in ('weight', 'bias'))
            bias += weight.flatten(1) @ state.pop(f'model.105.ia.{level}.implicit').flatten()
            factor = state.pop(f'model.105.im.{level}.implicit').flatten()
            bias *= factor
            weight *= factor.view(-1, 1, 1, 1)
    path = tmp_path / 'yolov7.pt'
    torch.save({'model': state, 'ema': None, 'epoch': -1}, path)
    model = build(config)
    model.load_state_dict(convert_checkpoint(str(path), 'yolov7', model)[0]['state_dict'])
    with torch.no_grad():
        raw = model.eval()._forward(torch.from_numpy(weights.inputs(REFERENCE['input'])))
    exits = [raw] if config == 'yolov7' else raw['exits']
    head = model.bbox_head if config == 'yolov7' else model.branch(1).bbox_head
    # Connections start at zero: both exits are the plain detector.
    for exit in exits:
        assert_close(decoded(head, theirs(head, exit)), REFERENCE['first']['decoded'])


@pytest.mark.parametrize(
    'name, file, backbone',
    [
        ('yolov7', 'dy-yolov7', 51),
        ('yolov7_x', 'dy-yolov7x', 59),
        ('yolov7_w6', 'dy-yolov7-w6.keys', 47),
    ],
)
def test_all_keys_of_the_static_family(name, file, backbone):
    with torch.device('meta'):
        model = build(name)
        state = {ours: torch.empty(shape) for _, ours, shape in static_keys(file, backbone)}
    found, skipped = apply_rules(static_rules(model), state)
    assert set(skipped) <= {'counters of training', 'anchors, which the config has'}
    require_complete(model, found)


@pytest.mark.parametrize('factor, said', [(1, 'which the config has'), (2, 'THAT DIFFER')])
def test_anchors_are_compared(factor, said):
    """Theirs are in units of each level's stride, and once more in pixels."""
    with torch.device('meta'):
        model = build('yolov7')
    head = model.bbox_head
    head.anchors = build('yolov7').bbox_head.anchors
    anchors = factor * head.anchors
    state = {
        'model.105.anchors': anchors / torch.tensor(head.strides)[:, None, None],
        'model.105.anchor_grid': anchors.view(3, 1, 3, 1, 1, 2),
    }
    ((reason, count),) = apply_rules(static_rules(model), state)[1].items()
    assert said in reason and count == 2


def test_w6_of_training():
    """Four auxiliary convolutions lie before the head, and outputs of its own in it."""
    with torch.device('meta'):
        model = build('yolov7_w6')
        state = {
            ours.replace('model.118.', 'model.122.'): torch.empty(shape)
            for _, ours, shape in static_keys('dy-yolov7-w6.keys', 47)
        }
        state |= {
            f'model.{number}.conv.weight': torch.empty(8, 8, 3, 3) for number in range(118, 122)
        }
        state |= {f'model.122.m2.{level}.weight': torch.empty(255, 8, 1, 1) for level in range(4)}
    found, skipped = apply_rules(static_rules(model), state)
    assert skipped['auxiliary outputs of training'] == 8
    require_complete(model, found)


@pytest.mark.parametrize(
    'name, file',
    [
        ('dy_yolov7', 'dy-yolov7'),
        ('dy_yolov7_x', 'dy-yolov7x'),
        ('dy_yolov7_w6', 'dy-yolov7-w6.keys'),
    ],
)
@pytest.mark.parametrize('step', [1, 2])
def test_all_keys_of_the_family(name, file, step):
    """Every entry is taken or known, and everything of ours is filled; step 1 has no router."""
    with torch.device('meta'):
        model = build(name)
        state = {
            key: torch.empty(shape)
            for key, shape in reference(file)['state_dict']
            if step == 2 or not key.startswith('router.')
        }
    found, skipped = apply_rules(dynamic_rules(model), state)
    assert set(skipped) <= {'counters of training', 'anchors, which the config has'}
    statistics = ('router.mean', 'router.std')
    require_complete(model, found, statistics if step == 2 else ('router.',))
