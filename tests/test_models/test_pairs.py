"""Several plain detectors as exits: each finds what it finds alone; their weights go together."""

import copy

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from conftest import ROOT, same_detections
from dynamicdet.apis.stream import Stream
from dynamicdet.cascade.resolution import reduce_images
from dynamicdet.cascade.weights import join_checkpoints
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.measuring.flops import measure_costs
from dynamicdet.models.fusing import fuse
from dynamicdet.models.resolution import reduce_samples
from dynamicdet.routing import build_objective
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_detector
from mmdet.registry import MODELS

#: Normalizations: none, with swapped colors, and without.
PLAIN = dict(type='DetDataPreprocessor', pad_size_divisor=32)
SCALED = dict(
    type='DetDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=True, pad_size_divisor=1
)
CENTERED = dict(
    type='DetDataPreprocessor',
    mean=[103.5, 116.3, 123.7],
    std=[57.4, 57.1, 58.4],
    bgr_to_rgb=False,
    pad_size_divisor=64,
    pad_value=0.5,
)
CASES = {
    'yolox, rtmdet': (('dy_yolox_s', PLAIN), ('dy_rtmdet_s', CENTERED)),
    'yolox, yolov5': (('dy_yolox_s', PLAIN), ('yolov5_n', SCALED)),
    'faster_rcnn, fcos': (('faster_rcnn', CENTERED), ('fcos', SCALED)),
    'retinanet, faster_rcnn': (('retinanet', SCALED), ('faster_rcnn', PLAIN)),
}


def detector_of(name, preprocessor):
    if (ROOT / f'configs/{name}.py').is_file():
        model = shrink(Config.fromfile(ROOT / f'configs/{name}.py').model)
        detector = model.get('detector', model)
        detector.backbone = model.backbone
    else:
        detector = tiny_detector(name)
    detector.data_preprocessor = ConfigDict(preprocessor)
    return detector


def pair_of(case, **settings):
    detectors = [detector_of(*one) for one in CASES[case]]
    return ConfigDict(
        type='DynamicDetector',
        detector=detectors,
        backbone=[one.backbone for one in detectors],
        objective='ap',
        **settings,
    )


def joined_name(folder, plains):
    names = []
    for index, plain in enumerate(plains):
        names.append(str(folder / f'{index}.pth'))
        write_checkpoint(dict(state_dict=plain.state_dict()), names[-1])
    return 'exits://' + ','.join(names)


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """A pair filled with its detectors' checkpoints, and the two by themselves."""
    cfg = pair_of(request.param, scales=(0.5, 1))
    with DefaultScope.overwrite_default_scope('mmdet'):
        plains = [
            randomize(MODELS.build(copy.deepcopy(one)), seed).eval()
            for seed, one in enumerate(cfg.detector)
        ]
        model = MODELS.build(copy.deepcopy(cfg)).eval()
    state = read_checkpoint(joined_name(tmp_path, plains))['state_dict']
    assert set(state) == {
        key for key in model.state_dict() if key.startswith(('backbone.', 'branches.'))
    }
    model.load_state_dict(state, strict=False)
    return model, plains


def batch_of(objects=(2, 1), size=(96, 128)):
    """Two images of different sizes, the second padded on both sides."""
    batch, small = tiny_batch(objects[:1], size), tiny_batch(objects[1:], (64, 70), seed=1)
    return {key: batch[key] + small[key] for key in batch}


def alone(plain, batch, scale, divisor):
    """What a plain detector finds in a batch of its own preprocessing, reduced."""
    preprocessor = copy.deepcopy(plain.data_preprocessor)
    preprocessor.pad_size_divisor = divisor
    data = preprocessor(copy.deepcopy(batch), False)
    images, ratio = reduce_images(data['inputs'], scale, max(32, divisor))
    return plain.predict(images, reduce_samples(data['data_samples'], ratio))


@torch.no_grad()
def test_each_exit_finds_what_its_detector_finds(pair):
    model, plains = pair
    divisor = model.data_preprocessor.pad_size_divisor
    for exit, (plain, threshold, scale) in enumerate(zip(plains, (1, -1), (0.5, 1))):
        wanted = alone(plain, batch_of(), scale, divisor)
        model.set_budget(threshold=threshold)
        found = model.test_step(batch_of())
        assert [sample.exit for sample in found] == [exit] * 2
        assert any(len(sample.pred_instances) for sample in wanted)
        # Bit by bit, but where the first one's normalization is undone.
        rounds = exit == 1 and model.normalizations[0].before_mean is not None
        for got, own in zip(found, wanted):
            compare(got.pred_instances, own.pred_instances, 1e-4 if rounds else 0.0)


def compare(got, wanted, atol):
    """Scores to ``atol``, boxes to 100 times as many pixels."""
    assert len(got) == len(wanted)
    torch.testing.assert_close(got.scores, wanted.scores, rtol=0, atol=atol)
    torch.testing.assert_close(got.bboxes, wanted.bboxes, rtol=0, atol=100 * atol)
    assert torch.equal(got.labels, wanted.labels)


