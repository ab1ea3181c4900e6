"""Parameters and FLOPs: hand-counted parts, the papers' figures, the page in docs/."""

import contextlib
import io
import re
import runpy
import sys

import pytest
import torch
from mmengine.config import Config
from torch import nn

from conftest import ROOT
from dynamicdet.errors import UsageError
from dynamicdet.measuring.flops import (
    Costs,
    PartCost,
    build_detector,
    count_flops,
    count_parameters,
    measure_costs,
    stated_shape,
)
from dynamicdet.measuring.model_zoo import (
    COUNTED,
    count_row,
    make_model_zoo_page,
    make_row,
    read_models,
)
from dynamicdet.models import fuse
from dynamicdet.testing import tiny_detector, tiny_dynamic

ENTRIES = read_models(ROOT)
#: Config -> the cells of its row in the page.
PAGE = {
    f'configs/{row[1]}': row[0][2:-2].split(' | ')
    for row in re.finditer(
        r'^\| \[[^]]*\]\(\.\./configs/([^)]*)\).*$', (ROOT / 'docs/model_zoo.md').read_text(), re.M
    )
}


def costs_of(model, shape=(96, 128)):
    return measure_costs(build_detector(Config(dict(model=model))), shape)


# Counting.


def test_a_multiply_add_is_two():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    flops, out = count_flops(lambda: conv(torch.zeros(1, 3, 7, 9)))
    assert flops == 2 * 3 * 5 * 9 * 7 * 9 and out.shape == (1, 5, 7, 9)


def test_what_is_shared_counts_once():
    layer = nn.Linear(3, 4)
    assert count_parameters(layer, nn.Sequential(layer, nn.Linear(4, 2))) == 16 + 10


@pytest.mark.parametrize('name', ['faster_rcnn', 'mask_rcnn', 'cascade_rcnn', 'retinanet', 'yolox'])
def test_an_easy_image_costs_a_plain_detector_and_the_router(name):
    model = tiny_dynamic(name, shared=name != 'retinanet', reuse_stages=0)
    costs, (stock,) = costs_of(model), costs_of(tiny_detector(name)).exits
    maps = 8 + 16 + 32 + 64
    router = 2 * (maps * (maps // 4) + maps // 4)
    assert costs.parts['router'].flops == router
    assert costs.exits[0].flops == stock.flops + router
    assert costs.exits[0].parameters == stock.parameters + costs.parts['router'].parameters
    # A second backbone, and the connections, on top; heads are not run twice.
    parts = costs.parts.values()
    second = costs.parts['second backbone, connections']
    assert costs.exits[1].flops == costs.exits[0].flops + second.flops
    assert second.flops > costs.parts['first backbone'].flops
    built = build_detector(Config(dict(model=model)))
    assert sum(part.parameters for part in parts) == count_parameters(built)


@pytest.mark.parametrize('shared', [True, False])
def test_exit_1_needs_no_neck_and_heads_but_its_own(shared):
    costs = costs_of(tiny_dynamic('retinanet', shared=shared))
    own = costs.parts['second neck and heads'].parameters
    assert (own == 0) == shared
    total = sum(part.parameters for part in costs.parts.values())
    assert costs.exits[1].parameters == total - own


def test_heads_get_all_the_regions_that_they_may():
    """50 proposals and 100 detections, as the config says."""
    assert costs_of(tiny_detector('mask_rcnn'), (256, 256)).rois == dict(boxes=50, masks=100)
    assert costs_of(tiny_detector('retinanet')).rois == {}


def test_mmcvs_own_operators_go_through():
    """Deformable convolutions count in part: the ordinary ones that make their offsets."""
    plain, deformable = tiny_detector('retinanet'), tiny_detector('retinanet')
    for model in (plain, deformable):
        model.backbone.update(depth=50, base_channels=2)
    deformable.backbone.update(
        dcn=dict(type='DCN', deform_groups=1), stage_with_dcn=(False, False, False, True)
    )
    (few,), (many,) = costs_of(deformable).exits, costs_of(plain).exits
    assert 0 < few.flops != many.flops


def test_counting_leaves_nothing_behind():
    model = build_detector(Config(dict(model=tiny_dynamic('mask_rcnn'))))
    assert measure_costs(model, (64, 96)) == measure_costs(model, (64, 96))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_smaller_image_costs_exit_0_less():
    small, full = (
        costs_of(tiny_dynamic('fcos', reuse_stages=0, first_scale=scale), (128, 128))
        for scale in (0.5, 1)
    )
    assert small.parts['first backbone'].flops == full.parts['first backbone'].flops / 4
    assert small.parts['second neck and heads'] == full.parts['second neck and heads']


def test_a_mix_costs_its_share():
    costs = Costs({}, (PartCost(1, 100), PartCost(2, 300)), {})
    assert [costs.at(share) for share in (0, 0.25, 1)] == [100, 150, 300]


@pytest.mark.parametrize('shape', [(0, 64), (64, 100)])
def test_a_shape_that_strides_do_not_divide(shape):
    with pytest.raises(UsageError, match='multiples of 32'):
        costs_of(tiny_detector('fcos'), shape)


@pytest.mark.parametrize('scale, shape', [((1333, 800), (800, 1280)), ((640, 640), (640, 640))])
def test_the_shape_that_papers_state(scale, shape):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=scale, keep_ratio=True)]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    assert stated_shape(cfg) == shape


