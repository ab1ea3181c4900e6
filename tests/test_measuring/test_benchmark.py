import json
import math

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import no_progress, run_tool
from dynamicdet.errors import UsageError
from dynamicdet.measuring import benchmark
from dynamicdet.measuring.benchmark import (
    BenchmarkTask,
    MachineSetting,
    build_pair,
    half_hard_threshold,
    make_batch,
    measure_benchmark,
    quartiles,
    require_equal,
    split_batch,
    time_interleaved,
    with_memory_format,
)
from dynamicdet.testing import tiny_detector, tiny_dynamic
from mmdet.registry import MODELS


@pytest.fixture(scope='module')
def batch():
    return make_batch((64, 96), count=4)


@pytest.fixture
def pair():
    return build_pair(Config(dict(model=tiny_dynamic('faster_rcnn'))))


def test_the_tool(tmp_path):
    out = tmp_path / 'deep' / 'benchmark.json'
    done = run_tool(
        'benchmark.py',
        'configs/dy_yolox_nano_digits.py',
        '--size',
        64,
        96,
        '--rounds',
        3,
        '--batch-rounds',
        2,
        '--batches',
        1,
        '--threads',
        1,
        '--device',
        'cpu',
        '--memory-format',
        'contiguous',
        'channels_last',
        '--dtype',
        'float32',
        'bfloat16',
        '--seed',
        3,
        '--out',
        out,
    )
    assert done.returncode == 0, done.stderr
    assert 'exit 0 / stock detector' in done.stdout and '<= 1.03' in done.stdout
    content = json.loads(out.read_text())
    assert [(run['dtype'], run['memory_format'], 'refused' in run) for run in content['runs']] == [
        ('float32', 'contiguous', False),
        ('float32', 'channels_last', False),
        ('bfloat16', 'contiguous', True),
        ('bfloat16', 'channels_last', True),
    ]
    assert "an operator of mmcv's lacks bfloat16" in done.stdout
    for found in content['runs'][:2]:
        assert set(found['seconds']) == {
            'stock',
            'exit0',
            'exit1',
            'all_easy',
            'half_hard',
            'online',
            'stream',
            'stream_all',
            'all_hard',
        }
        assert set(found['ratios']) == {*content['wanted'], 'stream_all_to_mean'}
        for figures in [*found['seconds'].values(), *found['ratios'].values()]:
            assert 0 < figures['q1'] <= figures['median'] <= figures['q3'] < math.inf
        assert found['boxes_compared'] > 0 and found['threads'] == 1
    machine = content['machine']
    assert (machine['seed'], machine['size'], machine['threads']) == (3, [64, 96], 1)
    assert machine['torch'] == torch.__version__ and 'cores' in machine['cpu']
    assert machine['checkpoint'] == 'random weights'


def test_every_exit_is_timed(batch):
    settings = tiny_dynamic('yolox', backbones=3)
    model, stock = build_pair(Config(dict(model=settings)))
    _, single, _ = benchmark._tasks(model, stock, [batch], MachineSetting(1))
    assert [name for _, name in single] == ['stock', 'exit0', 'exit1', 'exit2']
    for (_, name), task in single.items():
        if name != 'stock':
            model.set_budget(threshold=task.threshold)
            assert f'exit{task.detector.test_step(task.batches[0])[0].exit}' == name


def test_bad_input_is_one_line(tmp_path):
    done = run_tool('benchmark.py', '--size', 8, 8, '--out', tmp_path / 'a.json')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == 'error: --size must be 64 64 or more'
    assert 'Traceback' not in done.stderr and not (tmp_path / 'a.json').exists()


def test_a_checkpoint_that_is_absent(tmp_path):
    with pytest.raises(UsageError, match='no checkpoint'):
        build_pair(Config(dict(model=tiny_dynamic('faster_rcnn'))), str(tmp_path / 'absent.pth'))


