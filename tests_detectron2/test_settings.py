"""What settings do, and what wrong ones get."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from conftest import build, images, small_config, wake
from dynamicdet.errors import UsageError
from dynamicdet_detectron2.config import set_config_budget, take_router_step


@pytest.mark.parametrize('kind', ['mask', 'panoptic', 'keypoint', 'retinanet', 'fcos'])
@pytest.mark.parametrize('settings', [dict(reuse_stages=0), dict(backbones=1)], ids=str)
def test_exit_0_at_half_the_size(kind, settings):
    model = build(kind, first_scale=0.5, **settings).eval()
    batch = images((128, 192), (192, 128))
    seen = []
    stem = model.backbone.first.stem
    stem.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape[-2:])))
    with torch.no_grad():
        for threshold, sizes in ((1, [(96, 96)]), (-1, [(96, 96), (192, 192)])):
            model.set_budget(threshold=threshold)
            seen.clear()
            results = model(batch)
            assert seen[: len(sizes)] == sizes or settings == dict(reuse_stages=0)
            for result, inputs in zip(results, batch):
                # Results are in the frame that was asked for.
                instances = result['instances']
                assert instances.image_size == (inputs['height'], inputs['width'])
                boxes = instances.pred_boxes.tensor
                assert (boxes[:, 2] <= inputs['width']).all() and (
                    not len(boxes) or boxes.max() > 192 / 2
                )
                if 'sem_seg' in result:
                    assert result['sem_seg'].shape[-2:] == instances.image_size
    model.train()
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        losses = model(images((128, 192), (192, 128), annotated=True))
    assert all(loss.isfinite() for loss in losses.values())
    losses, _ = model.exit_losses(images((128, 192), (192, 128), annotated=True))
    assert losses.isfinite().all()


@torch.no_grad()
def test_one_backbone_at_two_sizes_is_the_stock_detector_at_each():
    plain = build('faster', dynamic=False).eval()
    model = build('faster', backbones=1, first_scale=0.5).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    batch = images((128, 192))
    model.set_budget(threshold=-1)
    assert torch.equal(model(batch)[0]['instances'].scores, plain(batch)[0]['instances'].scores)
    # What the exit sees is the normalized batch, resized.
    model.set_budget(threshold=1)
    result = model(batch)[0]['instances']
    pixels = torch.nn.functional.interpolate(
        plain.preprocess_image(batch).tensor, size=(64, 96), mode='bilinear', antialias=True
    )
    small = [dict(image=pixels[0] * plain.pixel_std + plain.pixel_mean, height=256, width=384)]
    wanted = plain(small)[0]['instances']
    torch.testing.assert_close(result.scores, wanted.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        result.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=1e-2, atol=0.1
    )


@torch.no_grad()
def test_three_exits():
    model = build('faster', backbones=3).eval()
    wake(model)
    for exit, thresholds in enumerate(([1, 1], [-1, 1], [-1, -1])):
        model.set_budget(threshold=thresholds)
        assert [result['exit'] for result in model(images())] == [exit] * 3


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(first_scale=0.5), 'REUSE_STAGES 0'),
        (dict(first_scale=0.0), r'must be in \(0, 1\]'),
        (dict(backbones=1), 'give FIRST_SCALE below 1'),
        (dict(backbones=9), '1 to 4 backbones'),
        (dict(reuse_stages=4), r'reuse_stages must be in \[0, 4\)'),
        (dict(meta_architecture='SemanticSegmentor'), 'must see images through its backbone'),
        (dict(meta_architecture='Nothing'), "names the stock detector; 'Nothing' is none"),
        (dict(meta_architecture='DynamicDetector'), 'is none'),
    ],
    ids=str,
)
def test_wrong_settings_get_one_line(settings, said):
    with pytest.raises(UsageError, match=said) as error:
        build('panoptic', **settings)
    assert '\n' not in str(error.value)


def test_an_architecture_without_a_backbone():
    @META_ARCH_REGISTRY.register()
    class NoBackbone(torch.nn.Module):
        def __init__(self, cfg):
            super().__init__()

    with pytest.raises(UsageError, match='NoBackbone cannot be made dynamic'):
        build('faster', meta_architecture='NoBackbone')


def test_a_backbone_without_a_family():
    from detectron2.modeling import BACKBONE_REGISTRY, Backbone

    class Odd(Backbone):
        def __init__(self):
            super().__init__()
            self._out_features = ['out']
            self._out_feature_channels, self._out_feature_strides = dict(out=4), dict(out=16)
            self.conv = torch.nn.Conv2d(3, 4, 16, 16)

        def forward(self, x):
            return dict(out=self.conv(x))

    @BACKBONE_REGISTRY.register()
    def build_odd_backbone(cfg, shape):
        return Odd()

    options = (
        ('MODEL.BACKBONE.NAME', 'build_odd_backbone')
        + ('MODEL.RPN.IN_FEATURES', ['out'])
        + ('MODEL.ROI_HEADS.IN_FEATURES', ['out'])
        + ('MODEL.ANCHOR_GENERATOR.SIZES', [[32]])
    )
    with pytest.raises(UsageError, match='no composite family serves the backbone Odd'):
        build_model(small_config('faster', True, *options))
    # Without a pyramid, and of any kind, at two sizes.
    more = ('MODEL.DYNAMIC.BACKBONES', 1, 'MODEL.DYNAMIC.FIRST_SCALE', 0.5)
    model = build_model(small_config('faster', True, *options, *more)).eval()
    with torch.no_grad():
        assert len(model(images())) == 3


@pytest.mark.parametrize(
    'budget', [dict(threshold=1.5), dict(hard_share=2), dict(target_latency=-1)]
)
def test_budgets_out_of_range(budget):
    with pytest.raises(UsageError, match='must be a number'):
        set_config_budget(small_config('faster'), **budget)
    with pytest.raises(UsageError):
        build('faster').set_budget(budget)


def test_two_budgets():
    with pytest.raises(UsageError, match='exactly one of'):
        set_config_budget(small_config('faster'), threshold=0.5, hard_share=0.5)


def test_a_hard_share_needs_a_calibration():
    with pytest.raises(UsageError, match='calibrat'):
        build('faster').set_budget(hard_share=0.5)


def test_step_2_without_step_1(tmp_path):
    cfg = small_config('faster', True, 'OUTPUT_DIR', str(tmp_path))
    with pytest.raises(UsageError, match='run step 1 first'):
        take_router_step(cfg)