# The page, and the papers' figures.


def test_the_page_has_a_row_for_each_detector():
    assert list(PAGE) == list(ENTRIES)


@pytest.mark.parametrize('config', ENTRIES)
def test_the_page_is_what_the_tool_writes(config):
    cells = PAGE[config]
    shape = stated_shape(Config.fromfile(ROOT / config))
    costs = Costs({}, (PartCost(0, 0), PartCost(0, 0)), {})
    blank = make_row(ENTRIES[config], 0, costs, shape)
    assert len(cells) == len(blank)
    assert [cells[0], *cells[7:]] == [blank[0], *blank[7:]]
    assert (
        make_model_zoo_page([cells]).splitlines()[-1]
        in (ROOT / 'docs/model_zoo.md').read_text().splitlines()
    )
    gflops = [float(cell) for cell in cells[2:7]]
    assert 0 < gflops[0] < gflops[-1] and float(cells[1]) > 0
    for share, value in zip((0, 0.1, 0.5, 0.9, 1), gflops):
        assert value == pytest.approx(gflops[0] + share * (gflops[-1] - gflops[0]), abs=0.11)


@pytest.mark.parametrize(
    'config', [config for config, entry in ENTRIES.items() if 'Figures Of The Paper' in entry]
)
def test_the_page_has_the_compute_that_papers_state(config):
    entry, cells = ENTRIES[config], PAGE[config]
    stated = entry['Figures Of The Paper']['At Percent Hard']
    within = 0.02 if COUNTED[entry['FLOPs Counted As']] == 2 else 0.005
    for percent, column in ((0, 2), (10, 3), (50, 4), (90, 5), (100, 6)):
        if percent in stated:
            assert float(cells[column]) == pytest.approx(stated[percent]['GFLOPs'], rel=within)


@pytest.mark.parametrize(
    'name', ['dy_mask_rcnn_swin-t', 'dy_fcos', 'dy_yolox_tiny', 'dy_rtmdet_tiny']
)
def test_the_page_has_what_is_counted(name):
    config = f'configs/{name}.py'
    assert count_row(ROOT, ENTRIES[config]) == PAGE[config]


@pytest.mark.parametrize(
    'name, millions', [('dy_yolov7', 80.62), ('dy_yolov7_x', 151.09), ('dy_yolov7_w6', 147.36)]
)
def test_yolov7_has_the_parameters_of_the_published_one(name, millions):
    assert float(PAGE[f'configs/{name}.py'][1]) == pytest.approx(millions, rel=1e-3)


