"""`dynamicdet.configs`: step 2 of a user's own step 1, lists changed by the type of their items."""

import pytest
from mmengine.config import Config

from conftest import ROOT
from dynamicdet.configs import by_type, router_step

ROUTER = """_base_ = '{base}'
from dynamicdet.configs import router_step
globals().update(router_step(_base_{arguments}))
"""


def written(folder, base='./my_dy.py', own='', arguments='', name='my_router.py'):
    """A user's config of step 2, on a user's config of step 1, on a shipped one; all read."""
    (folder / 'my_dy.py').write_text(f"_base_ = '{ROOT}/configs/dy_faster_rcnn.py'\n{own}")
    (folder / name).write_text(ROUTER.format(base=base, arguments=arguments))
    return Config.fromfile(folder / name)


def test_step_2_of_a_users_step_1(tmp_path):
    own = (
        'train_dataloader = dict(batch_size=4)\nrouter_step = dict(train_cfg=dict(max_epochs=5))\n'
    )
    cfg = written(tmp_path, own=own)
    assert cfg.custom_hooks[-1] == dict(type='RouterHook', cascade='work_dirs/my_dy')
    assert cfg.model.train_router and 'objective' not in cfg.model
    assert cfg.optim_wrapper.accumulative_counts == 2 and cfg.train_dataloader.batch_size == 4
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=5, val_interval=1)
    shipped = Config.fromfile(ROOT / 'configs/dy_faster_rcnn_router.py')
    assert cfg.optim_wrapper.optimizer == shipped.optim_wrapper.optimizer


def test_what_the_function_is_told(tmp_path):
    cfg = written(tmp_path, arguments=", objective='ap', cascade='runs/a'")
    assert cfg.model.objective == 'ap' and cfg.custom_hooks[-1].cascade == 'runs/a'
    # Called by no config.
    assert router_step(Config.fromfile(tmp_path / 'my_dy.py'))['custom_hooks'][-1].cascade is None


def test_a_dump_is_the_same_config(tmp_path):
    cfg = written(tmp_path)
    cfg.dump(tmp_path / 'dumped.py')
    again = Config.fromfile(tmp_path / 'dumped.py')
    assert again.to_dict() == cfg.to_dict()
    assert not any(callable(value) for value in again.values())


def test_a_users_config_on_a_shipped_step_2(tmp_path):
    (tmp_path / 'child.py').write_text(
        f"_base_ = '{ROOT}/configs/dy_yolox_s_router.py'\ntrain_cfg = dict(max_epochs=3)\n"
    )
    cfg = Config.fromfile(tmp_path / 'child.py')
    shipped = Config.fromfile(ROOT / 'configs/dy_yolox_s_router.py')
    assert cfg.train_cfg.pop('max_epochs') == 3 and shipped.train_cfg.pop('max_epochs') == 2
    assert cfg.to_dict() == shipped.to_dict()
    # As --cfg-options does.
    cfg.merge_from_dict({f'custom_hooks.{len(cfg.custom_hooks) - 1}.cascade': 'elsewhere'})
    assert cfg.custom_hooks[-1].cascade == 'elsewhere'


def test_a_users_hooks_stay_and_those_of_step_1_go(tmp_path):
    own = (
        "custom_hooks = _base_.custom_hooks + [dict(type='EMAHook'), dict(type='EmptyCacheHook')]\n"
    )
    kinds = [hook.type for hook in written(tmp_path, own=own).custom_hooks]
    assert kinds[-3:] == ['ValidationExitsHook', 'EmptyCacheHook', 'RouterHook']
    assert 'EMAHook' not in kinds


@pytest.mark.parametrize('switch', [False, True])
def test_mosaics_are_left_out_however_deep_they_are(tmp_path, switch):
    hook = "dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=[dict(type='Flip')])"
    own = f"""train_dataloader = dict(batch_size=16, dataset=dict(
    _delete_=True, type='RepeatDataset', times=2, dataset=dict(type='CocoDataset', pipeline=[
        dict(type='CachedMosaic', img_scale=(320, 320))])))
custom_hooks = _base_.custom_hooks + [{hook if switch else ''}]
"""
    cfg = written(tmp_path, own=own)
    assert cfg.train_dataloader.batch_size == 8 and cfg.auto_scale_lr.base_batch_size == 64
    pipeline = cfg.train_dataloader.dataset.dataset.pipeline
    assert cfg.train_dataloader.dataset.times == 2
    if switch:
        assert pipeline == [dict(type='Flip')]
    else:
        assert [step.scale for step in pipeline if step.type == 'Resize'] == [(320, 320)]


def test_items_change_by_type():
    items = [dict(type='A', x=1), dict(type='B', x=1), dict(type='A', y=2)]
    assert by_type(items, A=dict(x=3)) == [
        dict(type='A', x=3),
        dict(type='B', x=1),
        dict(type='A', x=3, y=2),
    ]
    assert items[0] == dict(type='A', x=1)
    with pytest.raises(KeyError, match='no item is of type C'):
        by_type(items, C=dict(x=3))
