"""What mmdet's hooks for the last epochs take for granted, said before a run and not in its last
epochs."""

from collections.abc import Mapping

from ..errors import UsageError


def check_switches(cfg: Mapping) -> list[str]:
    """Look whether the hooks that change the pipeline fit the model, the data and the schedule of a
    config.

    Args:
        cfg (Config): mmengine's config of a training.

    Returns:
        list[str]: Warnings, a line each.

    Raises:
        UsageError: If one would stop the run, or change nothing.
    """
    lines = []
    for hook in cfg.get('custom_hooks') or ():
        kind = _name(hook)
        if kind == 'YOLOXModeSwitchHook':
            _check_mode_switch(cfg)
        elif kind == 'PipelineSwitchHook':
            lines += _check_pipeline_switch(cfg, hook)
    return lines


def _check_mode_switch(cfg: Mapping) -> None:
    if _name(cfg.model) == 'DynamicDetector':
        raise UsageError(
            'YOLOXModeSwitchHook in custom_hooks looks for one head, and a DynamicDetector has '
            'several: name BranchModeSwitchHook instead, with the same settings'
        )
    if _name(cfg.train_dataloader.dataset) != 'MultiImageMixDataset':
        raise UsageError(
            'YOLOXModeSwitchHook in custom_hooks ends the mosaic of a MultiImageMixDataset, and '
            f'the training data are a {_name(cfg.train_dataloader.dataset)}: take the hook out'
        )


def _check_pipeline_switch(cfg: Mapping, hook: Mapping) -> list[str]:
    dataset = cfg.train_dataloader.dataset
    if 'dataset' in dataset and _name(dataset) != 'HoldOut' or 'datasets' in dataset:
        raise UsageError(
            f'PipelineSwitchHook in custom_hooks would change nothing: a {_name(dataset)} has no '
            'pipeline to replace, but the data sets in it have; take the hook out'
        )
    epochs = cfg.train_cfg.get('max_epochs')
    if epochs is None:
        return [
            'PipelineSwitchHook counts epochs, which a run of iterations has not: the first '
            'pipeline stays'
        ]
    if hook['switch_epoch'] >= epochs:
        return [
            f'PipelineSwitchHook switches after {hook["switch_epoch"]} epochs, and this run has '
            f'{epochs}: the first pipeline stays; set switch_epoch in custom_hooks'
        ]
    return []


def _name(settings: Mapping) -> str:
    """Of a type, which a config gives as a name, also with a scope, or as a class."""
    kind = settings.get('type')
    return getattr(kind, '__name__', str(kind)).split('.')[-1]
