"""Reading and writing configs in a tenth of the time.

MMEngine looks up each ``mmdet::`` path of a config in 100 YAML files, which takes half a second,
and asks each time anew whether mmdet is installed. Neither changes while tests run: both are kept.
And it formats the text of a config, which takes another half, whenever a run logs or writes it:
here it is read as Python, as a formatter would, and keeps its layout.
"""

import ast
import functools

from mmengine.config import config, utils
from mmengine.utils import package_utils


def make_configs_quick() -> None:
    utils.load = functools.cache(utils.load)
    config.is_installed = package_utils.is_installed = functools.cache(package_utils.is_installed)
    config.FormatCode = _parse


def _parse(text: str, **_) -> tuple[str, bool]:
    """In the place of yapf's: refuses the same, and changes no layout."""
    ast.parse(text)
    return text, False
