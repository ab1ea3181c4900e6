"""RoIAlign by a runtime is mmcv's."""

import copy

import pytest
import torch
from mmcv.ops import RoIAlign
from torch import nn

from conftest import RUNTIMES_TO_TRY
from dynamicdet.deploy.roi_align import place_roi_aligns


@pytest.mark.parametrize('aligned', (True, False))
@pytest.mark.parametrize('ratio', (0, 2))
@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_roi_align_is_mmcvs(aligned, ratio, runtime):
    layer = RoIAlign((7, 5), 0.25, ratio, 'avg', aligned)
    model = nn.Sequential(copy.deepcopy(layer))
    place_roi_aligns(model, 1, runtime)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, 20, 24, generator=generator)
    corners = torch.rand(40, 2, generator=generator) * 110 - 10
    sizes = torch.rand(40, 2, generator=generator) * 60
    # No width, no height, neither.
    sizes[3, 0], sizes[5, 1], sizes[7] = 0, 0, 0
    rois = torch.cat([torch.arange(40)[:, None] % 2, corners, corners + sizes], dim=1).float()
    # ONNX Runtime's is the same to the last bit.
    for some in (rois, rois[:9], rois[30:], rois[3:4]):
        torch.testing.assert_close(
            model[0](maps, some),
            layer(maps, some),
            rtol=0,
            atol=1e-5 if runtime == 'openvino' else 0,
        )
    assert model[0](maps, rois[:0]).shape == (0, 6, 7, 5)


@pytest.mark.parametrize('runtime', RUNTIMES_TO_TRY)
def test_rois_of_negative_size_are_0(runtime):
    """mmcv raises; OpenVINO by itself ends the process."""
    model = nn.Sequential(RoIAlign((7, 7), 0.25, 0, 'avg', True))
    place_roi_aligns(model, 1, runtime)
    found = model[0](
        torch.ones(1, 3, 20, 24), torch.tensor([[0, 50.0, 50, 20, 20], [0, 10.0, 10, 40, 40]])
    )
    assert (found[0] == 0).all() and torch.allclose(found[1], torch.ones(()))


def test_roi_align_of_maxima_stays_mmcvs():
    model = nn.Sequential(RoIAlign(7, 0.25, 2, 'max', True))
    place_roi_aligns(model)
    assert 'forward' not in vars(model[0])
