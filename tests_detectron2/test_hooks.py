"""Hooks that compress while training: quantization; resumed to the bit; on two processes."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.env import seed_all_rng
from test_package import tool
from test_training import CONFIG, LAZY, config, weights_of

from conftest import annotations, build, images, tensors_of, wake
from dynamicdet.errors import UsageError
from dynamicdet_detectron2 import QuantizationHook, lazy_training
from dynamicdet_detectron2.checkpointer import DynamicCheckpointer
from dynamicdet_detectron2.measuring import at_exit
from dynamicdet_detectron2.parts import find_parts
from dynamicdet_detectron2.quantization_hook import round_by_checkpoint
from dynamicdet_detectron2.trainer import DynamicTrainer, quantization_of

BLOCK = dict(name='nets', modules=['backbone.first', 'backbone.second'], target=0.5)
PRUNING = ('SOLVER.PRUNING.BLOCKS', [BLOCK], 'SOLVER.PRUNING.START', 3)
QUANTIZATION = ('SOLVER.QUANTIZATION.ENABLED', True, 'SOLVER.QUANTIZATION.START', 1)
LEARNED = (*QUANTIZATION, 'SOLVER.QUANTIZATION.RANGES', 'learned')
KINDS = ['faster', 'mask', 'cascade', 'keypoint', 'retinanet', 'fcos', 'panoptic']


def run(cfg, resume=False):
    seed_all_rng(0)
    trainer = DynamicTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dynamic', [True, False])
def test_parts_are_all_that_has_weights(kind, dynamic):
    model = build(kind, dynamic).eval()
    if dynamic:
        wake(model)
    forcing = at_exit(model, 1) if dynamic else torch.no_grad()
    with torch.no_grad(), forcing:
        wanted = model(images())
    seen, parts = set(), find_parts(model)
    for part in parts:
        part.place(lambda *inputs, part=part: (seen.add(part.name), part.run(*inputs))[1])
    forcing = at_exit(model, 1) if dynamic else torch.no_grad()
    with torch.no_grad(), forcing:
        results = model(images())
    assert seen == {part.name for part in parts}
    for result, before in zip(results, wanted):
        for name, values in tensors_of(before).items():
            assert torch.equal(tensors_of(result)[name], values)
    inside = {id(p) for part in parts for m in part.modules for p in m.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) not in inside} == set()


@pytest.mark.parametrize('kind', ['faster', 'retinanet', 'panoptic'])
def test_eight_bits_are_near_and_norms_are_folded(kind):
    model = build(kind).eval()
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    with torch.no_grad(), at_exit(model, 1):
        wanted = model(images())
    hook = QuantizationHook()
    hook.install(model)
    hook.training.begin_step(0)
    with torch.no_grad(), at_exit(model, 1):
        model(images())
        hook.training.rest()
        rounded = model(images())
    plans = [plan for part in hook.training.simulations.values() for plan in part._plans.values()]
    layers = [layer for plan in plans for layer in plan.layers.values()]
    assert any(isinstance(layer.norm, FrozenBatchNorm2d) for layer in layers)
    changed = False
    for result, before in zip(rounded, wanted):
        for name, values in tensors_of(before).items():
            other = tensors_of(result)[name]
            changed |= other.shape != values.shape or not torch.equal(other, values)
    assert changed
    # With gradients the calls are the same: a plan made without them fits.
    model.train()
    hook.training.begin_step(1)
    batch = [{**one, **annotations(*one['image'].shape[-2:])} for one in images()[:1]]
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        sum(value for value in model(batch).values()).backward()
    hook.remove()
    model.eval()
    with torch.no_grad(), at_exit(model, 1):
        after = model(images())
    for result, before in zip(after, wanted):
        for name, values in tensors_of(before).items():
            torch.testing.assert_close(tensors_of(result)[name], values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('options', [QUANTIZATION, LEARNED, PRUNING], ids=['run', 'learn', 'prune'])
def test_a_killed_run_ends_bit_equal(options, data, tmp_path):
    options = (*options, 'SOLVER.EXACT_RESUME', True, 'SEED', 3)
    run(config(tmp_path / 'whole', *options))
    short = tmp_path / 'stopped'
    # What a run that was killed after its second iteration leaves.
    run(config(short, *options))
    (short / 'last_checkpoint').write_text('model_0000001.pth')
    (short / 'model_final.pth').unlink()
    trainer = run(config(short, *options), resume=True)
    assert trainer.start_iter == 2
    whole, again = (weights_of(path / 'model_final.pth') for path in (tmp_path / 'whole', short))
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert torch.equal(value.nan_to_num(), again[key].nan_to_num()), key
    states = [
        torch.load(path / 'model_final.pth', weights_only=True)['trainer']['hooks']
        for path in (tmp_path / 'whole', short)
    ]
    for name, state in states[0].get('QuantizationHook', dict(ranges={}))['ranges'].items():
        assert torch.equal(state, states[1]['QuantizationHook']['ranges'][name])


def test_a_trained_detector_is_tested_in_eight_bits(data, tmp_path):
    cfg = config(tmp_path, *QUANTIZATION)
    trainer = run(cfg)
    model = trainer.model.eval()
    with torch.no_grad(), at_exit(model, 1):
        wanted = model(images())
    fresh = DynamicTrainer.build_model(cfg)
    checkpoint = DynamicCheckpointer(fresh).load(str(tmp_path / 'model_final.pth'))
    fresh.eval()
    with torch.no_grad(), at_exit(fresh, 1):
        floating = fresh(images())
    round_by_checkpoint(fresh, checkpoint, quantization_of(cfg))
    with torch.no_grad(), at_exit(fresh, 1):
        results = fresh(images())
    scores = [torch.cat([r['instances'].scores for r in rs]) for rs in (wanted, results, floating)]
    assert torch.equal(scores[0], scores[1])
    assert scores[0].shape != scores[2].shape or not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize(
    'extra',
    [
        "removal = dict(blocks=[dict(name='m', modules=['branches.*.mask_head'], target=0.5)],"
        ' round_to=2)',
        'quantization = dict(start=1)',
    ],
    ids=['removal', 'quantization'],
)
def test_hooks_by_lazy_config(extra, data, tmp_path):
    path, out = tmp_path / 'config.py', tmp_path / 'out'
    lines = LAZY.replace('OUT', str(out)) + extra
    path.write_text(lines + '\ntrain.update(exact_resume=True, seed=1)\n')
    out.mkdir()
    seed_all_rng(1)
    cfg = lazy_training.load_config(str(path))
    lazy_training.train(cfg)
    saved = torch.load(out / 'model_final.pth', weights_only=True)
    if 'removal' in extra:
        assert saved['model']['branches.0.roi_heads.mask_head.mask_fcn1.weight'].shape[0] == 4
    else:
        assert saved['trainer']['hooks']['QuantizationHook']['ranges']
    cfg.train.init_checkpoint = str(out / 'model_final.pth')
    lazy_training.load_model(cfg)


def test_quantization_that_cannot_be(data, tmp_path):
    for wrong, said in (
        (('NOISE', 0.0), 'no share of the weights'),
        (('RANGES', 'guessed'), "'running' or 'learned'"),
        (('START', 9), 'rounding begins after 9 iterations, but the run has 4'),
    ):
        options = (*QUANTIZATION, f'SOLVER.QUANTIZATION.{wrong[0]}', wrong[1])
        with pytest.raises(UsageError, match=said):
            run(config(tmp_path, *options))
    with pytest.raises(UsageError, match='an exact resume takes a seed'):
        DynamicTrainer(config(tmp_path, 'SOLVER.EXACT_RESUME', True, 'SEED', -1))


def _train_rank(folder, options, step, weights):
    """One of two processes: train, and leave what it has."""
    import os

    torch.set_num_threads(1)
    from detectron2.utils import comm

    rank = comm.get_rank()
    seed_all_rng(rank)
    _register(os.environ['TINY'])
    cfg = config(folder, *options, step=step, weights=weights)
    trainer = DynamicTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    model = trainer.model.module
    hooks = {type(hook).__name__: hook.state_dict() for hook in trainer._hooks}
    torch.save(dict(model=model.state_dict(), hooks=hooks), f'{folder}/rank{rank}.pth')


def _register(root):
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    if 'tiny_train' not in DatasetCatalog.list():
        for split in ('train', 'val', 'test'):
            register_coco_instances(
                f'tiny_{split}',
                dict(thing_classes=list('0123456789')),
                f'{root}/annotations/instances_{split}.json',
                f'{root}/{split}',
            )


def on_two(monkeypatch, root, folder, options=(), step=None, weights=None):
    from dynamicdet_detectron2.launching import launch

    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv('TINY', str(root))
    launch(_train_rank, 2, args=(folder, options, step, weights))
    return [torch.load(folder / f'rank{rank}.pth', weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize('options', [QUANTIZATION, LEARNED, PRUNING], ids=['run', 'learn', 'prune'])
def test_two_processes_agree(options, data, tmp_path, monkeypatch):
    first, second = on_two(monkeypatch, data, tmp_path, options)
    trained = {key for key in first['model'] if not key.endswith(('running_mean', 'running_var'))}
    # Norms of the backbones learn from what each process saw: Detectron2 leaves them apart.
    for key in trained:
        if 'num_batches' not in key:
            a, b = first['model'][key], second['model'][key]
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), key
    for name in ('QuantizationHook', 'PruningHook'):
        if name in first['hooks']:
            assert first['hooks'][name].keys() == second['hooks'][name].keys()
            parts = [
                state['hooks'][name].get('ranges', state['hooks'][name].get('masks'))
                for state in (first, second)
            ]
            assert parts[0].keys() == parts[1].keys() and parts[0]
            for key, value in parts[0].items():
                other = parts[1][key]
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other) and value.isfinite().all()
                else:
                    assert str(value) == str(other)


@pytest.mark.parametrize('delta', ['exact', 'online'])
def test_two_processes_agree_on_the_router(delta, data, tmp_path, monkeypatch):
    run(config(tmp_path))
    weights = str(tmp_path / 'model_final.pth')
    options = ('SOLVER.ROUTER.DELTA', delta)
    first, second = on_two(monkeypatch, data, tmp_path, options, 'router', weights)
    before = weights_of(weights)
    for key, value in first['model'].items():
        assert torch.equal(value.nan_to_num(), second['model'][key].nan_to_num()), key
        if not key.startswith('router.') and key != 'delta' and value.shape == before[key].shape:
            assert torch.equal(value.nan_to_num(), before[key].nan_to_num()), key
    assert first['model']['delta'].isfinite()
    gains = [state['hooks']['RouterHook']['gains'] for state in (first, second)]
    assert gains[0] == gains[1]


def test_a_mistake_in_a_process_is_one_line(tmp_path):
    code, _, error = tool(
        'train_net', '--config-file', CONFIG, '--step', 'router', '--num-gpus', 2,
        'OUTPUT_DIR', tmp_path, 'MODEL.DEVICE', 'cpu',
    )  # fmt: skip
    lines = [line for line in error.splitlines() if 'error' in line.lower() or 'Trace' in line]
    assert code == 2 and len(lines) == 1, error
    assert lines[0].startswith("error: step 2 starts from step 1's result")
