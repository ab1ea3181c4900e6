"""Deployment folders: written, read, tested, refused."""

import builtins
import copy
import json
import os
import runpy
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from conftest import ROOT, THREADS, load_small, run_tool, same_detections, train
from dynamicdet import building
from dynamicdet.building import build_loader, load_detector
from dynamicdet.cascade.parts import DetectorPart
from dynamicdet.compression.quantization import activation_scale
from dynamicdet.deploy.deployment import deploy
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.graphs import Graph, _export
from dynamicdet.deploy.int8 import (
    Observer,
    Recipe,
    choose_float,
    expose_layer_tensors,
    least_error,
    multiply_adds,
    quantize_graph,
)
from dynamicdet.deploy.latencies import put_latencies
from dynamicdet.deploy.runtimes import RUNTIMES
from dynamicdet.errors import UsageError
from dynamicdet.measuring.calibration import measure_difficulties
from dynamicdet.testing import randomize, tiny_batch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules


@pytest.fixture(scope='module')
def trained(digits, tmp_path_factory):
    """Config and checkpoint of a small Faster R-CNN, trained for two epochs in 8 bits, and what its
    hook did."""
    from dynamicdet.engine.quantization_hook import QuantizationHook  # noqa: F401  (registers)
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    work_dir = tmp_path_factory.mktemp('trained')
    cfg = small(digits, work_dir)
    runner = train(cfg)
    return cfg, str(work_dir / 'epoch_2.pth'), runner


def small(digits, work_dir, hook=None, **options):
    cfg = load_small(
        'faster_rcnn_digits',
        digits,
        work_dir,
        val=True,
        **{
            'model.neck.in_channels': [8, 16, 32, 64],
            'param_scheduler': [],
            'train_cfg.max_epochs': 2,
            'optim_wrapper.optimizer.lr': 1e-3,
            'load_from': None,
            **options,
        },
    )
    cfg.model.pop('detector')
    cfg.custom_hooks.append(dict(type='QuantizationHook', reduced_range=True, **(hook or {})))
    return cfg


def val_loader(cfg):
    return build_loader(dict(cfg.val_dataloader, num_workers=0, persistent_workers=False))


@pytest.fixture(scope='module')
def folder(trained, tmp_path_factory):
    """An int8 folder by the trained ranges."""
    cfg, path, _ = trained
    out = str(tmp_path_factory.mktemp('deployed') / 'int8')
    return out, deploy(cfg, path, out, val_loader(cfg), images=4)


def test_a_trained_checkpoint_has_the_detectors_keys_and_ranges_beside_them(trained):
    cfg, path, _ = trained
    checkpoint = torch.load(path, weights_only=True)
    model, _ = load_detector(cfg, path)
    assert set(checkpoint['state_dict']) == set(model.state_dict())
    ranges = checkpoint['quantization']['ranges']
    assert {key.split('/')[0] for key in ranges} == {'first', 'branch0', 'branch0.bbox_head0'}
    assert all(value[0] <= value[1] and value.isfinite().all() for value in ranges.values())