@torch.no_grad()
def test_mixed_batches_streams_and_fused_models_find_the_same(pair):
    model, _ = pair
    data = model.data_preprocessor(batch_of(), False)
    model.set_budget(threshold=float(model.score(data['inputs'], data['data_samples']).mean()))
    wanted = model.test_step(batch_of())
    assert sorted(sample.exit for sample in wanted) == [0, 1]
    with Stream(model, batch_size=2) as stream:
        streamed = list(stream.run([batch_of()]))
    for found in (streamed, fuse(copy.deepcopy(model)).test_step(batch_of())):
        for got, own in zip(found, wanted):
            assert got.exit == own.exit and same_detections(got.pred_instances, own.pred_instances)


def test_what_is_said_of_weights(pair, tmp_path):
    model, plains = pair
    assert not model.needs_step_one
    alone = dict(plains[0].state_dict())
    with pytest.raises(UsageError, match='one plain detector, and the config has 2'):
        model.load_state_dict(alone)
    with pytest.raises(UsageError, match='exit 1 is not a plain'):
        join_checkpoints([dict(state_dict=alone), dict(state_dict=model.state_dict())])
    metas = [dict(dataset_meta=dict(classes=names)) for names in (('a', 'b'), ('b', 'a'))]
    with pytest.raises(UsageError, match='the same classes in the same order'):
        join_checkpoints([dict(state_dict=alone, meta=meta) for meta in metas])
    joined = join_checkpoints([dict(state_dict=alone, meta=metas[0]), dict(state_dict=alone)])
    assert joined['meta']['dataset_meta']['classes'] == ('a', 'b')
    assert 2 * len(alone) == len(joined['state_dict'])


def test_costs_are_those_of_the_plain_detectors(pair):
    model, plains = pair
    costs, size = measure_costs(model, (128, 128)), [(64, 64), (128, 128)]
    router = costs.parts['router'].flops
    backbones = [costs.parts[f'{name} backbone'].flops for name in ('first', 'second')]
    heads = [costs.parts[f'{name} neck and heads'].flops for name in ('first', 'second')]
    assert costs.exits[0].flops == backbones[0] + router + heads[0]
    assert costs.exits[1].flops == sum(backbones) + router + heads[1]
    for plain, shape, own in zip(plains, size, zip(backbones, heads)):
        if not hasattr(plain, 'roi_head'):
            assert measure_costs(plain, shape).exits[0].flops == sum(own)


def test_what_makes_no_pair_is_refused():
    first, second = (detector_of('fcos', PLAIN), detector_of('retinanet', PLAIN))
    second.bbox_head.num_classes = 4
    for settings, said in (
        (dict(detector=[first, second]), 'the same classes; these have heads for 3 and 4'),
        (dict(detector=[first, first], scales=(0.5, 0.7, 1)), 'each of the 2 exits'),
        (dict(detector=[first, first], scales=(0.5, 1.5)), r'must be in \(0, 1\]'),
        (dict(detector=[first, first], first_scale=0.5, scales=(0.5, 1)), 'not both'),
        (dict(detector=[first, 'fcos']), 'a dict, or a list of one for each exit'),
    ):
        with pytest.raises(UsageError, match=said):
            MODELS.build(ConfigDict(type='DynamicDetector', **settings))


def test_losses_of_other_heads_are_not_compared():
    cfg = pair_of('retinanet, faster_rcnn')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = randomize(MODELS.build({**cfg, 'train_router': True})).train()
    data = model.data_preprocessor(tiny_batch((2, 1)), True)
    losses = model.loss(data['inputs'], data['data_samples'])
    assert torch.isfinite(losses['loss_router'])
    model.objective = build_objective('rank')
    with pytest.raises(UsageError, match="objective='ap'"):
        model.loss(data['inputs'], data['data_samples'])


def test_one_backbone_has_as_many_exits_as_scales_and_takes_any_backbone():
    """YOLOv5's belongs to no family of composites."""
    detector = detector_of('yolov5_n', SCALED)
    plain = randomize(MODELS.build(copy.deepcopy(detector))).eval()
    model = MODELS.build(
        ConfigDict(type='DynamicDetector', detector=detector, backbones=1, scales=(0.5, 0.75, 1))
    ).eval()
    assert model.num_exits == 3 and not model.needs_step_one
    model.load_state_dict(plain.state_dict(), strict=False)
    batch = tiny_batch((2, 1), size=(128, 128))
    for exit, thresholds in enumerate(((1, 1), (-1, 1), (-1, -1))):
        model.set_budget(threshold=list(thresholds))
        with torch.no_grad():
            found = model.test_step(copy.deepcopy(batch))
            wanted = alone(plain, batch, model.scales[exit], 1)
        for got, own in zip(found, wanted):
            assert got.exit == exit
            compare(got.pred_instances, own.pred_instances, 0.0)
