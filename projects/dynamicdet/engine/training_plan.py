"""What a training is about to do, in lines, before it does any of it."""

from collections.abc import Iterator, Mapping

from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..annotations import original_of
from ..cascade.weights import fit_weights
from ..checkpoints import read_checkpoint
from ..models import DynamicDetector
from ..private_mmengine import path_to_load, resumes
from .router_hook import RouterHook
from .unwrapping import unwrap


def describe_training(runner: Runner) -> list[str]:
    """Which step of which detector, on which data, from which weights, with which hooks.

    Builds data sets, and reads the checkpoint that the run would start from; the model stays as it
    is.

    Args:
        runner (Runner): Before ``train``.

    Returns:
        list[str]: Lines of ``name: what``, and those of hooks that compress.

    Raises:
        UsageError: If the checkpoint cannot be read.
    """
    model, loop = unwrap(runner.model), runner.train_loop
    compressed = [
        line for hook in runner.hooks if hasattr(hook, 'describe') for line in hook.describe(runner)
    ]
    hook_names = [type(hook).__name__ for hook in runner.hooks if _is_own(hook)]
    return [
        f'step: {_step(model)}',
        f'detector: {_detector(model)}',
        f'training data: {_data(loop.dataloader)}',
        *(
            [f'validation data: {_data(runner.val_loop.dataloader)}']
            if runner.val_loop is not None
            else []
        ),
        f'iterations: {_iterations(runner)}',
        f'weights: {_weights(runner, model)}',
        f"hooks, beside mmengine's and mmdet's: {', '.join(hook_names) or 'none'}",
        *(compressed or ['no hook of this config compresses anything']),
    ]


def _step(model: nn.Module) -> str:
    if not isinstance(model, DynamicDetector):
        return f'none of the two of dynamic detectors: {type(model).__name__} is trained as it is'
    if model.train_router:
        return '2, the router; exits stay as they are'
    return f'1, all {model.num_exits} exits; the router is not trained'


def _detector(model: nn.Module) -> str:
    parameters = list(model.parameters())
    every = sum(parameter.numel() for parameter in parameters) / 1e6
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6
    name = type(model).__name__
    if isinstance(model, DynamicDetector):
        name = (
            f'{name} of {type(model.branch(0)).__name__} on {type(model.backbone).__name__}, '
            f'{model.num_exits} exits, first_scale {model.first_scale:g}'
        )
    return f'{name}; {trained:.2f} of {every:.2f} million parameters are trained'


def _data(loader: DataLoader) -> str:
    size = getattr(loader.batch_sampler, 'batch_size', loader.batch_size)
    named = ', '.join(dict.fromkeys(_sources(loader.dataset)))
    return f'{len(loader.dataset)} images, batches of {size}; {named}'


def _sources(dataset: Dataset) -> Iterator[str]:
    """Class and annotation file of each data set inside those that join or repeat it."""
    inside = getattr(dataset, 'datasets', None) or (
        [dataset.dataset] if hasattr(dataset, 'dataset') else []
    )
    for part in inside:
        yield from _sources(part)
    if not inside:
        yield f'{type(dataset).__name__} {original_of(str(getattr(dataset, "ann_file", "")))}'


def _iterations(runner: Runner) -> str:
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        each = len(runner.train_loop.dataloader)
        return f'{runner.max_iters}, in {runner.max_epochs} epochs of {each}'
    return str(runner.max_iters)


def _weights(runner: Runner, model: nn.Module) -> str:
    for hook in runner.hooks:
        if isinstance(hook, RouterHook):
            # It looks for step 1's result.
            hook.before_run(runner)
    path = path_to_load(runner)
    if path:
        state = read_checkpoint(str(path))['state_dict']
        start = 'goes on from' if resumes(runner) else 'load_from'
        return f"{start} '{path}': {_exits(model)}{fit_weights(model, state)[1]}"
    if isinstance(model, DynamicDetector) and model.train_router:
        return 'NONE: step 2 needs those of step 1, which there are not yet'
    pretrained = list(dict.fromkeys(_pretrained(runner.cfg.model)))
    return ', '.join(pretrained) or 'random, all of them'


def _exits(model: nn.Module) -> str:
    """A checkpoint is of all exits, or a plain detector's for each."""
    if not isinstance(model, DynamicDetector):
        return ''
    return f'for exits {", ".join(map(str, range(model.num_exits)))}, '


def _pretrained(node: object) -> Iterator[str]:
    """Checkpoints of ``init_cfg`` anywhere in a model's config."""
    if isinstance(node, Mapping):
        if node.get('type') == 'Pretrained' and node.get('checkpoint'):
            yield f"init_cfg '{node['checkpoint']}'"
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from _pretrained(entry)


def _is_own(hook: object) -> bool:
    return type(hook).__module__.split('.')[0] == __name__.split('.')[0]
