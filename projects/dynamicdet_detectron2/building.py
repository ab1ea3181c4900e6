"""From a yaml config and a checkpoint to a detector that can be used."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from dynamicdet.errors import UsageError

from .branch import require_runnable
from .checkpointer import DynamicCheckpointer
from .config import add_dynamicdet_config, merge_config_file, require_device
from .data import register_digits
from .dynamic_detector import DynamicDetector


def read_config(path: str, options: Sequence[str] = ()) -> Any:
    """A yaml config, frozen, with settings that override its own.

    Args:
        path (str): The file.
        options (Sequence[str]): Names and values in turn, as Detectron2's tools take them.
    """
    register_digits()
    cfg = get_cfg()
    add_dynamicdet_config(cfg)
    merge_config_file(cfg, path)
    cfg.merge_from_list(list(options))
    cfg.freeze()
    return cfg


def load_model(
    config: str, checkpoint: str, options: Sequence[str] = ()
) -> tuple[Any, DynamicDetector]:
    """A config and its detector with a checkpoint's weights, in eval mode.

    Raises:
        UsageError: If the config is of a plain detector, or the file does not fit.
    """
    return load_any(config, checkpoint, options, dynamic=True)


def load_plain(config: str, checkpoint: str) -> tuple[Any, nn.Module]:
    """As `load_model`, of a plain detector: a baseline."""
    return load_any(config, checkpoint, dynamic=False)


def load_any(
    config: str, checkpoint: str | None, options: Sequence[str] = (), dynamic: bool | None = None
) -> tuple[Any, nn.Module]:
    """As `load_model`, of any detector; with weights as built where no checkpoint is given.

    Args:
        config (str), checkpoint (str, optional), options (Sequence[str]): As there.
        dynamic (bool, optional): Whether it has to be dynamic, or plain. Defaults to either.
    """
    cfg = read_config(config, options)
    require_device(cfg.MODEL.DEVICE)
    model = build_model(cfg)
    is_dynamic = isinstance(model, DynamicDetector)
    if dynamic is not None and dynamic != is_dynamic:
        raise UsageError(
            f"'{config}' is of a dynamic detector: a baseline is plain"
            if is_dynamic
            else f"'{config}' is of a plain {type(model).__name__}: a dynamic detector is wanted"
        )
    require_runnable(model)
    if checkpoint:
        checkpointer = DynamicCheckpointer(model)
        checkpointer.load(checkpoint)
        checkpointer.require_complete(checkpoint)
    return cfg, model.eval()
