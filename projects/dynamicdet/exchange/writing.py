"""Checkpoints, written whole."""

import io
from collections.abc import Mapping
from typing import Any

import torch

from ..files import write_atomically


def write_checkpoint(checkpoint: Mapping[str, Any], path: str) -> None:
    """Write a checkpoint, whole or not at all, and only what is read back without being
    executed."""
    file = io.BytesIO()
    torch.save(dict(checkpoint), file)
    file.seek(0)
    torch.load(file, map_location='cpu', weights_only=True)
    write_atomically(file.getbuffer(), path)