def test_trained_ranges_are_exported_and_the_graphs_compute_what_was_trained(trained, folder):
    cfg, path, _ = trained
    out, about = folder
    assert about['int8'] and about['reduced_range'] and about['calibration']['ranges'] == 'trained'
    # What an RPN gives are proposals.
    predictions = dict(first=[], branch0=[], **{'branch0.bbox_head0': ['fc_cls', 'fc_reg']})
    for name, layers in about['layers'].items():
        assert (
            sorted({'_'.join(one.split('/')[1].split('_')[:2]) for one in layers['float_layers']})
            == predictions[name]
        )
        # Measured, not said.
        assert 0 < layers['noise'] == layers['noise_all_int8'] < 1
        assert bool(predictions[name]) == (0 < layers['float_share'] <= 0.1)
    from dynamicdet.engine.quantization_hook import QuantizationHook

    simulated, checkpoint = load_detector(cfg, path)
    hook = QuantizationHook(reduced_range=True)
    hook._saved = checkpoint['quantization']
    hook._install(simulated)
    deployed, exact = load_deployed(out), load_detector(cfg, path)[0]
    batch = tiny_batch((1, 2), (64, 64))
    with torch.no_grad():
        maps = [
            model.extract_feat(model.data_preprocessor(batch)['inputs'])
            for model in (deployed, simulated, exact)
        ]

    def noise(one, two):
        return sum((a - b).square().sum() for a, b in zip(one, two)) / sum(
            b.square().sum() for b in two
        )

    assert noise(maps[1], maps[2]) > 1e-5
    assert noise(maps[0], maps[1]) < noise(maps[1], maps[2]) / 10


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_folder_is_tested_by_the_tool(runtime, folder, tmp_path):
    done = run_tool(
        'test_deployed.py',
        folder[0],
        '--images',
        1,
        '--out',
        tmp_path / 'f.json',
        '--work-dir',
        tmp_path,
        '--runtime',
        runtime,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / 'f.json').read_text())
    assert figures['runtime'] == runtime
    # Two epochs find nothing, of which mmdet gives no AP.
    assert (
        len(figures['milliseconds']) == 1
        and figures['milliseconds'][0] > 0
        and 'metrics' in figures
    )


def test_compressed_graphs_compute_the_same_from_a_smaller_folder(trained, folder, tmp_path):
    from dynamicdet.deploy import folder as folders

    out = str(tmp_path / 'small')
    about = deploy(trained[0], trained[1], out, compress=True)
    whole = str(tmp_path / 'whole')
    assert about['bytes'] < 0.95 * deploy(trained[0], trained[1], whole)['bytes']
    assert {path.suffix for path in (tmp_path / 'small').glob('*.onnx*')} == {'.zst'}
    batch = tiny_batch((1, 2), (64, 64))
    one, other = (load_deployed(path) for path in (out, whole))
    with torch.no_grad():
        maps = [
            model.extract_feat(model.data_preprocessor(batch)['inputs']) for model in (one, other)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*maps))
    # A frame that says it is larger than the manifest does is not unpacked.
    with pytest.raises(UsageError, match='first.onnx.zst.* is damaged'):
        folders._read_graph(tmp_path / 'small' / 'first.onnx.zst', 10)


