"""Both steps on the built-in data, by yaml and by LazyConfig; resumed; calibrated; reported."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from test_package import tool

from conftest import ROOT, wake
from dynamicdet.errors import UsageError
from dynamicdet.routing.record import read_record
from dynamicdet_detectron2 import DynamicCheckpointer, lazy, lazy_training
from dynamicdet_detectron2.building import load_model, read_config
from dynamicdet_detectron2.config import set_config_budget, take_router_step
from dynamicdet_detectron2.data import every_test_image, register_digits
from dynamicdet_detectron2.trainer import DynamicTrainer

CONFIG = str(ROOT / 'configs/detectron2/dy_faster_rcnn_R_18_digits.yaml')
OPTIONS = """
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 SOLVER.CHECKPOINT_PERIOD 2
    SOLVER.ROUTER.MAX_ITER 4 SOLVER.ROUTER.IMS_PER_BATCH 2 SOLVER.ROUTER.TRAIN ('tiny_train',)
    MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.FPN.OUT_CHANNELS 16
    MODEL.ROI_BOX_HEAD.FC_DIM 16 DATASETS.TRAIN ('tiny_train',) DATASETS.TEST ('tiny_test',)
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 5
""".split()


def config(folder, *options, step=None, weights=None, **budget):
    cfg = read_config(CONFIG, [*OPTIONS, 'OUTPUT_DIR', str(folder), *options])
    cfg.defrost()
    set_config_budget(cfg, **budget)
    if step == 'router':
        take_router_step(cfg, weights)
    cfg.freeze()
    (folder / 'router').mkdir(parents=True, exist_ok=True)
    return cfg


def train(cfg, resume=False):
    trainer = DynamicTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights_of(path):
    return torch.load(path, weights_only=True)['model']


def test_step_2_changes_nothing_but_the_router(trained):
    first = weights_of(trained / 'model_final.pth')
    second = weights_of(trained / 'router/model_final.pth')
    changed = {
        key
        for key, value in second.items()
        if value.shape != first[key].shape
        or not torch.allclose(value.float(), first[key].float(), 0, 0, equal_nan=True)
    }
    assert {'router.mean', 'router.fc1.weight', 'delta'} <= changed
    assert all(key.startswith('router.') or key == 'delta' for key in changed)
    assert second['delta'].isfinite()
    log = [json.loads(line) for line in (trained / 'router/metrics.json').read_text().splitlines()]
    # Detectron2 calls a loss that is the only one so.
    assert {'total_loss', 'router/difficulty', 'router/delta'} <= {*log[-1], *log[-2]}


def test_a_resumed_step_2_is_the_same_run(trained, tmp_path):
    # Stopped after two iterations of four, and gone on.
    start = str(trained / 'model_final.pth')
    short = ('SOLVER.ROUTER.MAX_ITER', 2)
    train(config(tmp_path, *short, step='router', weights=start))
    trainer = DynamicTrainer(config(tmp_path, step='router', weights=start))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    model = trainer.model
    gains, delta, mean = model.gains.clone(), model.delta.clone(), model.router.mean.clone()
    assert gains.isfinite().all()
    trainer.train()
    assert torch.equal(model.gains, gains) and torch.equal(model.delta, delta)
    assert torch.equal(model.router.mean, mean)
    whole = weights_of(trained / 'router/model_final.pth')
    for key in ('delta', 'router.mean', 'router.std'):
        assert torch.equal(whole[key], weights_of(tmp_path / 'router/model_final.pth')[key])


def test_an_online_delta(trained, tmp_path):
    start = str(trained / 'model_final.pth')
    cfg = config(tmp_path, 'SOLVER.ROUTER.DELTA', 'online', step='router', weights=start)
    trainer = train(cfg)
    assert trainer.model.delta.isfinite() and len(trainer._hooks[0].window) == 8


def test_step_2_refuses_what_is_no_cascade(data, tmp_path):
    model = build_model(config(tmp_path))
    plain = dict(model=model.as_plain())
    torch.save(plain, tmp_path / 'plain.pth')
    cfg = config(tmp_path, step='router', weights=str(tmp_path / 'plain.pth'))
    trainer = DynamicTrainer(cfg)
    with pytest.raises(UsageError, match='none was loaded: run step 1 first'):
        trainer.resume_or_load()


def test_evaluating_at_a_hard_share(trained, tmp_path):
    path = str(trained / 'router/model_final.pth')
    calibrated = tmp_path / 'calibrated.pth'
    options = [*OPTIONS, 'OUTPUT_DIR', str(tmp_path)]
    cfg, model = load_model(CONFIG, path, options)
    from dynamicdet.progress import progress
    from dynamicdet_detectron2.measuring import calibrate

    facts = calibrate(model, every_test_image(cfg, 'tiny_test'), progress, 0.5)
    assert facts['images'] == 6 and 0 < facts['g0'] < facts['g1'] and 0 < facts['lat1']
    DynamicCheckpointer(model, str(tmp_path)).save('calibrated')
    for budget, share in ((dict(hard_share=0.5), 50), (dict(threshold=-1.0), 100)):
        cfg = config(tmp_path, **budget)
        detector = DynamicTrainer.build_model(cfg)
        DynamicCheckpointer(detector).load(str(calibrated))
        results = DynamicTrainer.test(cfg, detector)
        assert results['exits']['exit 1'] == pytest.approx(share)
        assert results['exits']['exit 0'] == pytest.approx(100 - share)
        assert 'AP' in results['bbox'] and 0 <= results['exits']['difficulty'] <= 1


def test_a_report(trained, tmp_path):
    from dynamicdet.progress import progress
    from dynamicdet.reports.routing_analysis import analyze_routing, two_exit_record
    from dynamicdet.routing.evaluation import read_truth
    from dynamicdet.routing.record import write_record
    from dynamicdet_detectron2.measuring import known_record, record_exits

    path = str(trained / 'router/model_final.pth')
    cfg, model = load_model(CONFIG, path, [*OPTIONS, 'OUTPUT_DIR', str(tmp_path)])
    batches = every_test_image(cfg, 'tiny_test', annotated=True)
    record = record_exits(model, batches, 'tiny_test', progress, path, CONFIG)
    write_record(record, tmp_path / 'record.npz')
    again = known_record(tmp_path / 'record.npz', model, 'tiny_test')
    assert len(again) == 6 and again.exits == 2 and again.losses.shape == (6, 2)
    assert known_record(tmp_path / 'record.npz', model, 'tiny_val') is None
    wake(model)
    assert known_record(tmp_path / 'record.npz', model, 'tiny_test') is None
    truth = read_truth(again.provenance['ann_file'], again.provenance['categories'])
    analysis = analyze_routing(
        two_exit_record(read_record(tmp_path / 'record.npz')), truth, bootstrap=5
    )
    assert len(analysis['curves']['router']) > 2


LAZY = """
from detectron2 import model_zoo
from detectron2.layers import ShapeSpec
from dynamicdet_detectron2 import make_dynamic
_zoo = model_zoo.get_config('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py')
dataloader, optimizer, lr_multiplier, train = (
    _zoo[name] for name in ('dataloader', 'optimizer', 'lr_multiplier', 'train'))
