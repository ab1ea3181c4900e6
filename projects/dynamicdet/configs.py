"""What configs call. ``_base_`` stands above the import: otherwise mmengine takes the file for one
of its lazy configs.

    _base_ = './dy_yolox_s.py'
    from dynamicdet.configs import router_step
    globals().update(router_step(_base_))
"""

import ast
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.hub import get_config

#: Hooks of step 1 alone: they average, switch or synchronize what step 2 does not train.
_STEP_1_HOOKS = (
    'BranchModeSwitchHook',
    'EMAHook',
    'PipelineSwitchHook',
    'SyncNormHook',
    'YOLOXModeSwitchHook',
)


def router_step(
    step_1: dict, objective: str | dict | None = None, cascade: str | None = None
) -> dict:
    """Step 2 of a cascade: fields of its config, over those of step 1's.

    The schedule is that of the paper's authors (arXiv 2304.05552): AdamW, lr 1e-5 constant after
    1000 warm-up iterations, weight decay 0.005 on weights, 2 epochs, 64 images per update.

    Step 1 decides the rest. 8 GPUs take its batches, of 8 images at most, and accumulate them to
    64. Its hooks stay, without those of `_STEP_1_HOOKS`. Where it mixes training images, step 2
    takes the pipeline of its ``PipelineSwitchHook``, or else YOLOX's without mosaic and mixup.

    Args:
        step_1 (dict): Step 1's config, ``_base_``. A field ``router_step`` of it is merged over the
            result: ``router_step = dict(train_cfg=dict(max_epochs=4))``.
        objective (str or dict, optional): What the router learns, ``model.objective``. Defaults to
            None: as in step 1's config.
        cascade (str, optional): Work dir of step 1, `RouterHook`'s. Defaults to None:
            ``work_dirs/X``, where the config that calls has ``X.py`` as its (first) base.

    Returns:
        dict: Fields, for ``globals().update(...)``.
    """
    if cascade is None:
        # mmengine compiles a config under the name of its file.
        name = _first_base(inspect.currentframe().f_back.f_code.co_filename)
        cascade = name and f'work_dirs/{name}'
    model = dict(train_router=True)
    if objective is not None:
        model['objective'] = objective
    batch_size = min(8, step_1['train_dataloader']['batch_size'])
    hooks = step_1.get('custom_hooks') or []
    step_2 = dict(
        model=model,
        train_dataloader=dict(batch_size=batch_size),
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2, val_interval=1),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)
        ],
        optim_wrapper=dict(
            _delete_=True,
            type='OptimWrapper',
            accumulative_counts=max(1, round(64 / (8 * batch_size))),
            optimizer=dict(type='AdamW', lr=1e-5, betas=(0.937, 0.999), weight_decay=0.005),
            # Heads such as RTMDet's hold a parameter more than once.
            paramwise_cfg=dict(bias_decay_mult=0.0, bypass_duplicate=True),
        ),
        default_hooks=dict(checkpoint=dict(interval=1)),
        custom_hooks=[hook for hook in hooks if hook['type'] not in _STEP_1_HOOKS]
        + [dict(type='RouterHook', cascade=cascade)],
    )
    unmixed = _unmixed(step_1['train_dataloader']['dataset'], hooks)
    if unmixed:
        step_2['train_dataloader']['dataset'] = unmixed
    if 'auto_scale_lr' in step_1:
        step_2['auto_scale_lr'] = dict(base_batch_size=8 * batch_size)
    merged = Config(step_2)
    merged.merge_from_dict(step_1.get('router_step', {}))
    return dict(merged.items())


def _first_base(config: str) -> str | None:
    """The name of a config's base, or of the first of them."""
    if not Path(config).is_file():
        return None
    for node in ast.parse(Path(config).read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) == '_base_':
            bases = ast.literal_eval(node.value)
            return Path(bases if isinstance(bases, str) else bases[0]).stem
    return None


def _unmixed(dataset: dict, hooks: list[dict]) -> dict | None:
    """What changes in a data set's config so that it gives single images; None if it does."""
    mosaic = next((step for step in dataset.get('pipeline', ()) if 'Mosaic' in step['type']), None)
    if mosaic is None:
        inner = _unmixed(dataset['dataset'], hooks) if 'dataset' in dataset else None
        return inner and dict(dataset=inner)
    for hook in hooks:
        if hook['type'] == 'PipelineSwitchHook':
            return dict(pipeline=hook['switch_pipeline'])
    return dict(
        pipeline=[
            # Scale and translation as released by the paper's authors.
            dict(
                type='RandomAffine',
                max_rotate_degree=0,
                max_translate_ratio=0.2,
                scaling_ratio_range=(0.1, 1.9),
                max_shear_degree=0,
            ),
            dict(type='YOLOXHSVRandomAug'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='Resize', scale=mosaic['img_scale'], keep_ratio=True),
            dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
            dict(type='PackDetInputs'),
        ]
    )


def model_of(config: str) -> dict:
    """The model of another config, such as that of a pair's second detector.

    Args:
        config (str): Path, ``mmdet::PATH`` of one of MMDetection's, or a path from the file of the
            config that calls on.
    """
    if '::' in config:
        return get_config(config).model
    folder = Path(inspect.currentframe().f_back.f_code.co_filename).parent
    return Config.fromfile(folder / config).model


def by_type(items: list[dict], **changes: dict) -> list[dict]:
    """Transforms or hooks, some changed: ``by_type(pipeline, RandomFlip=dict(prob=0.2))``.

    Args:
        items (list[dict]): Of another config.
        changes (dict): New fields, by the type of the items that they are for.

    Raises:
        KeyError: If no item is of that type.
    """
    missing = changes.keys() - {item['type'] for item in items}
    if missing:
        raise KeyError(f'no item is of type {", ".join(sorted(missing))}')
    return [dict(item, **changes.get(item['type'], {})) for item in items]


def full_size(pipeline: Sequence[Mapping], divisor: int = 32) -> list[dict]:
    """A test pipeline that delivers images as large as they are, for detectors with regions.

    Args:
        pipeline (Sequence[Mapping]): Of mmdet's kind; it stays as it is.
        divisor (int): Where it pads, images are padded to multiples of this. Defaults to 32.

    Returns:
        list[dict]: The same steps: those that resize leave the size, which heads want to know of.
    """
    steps = []
    for step in map(dict, pipeline):
        kind = str(step['type']).rsplit('.', 1)[-1]
        if 'Resize' in kind:
            step = dict(type='mmdet.Resize', scale_factor=1.0, keep_ratio=True)
        elif kind == 'Pad':
            step = {
                name: value for name, value in step.items() if name not in ('size', 'pad_to_square')
            }
            step['size_divisor'] = divisor
        steps.append(step)
    return steps