def test_what_was_changed_or_cut_is_refused(folder, tmp_path):
    import shutil

    for number, (name, change) in enumerate(
        [
            ('first.onnx', lambda content: content[:-1]),
            ('state.pth', lambda content: b'x' + content[1:]),
            ('manifest.json', lambda content: content.replace(b'"version": 6', b'"version": 1')),
            ('manifest.json', lambda content: content[:100]),
            ('config.json', lambda content: None),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(folder[0], copy)
        content = change((copy / name).read_bytes())
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        with pytest.raises(UsageError, match='damaged|changed') as error:
            load_deployed(str(copy))
        assert '\n' not in str(error.value)
    with pytest.raises(UsageError, match='no deployed detector'):
        load_deployed(str(tmp_path))


def test_a_folder_that_is_there_is_not_overwritten(trained, folder):
    with pytest.raises(UsageError, match='is there already'):
        deploy(trained[0], trained[1], folder[0])


def test_of_two_runs_the_slower_one_is_refused(folder, tmp_path, monkeypatch):
    """Both found nothing there when they began."""
    import shutil

    from dynamicdet.deploy import folder as module

    model, out = load_deployed(folder[0]), tmp_path / 'out'
    check = module.require_new

    def slow(path):
        check(path)
        shutil.copytree(folder[0], out)
        monkeypatch.setattr(module, 'require_new', check)

    monkeypatch.setattr(module, 'require_new', slow)
    with pytest.raises(UsageError, match='is there already'):
        module.write_folder(str(out), model.cfg, model, {}, {}, {})
    assert [one.name for one in tmp_path.iterdir()] == ['out'] and load_deployed(str(out))


def test_no_images_or_no_runtime_are_one_line(trained, tmp_path, monkeypatch):
    cfg, path, _ = trained
    with pytest.raises(UsageError, match='calibrate on'):
        deploy(cfg, path, str(tmp_path / 'out'), val_loader(cfg), images=0)
    importing = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == 'onnxruntime':
            raise ImportError
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', absent)
    with pytest.raises(UsageError, match="need 'onnxruntime'.*requirements/deploy.txt"):
        deploy(cfg, path, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_the_tool_says_what_it_would_do(trained, tmp_path):
    cfg, path, _ = trained
    cfg.dump(tmp_path / 'config.py')
    done = run_tool(
        'export.py', tmp_path / 'config.py', path, '--out', tmp_path / 'out', '--int8', '--dry-run'
    )
    assert done.returncode == 0, done.stderr
    assert (
        'int8: first, branch0, branch0.bbox_head0' in done.stdout
        and not (tmp_path / 'out').exists()
    )
    done = run_tool('export.py', tmp_path / 'config.py', path, '--out', tmp_path, '--int8')
    assert (
        done.returncode == 2 and done.stderr.count('\n') == 1 and 'is there already' in done.stderr
    )


def test_ranges_are_all_that_was_seen_or_what_has_the_least_error():
    observer = Observer()
    observer(dict(x=np.array([[0.0, 1.0]], np.float32)))
    observer(dict(x=np.array([[-1.0, 4.0]], np.float32), empty=np.zeros((0, 3), np.float32)))
    assert observer.ranges('minmax') == dict(x=(-1.0, 4.0)) and observer.shares == dict(x=2)
    # One outlier among many small values is not worth the steps it would cost; two values alone
    # are.
    counts = np.zeros(2048)
    counts[:400], counts[-1] = 1e6, 1
    assert least_error(counts, 0.0, 1.0)[1] < 0.3
    counts[:] = 0
    counts[[0, -1]] = 1
    assert least_error(counts, 0.0, 1.0)[1] > 0.99
    with pytest.raises(UsageError, match='not finite'):
        observer(dict(x=np.array([[np.nan]], np.float32)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.two(self.one(x).relu())


def test_the_layer_that_suffers_stays_float():
    torch.manual_seed(0)
    module = Two().eval()
    x = torch.randn(1, 3, 8, 8)
    exported = _export(DetectorPart('two', module, lambda run: None, (module,)), (x,))
    observer = Observer()
    Graph(expose_layer_tensors(exported.content), exported.form, watch=observer)(x)
    ranges = observer.ranges('minmax')
    costs = multiply_adds(exported.content, observer.shares)
    assert sorted(costs.values()) == [64 * 16, 64 * 24]
    fine = choose_float(exported.content, Recipe(ranges), [(x,)], costs)
    assert fine.before < 1e-3 and not fine.chosen
    # Steps of 100 where values are near 1.
    bad = Recipe({**ranges, 'out0': (0.0, 25500.0)})
    found = choose_float(exported.content, bad, [(x,)], costs, share=0.5)
    last = max(found.each, key=found.each.get)
    assert found.before > 0.1 and found.chosen == [last] and costs[last] == 64 * 16
    assert found.after < 1e-3 and found.share == pytest.approx(0.4)
    # It may not, where that is more than may stay float.
    assert not choose_float(exported.content, bad, [(x,)], costs, share=0.3).chosen
    # The int8 graph is of integers; what is float stays as it was.
    assert b'DequantizeLinear' in quantize_graph(exported.content, Recipe(ranges))
    assert quantize_graph(exported.content, Recipe(ranges, tuple(costs))) == exported.content


def test_resuming_goes_on_with_the_ranges(trained, digits, tmp_path):
    cfg, path, whole = trained
    half = small(digits, tmp_path / 'half', **{'train_cfg.max_epochs': 1})
    train(half)
    rest = small(digits, tmp_path / 'half')
    rest.resume, rest.load_from = True, str(tmp_path / 'half' / 'epoch_1.pth')
    train(rest)
    one = torch.load(path, weights_only=True)
    two = torch.load(tmp_path / 'half' / 'epoch_2.pth', weights_only=True)
    for key, value in one['quantization']['ranges'].items():
        torch.testing.assert_close(two['quantization']['ranges'][key], value)
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][key], value)


@pytest.mark.parametrize(
    'changed, message',
    [
        (dict(reduced_range=False), 'reduced_range=False, .*with True'),
        (dict(float_share=0.2), 'float_share=0.2, .*with 0.1'),
    ],
)
def test_resuming_with_other_integers_is_refused(trained, changed, message):
    from dynamicdet.engine.quantization_hook import QuantizationHook

    model, checkpoint = load_detector(trained[0], trained[1])
    hook = QuantizationHook(**{**dict(reduced_range=True), **changed})
    hook._saved = checkpoint['quantization']
    with pytest.raises(UsageError, match=message):
        hook._install(model)


def ranges_of(path):
    return torch.load(path, weights_only=True)['quantization']['ranges']


def scale_of_input(path):
    """Scale and zero point by which an int8 graph rounds its input."""
    model = onnx.load(path)
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    node = next(
        one for one in model.graph.node if one.op_type == 'QuantizeLinear' and one.input[0] == 'in0'
    )
    return [values[name].item() for name in node.input[1:]]


def test_learned_ranges_move_are_resumed_and_exported(digits, tmp_path):
    hook = dict(ranges='learned', start=1, rate=0.01)
    train(small(digits, tmp_path / 'whole', hook))
    one, two = (ranges_of(tmp_path / 'whole' / f'epoch_{epoch}.pth') for epoch in (1, 2))
    moved = {key: (two[key] - value).abs() / (value[1] - value[0]) for key, value in one.items()}
    # Three iterations, of a hundredth each.
    assert one.keys() == two.keys() and max(value.max() for value in moved.values()) < 0.031
    assert sum(bool(value.max() > 0.009) for value in moved.values()) > 0.9 * len(moved)
    assert all(not value.requires_grad for value in two.values())
    rest = small(digits, tmp_path / 'half', hook)
    rest.resume, rest.load_from = True, str(tmp_path / 'whole' / 'epoch_1.pth')
    train(rest)
    resumed = ranges_of(tmp_path / 'half' / 'epoch_2.pth')
    for key, value in two.items():
        torch.testing.assert_close(resumed[key], value)
    deploy(
        rest,
        str(tmp_path / 'whole' / 'epoch_2.pth'),
        str(tmp_path / 'out'),
        val_loader(rest),
        images=1,
    )
    scale, zero = activation_scale(*two['first/in0'].tolist())
    assert scale_of_input(tmp_path / 'out' / 'first.onnx') == [scale, zero]


class TestsAverages(Hook):
    """Compares, while it validates, what a first part gives with what it would give in float."""

    priority = 'LOWEST'
    noise = None

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        model = runner.model
        average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
        quantized = next(hook for hook in runner.hooks if type(hook).__name__ == 'QuantizationHook')
        # EMAHook has swapped them: the run's own weights are in its copy.
        assert not torch.equal(
            model.backbone.conv1.weight, average.ema_model.module.backbone.conv1.weight
        )
        images = model.data_preprocessor(data_batch)['inputs']
        with torch.no_grad():
            rounded, exact = model.backbone(images), quantized.simulations['first'].run(images)
        TestsAverages.noise = float(
            (rounded[0] - exact[0]).square().sum() / exact[0].square().sum()
        )


def test_averages_are_validated_in_8_bits(digits, tmp_path):
    cfg = small(digits, tmp_path, **{'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1})
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.3))
    runner = Runner.from_cfg(cfg)
    runner.register_hook(TestsAverages())
    runner.train()
    assert 0 < TestsAverages.noise < 0.1
    # What is saved are plain keys, of both.
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    assert set(saved) == set(MODELS.build(cfg.model).state_dict()) and ranges_of(
        tmp_path / 'epoch_1.pth'
    )


def test_a_loader_without_a_batch_size_of_its_own(trained, tmp_path):
    """As of videos, whose batches are streams side by side."""
    cfg, path, _ = trained
    loader = val_loader(cfg)
    batches = torch.utils.data.DataLoader(
        loader.dataset, batch_sampler=[[0, 1], [2], [3, 4], [5]], collate_fn=loader.collate_fn
    )
    about = deploy(cfg, path, str(tmp_path / 'out'), batches, images=3)
    assert about['calibration']['images'] == 3


def test_a_model_that_cannot_be_built_is_one_line(trained, tmp_path):
    cfg, path, _ = trained
    cfg = copy.deepcopy(cfg)
    cfg.model.rpn_head.type = 'RPNHeadd'
    with pytest.raises(UsageError, match='cannot be built.*RPNHeadd is not in') as error:
        deploy(cfg, path, str(tmp_path / 'out'))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'options, said',
    [
        (['data_root=nowhere/'], "no annotation file at 'nowhere/annotations/instances_test.json'"),
        (['data_root.x=3'], '--cfg-options do not fit'),
    ],
)
def test_options_of_the_tool_move_the_data_or_are_refused(folder, tmp_path, options, said):
    done = run_tool(
        'test_deployed.py', folder[0], '--no-ap', '--work-dir', tmp_path, '--cfg-options', *options
    )
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr


def test_a_test_of_such_a_run_is_in_8_bits(trained, digits, tmp_path):
    cfg, path, _ = trained
    tested = small(digits, tmp_path)
    tested.load_from = path
    hook = next(
        one for one in Runner.from_cfg(tested).hooks if type(one).__name__ == 'QuantizationHook'
    )
    counted = []
    install = hook._install
    hook._install = lambda model: (install(model), counted.extend(hook.simulations))
    runner = Runner.from_cfg(tested)
    runner._hooks = [
        hook if type(one).__name__ == 'QuantizationHook' else one for one in runner.hooks
    ]
    runner.test()
    assert counted == ['first', 'branch0', 'branch0.bbox_head0']


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(start=-1), 'negative'),
        (dict(start=2, observe=2), 'later'),
        (dict(noise=0), 'no share'),
        (dict(float_share=1.1), 'no share'),
        (dict(ranges='best'), "'running' or 'learned'"),
        (dict(ranges='learned', rate=0), 'in .0, 0.1.'),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, message):
    from dynamicdet.engine.quantization_hook import QuantizationHook

    with pytest.raises(UsageError, match=message):
        QuantizationHook(**settings)


