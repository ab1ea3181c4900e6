"""Several plain detectors as exits: each finds what it finds alone, and their weights go together."""

import copy

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from conftest import ROOT, same_detections
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.models.fusing import fuse
from dynamicdet.models.resolution import reduce_images, reduce_samples
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
