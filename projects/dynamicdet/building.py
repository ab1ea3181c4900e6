"""From a config and a checkpoint to a model or a data loader."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS

from .cascade.weights import forget_other_router, missing_of, require_complete
from .checkpoints import read_checkpoint
from .datasets.check import is_of_empty_set
from .errors import UsageError, reason_of
from .models import DynamicDetector, fuse


def require_model(cfg: Config, path: str) -> None:
    """Raise a `UsageError` unless a config, which was read from ``path``, names a model that is
    registered."""
    kind = cfg.model.get('type') if isinstance(cfg.get('model'), dict) else None
    if kind is None:
        raise UsageError(f"the config '{path}' has no model=dict(type=...)")
    if isinstance(kind, str) and MODELS.get(kind) is None:
        raise UsageError(
            f"the config '{path}' names a model of type '{kind}', which nothing "
            'registers: is a package missing in custom_imports?'
        )


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model, or raise a `UsageError` that says why not."""
    try:
        return MODELS.build(cfg.model)
    except UsageError:
        raise
    except Exception as error:
        # Its parts are built by many constructors, which may raise anything.
        raise UsageError(
            f"the model of '{cfg.filename}' cannot be built: {reason_of(error)}"
        ) from error


def whole_model(cfg: Config) -> dict:
    """The config of a model; of one that has lost channels (`PrunedDetector`), that of the detector
    it was."""
    return cfg.model.detector if cfg.model.type == 'PrunedDetector' else cfg.model


def is_dynamic(cfg: Config) -> bool:
    """Whether a config is of a `DynamicDetector` or a class of that kind, whole or pruned."""
    kind = MODELS.get(whole_model(cfg).type)
    return isinstance(kind, type) and issubclass(kind, DynamicDetector)


def require_dynamic(cfg: Config) -> None:
    """Raise a `UsageError` unless a config is of a dynamic detector, whole or pruned."""
    if not is_dynamic(cfg):
        raise UsageError(
            f"the config's model must be a DynamicDetector, not {whole_model(cfg).type}"
        )


def load_detector(
    cfg: Config,
    checkpoint: str | Mapping[str, Any],
    device: str = 'cpu',
    optional: Sequence[str] = (),
    plain: bool = False,
) -> tuple[BaseDetector, dict[str, Any]]:
    """Build a config's detector, of any kind, and fill it from a checkpoint of its own.

    Args:
        cfg (Config): Of a plain, dynamic, pruned or early-exit detector.
        checkpoint (str or Mapping): Its checkpoint: a file, a URL, or what `read_checkpoint` made
            of one.
        device (str): Where the detector goes. Defaults to 'cpu'.
        optional (Sequence[str]): Prefixes of entries that may be missing; these stay as they were
            initialized.
        plain (bool): Whether weights of a plain detector will do for a dynamic one of which a part
            is trained in step 1. Router and connections then stay as they were initialized.
            Defaults to False; those whose exits are plain detectors take them in any case.

    Returns:
        tuple: The detector, in eval mode and not fused, with the checkpoint's ``dataset_meta``; and
            the checkpoint.

    Raises:
        UsageError: If there is no checkpoint, or it does not fit.
    """
    checkpoint = read_checkpoint(checkpoint) if isinstance(checkpoint, str) else dict(checkpoint)
    init_default_scope('mmdet')
    # What the checkpoint does not fill is the same each time.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build_model(cfg).eval()
    state = {key.removeprefix('module.'): value for key, value in checkpoint['state_dict'].items()}
    if plain or not getattr(model, 'needs_step_one', True):
        optional = (*optional, *missing_of(state))
    require_complete(model, state, optional)
    model.load_state_dict(state, strict=False)
    meta = checkpoint.get('meta', {}).get('dataset_meta')
    if meta:
        model.dataset_meta = meta
    return model.to(device), checkpoint


def load_dynamic_detector(
    cfg: Config, path: str, device: str, any_router: bool = False
) -> tuple[DynamicDetector, dict[str, Any]]:
    """Build a dynamic detector and fill it from a checkpoint of its own, ready for inference.

    Args:
        cfg (Config): Of a dynamic detector.
        path (str): Its checkpoint.
        device (str): Such as 'cpu'.
        any_router (bool): Whether a router that is not trained may be another than the config's,
            which then is as random. Defaults to False.

    Returns:
        tuple: The model, in eval mode and fused where it can be, and the checkpoint; its
            ``state_dict`` by the names of the model's entries, also where it is a plain detector's.

    Raises:
        UsageError: If the config is of no dynamic detector or the checkpoint does not fit.
    """
    require_dynamic(cfg)
    checkpoint = read_checkpoint(path)
    state = checkpoint['state_dict']
    untrained = bool(state.get('delta', torch.tensor(torch.nan)).isnan())
    init_default_scope('mmdet')
    other = False
    if untrained and (any_router or missing_of(state)):
        empty = build_model(cfg)
        state = exits_of_plain(empty, state, path)
        other = any_router and forget_other_router(empty, state)
    model, checkpoint = load_detector(
        cfg, dict(checkpoint, state_dict=state), device, ('router.',) if other else ()
    )
    return fuse(model), checkpoint


def exits_of_plain(
    model: DynamicDetector, state: Mapping[str, torch.Tensor], path: str
) -> dict[str, torch.Tensor]:
    """Weights by the names that a dynamic detector has for them, also those of a plain one.

    Args:
        model (DynamicDetector): As the config builds it.
        state (Mapping[str, Tensor]): Of its own checkpoint or of plain detectors'.
        path (str): Where they are from, for what is said.

    Raises:
        UsageError: If they leave a part of the exits to step 1.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    if model.needs_step_one and missing_of(state):
        raise UsageError(f"'{path}' is a plain detector's: train the cascade and the router first")
    return model.spread_plain_weights(state)


def build_loader(dataloader: dict) -> DataLoader:
    """Build a data loader of a config, in this process.

    Raises:
        UsageError: If its data set is empty, or cannot be built.
    """
    init_default_scope('mmdet')
    try:
        loader = Runner.build_dataloader(dataloader)
    except ValueError as error:
        if not is_of_empty_set(error):
            raise
        loader = None
    except (OSError, KeyError, TypeError) as error:
        raise UsageError(
            f'the data set of the config cannot be built: {type(error).__name__}: {error}'
        ) from error
    if loader is None or not len(loader.dataset):
        raise UsageError('the validation set is empty: there is nothing to measure on')
    classes = getattr(loader.dataset, 'metainfo', {}).get('classes', ())
    known = getattr(loader.dataset, 'cat_ids', classes)
    if len(known) < len(classes):
        # mmdet then gives the labels that are left other numbers.
        raise UsageError(
            f"'{getattr(loader.dataset, 'ann_file', '')}' has {len(known)} of the {len(classes)} "
            'classes '
            "of the config's metainfo: it must name all of them in its categories"
        )
    return loader