@pytest.fixture(scope='module')
def calibrated(digits, tmp_path_factory):
    """Config and checkpoint of a dynamic detector: two of six images are hard; torch took a minute
    for each."""
    folder = tmp_path_factory.mktemp('calibrated')
    register_all_modules(init_default_scope=True)
    cfg = load_small('dy_faster_rcnn_digits', digits, folder, val=True)
    model = randomize(MODELS.build(cfg.model), seed=3)
    model.difficulties, model.delta = torch.linspace(0, 1, 9), torch.tensor(0.0)
    scores = measure_difficulties(model.eval(), val_loader(cfg), lambda steps, what: steps)
    model.threshold.fill_(float(scores[3] + scores[4]) / 2)
    model.latencies.copy_(torch.tensor([60.0, 120.0]))
    torch.save(dict(state_dict=model.state_dict()), folder / 'calibrated.pth')
    return cfg, str(folder / 'calibrated.pth'), scores


@pytest.mark.parametrize('images', [6, 1])
def test_a_calibrated_detector_keeps_its_calibration(calibrated, images, tmp_path):
    """Difficulties move with the weights; the hard share is the checkpoint's, not that of the
    images that int8 has seen."""
    cfg, path, _ = calibrated
    one_by_one = DataLoader(val_loader(cfg).dataset, collate_fn=pseudo_collate)
    about = deploy(cfg, path, str(tmp_path / 'out'), one_by_one, images=images)
    assert about['calibration'] == dict(images=images, ranges='mse')
    # The router's two layers.
    assert len(about['layers']['first']['float_layers']) >= 2
    before = torch.load(path, weights_only=True)['state_dict']
    deployed = load_deployed(str(tmp_path / 'out'))
    assert len(deployed.difficulties) == 9
    assert not torch.equal(deployed.difficulties, before['difficulties'])
    hard = before['difficulties'] > before['threshold']
    assert torch.equal(deployed.difficulties > deployed.threshold, hard) and 0 < hard.sum() < 9
    assert (deployed.latencies < 30).all()
    if images == 1:
        return
    exits = [sample.exit for batch in val_loader(cfg) for sample in deployed.test_step(batch)]
    assert sorted(exits) == [0, 0, 0, 0, 1, 1]