model = make_dynamic(_zoo.model, reuse_stages=0)
stock = model.detector.stock
stock.backbone.bottom_up.stages = dict(
    _target_=stock.backbone.bottom_up.stages._target_, depth=18, norm='FrozenBN')
stock.backbone.out_channels = 16
stock.proposal_generator.head.in_channels = 16
stock.proposal_generator.post_nms_topk = (20, 10)
stock.roi_heads.num_classes = 10
stock.roi_heads.box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
stock.roi_heads.box_head.fc_dims = [16]
stock.roi_heads.box_predictor.input_shape = ShapeSpec(channels=16)
stock.roi_heads.mask_head.input_shape = ShapeSpec(channels=16, height=14, width=14)
stock.roi_heads.mask_head.conv_dims = [8, 8]
dataloader.train.dataset.names = dataloader.test.dataset.names = 'tiny_train'
dataloader.train.mapper.augmentations = dataloader.test.mapper.augmentations = []
dataloader.train.mapper.instance_mask_format = 'bitmask'
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.evaluator.dataset_name = 'tiny_train'
dataloader.evaluator.use_fast_impl = False
optimizer.lr = 1e-4
train.update(device='cpu', max_iter=2, init_checkpoint='', output_dir='OUT', eval_period=0)
train.checkpointer.period = 1
router = dict(max_iter=2, lr=1e-3)
"""


def test_both_steps_by_lazy_config(data, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(LAZY.replace('OUT', str(tmp_path / 'out')))

    def load(step=None):
        cfg = lazy_training.load_config(str(path))
        if step:
            lazy.take_router_step(cfg)
        for folder in ('out', 'out/router'):
            (tmp_path / folder).mkdir(exist_ok=True)
        return cfg

    with pytest.raises(UsageError, match='run step 1 first'):
        load('router')
    lazy_training.train(load())
    cfg = load('router')
    lazy_training.train(cfg)
    first, second = (
        weights_of(tmp_path / f'out/{folder}model_final.pth') for folder in ('', 'router/')
    )
    changed = {
        key
        for key in first
        if first[key].shape == second[key].shape
        and not torch.allclose(first[key].float(), second[key].float(), 0, 0, equal_nan=True)
    }
    assert changed and all(key.startswith('router.') or key == 'delta' for key in changed)
    cfg.model.train_router = False
    cfg.train.init_checkpoint = str(tmp_path / 'out/router/model_final.pth')
    lazy.set_config_budget(cfg, threshold=1.0)
    results = lazy_training.test(cfg, lazy_training.load_model(cfg).eval())
    assert results['exits']['exit 0'] == 100 and 'segm' in results


def test_lazy_configs_of_plain_detectors(data, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(LAZY.partition('model = make')[0] + 'model = _zoo.model')
    with pytest.raises(UsageError, match='no dynamic detector: write model = make_dynamic'):
        lazy.take_router_step(lazy_training.load_config(str(path)))


def test_the_built_in_data_are_registered():
    register_digits()
    register_digits()
    assert MetadataCatalog.get('digits_val').thing_classes == list('0123456789')
    if not (ROOT / 'data/digits').exists():
        with pytest.raises(UsageError, match='make it by tools/make_digits.py'):
            DatasetCatalog.get('digits_val')


def test_the_command_line(trained, tmp_path):
    code, _, error = tool(
        'train_net', '--config-file', CONFIG, '--step', 'router', '--num-gpus', 1,
        'OUTPUT_DIR', tmp_path,
    )  # fmt: skip
    assert code == 2
    assert error.strip().splitlines()[-1].startswith("error: step 2 starts from step 1's result")


def zeros(state, prefix='backbone.'):
    """Share of zeros in convolutions."""
    kept = [
        value
        for key, value in state.items()
        if key.startswith(prefix) and value.ndim == 4 and 'connections' not in key
    ]
    return sum((value == 0).sum() for value in kept) / sum(value.numel() for value in kept)


@pytest.mark.parametrize('score', ['magnitude', 'activation', 'gradient'])
def test_pruning_while_training_and_resumed(score, data, tmp_path):
    block = dict(
        name='nets', modules=['backbone.first', 'backbone.second'], target=0.5, score=score
    )
    options = ('SOLVER.PRUNING.BLOCKS', [block], 'SOLVER.PRUNING.SCHEDULE', 'iterative')
    options += ('SOLVER.PRUNING.START', 1, 'SOLVER.PRUNING.END', 3)
    train(config(tmp_path, *options))
    whole = weights_of(tmp_path / 'model_final.pth')
    assert zeros(whole) == pytest.approx(0.5, abs=0.01)
    # Stopped after two iterations.
    half = weights_of(tmp_path / 'model_0000001.pth')
    assert 0.2 < zeros(half) < 0.45
    (tmp_path / 'last_checkpoint').write_text('model_0000001.pth')
    trainer = train(config(tmp_path, *options), resume=True)
    again = weights_of(tmp_path / 'model_final.pth')
    assert trainer.start_iter == 2 and zeros(again) == pytest.approx(0.5, abs=0.01)
    # What was pruned stays so.
    for key, value in half.items():
        if key.endswith('weight') and value.ndim == 4 and 'connections' not in key:
            assert (again[key][value == 0] == 0).all()


def test_pruning_that_cannot_be(trained, tmp_path):
    block = dict(name='nets', modules=['backbone'], target=0.5)
    options = ('SOLVER.PRUNING.BLOCKS', [block])
    start = str(trained / 'model_final.pth')
    trainer = DynamicTrainer(config(tmp_path, *options, step='router', weights=start))
    with pytest.raises(UsageError, match='trains a router alone'):
        trainer._hooks[0].before_train()
    trainer = DynamicTrainer(config(tmp_path, *options, 'SOLVER.PRUNING.START', 9))
    with pytest.raises(UsageError, match='the target would not be reached'):
        trainer._hooks[0].before_train()
    wrong = ('SOLVER.PRUNING.BLOCKS', [dict(block, share=0.5)])
    with pytest.raises(UsageError, match='unknown or missing in a block: share'):
        DynamicTrainer(config(tmp_path, *wrong))
