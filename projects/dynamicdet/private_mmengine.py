"""All that is used of mmengine's private API, in one place: it may move with any release.

``tests/test_private_apis.py`` fails when it does. mmengine is at 0.10; a Runner shows its hooks
neither whether it resumes nor what it loads. Overridden methods stay in the classes that override
them.
"""

import traceback
from typing import Any

from mmengine.config import DictAction
from mmengine.model import BaseDataPreprocessor
from mmengine.runner import BaseLoop, Runner


def resumes(runner: Runner) -> bool:
    """Whether a run goes on from a checkpoint of its own."""
    return runner._resume


def trains(runner: Runner) -> bool:
    """Whether a run trains. The loop of one that only tests is still a config."""
    return isinstance(runner._train_loop, BaseLoop)


def path_to_load(runner: Runner) -> str | None:
    """The checkpoint that a run starts from: a path or URL."""
    return runner._load_from


def start_from(runner: Runner, path: str | None) -> None:
    """Let a run start from a checkpoint, None for none; before it has loaded one."""
    runner._load_from = path


def start_anew(runner: Runner) -> None:
    """Let a run that was to resume start at its first iteration."""
    runner._resume = False


def train_loader_settings(runner: Runner) -> dict | None:
    """The config of the training's data loader; None if the loader was given ready-made."""
    settings = runner._train_dataloader
    return settings if isinstance(settings, dict) else None


def ranks_differ_in_seed(runner: Runner) -> bool:
    """Whether each rank has a seed of its own."""
    return runner._randomness_cfg.get('diff_rank_seed', False)


def parse_scalar(text: str) -> Any:
    """A number, a truth value, None or text, as mmengine's ``--cfg-options`` reads it."""
    return DictAction._parse_int_float_bool(text)


def parse_iterable(text: str) -> Any:
    """A list or tuple, as mmengine's ``--cfg-options`` reads it. Raises an AssertionError where
    brackets do not match."""
    return DictAction._parse_iterable(text)


def normalizes(preprocessor: BaseDataPreprocessor) -> bool:
    """Whether a data preprocessor subtracts means and divides by deviations."""
    return getattr(preprocessor, '_enable_normalize', False)


def swaps_channels(preprocessor: BaseDataPreprocessor) -> bool:
    """Whether a data preprocessor turns BGR into RGB, or back."""
    return getattr(preprocessor, '_channel_conversion', False)


def failed_to_serialize(error: Exception) -> bool:
    """Whether an error was raised where a data set packs its annotations: so it is for one that is
    empty."""
    return any(
        frame.name == '_serialize_data' for frame in traceback.extract_tb(error.__traceback__)
    )