def test_a_folder_merges_exits_as_its_config_says(calibrated, tmp_path):
    """And scales their scores as its checkpoint says."""
    cfg, path, _ = calibrated
    cfg, state = copy.deepcopy(cfg), torch.load(path, weights_only=True)
    # As an attribute it is a method of ConfigDict's.
    cfg.model['merge'] = dict(type='nms', iou=0.5)
    state['state_dict']['platt_shift'] = torch.tensor([0.5, -0.5])
    torch.save(state, tmp_path / 'merged.pth')
    deploy(cfg, str(tmp_path / 'merged.pth'), str(tmp_path / 'out'))
    model, _ = load_detector(cfg, str(tmp_path / 'merged.pth'))
    deployed = load_deployed(str(tmp_path / 'out'))
    assert deployed.merge == model.merge and deployed.platt_shift.tolist() == [0.5, -0.5]
    batch = next(iter(val_loader(cfg)))
    with torch.no_grad():
        for threshold in (1, -1):
            found = []
            for one in (model, deployed):
                one.set_budget(threshold=threshold)
                found.append(one.test_step(copy.deepcopy(batch)))
            for one, two in zip(*found):
                assert same_detections(one.pred_instances, two.pred_instances)


@pytest.mark.parametrize('sees', ['detections', 'both'])
def test_a_router_that_sees_detections_is_deployed(calibrated, sees, tmp_path):
    """It runs behind exit 0's graph."""
    cfg, *_ = calibrated
    cfg = copy.deepcopy(cfg)
    cfg.model.router = dict(type='Router', sees=sees)
    model = randomize(MODELS.build(cfg.model), seed=3).eval()
    path = str(tmp_path / 'sees.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    deploy(cfg, path, str(tmp_path / 'out'))
    model, _ = load_detector(cfg, path)
    deployed = load_deployed(str(tmp_path / 'out'))
    batch = next(iter(val_loader(cfg)))
    with torch.no_grad():
        samples = [model.test_step(copy.deepcopy(batch)) for model in (model, deployed)]
    difficulties = [[sample.difficulty for sample in found] for found in samples]
    assert len(set(difficulties[0])) > 1
    assert np.allclose(*difficulties, atol=1e-4)
    for threshold in (1, -1):
        found = []
        for each in (model, deployed):
            each.set_budget(threshold=threshold)
            with torch.no_grad():
                found.append(each.test_step(copy.deepcopy(batch)))
        for wanted, got in zip(*found):
            assert same_detections(got.pred_instances, wanted.pred_instances)


@pytest.fixture(scope='module')
def timed(calibrated, tmp_path_factory):
    """A float32 folder, whose latencies were measured; its path and what was done."""
    out = str(tmp_path_factory.mktemp('timed') / 'float32')
    return out, deploy(*calibrated[:2], out, timed=val_loader(calibrated[0]).dataset)


def test_a_float_folder_has_its_own_latencies(timed):
    """Not torch's: what it can reach is taken, and what it cannot is refused."""
    out, about = timed
    facts = about['latencies']
    assert (facts['images'], facts['batch_size'], facts['runtime'], facts['threads']) == (
        6,
        1,
        'onnxruntime',
        THREADS,
    )
    assert 'cores' in facts['device']
    deployed = load_deployed(out)
    assert (
        deployed.latencies.tolist() == pytest.approx(facts['seconds'])
        and 0 < max(facts['seconds']) < 30
    )
    with pytest.warns(UserWarning) as said:
        deployed.set_budget(target_latency=30)
    assert ['every image takes the hard path' in str(one.message) for one in said] == [True]
    with pytest.raises(UsageError, match='cannot be met'):
        deployed.set_budget(target_latency=min(facts['seconds']) / 2)
    # As many are hard as before.
    before = torch.load(os.path.join(out, 'state.pth'), weights_only=True)
    assert len(before['difficulties']) == 9


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(threads=THREADS + 1), f'threads {THREADS}, and here it is threads {THREADS + 1}'),
        pytest.param(
            dict(runtime='openvino'),
            'runtime onnxruntime, and here it is runtime openvino',
            marks=pytest.mark.openvino,
        ),
    ],
)
def test_what_runs_a_folder_otherwise_than_it_was_measured_is_said(timed, settings, said):
    deployed = load_deployed(timed[0], **settings)
    # All hard; how long that takes is not the point.
    with pytest.warns(UserWarning, match=said):
        deployed.set_budget(target_latency=100)
    # Measured anew, there is nothing to say.
    put_latencies(deployed, [0.01, 0.03])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert deployed.set_budget(target_latency=0.02) == pytest.approx(0.5, abs=0.1)


