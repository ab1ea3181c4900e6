"""The table of blocks: the seed's figures, shared weights, sums."""

import pytest
import torch
from mmengine.hub import get_config

from dynamicdet.compression.ddz import compress
from dynamicdet.compression.encoding import Lossy
from dynamicdet.compression.pruning_blocks import find_layers
from dynamicdet.compression.size_report import (
    TWO_STAGE,
    AccuracyAndLatency,
    block_sizes,
    compression_table,
    total_size,
)
from dynamicdet.errors import UsageError
from mmdet.registry import MODELS

#: Muhawenayo, "Compressed Objects Detection", Table 2: MB left at a share of pruned weights. Its
#: columns for 60 %
#: are missing.
SHARES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9)
MEMORY = {
    ('backbone',): (165.6, 154.88, 144.16, 133.44, 122.72, 112.0, 90.56, 79.84, 69.12),
    ('roi_heads',): (165.6, 160.0, 154.4, 148.8, 143.2, 137.6, 126.4, 120.8, 115.2),
    ('backbone', 'roi_heads'): (165.6, 149.2, 132.9, 116.6, 100.3, 84.0, 51.3, 35.0, 18.7),
}


@pytest.fixture(scope='module')
def r50():
    """Faster R-CNN R-50 with the seed's 13 classes, all of ones: (state, keys of weights per
    block)."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    cfg = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py').model
    cfg.backbone.init_cfg = None
    cfg.roi_head.bbox_head.num_classes = 13
    with torch.device('meta'):
        model = MODELS.build(cfg)
    weights = {
        name: [
            f'{layer}.weight' for layer in find_layers(model) if layer.startswith(tuple(patterns))
        ]
        for name, patterns in TWO_STAGE.items()
    }
    return {key: torch.ones(value.shape) for key, value in model.state_dict().items()}, weights


def test_the_seeds_parameters(r50):
    sizes = {size.name: size.parameters / 1e6 for size in block_sizes(r50[0], groups=TWO_STAGE)}
    assert sizes == pytest.approx(dict(backbone=26.8, proposals=0.6, roi_heads=14.0), rel=0.013)
    assert sizes['backbone'] == pytest.approx(26.8, rel=0.01) and sizes[
        'roi_heads'
    ] == pytest.approx(14.0, rel=0.01)
    assert sum(sizes.values()) == pytest.approx(41.4, rel=0.01)


@pytest.mark.parametrize('blocks', MEMORY, ids='+'.join)
def test_the_seeds_memory_column(r50, blocks):
    state, weights = r50
    state = dict(state)
    for share, memory in zip(SHARES, MEMORY[blocks]):
        for key in (key for block in blocks for key in weights[block]):
            flat = state[key].flatten().clone()
            flat[: round(share * flat.numel())] = 0
            state[key] = flat.view_as(state[key])
        sizes = block_sizes(state, groups=TWO_STAGE)
        # Norms and biases are not pruned, which is 1 % of the little that is left at 90 %.
        assert total_size(sizes, 0).megabytes == pytest.approx(
            memory, rel=0.01 if memory > 20 else 0.02
        )
        assert all(
            size.pruned == pytest.approx(share if size.name in blocks else 0, abs=0.005)
            for size in sizes
        )


def test_a_row_counts_weights_once_and_zeros_in_weights_alone():
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    state = {
        'head.a.weight': weight,
        'head.b.weight': weight,
        'head.a.bias': torch.zeros(2),
        'head.bn.running_mean': torch.zeros(9),
        'head.bn.num_batches_tracked': torch.tensor(3),
        'neck.weight': torch.ones(1, 3),
        'delta': torch.tensor(0.5),
    }
    compressed = compress(dict(state_dict=state))
    head, neck, delta = block_sizes(state, compressed.entries)
    assert (head.parameters, head.zeros, head.pruned, head.megabytes) == (6, 3, 0.5, 12e-6)
    assert (neck.parameters, neck.zeros, delta.parameters) == (3, 0, 0)
    assert head.in_file == sum(entry.size for entry in compressed.entries[:5])
    # Rows and the index are the whole file.
    lines = compression_table([head, neck, delta], 5_000_000)
    figures = [float(line.split()[6]) for line in lines[1:]]
    assert sum(figures[:-1]) == pytest.approx(figures[-1]) == 5.0
    assert [line.split()[0] for line in lines] == [
        'block',
        'head',
        'neck',
        'delta',
        '(index)',
        'total',
    ]


def test_errors_are_of_all_weights_of_a_block():
    """By hand: 1 and 3 become 2, the bias is no weight; 2 and 2 stay."""
    state = {
        'a.weight': torch.tensor([[1.0, 3.0]]),
        'a.bias': torch.tensor([5.0]),
        'b.weight': torch.tensor([[2.0, 2.0]]),
    }
    compressed = compress(dict(state_dict=state), Lossy(binary=()))
    sizes = block_sizes(state, compressed.entries)
    assert [size.error for size in sizes] == [pytest.approx((2 / 10) ** 0.5), 0]
    assert total_size(sizes, 1).error == pytest.approx((2 / 18) ** 0.5)
    assert [size.error for size in block_sizes(state)] == [0, 0]


def test_what_is_unknown_is_a_dash():
    lines = compression_table(
        [],
        5,
        AccuracyAndLatency(None, 12.34, 0.01),
        AccuracyAndLatency(50.0, None, 0.02),
        9_000_000,
    )
    assert lines[2].split()[-4:] == ['-', '12.34', '10.0', 'ms']
    assert lines[3].split()[0] == 'original' and lines[3].split()[6] == '9.000'
    assert lines[3].split()[-4:] == ['50.00', '-', '20.0', 'ms']


def test_groups_that_match_nothing():
    with pytest.raises(UsageError, match="'nekc' matches no entry"):
        block_sizes({'neck.weight': torch.ones(2, 2)}, groups=dict(a=['neck', 'nekc']))