def test_both_detectors_have_the_same_tensors(pair):
    model, stock = pair
    mine = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        own = name.replace('backbone.', 'backbone.first.', 1)
        mate = mine[own if own in mine else f'branches.0.{name}']
        assert parameter.data_ptr() == mate.data_ptr()


def test_the_same_seed_gives_the_same_weights():
    cfg = Config(dict(model=tiny_dynamic('faster_rcnn')))
    first, again, other = (
        dict(build_pair(cfg, seed=seed)[0].named_parameters()) for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first['router.fc1.weight'], other['router.fc1.weight'])


def test_unequal_detectors_are_not_timed(pair, batch):
    model, stock = pair
    assert require_equal(stock, model, [batch]) > 0
    bias = stock.roi_head.bbox_head.fc_reg.bias
    stock.roi_head.bbox_head.fc_reg.bias = torch.nn.Parameter(bias + 0.5)
    with pytest.raises(RuntimeError, match='cannot be compared'):
        require_equal(stock, model, [batch])


def test_the_stock_detector_sees_what_exit_0_sees(batch):
    cfg = Config(dict(model=tiny_dynamic('faster_rcnn', reuse_stages=0, first_scale=0.5)))
    model, stock = build_pair(cfg)
    assert require_equal(stock, model, [batch, *split_batch(batch)]) > 0
    shapes = []
    stock.backbone.register_forward_hook(
        lambda module, inputs, _: shapes.append(inputs[0].shape[2:])
    )
    stock.test_step(batch)
    assert shapes == [(32, 64)]


def test_half_of_the_batch_is_hard(pair, batch):
    model, _ = pair
    model.set_budget(threshold=half_hard_threshold(model, [batch]))
    with torch.no_grad():
        assert sorted(sample.exit for sample in model.test_step(batch)) == [0, 0, 1, 1]


def test_a_router_that_parts_nothing(pair, batch):
    model, _ = pair
    torch.nn.init.zeros_(model.router.fc2.weight)
    with pytest.raises(UsageError, match='same difficulty'):
        half_hard_threshold(model, [batch])


def test_a_plain_checkpoint_fills_both_exits(pair, tmp_path):
    _, stock = pair
    torch.save(dict(state_dict=stock.state_dict()), tmp_path / 'plain.pth')
    cfg = Config(dict(model=tiny_dynamic('faster_rcnn')))
    model, again = build_pair(cfg, str(tmp_path / 'plain.pth'))
    wanted = stock.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
    assert torch.equal(
        model.backbone.second.layer2[0].conv1.weight, wanted['backbone.layer2.0.conv1.weight']
    )


def test_stock_configs_are_refused():
    with pytest.raises(UsageError, match='must be a DynamicDetector'):
        build_pair(Config(dict(model=tiny_detector('faster_rcnn'))))