def test_a_folder_without_images_to_measure_on_takes_no_budget_in_time(calibrated, tmp_path):
    """And a config's own budget in time, which torch could not meet, is no hindrance to the
    export."""
    cfg = copy.deepcopy(calibrated[0])
    cfg.model.budget = dict(target_latency=0.1)
    with pytest.raises(UsageError, match='cannot be met'):
        load_detector(cfg, calibrated[1])
    assert deploy(cfg, calibrated[1], str(tmp_path / 'out'))['latencies'] is None
    with pytest.raises(UsageError, match='tools/export.py'):
        load_deployed(str(tmp_path / 'out'))


def test_the_tool_serves_a_budget_in_time_by_what_it_measured(timed, tmp_path):
    """Another number of threads than the folder's: nothing is left to say but what was served."""
    done = run_tool(
        'test_deployed.py',
        timed[0],
        '--images',
        2,
        '--target-latency',
        20,
        '--threads',
        THREADS + 1,
        '--work-dir',
        tmp_path,
        '--out',
        tmp_path / 'f.json',
    )
    assert done.returncode == 0, done.stderr
    assert 'latencies: exit 0 ' in done.stdout
    assert f'onnxruntime, threads {THREADS + 1}, one image at a time' in done.stdout
    assert (
        'hard: 100.0% wanted, 100.0% served (6 of 6 images)' in done.stdout
        and '20000.0 ms wanted' in done.stdout
    )
    assert 'were measured with' not in done.stderr
    figures = json.loads((tmp_path / 'f.json').read_text())
    assert figures['metrics']['budget/milliseconds'] == pytest.approx(figures['milliseconds'][1])


