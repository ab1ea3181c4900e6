"""Composite backbones of Detectron2's."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.regnet import AnyNet, ResBottleneckBlock, SimpleStem
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from conftest import build, images, wake
from dynamicdet.errors import UsageError
from dynamicdet_detectron2.branch import require_runnable, split_detector
from dynamicdet_detectron2.composite import build_composite
from dynamicdet_detectron2.measuring import at_exit


def resnet(block=BottleneckBlock, out_features=('res2', 'res3', 'res4', 'res5'), **settings):
    bottleneck = {} if block is BasicBlock else dict(bottleneck_channels=4, **settings)
    stages = [
        ResNet.make_stage(
            block,
            2,
            stride_per_block=[1 if index == 0 else 2, 1],
            in_channels=8 if index == 0 else 16 * 2 ** (index - 1),
            out_channels=16 * 2**index,
            norm='BN',
            **bottleneck,
        )
        for index in range(4)
    ]
    return ResNet(BasicStem(out_channels=8, norm='BN'), stages, out_features=list(out_features))


def regnet(out_features=('s1', 's2', 's3', 's4')):
    return AnyNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depths=[1, 2, 1, 1],
        widths=[16, 24, 32, 40],
        group_widths=[8] * 4,
        strides=[2] * 4,
        bottleneck_ratios=[1.0] * 4,
        se_ratio=0.25,
        activation_class=torch.nn.ReLU,
        norm='BN',
        out_features=list(out_features),
    )


NETS = dict(
    basic=lambda: resnet(BasicBlock),
    caffe=lambda: resnet(stride_in_1x1=True),
    grouped=lambda: resnet(num_groups=2),
    dense=lambda: resnet(out_features=('res3', 'res4', 'res5')),
    shallow=lambda: resnet(out_features=('res4',)),
    regnet=regnet,
)


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('reused', [0, 1, 2])
@torch.no_grad()
def test_maps(name, reused):
    nets = [NETS[name]() for _ in range(2)]
    wanted = nets[0]
    if reused == 0:
        nets[1].load_state_dict(wanted.state_dict())
    for net in nets:
        net.eval()
    pixels = torch.randn(2, 3, 64, 96)
    first = wanted(pixels)
    composite = build_composite(nets, reused).eval()
    maps = composite.first_maps(pixels)
    chosen = composite.select(maps)
    assert list(chosen) == list(wanted.output_shape())
    assert all(torch.equal(chosen[key], first[key]) for key in first)
    assert [m.shape[1] for m in maps] == composite.channels
    deeper = composite.deeper_maps(pixels, maps)
    assert [m.shape for m in deeper] == [m.shape for m in maps]
    for stage, (low, high) in enumerate(zip(maps, deeper)):
        assert (low is high) == (stage < reused)
        if reused == 0:
            # Connections start at zero.
            torch.testing.assert_close(low, high)
    for connection in composite.connections:
        for projection in connection.projections:
            projection[1].weight.fill_(0.5)
    moved = composite.deeper_maps(pixels, maps)
    assert not torch.allclose(moved[-1], deeper[-1])


def test_what_is_taken_over_has_no_weights():
    composite = build_composite([resnet(), resnet()], 1)
    second = composite.second.state_dict()
    assert second and not any(key.startswith(('stem.', 'res2.')) for key in second)


def test_the_stem_is_no_stage():
    nets = [resnet(out_features=('stem', 'res4')) for _ in range(2)]
    with pytest.raises(UsageError, match='leave stem out of OUT_FEATURES'):
        build_composite(nets)


def test_a_subclass_with_its_own_forward_is_not_served():
    class Other(ResNet):
        def forward(self, x):
            return super().forward(x.flip(1))

    net = resnet()
    net.__class__ = Other
    with pytest.raises(UsageError, match='no composite family serves the backbone Other'):
        build_composite([net, net])


def test_narrow_resnets():
    from detectron2.config import get_cfg

    from dynamicdet_detectron2 import build_narrow_resnet_fpn_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    names = ['res2', 'res3', 'res4', 'res5']
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = names
    net = build_narrow_resnet_fpn_backbone(cfg, ShapeSpec(channels=3))
    shapes = net.bottom_up.output_shape()
    assert [shapes[name].channels for name in names] == [8, 16, 32, 64]
    cfg.MODEL.RESNETS.DEPTH = 19
    with pytest.raises(UsageError, match='DEPTH of 18, 34, 50, 101'):
        build_narrow_resnet_fpn_backbone(cfg, ShapeSpec(channels=3))


def test_deformable_stages():
    options = ('MODEL.RESNETS.DEFORM_ON_PER_STAGE', [False, True, True, True])
    model = build('faster', options=options).eval()
    wake(model)
    kinds = [type(module).__name__ for module in model.backbone.second.modules()]
    assert kinds.count('DeformConv') == 13
    require_runnable(model)
    plain = build('faster', dynamic=False, options=options).eval()
    plain.load_state_dict(model.as_plain())
    with torch.no_grad():
        for exit in (0, 1):
            with at_exit(model, exit):
                results = model(images())
            for result, stock in zip(results, plain(images())):
                same = torch.equal(result['instances'].scores, stock['instances'].scores)
                assert same == (exit == 0) and result['exit'] == exit
    with pytest.raises(UsageError, match='are trained on GPUs alone'):
        require_runnable(model, training=True)
    modulated = build('faster', options=(*options, 'MODEL.RESNETS.DEFORM_MODULATED', True))
    with pytest.raises(UsageError, match='with modulation or several groups run on GPUs'):
        require_runnable(modulated)


def test_a_detector_that_needs_the_extension():
    def absent():
        raise ImportError("'detectron2._C' is not there")

    with pytest.raises(UsageError, match="needs Detectron2's extension, as deformable stages do"):
        split_detector(absent)