def test_the_stock_detector_of_one_that_has_lost_channels(batch):
    """Inside a block of each backbone, and of the heads."""
    dense = tiny_dynamic('faster_rcnn')
    whole = MODELS.build(dense)
    channels = {}
    for net in ('first', 'second'):
        name = f'backbone.{net}.layer2.0'
        block = whole.get_submodule(name)
        half = block.conv1.out_channels // 2
        channels.update(
            {
                f'{name}.conv1': [block.conv1.in_channels, half, 1],
                f'{name}.bn1': [half, half, 1],
                f'{name}.conv2': [half, block.conv2.out_channels, 1],
            }
        )
    name = 'branches.0.roi_head.bbox_head.shared_fcs'
    one, two = whole.get_submodule(name)
    channels.update(
        {
            f'{name}.0': [one.in_features, one.out_features // 2, 1],
            f'{name}.1': [one.out_features // 2, two.out_features, 1],
        }
    )
    settings = dict(
        type='PrunedDetector', detector=dense, channels=channels, backbone=dict(type='ResNet')
    )
    model, stock = build_pair(Config(dict(model=settings)))
    assert stock.backbone.layer2[0].conv1.out_channels == half
    assert stock.roi_head.bbox_head.shared_fcs[1].in_features == one.out_features // 2
    assert require_equal(stock, model, split_batch(batch)) > 0


class Recorder(torch.nn.Linear):
    """Stands in for a detector; notes its calls."""

    def __init__(self, name, calls):
        super().__init__(1, 1)
        self.name, self.calls, self.threshold = name, calls, None

    def set_budget(self, threshold):
        self.threshold = threshold

    def test_step(self, batch):
        self.calls.append((self.name, self.threshold))


def test_tasks_take_turns():
    calls = []
    tasks = dict(
        a=BenchmarkTask(Recorder('a', calls), [{}]),
        b=BenchmarkTask(Recorder('b', calls), [{}], 0.5),
    )
    times = time_interleaved(tasks, 2, no_progress, '')
    a, b = ('a', None), ('b', 0.5)
    # Two untimed rounds, two timed.
    assert calls == [a, b, b, a] * 2
    assert {name: len(seconds) for name, seconds in times.items()} == dict(a=2, b=2)
    assert all((seconds > 0).all() for seconds in times.values())


def test_many_tasks_take_turns_in_many_orders():
    calls = []
    tasks = {name: BenchmarkTask(Recorder(name, calls), [{}]) for name in 'abcde'}
    time_interleaved(tasks, 8, no_progress, '')
    rounds = [''.join(name for name, _ in calls[at : at + 5]) for at in range(0, 50, 5)]
    assert len(set(rounds)) == 10 and all(sorted(one) == list('abcde') for one in rounds)
    # Each comes first twice, and behind each neighbor as often as before it.
    assert sorted(one[0] for one in rounds) == list('aabbccddee')
    assert ''.join(rounds).count('ab') >= 4 and ''.join(rounds).count('ba') >= 4


def test_settings_hold_for_their_tasks_alone(pair, batch):
    model, stock = pair
    seen = []
    model.router.register_forward_hook(
        lambda *_: seen.append((torch.get_num_threads(), torch.is_autocast_enabled('cpu')))
    )
    task = BenchmarkTask(model, [batch], 1.0)
    before = torch.get_num_threads()
    time_interleaved(
        dict(one=task._replace(setting=MachineSetting(3)), other=task), 1, no_progress, ''
    )
    assert set(seen) == {(3, False), (before, False)} and torch.get_num_threads() == before
    with MachineSetting(1, 'bfloat16').on(torch.device('cpu')):
        assert (
            torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16
        )


def test_roi_heads_take_contiguous_maps_only(pair, batch):
    model, _ = pair
    assert with_memory_format(model, 'contiguous') is model
    settings = Config(dict(model=tiny_dynamic('faster_rcnn'))).model
    first, second = measure_benchmark(
        model,
        settings,
        [batch],
        1,
        1,
        no_progress,
        [MachineSetting(1), MachineSetting(1, memory_format='channels_last')],
    )
    assert 'one-stage' in second['refused'] and 'ratios' not in second
    assert 0 < first['ratios']['stream_to_mean']['median'] < math.inf


def test_channels_last_reaches_the_maps(batch):
    cfg = Config(dict(model=tiny_dynamic('retinanet')))
    model = with_memory_format(build_pair(cfg)[0], 'channels_last')
    seen = []
    model.branches[0].neck.register_forward_hook(lambda module, inputs, _: seen.extend(inputs[0]))
    model.set_budget(threshold=1.0)
    with torch.no_grad():
        model.test_step(batch)
    assert (
        all(one.is_contiguous(memory_format=torch.channels_last) for one in seen) and len(seen) == 4
    )


def test_quartiles():
    assert quartiles(np.arange(5)) == dict(median=2.0, q1=1.0, q3=3.0)


def test_batches_of_one(batch):
    singles = split_batch(batch)
    assert [len(single['inputs']) for single in singles] == [1] * 4
    assert [single['data_samples'][0].img_id for single in singles] == [0, 1, 2, 3]
    assert batch['inputs'][0].shape == (3, 64, 96) and batch['inputs'][0].dtype == torch.uint8