def test_the_tool_refuses_a_budget_in_time_before_it_times(timed, tmp_path):
    """By the folder's latencies, where it runs as it did; under other threads they rule nothing
    out."""
    status = []
    for threads in (THREADS, THREADS + 1):
        target = ('--target-latency', 1e-6, '--threads', threads, '--images', 1)
        done = run_tool('test_deployed.py', timed[0], *target, '--work-dir', tmp_path)
        assert done.returncode == 2 and 'cannot be met' in done.stderr.splitlines()[-1]
        status.append(('latencies: exit 0 ' in done.stdout, 'of the folder' in done.stderr))
    assert status == [(False, True), (True, False)]


@pytest.mark.parametrize(
    'options, said',
    [
        ([], 'latencies: exit 0 '),
        (
            ['--cfg-options', 'val_dataloader.dataset.ann_file=gone.json'],
            'warning: latencies are not measured',
        ),
    ],
)
def test_the_tool_measures_what_it_exports_or_says_why_not(
    calibrated, options, said, tmp_path, monkeypatch, capfd
):
    cfg, path, _ = calibrated
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'export.py',
            *map(str, (tmp_path / 'config.py', path, '--out', tmp_path / 'out')),
            *options,
        ],
    )
    read, reader = [], building.read_checkpoint
    monkeypatch.setattr(building, 'read_checkpoint', lambda own: read.append(own) or reader(own))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'tools/export.py'), run_name='__main__')
    out, err = capfd.readouterr()
    assert not end.value.code and said in out + err
    assert read == [path]
    manifest = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    assert bool(options) == (manifest['latencies'] is None)
    # Nothing was looked at.
    assert not {'dtype', 'batch_size', 'images', 'ann_file'} & set(manifest['provenance'])