def test_faster_rcnn_costs_what_cbnetv2_states():
    config = 'configs/dy_faster_rcnn.py'
    model = build_detector(Config.fromfile(ROOT / config))
    costs = measure_costs(model, (800, 1280))
    assert costs.rois == dict(boxes=1000)
    easy, hard = (exit.flops / 2e9 for exit in costs.exits)
    assert easy == pytest.approx(207, rel=0.02) and hard == pytest.approx(284, rel=0.02)
    # CBNetV2 has no router.
    without = costs.exits[1].parameters - costs.parts['router'].parameters
    assert without == pytest.approx(69e6, rel=0.02)
    assert make_row(ENTRIES[config], count_parameters(model), costs, (800, 1280)) == PAGE[config]


def test_yolov7_costs_less_when_fused():
    """What the published Dy-YOLOv7 counts, without fusing and with it."""
    config = 'configs/dy_yolov7.py'
    model = build_detector(Config.fromfile(ROOT / config))
    parameters = count_parameters(model)
    for ends in ((105.8, 183.0), (104.7, 181.7)):
        costs = measure_costs(model, (640, 640))
        assert [exit.flops / 1e9 for exit in costs.exits] == pytest.approx(ends, rel=0.005)
        fuse(model)
    assert make_row(ENTRIES[config], parameters, costs, (640, 640)) == PAGE[config]


# The tool.


@pytest.fixture
def tool(monkeypatch):
    """``tool(*arguments)`` runs it in this process: status, output, errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['get_flops', *map(str, arguments)])
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / 'tools/get_flops.py'), run_name='__main__')
        return ended.value.code or 0, out.getvalue(), said.getvalue()

    return run


def figures(out):
    """Row -> parameters, multiply-adds, 2 x multiply-adds."""
    rows = re.findall(r'^(\S.*?)  +(?:([\d.]+) +)?([\d.]+) +([\d.]+)$', out, re.M)
    return {name: tuple(float(number or 'nan') for number in numbers) for name, *numbers in rows}


def test_the_tool_on_a_dynamic_detector(tool):
    status, out, _ = tool(
        ROOT / 'configs/dy_faster_rcnn_digits.py',
        '--hard-share',
        0.25,
        '--fused',
        '--cfg-options',
        'model.first_scale=1',
    )
    assert status == 0
    assert ' 128 x 128 pixels\n' in out and 'Not fused: ' in out and '60 boxes' in out
    rows = figures(out)
    assert list(rows) == [
        'first backbone',
        'router',
        'first neck and heads',
        'second backbone, connections',
        'second neck and heads',
        'exit 0',
        'exit 1',
        '25% hard',
    ]
    for _, single, double in rows.values():
        assert double == pytest.approx(2 * single, abs=0.011)
    assert rows['25% hard'][1] == pytest.approx(
        0.75 * rows['exit 0'][1] + 0.25 * rows['exit 1'][1], abs=0.01
    )


def test_the_tool_on_a_stock_detector(tool, tmp_path):
    config = tmp_path / 'stock.py'
    config.write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'")
    status, out, _ = tool(config, '--shape', 64, 96)
    assert status == 0 and ' 64 x 96 pixels\n' in out
    assert list(figures(out)) == ['detector'] and figures(out)['detector'][0] > 10


@pytest.mark.parametrize(
    'arguments, said',
    [
        ([], 'name a config, or ask for --zoo'),
        (['configs/absent.py'], 'there is no config'),
        (['configs/absent.py', '--zoo'], 'name a config, or ask for --zoo'),
        (['configs/dy_faster_rcnn.py', '--hard-share', 2], '--hard-share takes shares'),
    ],
)
def test_bad_input_is_one_line(tool, arguments, said):
    status, _, errors = tool(*arguments)
    assert status == 2 and errors.startswith('error: ') and said in errors
    assert len(errors.strip().splitlines()) == 1
